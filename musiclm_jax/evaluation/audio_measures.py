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

WINDOWS = (512, 1024, 2048)
BANDS = 64
FLOOR = 1e-5


@functools.lru_cache(maxsize=8)
def mel_configs(sample_rate: int) -> tuple[spectral.MelConfig, ...]:
  """The spectrograms of the mel distance: windows 512, 1024 and 2048, hop a quarter of the window."""
  return tuple(
      spectral.MelConfig(sample_rate=sample_rate, window=w, hop=w // 4, bands=BANDS, floor=FLOOR)
      for w in WINDOWS)


@functools.partial(jax.jit, static_argnums=1)
def _log_mels(x_BxN: jax.Array, sample_rate: int) -> tuple[jax.Array, ...]:
  return tuple(spectral.log_mel(x_BxN, config) for config in mel_configs(sample_rate))


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

  Amplitude mel spectrograms of 64 bands with a floor of 1e-5, windows 512, 1024 and 2048 at a hop of a
  quarter of the window. 0.69 (ln 2) means that amplitudes are off by a factor of 2 on average.
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
  answers = {
      'silence': tuple(np.full((1, 1, BANDS), np.log(FLOOR), np.float32) for _ in mels),
      'white_noise': log_mels(noise_BxN, sample_rate=sample_rate),
      'set_median': tuple(np.median(x, axis=(0, 1), keepdims=True) for x in mels),
      'clip_median': tuple(np.median(x, axis=1, keepdims=True) for x in mels),
  }
  if len(clips_BxN) > 1:
    answers['another_clip'] = tuple(np.roll(x, 1, axis=0) for x in mels)
  return {name: _distance(mels, answer) for name, answer in answers.items()}


def si_sdr(reference_BxN: np.ndarray, estimate_BxN: np.ndarray) -> np.ndarray:
  """Scale-invariant signal-to-distortion ratio in dB, [B] (Le Roux et al., arXiv 1811.02508, eq. 5).

  Both signals are made zero-mean first. Clips without any sound have no such ratio: NaN.
  """
  reference_BxN = np.asarray(reference_BxN, np.float64)
  estimate_BxN = np.asarray(estimate_BxN, np.float64)
  reference_BxN = reference_BxN - reference_BxN.mean(axis=1, keepdims=True)
  estimate_BxN = estimate_BxN - estimate_BxN.mean(axis=1, keepdims=True)
  energy_B = np.sum(reference_BxN**2, axis=1)
  silent_B = energy_B <= 1e-12 * reference_BxN.shape[1]
  scale_B = np.sum(reference_BxN * estimate_BxN, axis=1) / np.where(silent_B, 1.0, energy_B)
  target_BxN = scale_B[:, None] * reference_BxN
  target_energy_B = np.sum(target_BxN**2, axis=1)
  error_energy_B = np.sum((estimate_BxN - target_BxN)**2, axis=1)
  # Keeps a perfect and an unrelated estimate finite, at +300 and -300 dB.
  ratio_B = np.clip(target_energy_B / np.maximum(error_energy_B, 1e-300), 1e-30, 1e30)
  return np.where(silent_B, np.nan, 10 * np.log10(ratio_B))


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
