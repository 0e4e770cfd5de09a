"""Tagging, retrieval, triplets, negation and order with answers known by hand."""
from __future__ import annotations

import numpy as np
import pytest

from musiclm_jax.evaluation import language


def test_auc_and_average_precision_by_hand():
  scores = np.array([[0.9], [0.8], [0.7], [0.1]])
  found = language.tagging_figures(scores, [[1], [0], [1], [0]], ['flute'])
  # Pairs in the right order: 3 of 4. Precision at the two hits: 1 and 2/3.
  assert found['tags']['flute'] == pytest.approx({'auc': 0.75, 'ap': (1 + 2 / 3) / 2, 'share': 0.5})
  assert found['macro_auc'] == pytest.approx(0.75) and found['clips'] == 4


def test_tags_that_all_or_no_clips_have_are_left_out():
  labels = np.array([[1, 0, 1], [1, 0, 0]])
  found = language.tagging_figures(np.eye(2, 3), labels, ['music', 'silence', 'flute'])
  assert list(found['tags']) == ['flute'] and found['left_out'] == ['music', 'silence']
  with pytest.raises(ValueError, match='of 2 tags none'):
    language.tagging_figures(np.eye(2), labels[:, :2], ['music', 'silence'])
  with pytest.raises(ValueError, match='do not agree'):
    language.tagging_figures(np.eye(2), labels, ['music', 'silence'])


def test_embeddings_that_know_the_tag_find_it_and_others_are_at_chance():
  rng = np.random.default_rng(0)
  labels = rng.random((400, 3)) < 0.3
  directions = np.linalg.qr(rng.normal(size=(16, 16)))[0][:3]
  unit = lambda x: x / np.linalg.norm(x, axis=1, keepdims=True)
  audio = unit(labels @ directions + 0.3 * rng.normal(size=(400, 16)))
  tags = ['a', 'b', 'c']
  assert language.zero_shot_figures(audio, directions, labels, tags)['macro_auc'] > 0.85
  assert abs(language.zero_shot_figures(audio, directions[[1, 2, 0]], labels, tags)['macro_auc'] - 0.5) < 0.15
  probed = language.linear_probe_figures(audio[:200], labels[:200], audio[200:], labels[200:], tags)
  assert probed['macro_auc'] > 0.85
  shuffled = language.linear_probe_figures(audio[:200], rng.permutation(labels[:200]), audio[200:], labels[200:], tags)
  assert abs(shuffled['macro_auc'] - 0.5) < 0.15


def test_a_probe_leaves_out_what_it_cannot_learn():
  labels = np.array([[1, 0], [0, 0], [1, 0], [0, 0]])
  audio = np.array([[1.0, 0], [0, 1], [1, 0.1], [0.1, 1]])
  found = language.linear_probe_figures(audio, labels, audio, labels[:, ::1], ['flute', 'none'])
  assert found['left_out'] == ['none'] and found['macro_auc'] == 1


def test_ranks_by_hand():
  scores = np.array([[3.0, 2, 1, 0], [0, 1, 2, 3]])
  relevant = np.array([[1, 0, 1, 0], [1, 0, 0, 0]])
  found = language.ranking_figures(scores, relevant, ks=(1, 4))
  assert found == pytest.approx({'recall_at_1': 0.5, 'recall_at_4': 1.0, 'map': ((1 + 2 / 3) / 2 + 1 / 4) / 2,
                                 'median_rank': 2.5})
  # A model whose embeddings are all alike finds nothing.
  assert language.ranking_figures(np.zeros((2, 4)), relevant, ks=(1,))['recall_at_1'] == 0
  with pytest.raises(ValueError, match='1 texts have no clip'):
    language.ranking_figures(scores, [[1, 0, 0, 0], [0, 0, 0, 0]])


def test_triplets():
  anchor, positive, negative = np.eye(2), np.array([[1.0, 0], [1, 0]]), np.array([[0.0, 1], [0, 1]])
  assert language.triplet_accuracy(anchor, positive, negative) == 0.5
  assert language.triplet_accuracy(anchor, positive, positive) == 0


def test_negation_by_hand():
  audio = np.array([[1.0, 0], [1, 0], [0, 1], [1, 0]])
  found = language.negation_figures(audio, np.array([1.0, 0]), np.array([0.0, 1]), [1, 1, 0, 0])
  assert found == {'with': 1.0, 'without': 0.5, 'accuracy': 0.75, 'chance': 0.5}
  # A model that does not read the "no" prefers one of the texts whatever it hears.
  deaf = language.negation_figures(audio, np.array([1.0, 1]), np.array([0.5, 0.5]), [1, 1, 0, 0])
  assert deaf['accuracy'] == 0.5
  with pytest.raises(ValueError, match='negation: clips that have it'):
    language.negation_figures(audio, audio[0], audio[2], [1, 1, 1, 1])


def test_order_by_hand():
  told = np.array([[1.0, 0], [0, 1], [1, 0]])
  found = language.order_figures(np.array([[0.9, 0.1], [0.2, 0.8], [0.1, 0.9]]), told, told[:, ::-1])
  assert found == {'accuracy': pytest.approx(2 / 3), 'chance': 0.5, 'clips': 3}
