"""How far a reconstruction is from its clip, and from what a decoder that knows little would give.

B clips, N samples, F frames, M mel bands.
"""
from __future__ import annotations

from collections.abc import Callable
import functools
from typing import NamedTuple

import jax
import numpy as np

from musiclm_jax.evaluation import batched
from musiclm_jax.nn import spectral
from musiclm_jax.training import state as states

# Of `log_spectral_distance`: samples of a window and between windows.
_WINDOW, _HOP = 2048, 512


class Distances(NamedTuple):
  """How far each clip's estimate is from it, each [B]: see the functions of these names."""

  si_sdr: np.ndarray
  mel_distance: np.ndarray
  log_spectral_distance: np.ndarray


@functools.partial(jax.jit, static_argnums=1)
def _mels(x_BxN: jax.Array, sample_rate: int) -> tuple[jax.Array, ...]:
  return tuple(spectral.mel(x_BxN, config) for config in spectral.distance_mels(sample_rate))


def _amplitude_mels(x_BxN: np.ndarray, sample_rate: int, batch_size: int = 8) -> tuple[np.ndarray, ...]:
  """Mel spectrograms of the three windows, each float32 [B, F, M]."""
  return batched.in_batches(lambda x: _mels(x, sample_rate), np.asarray(x_BxN, np.float32), batch_size=batch_size)


def _distance(references: tuple[np.ndarray, ...], estimates: tuple[np.ndarray, ...],
              frames: tuple[np.ndarray | None, ...] | None = None) -> np.ndarray:
  """Mean |ln a - ln b| over frames and bands of each window, averaged over windows; [B]. Estimates may broadcast."""
  distances = []
  for a_BxFxM, b_BxFxM, used in zip(references, estimates, frames or (None,) * len(references)):
    floor = spectral.distance_floor(a_BxFxM)
    difference = np.log(np.maximum(a_BxFxM, floor)) - np.log(np.maximum(b_BxFxM, floor))
    distances.append(_mean_of_frames(np.mean(np.abs(difference), axis=2, dtype=np.float64), used))
  return np.mean(distances, axis=0)


def _mean_of_frames(values_BxF: np.ndarray, frames_B: np.ndarray | None) -> np.ndarray:
  """Over the first `frames` of each row, all of them for None; [B]."""
  if frames_B is None:
    return values_BxF.mean(axis=1)
  used_BxF = np.arange(values_BxF.shape[1]) < np.asarray(frames_B)[:, None]
  return np.sum(values_BxF * used_BxF, axis=1) / used_BxF.sum(axis=1)


