"""SeqIO tasks over token streams: one function a corpus."""
from __future__ import annotations

from collections.abc import Sequence

import seqio

from musiclm_jax import specs
from musiclm_jax.data import records, seqio_source


def register(name: str, record_dir: str, token_specs: Sequence[specs.TokenSpec] = (),
             preprocessors: Sequence[seqio_source.Preprocessor] = ()) -> seqio.Task:
  """Tokens that `musiclm extract` wrote: one feature a stream, int32 [frames, levels], each with its
  vocabulary.

  Raises: ValueError where a stream of `token_specs` is not recorded, has another codebook or frame rate, or fewer
    levels.
  """
  held = records.read_manifest(record_dir).header.streams
  for feature, wanted in records.token_streams(token_specs).items():
    there = held.get(feature)
    if not there or {**there, 'levels': wanted['levels']} != wanted or there['levels'] < wanted['levels']:
      raise ValueError(f'{record_dir} records {feature!r} as {held.get(feature)}, the specification is '
                       f'{wanted}')
  return seqio_source.add_task(name, record_dir, kind='tokens', preprocessors=preprocessors)
