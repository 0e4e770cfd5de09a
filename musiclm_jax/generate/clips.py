"""Clips that a user gives: read with care, heard by MuLan, and turned into the tokens that new music goes on from.

Shapes: B clips, N samples, F frames, E dimensions of MuLan's space.
"""
from __future__ import annotations

import os

import numpy as np

from musiclm_jax import specs
from musiclm_jax.generate import chain, windows
from musiclm_jax.generate.networks import Networks
from musiclm_jax.generate.pipeline import Given

MIN_SECONDS, MAX_SECONDS = 0.5, 600.0
FADE_TICKS = 12  # 20 ms: how long a recording and the codec's version of it are blended where they meet
# The codec hears this much before the tokens that are kept: more than its encoder reaches back.
_WARM_TICKS = 2 * specs.TICKS_PER_SECOND
_WINDOWS = 8  # that MuLan hears at a time


def read(path: str | os.PathLike, sample_rate: int) -> np.ndarray:
  """A clip as mono float32 [N]. Raises ValueError, with its name, where it cannot be used, FileNotFoundError."""
  from musiclm_jax.data import audio_files  # and its resampler, which only who gives a clip needs
  if not os.path.isfile(path):
    raise FileNotFoundError(f'there is no file {os.fspath(path)!r}')
  try:
    audio_N = audio_files.read(path, sample_rate, MAX_SECONDS + 1)
  except audio_files.AudioFault as fault:
    raise ValueError(f'{path}: {fault}') from None
  seconds = len(audio_N) / sample_rate
  if seconds < MIN_SECONDS:
    raise ValueError(f'{path}: too short: {seconds:.2f} s, at least {MIN_SECONDS:g} s are needed')
  if seconds > MAX_SECONDS:
    raise ValueError(f'{path}: too long: more than {MAX_SECONDS / 60:g} minutes; cut out the part that is meant')
  if np.abs(audio_N).max() < audio_files.SILENCE:
    raise ValueError(f'{path}: silent: there is nothing to hear in it')
  return audio_N


def resampled(audio_N: np.ndarray, rate: int, wanted: int) -> np.ndarray:
  """A clip at the wanted rate."""
  if rate == wanted:
    return audio_N
  import soxr
  return soxr.resample(audio_N, rate, wanted, quality='VHQ').astype(np.float32)


def embed(networks: Networks, audio_N: np.ndarray, rate: int) -> np.ndarray:
  """MuLan's embedding of a clip of any length, float32 [E] of length 1.

  The mean over all whole windows, as MuLan hears long clips in training of its tokens; memory does not grow with the
  length of the clip.
  """
  audio_N = resampled(audio_N, rate, networks.mulan_rate)
  window, hop = networks.mulan_window, networks.mulan_hop
  firsts = np.arange(1 + max(0, len(audio_N) - window) // hop) * hop
  total_E: np.ndarray | float = 0.0
  for some in np.array_split(firsts, -(-len(firsts) // _WINDOWS)):
    clips_BxN = np.zeros((_WINDOWS if len(firsts) > 1 else 1, window), np.float32)
    length_B = np.full(len(clips_BxN), window, np.int32)
    for row, first in enumerate(some):
      clip_N = audio_N[first:first + window]
      clips_BxN[row, :len(clip_N)], length_B[row] = clip_N, len(clip_N)
    total_E = total_E + np.asarray(networks.embed_window(clips_BxN, length_B), np.float32)[:len(some)].sum(axis=0)
  return total_E / max(float(np.linalg.norm(total_E)), 1e-12)


def tokens(networks: Networks, audio_N: np.ndarray, ticks: int) -> Given:
  """Tokens of the last `ticks` of mono audio at the codec's rate, as one example; `ticks` lie on the stages' grid."""
  names = chain.order(networks.stages)
  grid = chain.grid(networks.stages, names)
  rate, spec = networks.sample_rate, networks.codec_spec
  length = windows.whole(len(audio_N), rate, grid)
  heard = min(length, ticks + -(-_WARM_TICKS // grid) * grid)
  acoustic = np.asarray(networks.acoustic_tokens(audio_N[None, len(audio_N) - windows.samples(heard, rate):]))
  found = {spec.feature: acoustic[:, acoustic.shape[1] - windows.frame(ticks, spec):]}
  for name in names:
    stage = networks.stages[name]
    if stage.target.feature == 'semantic':
      # Always as many samples as a crop of the stage has, as in its training.
      crop = max(ticks, int(stage.seconds * specs.TICKS_PER_SECOND) // grid * grid)
      heard = min(length, crop)
      audio_N = resampled(audio_N[len(audio_N) - windows.samples(heard, rate):], rate, networks.semantic_rate)
      padded_1xN = np.zeros((1, windows.samples(crop, networks.semantic_rate)), np.float32)
      padded_1xN[0, :len(audio_N)] = audio_N[:padded_1xN.shape[1]]
      ids = np.asarray(networks.semantic_tokens(padded_1xN, np.array([len(audio_N)], np.int32)))
      end = windows.frame(heard, stage.target)
      found['semantic'] = ids[:, end - windows.frame(ticks, stage.target):end]
  return Given(ticks, found)


def repeated(given: Given, count: int) -> Given:
  """The same tokens for `count` examples."""
  return Given(given.ticks, {name: np.repeat(codes, count, axis=0) for name, codes in given.tokens.items()})


def faded(before_N: np.ndarray, after_N: np.ndarray) -> np.ndarray:
  """From one version of the same moment to the other."""
  share_N = ((np.arange(len(before_N)) + 0.5) / len(before_N)).astype(np.float32)
  return before_N * (1 - share_N) + after_N * share_N
