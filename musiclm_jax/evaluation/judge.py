"""The independent judge: names the lead timbre of a clip from its log-mel statistics.

It shares nothing with MuLan: no parameters, no training pairs, no network, only labelled audio. It is a
measuring instrument and not a product model, hence scikit-learn.

B clips, N samples, F frames, M mel bands, D features, E embedding.
"""
from __future__ import annotations

from collections.abc import Sequence
import dataclasses
import functools
import warnings

import jax
import numpy as np
from sklearn import exceptions, neural_network, preprocessing
import threadpoolctl

from musiclm_jax.evaluation import batched
from musiclm_jax.nn import spectral

BANDS = 64
CEPSTRA = 20


@functools.lru_cache(maxsize=4)
def _config(sample_rate: int) -> spectral.MelConfig:
  # A hop of about 10 ms resolves attacks, which tell plucked and struck from blown and bowed.
  return spectral.MelConfig(
      sample_rate=sample_rate, window=1024, hop=256, bands=BANDS, low_hz=40.0, high_hz=sample_rate / 2 * 0.9,
      floor=1e-4)


@functools.partial(jax.jit, static_argnums=1)
def _log_mel(x_BxN: jax.Array, sample_rate: int) -> jax.Array:
  return spectral.log_mel(x_BxN, _config(sample_rate))


@functools.lru_cache(maxsize=1)
def _cosines() -> np.ndarray:
  """DCT-II basis [M, CEPSTRA] without the constant row."""
  order = np.arange(1, CEPSTRA + 1)
  return np.cos(np.pi * (np.arange(BANDS)[:, None] + 0.5) * order / BANDS) * np.sqrt(2 / BANDS)


def _statistics(log_mel_FxM: np.ndarray) -> np.ndarray:
  """Features of one clip, independent of its loudness: [D]."""
  x_FxM = log_mel_FxM - log_mel_FxM.mean()
  rise_FxM = np.diff(x_FxM, axis=0)
  # Spectra at attacks: the frames that follow the steepest rises.
  flux_F = np.maximum(rise_FxM, 0).mean(1)
  attacks = 1 + np.argsort(flux_F)[-max(1, len(flux_F) // 12):]
  cepstra_FxC = x_FxM @ _cosines()
  covariance_CxC = np.atleast_2d(np.cov(cepstra_FxC.T))
  scale_C = np.sqrt(np.maximum(np.diag(covariance_CxC), 1e-6))
  correlation_CxC = covariance_CxC / np.outer(scale_C, scale_C)
  rise_cepstra_C = np.std(np.diff(cepstra_FxC, axis=0), axis=0)
  return np.concatenate([
      x_FxM.mean(0), x_FxM.std(0), np.quantile(x_FxM, 0.9, axis=0), np.maximum(rise_FxM, 0).mean(0),
      np.maximum(-rise_FxM, 0).mean(0), x_FxM[attacks].mean(0), np.log(scale_C),
      np.log(rise_cepstra_C + 1e-3), correlation_CxC[np.triu_indices(CEPSTRA, 1)],
      np.quantile(flux_F, [0.5, 0.75, 0.9, 0.97])])


def features(audio_BxN: np.ndarray, *, sample_rate: int = 24000, batch_size: int = 16) -> np.ndarray:
  """Pooled log-mel statistics of each clip, float32 [B, D]: clips of any length, at least 0.1 s."""
  audio_BxN = np.asarray(audio_BxN, np.float32)
  if audio_BxN.ndim != 2 or audio_BxN.shape[1] < sample_rate // 10:
    raise ValueError(f'judge: clips [B, N] of at least 0.1 s are needed, found shape {audio_BxN.shape}')

  def pooled(x_BxN: np.ndarray) -> np.ndarray:
    mels_BxFxM = np.asarray(_log_mel(x_BxN, sample_rate), np.float64)
    return np.stack([_statistics(m) for m in mels_BxFxM]).astype(np.float32)

  return batched.in_batches(pooled, audio_BxN, batch_size=min(batch_size, max(1, len(audio_BxN))))


@dataclasses.dataclass(frozen=True)
class Judge:
  """A fitted judge; made by `fit`.

  Attributes:
    classes: the labels in the order of the network's outputs.
    sample_rate: of the audio that it takes.
  """

  classes: tuple[str, ...]
  sample_rate: int
  scaler: preprocessing.StandardScaler
  network: neural_network.MLPClassifier

  def _scaled(self, audio_BxN: np.ndarray) -> np.ndarray:
    # Sounds unlike any in training must not be able to blow the embedding up.
    return np.clip(self.scaler.transform(features(audio_BxN, sample_rate=self.sample_rate)), -6.0, 6.0)

  def name(self, audio_BxN: np.ndarray) -> np.ndarray:
    """The label of each clip, [B] of str."""
    return np.asarray(self.classes)[self.network.predict(self._scaled(audio_BxN))]

  def embed(self, audio_BxN: np.ndarray) -> np.ndarray:
    """Activations of the last hidden layer, float64 [B, E]; what the Frechet distance is measured in."""
    x = self._scaled(audio_BxN)
    for weight, bias in zip(self.network.coefs_[:-1], self.network.intercepts_[:-1]):
      x = np.maximum(x @ weight + bias, 0.0)
    return x

  def accuracy(self, audio_BxN: np.ndarray, labels_B: Sequence[str]) -> float:
    """Share of clips that are named as labelled."""
    return float(np.mean(self.name(audio_BxN) == np.asarray(labels_B)))


def fit(
    audio_BxN: np.ndarray, labels_B: Sequence[str], *, sample_rate: int = 24000,
    hidden: tuple[int, ...] = (96, 24), epochs: int = 60, seed: int = 0) -> Judge:
  """Trains a judge on labelled clips; a few seconds for two thousand of them.

  Train it on codec round trips of clips and on nothing that a generator made, so that what it knows of a
  timbre is how the codec renders it. A narrow last layer (24) keeps the covariances of the Frechet distance
  of full rank with a hundred clips.
  """
  classes = tuple(sorted(set(labels_B)))
  if len(classes) < 2:
    raise ValueError(f'judge: at least two labels are needed, found {list(classes)}')
  x_BxD = features(audio_BxN, sample_rate=sample_rate)
  scaler = preprocessing.StandardScaler().fit(x_BxD)
  network = neural_network.MLPClassifier(
      hidden, alpha=0.3, batch_size=min(64, len(x_BxD)), learning_rate_init=2e-3, max_iter=epochs,
      random_state=seed)
  # The products are small: more threads only wait for one another. The number of epochs is fixed on purpose.
  with threadpoolctl.threadpool_limits(1), warnings.catch_warnings():
    warnings.simplefilter('ignore', exceptions.ConvergenceWarning)
    network.fit(np.clip(scaler.transform(x_BxD), -6.0, 6.0), np.searchsorted(classes, np.asarray(labels_B)))
  return Judge(classes, sample_rate, scaler, network)