def _frames(samples_B: np.ndarray | None, hop: int) -> np.ndarray | None:
  """Frames of clips of so many samples: further ones exist only because the batch is as long as its longest."""
  return None if samples_B is None else -(-np.asarray(samples_B) // hop)


def mel_distance(reference_BxN: np.ndarray, estimate_BxN: np.ndarray, *, sample_rate: int = 24000,
                 samples_B: np.ndarray | None = None) -> np.ndarray:
  """Mean |ln mel(reference) - ln mel(estimate)| over windows, frames and bands; [B], 0 for equal clips.

  `spectral.log_mel_distance` in batches: natural logarithms, windows 512, 1024 and 2048, 64 bands, and a floor 80 dB
  below the loudest cell of the reference. 0.69 (ln 2) means that amplitudes are off by a factor of 2 on average.
  Where clips have fewer than N `samples`, zeros follow, and what is returned is that of the clips without them.
  """
  frames = tuple(_frames(samples_B, config.hop) for config in spectral.distance_mels(sample_rate))
  return _distance(_amplitude_mels(reference_BxN, sample_rate), _amplitude_mels(estimate_BxN, sample_rate), frames)


@jax.jit
def _amplitudes(x_BxN: jax.Array) -> jax.Array:
  return abs(spectral.stft(x_BxN, _WINDOW, _HOP))


def log_spectral_distance(reference_BxN: np.ndarray, estimate_BxN: np.ndarray, *,
                          samples_B: np.ndarray | None = None) -> np.ndarray:
  """Root mean square over frequency of the difference in dB, averaged over frames; dB, [B], 0 for equal clips.

  Gray and Markel, IEEE Trans. ASSP 24 (1976), equation 1, on Hann windows of 2048 samples, hop 512. Amplitudes more
  than 80 dB below the loudest cell of the reference count as 80 dB below it, in both. `samples_B` as for
  `mel_distance`.
  """
  a_BxFxC, b_BxFxC = (np.asarray(_amplitudes(np.asarray(x, np.float32))) for x in (reference_BxN, estimate_BxN))
  floor_Bx1x1 = spectral.distance_floor(a_BxFxC)
  a_BxFxC, b_BxFxC = (20 * np.log10(np.maximum(x, floor_Bx1x1)) for x in (a_BxFxC, b_BxFxC))
  rms_BxF = np.sqrt(np.mean(np.square(a_BxFxC - b_BxFxC), axis=2, dtype=np.float64))
  return _mean_of_frames(rms_BxF, _frames(samples_B, _HOP))


def distances(reference_BxN: np.ndarray, estimate_BxN: np.ndarray, samples_B: np.ndarray, *,
              sample_rate: int) -> Distances:
  """All of them, of clips of so many samples; what follows in either array is taken as silence."""
  within_BxN = np.arange(reference_BxN.shape[1]) < np.asarray(samples_B)[:, None]
  a_BxN, b_BxN = (np.where(within_BxN, x, 0).astype(np.float32) for x in (reference_BxN, estimate_BxN))
  sdr = [si_sdr(a[None, :n], b[None, :n])[0] for a, b, n in zip(a_BxN, b_BxN, samples_B)]
  return Distances(np.array(sdr), mel_distance(a_BxN, b_BxN, sample_rate=sample_rate, samples_B=samples_B),
                   log_spectral_distance(a_BxN, b_BxN, samples_B=samples_B))


def mel_distance_baselines(
    clips_BxN: np.ndarray, *, sample_rate: int = 24000, seed: int = 0) -> dict[str, np.ndarray]:
  """The mel distance of answers that cost nothing, each [B]; a codec has to be better than all of them.

  silence; white_noise of the clip's own loudness; another_clip (the next one of the set); set_median, the
  median spectrum of all clips and frames; clip_median, the clip's own median spectrum held constant over time,
  which is the strongest: one spectrum that knows the clip but no event in it.
  """
  clips_BxN = np.asarray(clips_BxN, np.float32)
  rng = np.random.default_rng(seed)
  noise_BxN = rng.standard_normal(clips_BxN.shape, dtype=np.float32)
  noise_BxN *= np.sqrt(np.mean(np.square(clips_BxN), axis=1, keepdims=True))
  mels = _amplitude_mels(clips_BxN, sample_rate)
  answers = {
      'silence': (np.zeros((1, 1, 1), np.float32),) * len(mels),
      'white_noise': _amplitude_mels(noise_BxN, sample_rate),
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


def common_length(lengths_N: np.ndarray, most: float) -> float:
  """The length to which clips of these lengths are cut: that of nine tenths of them, `most` at most.

  Shorter ones are to be left out: a single one must not cut all others.
  """
  return float(min(most, np.quantile(lengths_N, 0.1, method='lower')))


def fit_length(audio: np.ndarray, length: int, *, axis: int = -1) -> np.ndarray:
  """`audio` cut or zero-padded at its end to `length` samples, which are along `axis`."""
  samples_first = np.moveaxis(audio, axis, 0)[:length]
  padding = [(0, length - len(samples_first))] + [(0, 0)] * (audio.ndim - 1)
  return np.moveaxis(np.pad(samples_first, padding), 0, axis)
