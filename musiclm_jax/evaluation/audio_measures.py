"""How far a reconstruction is from its clip, and from what a decoder that knows little would give.

B clips, N samples, F frames, M mel bands.
"""
from __future__ import annotations

from collections.abc import Callable
import functools

import jax
import numpy as np

from musiclm_jax.evaluation import batched
from musiclm_jax.training import state as states
from musiclm_jax.nn import spectral

@functools.partial(jax.jit, static_argnums=1)
def _log_mels(x_BxN: jax.Array, sample_rate: int) -> tuple[jax.Array, ...]:
  return tuple(spectral.log_mel(x_BxN, config) for config in spectral.distance_mels(sample_rate))


def log_mels(x_BxN: np.ndarray, *, sample_rate: int = 24000, batch_size: int = 8) -> tuple[np.ndarray, ...]:
  """Natural-log mel spectrograms of the three windows, each float32 [B, F, M]."""
  return batched.in_batches(
      lambda x: _log_mels(x, sample_rate), np.asarray(x_BxN, np.float32), batch_size=batch_size)


def _distance(a: tuple[np.ndarray, ...], b: tuple[np.ndarray, ...]) -> np.ndarray:
  """Mean |a - b| over frames and bands of each window, averaged over windows; [B]. `b` may broadcast."""
  return np.mean([np.mean(np.abs(x - y), axis=(1, 2), dtype=np.float64) for x, y in zip(a, b)], axis=0)


def mel_distance(
    reference_BxN: np.ndarray, estimate_BxN: np.ndarray, *, sample_rate: int = 24000) -> np.ndarray:
  """Mean |ln mel(reference) - ln mel(estimate)| over windows, frames and bands; [B], 0 for equal clips.

  `spectral.log_mel_distance` in batches: 0.69 (ln 2) means that amplitudes are off by a factor of 2 on average.
  """
  return _distance(log_mels(reference_BxN, sample_rate=sample_rate),
                   log_mels(estimate_BxN, sample_rate=sample_rate))


def mel_distance_baselines(
    clips_BxN: np.ndarray, *, sample_rate: int = 24000, seed: int = 0) -> dict[str, np.ndarray]:
  """The mel distance of answers that cost nothing, each [B]; a codec has to be better than all of them.

  silence; white_noise of the clip's own loudness; another_clip (the next one of the set); set_median, the
  median spectrum of all clips and frames; clip_median, the clip's own median spectrum (of log amplitudes)
  held constant over time, which is the strongest: one spectrum that knows the clip but no event in it.
  """
  clips_BxN = np.asarray(clips_BxN, np.float32)
  rng = np.random.default_rng(seed)
  noise_BxN = rng.standard_normal(clips_BxN.shape, dtype=np.float32)
  noise_BxN *= np.sqrt(np.mean(np.square(clips_BxN), axis=1, keepdims=True))
  mels = log_mels(clips_BxN, sample_rate=sample_rate)
  floors = [config.floor for config in spectral.distance_mels(sample_rate)]
  answers = {
      'silence': tuple(np.full((1, 1, 1), np.log(floor), np.float32) for floor in floors),
      'white_noise': log_mels(noise_BxN, sample_rate=sample_rate),
      'set_median': tuple(np.median(x, axis=(0, 1), keepdims=True) for x in mels),
      'clip_median': tuple(np.median(x, axis=1, keepdims=True) for x in mels),
  }
  if len(clips_BxN) > 1:
    answers['another_clip'] = tuple(np.roll(x, 1, axis=0) for x in mels)
  return {name: _distance(mels, answer) for name, answer in answers.items()}


def si_sdr(reference_BxN: np.ndarray, estimate_BxN: np.ndarray) -> np.ndarray:
  """`spectral.si_sdr` in float64: dB, [B], NaN for silent clips."""
  return spectral.si_sdr(np.asarray(reference_BxN, np.float64), np.asarray(estimate_BxN, np.float64))


def round_trip(
    model: object, clips_BxN: np.ndarray, levels: tuple[int, ...], *, batch_size: int = 8,
) -> tuple[np.ndarray, dict[int, np.ndarray]]:
  """Codes [B, F, Q] of the clips and their decoding from the first `q` levels, [B, N] for each q.

  `model` has `encode(audio_BxN) -> int32 BxFxQ` and `decode(indices_BxFxq) -> audio`. The decoded audio is
  cut or zero-padded to N, since a codec works in whole frames.
  """
  encode: Callable = states.compiled(model, 'encode')
  decode: Callable = states.compiled(model, 'decode')
  clips_BxN = np.asarray(clips_BxN, np.float32)
  codes_BxFxQ = batched.in_batches(encode, clips_BxN, batch_size=batch_size)
  if max(levels) > codes_BxFxQ.shape[-1]:
    raise ValueError(
        f'codec evaluation: {max(levels)} levels asked for, the codec has {codes_BxFxQ.shape[-1]}')
  decoded = {q: batched.in_batches(decode, codes_BxFxQ[..., :q], batch_size=batch_size) for q in levels}
  return codes_BxFxQ, {q: fit_length(audio, clips_BxN.shape[1]) for q, audio in decoded.items()}


def fit_length(audio_BxN: np.ndarray, length: int) -> np.ndarray:
  """`audio` cut or zero-padded at its end to `length` samples."""
  missing = max(0, length - audio_BxN.shape[-1])
  return np.pad(audio_BxN[..., :length], [(0, 0)] * (audio_BxN.ndim - 1) + [(0, missing)])
