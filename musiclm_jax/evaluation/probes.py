"""What a token sequence tells about the music: linear probes, the same for every tokenizer.

N clips, F frames, K codes, M mel bands.
"""
from __future__ import annotations

from collections.abc import Mapping, Sequence
import functools

import jax
import numpy as np
from sklearn import cluster, linear_model, model_selection, pipeline, preprocessing

from musiclm_jax.evaluation import batched, statistics
from musiclm_jax.nn import spectral

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


def local_histograms(
    tokens_NxF: np.ndarray, codebook_size: int, frames: np.ndarray, *, radius: int) -> np.ndarray:
  """`histograms` of the tokens within `radius` frames of each of `frames`, [N, len(frames), K]."""
  length = np.shape(tokens_NxF)[1]
  parts = [histograms(tokens_NxF[:, max(0, f - radius):min(length, f + radius + 1)], codebook_size)
           for f in frames]
  return np.stack(parts, axis=1)


def probe_accuracy(
    x_NxD: np.ndarray, labels_N: Sequence[str], groups_N: np.ndarray, *, folds: int = 5, seed: int = 0,
) -> float:
  """Accuracy of logistic regression on rows of groups (clips) that it was not fitted on.

  Cross-validated over groups, so that every row counts once. One fixed strength of regularisation for all
  tokenizers and all labels: nothing is tuned. Rows labelled UNKNOWN are left out.
  """
  labels_N = np.asarray(labels_N, dtype=str)
  known = labels_N != UNKNOWN
  x_NxD, labels_N, groups_N = np.asarray(x_NxD)[known], labels_N[known], np.asarray(groups_N)[known]
  groups = len(np.unique(groups_N))
  if groups < folds or len(np.unique(labels_N)) < 2:
    raise ValueError(f'probe: {groups} labelled clips with labels {sorted(set(labels_N))} are too few for '
                     f'{folds} folds')
  correct = np.zeros(len(labels_N), bool)
  split = model_selection.GroupKFold(folds, shuffle=True, random_state=seed)
  for fit, test in split.split(x_NxD, labels_N, groups_N):
    if len(np.unique(labels_N[fit])) < 2:
      correct[test] = labels_N[test] == labels_N[fit][0]
      continue
    probe = pipeline.make_pipeline(
        preprocessing.StandardScaler(), linear_model.LogisticRegression(C=0.02, max_iter=300, tol=1e-3))
    correct[test] = probe.fit(x_NxD[fit], labels_N[fit]).predict(x_NxD[test]) == labels_N[test]
  return float(correct.mean())


def probe_figures(
    tokens: Mapping[str, np.ndarray], codebook_size: int, clip_labels: Mapping[str, Sequence[str]],
    frame_labels: Mapping[str, np.ndarray] | None = None, *, frame_radius: int = 12, frame_stride: int = 12,
    folds: int = 5, seed: int = 0) -> dict[str, dict[str, float]]:
  """Accuracy of the same probe on the tokens of each tokenizer, beside chance.

  Args:
    tokens: tokenizer name ("trained", "untrained", "log_mel") -> int [N, F] of the same clips.
    clip_labels: probe name ("tempo", "meter", "drum_style", "timbre") -> N labels.
    frame_labels: probe name ("chord") -> labels [N, F]; probed every `frame_stride` frames from the tokens
      within `frame_radius`.

  Returns {probe: {tokenizer: accuracy, ..., 'chance': share of the most frequent label, 'clips': N}}.
  """
  figures: dict[str, dict[str, float]] = {}
  clips = {name: histograms(t, codebook_size) for name, t in tokens.items()}
  for probe, labels in clip_labels.items():
    rows = np.arange(len(labels))
    figures[probe] = _one_probe(clips, np.asarray(labels, dtype=str), rows, folds, seed)
  if not frame_labels:
    return figures
  length = next(iter(tokens.values())).shape[1]
  frames = np.arange(frame_stride // 2, length, frame_stride)
  local = {
      name: local_histograms(t, codebook_size, frames, radius=frame_radius).reshape(-1, codebook_size)
      for name, t in tokens.items()}
  for probe, labels_NxF in frame_labels.items():
    labels_NxF = np.asarray(labels_NxF, dtype=str)
    if labels_NxF.shape[1] != length:
      raise ValueError(f'probe {probe!r}: labels for {labels_NxF.shape[1]} frames, tokens for {length}')
    groups = np.repeat(np.arange(len(labels_NxF)), len(frames))
    figures[probe] = _one_probe(local, labels_NxF[:, frames].reshape(-1), groups, folds, seed)
  return figures


def _one_probe(rows: Mapping[str, np.ndarray], labels: np.ndarray, groups: np.ndarray, folds: int, seed: int):
  known = labels != UNKNOWN
  scores = {name: probe_accuracy(x, labels, groups, folds=folds, seed=seed) for name, x in rows.items()}
  return {**scores, 'chance': statistics.majority_share(labels[known]),
          'clips': int(len(np.unique(groups[known])))}


@functools.partial(jax.jit, static_argnums=1)
def _log_mel(x_BxN: jax.Array, config: spectral.MelConfig) -> jax.Array:
  return spectral.log_mel(x_BxN, config)


def log_mel_tokens(
    fit_NxT: np.ndarray, audio_NxT: np.ndarray, codebook_size: int, *, frame_rate: float = 25.0,
    sample_rate: int = 24000, bands: int = 64, seed: int = 0, batch_size: int = 16) -> np.ndarray:
  """Tokens of a k-means of plain log-mel frames: the baseline that knows no learning, int32 [N, F].

  Fitted on the clips `fit`, applied to `audio`; bands are normalised by their mean and deviation first, as
  the semantic tokenizer does with its features.
  """
  hop = round(sample_rate / frame_rate)
  config = spectral.MelConfig(sample_rate=sample_rate, window=2 * hop, hop=hop, bands=bands)
  rows = lambda x: batched.in_batches(
      lambda b: _log_mel(b, config), np.asarray(x, np.float32), batch_size=batch_size)
  fit_MxD = rows(fit_NxT).reshape(-1, bands)
  scaler = preprocessing.StandardScaler().fit(fit_MxD)
  means = cluster.MiniBatchKMeans(codebook_size, batch_size=4096, n_init=1, max_iter=30, random_state=seed)
  means.fit(scaler.transform(fit_MxD))
  mels_NxFxM = rows(audio_NxT)
  tokens = means.predict(scaler.transform(mels_NxFxM.reshape(-1, bands)))
  return tokens.reshape(mels_NxFxM.shape[:2]).astype(np.int32)
