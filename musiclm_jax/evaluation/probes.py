"""What a token sequence tells about the music: linear probes, the same for every tokenizer.

N clips, F frames, K codes, M mel bands.
"""
from __future__ import annotations

from collections.abc import Mapping
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from sklearn import linear_model, model_selection, pipeline, preprocessing

from musiclm_jax.evaluation import batched, statistics
from musiclm_jax.nn import spectral
from musiclm_jax.nn.quantize import nearest
from musiclm_jax.semantic.model import W2vBertConfig
from musiclm_jax.semantic.tokenizer import normalised, SemanticTokenizer
from musiclm_jax.training import accumulate
from musiclm_jax.training.partition import Partitioner

# A label that says "not known here"; such clips or frames are left out.
UNKNOWN = ''


def histograms(tokens_NxF: np.ndarray, codebook_size: int) -> np.ndarray:
  """Square root of the share of each code in each clip, float32 [N, K].

  The root (Hellinger's) keeps rare codes visible to a linear probe. No order of tokens enters: a probe that
  could compare neighbours would do the work that the tokens are meant to have done.
  """
  tokens_NxF = np.asarray(tokens_NxF)
  counts_NxK = np.zeros((len(tokens_NxF), codebook_size), np.float32)
  np.add.at(counts_NxK, (np.arange(len(tokens_NxF))[:, None], tokens_NxF), 1.0)
  return np.sqrt(counts_NxK / tokens_NxF.shape[1])


