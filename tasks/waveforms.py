"""SeqIO tasks over waveforms with text: one function a corpus."""
from __future__ import annotations

from collections.abc import Sequence

import seqio

from musiclm_jax.data import seqio_source


def register(name: str, record_dir: str,
             preprocessors: Sequence[seqio_source.Preprocessor] = ()) -> seqio.Task:
  """Music that `musiclm prepare` wrote: the feature 'audio' (int16 samples), with 'texts' and 'text_kinds'.

  Preprocessors give one element for each, keep the side features of `seqio_source`, and take what they draw
  from 'slot_seed'.
  """
  return seqio_source.add_task(name, record_dir, kind='audio', preprocessors=preprocessors)
