"""Audio records to token records: the frozen networks run once over a corpus, shard by shard.

Shapes: B batch, N samples, F frames, Q levels.
"""
from __future__ import annotations

from collections.abc import Iterator
import math
import os
import sys
from typing import Any

import jax
import numpy as np

from musiclm_jax import specs
from musiclm_jax.cascade import TOKENIZERS, Cascade
from musiclm_jax.data import records

# What a token record keeps of its audio record.
_CARRIED = ('recording', 'artist', 'start', 'texts', 'attributes', 'source')


def extract(audio_dir: str | os.PathLike, output_dir: str | os.PathLike, cascade: Cascade, *, batch_size: int = 16,
            report: Any = None) -> records.Manifest:
  """Tokenises every split of a record set; shards that are done are skipped.

  Batches never cross a shard and have one static shape, so a shard's tokens do not depend on where the work was
  interrupted.

  Raises ValueError where `output_dir` holds tokens of other networks or other audio, naming both.
  """
  audio = records.read_manifest(audio_dir)
  token_specs = [cascade.token_spec(role) for role in TOKENIZERS]
  header = records.Header(
      'tokens', records.token_streams(token_specs), settings={'audio': audio.fingerprint, 'batch': batch_size},
      lineage=cascade.lineage)
  _check_output(output_dir, header)
  counts = {split: len(shards) for split, shards in audio.splits.items()}
  longest = max(float(records.RecordSet(audio_dir, split).durations.max()) for split in counts if counts[split])
  for split, count in counts.items():
    corpus = records.RecordSet(audio_dir, split) if count else None
    for index in range(count):
      if records.shard_done(output_dir, split, index, count, header):
        continue
      examples = _tokenise(corpus, corpus.shard_indices(index), cascade, longest, batch_size)
      records.write_shard(output_dir, split, index, count, examples, header)
      (report or _report)(f'extracted {split} {index + 1}/{count}')
  return records.finish(output_dir, header, counts)


def _report(line: str) -> None:
  print(line, file=sys.stderr, flush=True)


def _check_output(output_dir: str | os.PathLike, header: records.Header) -> None:
  try:
    old = records.read_manifest(output_dir).header
  except FileNotFoundError:
    return
  for name in ('lineage', 'settings', 'streams'):
    before, now = getattr(old, name), getattr(header, name)
    for key in sorted(set(before) | set(now)):
      if before.get(key) != now.get(key):
        raise ValueError(f'{output_dir} holds tokens of {key} {before.get(key)}, this would be {key} {now.get(key)}; '
                         'name another output')


def _tokenise(corpus: records.RecordSet, indices: np.ndarray, cascade: Cascade, seconds: float, batch_size: int
              ) -> Iterator[dict[str, Any]]:
  """Token examples of the audio examples at `indices`, padded to `seconds` on the way."""
  rate = corpus.header.streams['audio']['sample_rate']
  # Whole seconds hold whole frames of every stream.
  samples = math.ceil(seconds) * rate
  run = {'acoustic': cascade.function('codec', 'encode'), 'semantic': cascade.function('semantic', 'tokens'),
         'embed': cascade.function('mulan', 'embed_audio'), 'mulan': cascade.function('mulan', 'tokens')}
  by_feature = {cascade.token_spec(role).feature: cascade.token_spec(role) for role in TOKENIZERS}
  for first in range(0, len(indices), batch_size):
    examples = [corpus[int(i)] for i in indices[first:first + batch_size]]
    audio_BxN = np.zeros((batch_size, samples), np.float32)
    length_B = np.full((batch_size,), samples, np.int32)
    for row, example in enumerate(examples):
      audio_BxN[row, :len(example['audio'])] = example['audio']
      length_B[row] = len(example['audio'])
    tokens = {'acoustic': run['acoustic'](audio_BxN), 'semantic': run['semantic'](audio_BxN),
              'mulan': run['mulan'](run['embed'](audio_BxN, length_B))}
    tokens = jax.device_get(tokens)
    for row, example in enumerate(examples):
      held = {name: cut(tokens[name][row], by_feature[name], length_B[row] / rate) for name in tokens}
      yield {**{k: example[k] for k in _CARRIED if k in example}, **held}


def cut(tokens_FxQ: np.ndarray, spec: specs.TokenSpec, seconds: float) -> np.ndarray:
  """The frames that lie within the clip, without those of the padding behind it."""
  return tokens_FxQ[:spec.frames(seconds)]
