"""What a joint embedding knows of words: tags without training on them, retrieval, triplets, negation and order.

N clips, T tags, E embedding.
"""
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from sklearn import linear_model, metrics, multiclass, pipeline, preprocessing


def tagging_figures(scores_NxT: np.ndarray, labels_NxT: np.ndarray, tags: Sequence[str]) -> dict[str, Any]:
  """How well scores tell which clips have a tag: by tag, and averaged over tags ("macro").

  `auc`: area under the ROC curve, 0.5 at chance. `ap`: average precision, whose chance is the share of clips that have
  the tag (`share`). Tags that all clips have, or none, cannot be measured: they are in `left_out`. Raises ValueError
  where nothing can.
  """
  scores_NxT, labels_NxT = np.asarray(scores_NxT, np.float64), np.asarray(labels_NxT, bool)
  if scores_NxT.shape != labels_NxT.shape or scores_NxT.shape[1] != len(tags):
    raise ValueError(f'tagging: scores {scores_NxT.shape}, labels {labels_NxT.shape} and {len(tags)} tags do not agree')
  by_tag, left_out = {}, []
  for tag, score_N, label_N in zip(tags, scores_NxT.T, labels_NxT.T):
    if label_N.all() or not label_N.any():
      left_out.append(tag)
      continue
    by_tag[tag] = {'auc': float(metrics.roc_auc_score(label_N, score_N)),
                   'ap': float(metrics.average_precision_score(label_N, score_N)), 'share': float(label_N.mean())}
  if not by_tag:
    raise ValueError(f'tagging: of {len(tags)} tags none is had by some of {len(labels_NxT)} clips and not by others')
  macro = {f'macro_{name}': float(np.mean([row[name] for row in by_tag.values()])) for name in ('auc', 'ap', 'share')}
  return {'clips': len(labels_NxT), **macro, 'auc_chance': 0.5, 'tags': by_tag, 'left_out': left_out}


def zero_shot_figures(audio_NxE: np.ndarray, tag_TxE: np.ndarray, labels_NxT: np.ndarray, tags: Sequence[str]
                      ) -> dict[str, Any]:
  """`tagging_figures` of the cosine between a clip and the text of a tag; embeddings have length 1."""
  return tagging_figures(np.asarray(audio_NxE) @ np.asarray(tag_TxE).T, labels_NxT, tags)


def linear_probe_figures(
    fit_MxE: np.ndarray, fit_labels_MxT: np.ndarray, audio_NxE: np.ndarray, labels_NxT: np.ndarray, tags: Sequence[str],
) -> dict[str, Any]:
  """`tagging_figures` of a logistic regression for each tag, fitted on other clips with one fixed regularisation.

  Tags that all or none of the clips to fit have are left out.
  """
  fit_labels_MxT = np.asarray(fit_labels_MxT, bool)
  usable_T = fit_labels_MxT.any(axis=0) & ~fit_labels_MxT.all(axis=0)
  if not usable_T.any():
    raise ValueError('linear probe: no tag is had by some of the clips to fit and not by others')
  probe = pipeline.make_pipeline(
      preprocessing.StandardScaler(),
      multiclass.OneVsRestClassifier(linear_model.LogisticRegression(C=0.1, max_iter=500)))
  probe.fit(fit_MxE, fit_labels_MxT[:, usable_T].astype(int))
  scores = probe.decision_function(audio_NxE).reshape(len(audio_NxE), -1)
  kept = [tag for tag, usable in zip(tags, usable_T) if usable]
  figures = tagging_figures(scores, np.asarray(labels_NxT, bool)[:, usable_T], kept)
  figures['left_out'] += [tag for tag, usable in zip(tags, usable_T) if not usable]
  return figures


def ranking_figures(scores_NxM: np.ndarray, relevant_NxM: np.ndarray, ks: Sequence[int] = (1, 5, 10)
                    ) -> dict[str, float]:
  """Retrieval of M clips by N texts, of which each has at least one relevant clip.

  `recall_at_k`: share of texts that have a relevant clip among the first k. `map`: mean average precision over all
  relevant clips. `median_rank`: of the first relevant clip, from 1. Equal scores count against the text.
  """
  scores_NxM, relevant_NxM = np.asarray(scores_NxM, np.float64), np.asarray(relevant_NxM, bool)
  if not relevant_NxM.any(axis=1).all():
    raise ValueError(f'retrieval: {int((~relevant_NxM.any(axis=1)).sum())} texts have no clip that is relevant')
  # Of equal scores, those that are not relevant come first.
  order_NxM = np.lexsort((relevant_NxM, -scores_NxM), axis=1)
  found_NxM = np.take_along_axis(relevant_NxM, order_NxM, axis=1)
  first_N = found_NxM.argmax(axis=1) + 1
  precision_NxM = np.cumsum(found_NxM, axis=1) / np.arange(1, found_NxM.shape[1] + 1)
  average_N = (precision_NxM * found_NxM).sum(axis=1) / found_NxM.sum(axis=1)
  return {**{f'recall_at_{k}': float(np.mean(first_N <= k)) for k in ks}, 'map': float(average_N.mean()),
          'median_rank': float(np.median(first_N))}


def triplet_accuracy(anchor_NxE: np.ndarray, positive_NxE: np.ndarray, negative_NxE: np.ndarray) -> float:
  """Share of triplets whose anchor is closer to the positive than to the negative; a tie counts as a miss."""
  closer = np.sum(anchor_NxE * positive_NxE, axis=1) > np.sum(anchor_NxE * negative_NxE, axis=1)
  return float(np.mean(closer))


def negation_figures(audio_NxE: np.ndarray, with_E: np.ndarray, without_E: np.ndarray, has_N: np.ndarray
                     ) -> dict[str, float]:
  """Whether "no drums" is nearer than "drums" to the clips without drums, and only to those; chance is 0.5.

  `with` and `without`: share of the clips that have it, and of those that have it not, for which the right text is the
  nearer one. `accuracy`: the mean of the two, so that a bias to one of the texts gains nothing.
  """
  has_N = np.asarray(has_N, bool)
  if has_N.all() or not has_N.any():
    raise ValueError('negation: clips that have it and clips that have it not are needed')
  nearer_N = np.asarray(audio_NxE) @ with_E > np.asarray(audio_NxE) @ without_E
  shares = float(nearer_N[has_N].mean()), float((~nearer_N[~has_N]).mean())
  return {'with': shares[0], 'without': shares[1], 'accuracy': sum(shares) / 2, 'chance': 0.5}


def order_figures(audio_NxE: np.ndarray, told_NxE: np.ndarray, reversed_NxE: np.ndarray) -> dict[str, float]:
  """Whether "a flute, then brass" is nearer to such a clip than "brass, then a flute"; chance is 0.5."""
  return {'accuracy': triplet_accuracy(audio_NxE, told_NxE, reversed_NxE), 'chance': 0.5, 'clips': len(audio_NxE)}