@dataclasses.dataclass(frozen=True)
class Probe:
  """What is to be read from tokens: labels of clips [N], or of frames [N, F] by the tokens around them.

  Attributes:
    radius: of frames, the tokens at most so far away are read.
    stride: of frames, every how many one is asked for.
  """

  labels: np.ndarray
  radius: int = 12
  stride: int = 12

  @property
  def chosen(self) -> tuple[np.ndarray, np.ndarray]:
    """Clips [R] and frames [R] of the rows whose label is known; frames are 0 where whole clips are read."""
    labels = np.asarray(self.labels, str)
    if labels.ndim == 1:
      clips = np.flatnonzero(labels != UNKNOWN)
      return clips, np.zeros_like(clips)
    asked_F = np.arange(self.stride // 2, labels.shape[1], self.stride)
    clips, place = np.nonzero(labels[:, asked_F] != UNKNOWN)
    return clips, asked_F[place]

  @property
  def answers(self) -> np.ndarray:
    """Labels [R] of those rows."""
    clips, frames = self.chosen
    labels = np.asarray(self.labels, str)
    return labels[clips] if labels.ndim == 1 else labels[clips, frames]

  def read(self, tokens_NxF: np.ndarray, codebook_size: int) -> np.ndarray:
    """What the rows are read from: `histograms` of a clip, or of the tokens around a frame, [R, K]."""
    clips, frames = self.chosen
    labels = np.asarray(self.labels)
    if labels.ndim == 1:
      return histograms(tokens_NxF[clips], codebook_size)
    length = np.shape(tokens_NxF)[1]
    if labels.shape[1] != length:
      raise ValueError(f'labels for {labels.shape[1]} frames, tokens for {length}')
    rows = np.empty((len(clips), codebook_size), np.float32)
    for frame in np.unique(frames):
      mine = frames == frame
      window = tokens_NxF[clips[mine], max(0, frame - self.radius):frame + self.radius + 1]
      rows[mine] = histograms(window, codebook_size)
    return rows


def classifier() -> pipeline.Pipeline:
  """What is fitted to `histograms`: a logistic regression, of one strength of regularisation for all tokenizers and
  all labels: nothing is tuned."""
  return pipeline.make_pipeline(
      preprocessing.StandardScaler(), linear_model.LogisticRegression(C=0.02, max_iter=300, tol=1e-3))


def answered(probe: Probe, tokens_NxF: np.ndarray, codebook_size: int, *, heard_NxF: np.ndarray | None = None,
             apart_N: np.ndarray | None = None, folds: int = 5, seed: int = 0) -> np.ndarray:
  """Which rows a `classifier` answers rightly that was fitted on other clips, bool [R].

  Cross-validated over groups of clips, so that every row counts once.

  Args:
    heard_NxF: tokens of the same clips to answer from, where they are not the ones to fit on (clips with noise, say).
    apart_N: a group of each clip; those of one group are never both fitted on and asked for (one by one as it comes).
  """
  clips, _ = probe.chosen
  answers = probe.answers
  groups = (np.arange(len(probe.labels)) if apart_N is None else np.asarray(apart_N))[clips]
  folds = min(folds, len(np.unique(groups))) if apart_N is not None else folds
  if len(np.unique(groups)) < folds or folds < 2 or len(np.unique(answers)) < 2:
    known = ', '.join(sorted(set(answers)))
    raise ValueError(f'probe: {len(np.unique(groups))} labelled clips or groups with labels {known} are too few for '
                     f'{folds} folds')
  fit_on = probe.read(tokens_NxF, codebook_size)
  asked = fit_on if heard_NxF is None else probe.read(heard_NxF, codebook_size)
  right = np.zeros(len(answers), bool)
  split = model_selection.GroupKFold(folds, shuffle=True, random_state=seed)
  for fit, test in split.split(fit_on, answers, groups):
    if len(np.unique(answers[fit])) < 2:
      right[test] = answers[test] == answers[fit][0]
      continue
    right[test] = classifier().fit(fit_on[fit], answers[fit]).predict(asked[test]) == answers[test]
  return right


def probe_figures(tokens: Mapping[str, np.ndarray], codebook_size: int, asked: Mapping[str, Probe], *, folds: int = 5,
                  seed: int = 0) -> dict[str, dict[str, Any]]:
  """Accuracy of the same probes on the tokens int [N, F] of each tokenizer, beside chance.

  Returns {probe: {tokenizer: accuracy, tokenizer_interval: of 95% over clips, ..., 'chance': share of the most frequent
  label, 'clips': how many have one}}.
  """
  figures: dict[str, dict[str, Any]] = {}
  for name, probe in asked.items():
    clips, _ = probe.chosen
    found: dict[str, Any] = {}
    for tokenizer, tokens_NxF in tokens.items():
      right = answered(probe, tokens_NxF, codebook_size, folds=folds, seed=seed)
      interval = statistics.bootstrap_interval(right, clips, seed=seed)
      found |= {tokenizer: interval.value, f'{tokenizer}_interval': interval.bounds}
    figures[name] = {**found, 'chance': statistics.majority_share(probe.answers), 'clips': len(np.unique(clips))}
  return figures


def fitted(tokenizer: SemanticTokenizer, rows_NxFxD: np.ndarray, seed: int) -> dict[str, Any]:
  """Normalisation and centres of any rows, as the tokenizer fits them to those of its encoder."""
  width = rows_NxFxD.shape[-1]
  start = {'mean': jnp.zeros((width,)), 'scaling': jnp.eye(width)}
  passes = accumulate.run(tokenizer, start, rows_NxFxD.reshape(-1, width), Partitioner(), jax.random.key(seed))
  *_, (_, _, buffers, _) = passes
  return jax.device_get(buffers)


@jax.jit
def tokens(found: Mapping[str, Any], rows_NxFxD: jax.Array) -> jax.Array:
  """Tokens int32 [N, F] of rows, with what `fitted` found."""
  return nearest(normalised(rows_NxFxD, found['mean'], found['scaling']), found['quantizer']['codebook'][0])


@functools.partial(jax.jit, static_argnums=1)
def _log_mel(x_BxN: jax.Array, config: spectral.MelConfig) -> jax.Array:
  return spectral.log_mel(x_BxN, config)


def log_mel_rows(encoder: W2vBertConfig, audio_NxT: np.ndarray, *, bands: int = 64, batch_size: int = 16) -> np.ndarray:
  """Plain log-mel frames at the rate of an encoder's features, float32 [N, F, M]."""
  hop = encoder.samples_per_frame
  config = spectral.MelConfig(sample_rate=encoder.mel.sample_rate, window=2 * hop, hop=hop, bands=bands)
  return batched.in_batches(lambda b: _log_mel(b, config), np.asarray(audio_NxT, np.float32), batch_size=batch_size)


def log_mel_tokens(tokenizer: SemanticTokenizer, fit_NxT: np.ndarray, audio_NxT: np.ndarray, *, seed: int = 0,
                   ) -> np.ndarray:
  """Tokens int32 [N, F] of k-means of `log_mel_rows`: the baseline that knows no learning.

  Fitted to the clips `fit` as the tokenizer is, applied to `audio`.
  """
  found = fitted(tokenizer, log_mel_rows(tokenizer.encoder, fit_NxT), seed)
  return np.asarray(tokens(found, log_mel_rows(tokenizer.encoder, audio_NxT)))
