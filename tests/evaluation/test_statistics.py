"""N-grams reach the entropy of their source, tests keep their level, recall counts what it says."""
from __future__ import annotations

import numpy as np
import pytest

from musiclm_jax.evaluation import bars, statistics

K = 16


def markov(rng, rows, frames, transition):
  """Sequences [rows, frames] of a chain started from its stationary distribution."""
  values, vectors = np.linalg.eig(transition.T)
  stationary = np.abs(np.real(vectors[:, np.argmax(np.real(values))]))
  stationary /= stationary.sum()
  tokens = np.empty((rows, frames), int)
  tokens[:, 0] = rng.choice(len(transition), rows, p=stationary)
  cumulative = transition.cumsum(1)
  for f in range(1, frames):
    below = rng.random(rows)[:, None] > cumulative[tokens[:, f - 1]]
    tokens[:, f] = below.sum(1).clip(0, len(transition) - 1)
  conditional = -np.sum(stationary[:, None] * transition * np.log2(transition))
  return tokens, conditional, -np.sum(stationary * np.log2(stationary))


def test_ngrams_reach_the_entropy_of_a_markov_chain():
  rng = np.random.default_rng(0)
  transition = rng.dirichlet(np.full(K, 0.3), K) * 0.95 + 0.05 / K
  tokens, conditional, marginal = markov(rng, 400, 200, transition)
  # A second level is the same chain; each level has its own tables.
  both = np.stack([tokens, (tokens + 3) % K], axis=-1)
  ngrams = statistics.fit_ngrams(both[:300], K)
  held_out = both[300:]
  np.testing.assert_allclose(ngrams.unigram_bits(held_out).mean((0, 1)), marginal, rtol=0.02)
  np.testing.assert_allclose(ngrams.bigram_bits(held_out)[:, 1:].mean((0, 1)), conditional, rtol=0.02)
  # The first frame of a row has no predecessor.
  np.testing.assert_array_equal(ngrams.bigram_bits(held_out)[:, 0], ngrams.unigram_bits(held_out)[:, 0])


def test_ngrams_are_distributions_even_where_nothing_was_seen():
  ngrams = statistics.fit_ngrams([np.array([[0], [1], [0], [2]])], K)
  np.testing.assert_allclose(np.exp(ngrams.unigram_QxK).sum(-1), 1)
  np.testing.assert_allclose(np.exp(ngrams.bigram_QxKxK).sum(-1), 1)
  assert np.isfinite(ngrams.bigram_QxKxK).all()


def test_a_bigram_of_independent_tokens_is_hardly_worse_than_the_unigram():
  rng = np.random.default_rng(0)
  ngrams = statistics.fit_ngrams(rng.integers(0, 64, (50, 100, 1)), 64)
  held_out = rng.integers(0, 64, (50, 100, 1))
  assert ngrams.bigram_bits(held_out).mean() < ngrams.unigram_bits(held_out).mean() + 0.5


def test_rows_of_differing_lengths_do_not_join():
  ngrams = statistics.fit_ngrams([np.array([[0], [0]]), np.array([[1], [1], [1]])], 2)
  assert ngrams.bigram_QxKxK[0, 0, 0] > ngrams.bigram_QxKxK[0, 0, 1]


def test_no_tokens_and_foreign_codes_are_refused():
  with pytest.raises(ValueError, match='no training tokens'):
    statistics.fit_ngrams([], K)
  with pytest.raises(ValueError, match='codebook of 4'):
    statistics.fit_ngrams([np.array([[7]])], 4)


@pytest.mark.parametrize('pairs', [8, 30])
def test_p_values_are_uniform_under_the_null(pairs):
  rng = np.random.default_rng(0)
  p = np.array([
      statistics.paired_permutation_test(*rng.standard_normal((2, pairs)), samples=400, seed=i)
      for i in range(400)])
  for level in (0.05, 0.2, 0.5):
    assert np.mean(p <= level) == pytest.approx(level, abs=3 * np.sqrt(level * (1 - level) / 400))


def test_a_clear_difference_has_the_smallest_p_value():
  better = np.arange(10) + 1.0
  assert statistics.paired_permutation_test(better, np.zeros(10)) == 1 / 2**10
  assert statistics.paired_permutation_test(np.zeros(10), better) == 1
  assert statistics.paired_permutation_test(np.zeros(10), np.zeros(10)) == 1


def test_intervals_cover_the_mean_and_respect_groups():
  rng = np.random.default_rng(0)
  covered = 0
  for trial in range(200):
    interval = statistics.bootstrap_interval(rng.standard_normal(50), samples=400, seed=trial)
    covered += interval.low <= 0 <= interval.high
  assert covered / 200 == pytest.approx(0.95, abs=0.05)
  groups = np.repeat(np.arange(10), 20)
  values = rng.standard_normal(10)[groups]
  wide = statistics.bootstrap_interval(values, groups)
  narrow = statistics.bootstrap_interval(values)
  assert wide.high - wide.low > 3 * (narrow.high - narrow.low)


@pytest.mark.parametrize('groups', [5, 8, 20])
def test_intervals_over_few_groups_cover_the_mean_as_often_as_they_say(groups):
  rng = np.random.default_rng(0)
  found = [statistics.bootstrap_interval(rng.standard_normal(groups), samples=400, seed=i) for i in range(400)]
  assert np.mean([i.low <= 0 <= i.high for i in found]) > 0.9


def test_fewer_than_five_groups_bound_nothing():
  values, groups = np.repeat([1.0, 1.0, 0.9, 1.0], 50), np.repeat(np.arange(4), 50)
  found = statistics.bootstrap_interval(values, groups)
  assert found.value == pytest.approx(0.975) and found.low == -np.inf and found.high == np.inf
  assert found.as_dict() == {'value': found.value, 'interval': [None, None]}
  assert not bars.evaluate(bars.Bar('gap.interval[0]', '>', 0.0, ''), {'gap': found.as_dict()}).passed


def test_an_interval_of_shares_stays_between_nothing_and_all():
  found = statistics.bootstrap_interval(np.array([0.0, 0, 0, 0, 0, 1]))
  assert found.bounds[0] == 0 and found.bounds[1] <= 1


def test_recall_of_perfect_constant_and_random_scores():
  count = 300
  assert statistics.recall_in_pools(np.eye(count), pool=64, pools=5)[1] == 1
  constant = statistics.recall_in_pools(np.zeros((count, count)), pool=64, pools=5)
  assert constant[1] == pytest.approx(1 / 64)
  assert constant[10] == pytest.approx(10 / 64)
  noise = np.random.default_rng(0).standard_normal((count, count))
  assert statistics.recall_in_pools(noise, pool=20, pools=50)[1] == pytest.approx(1 / 20, abs=0.03)
  with pytest.raises(ValueError, match='only 300 pairs'):
    statistics.recall_in_pools(noise, pool=301)


def test_every_item_of_the_same_text_is_right():
  which = np.arange(60) // 2  # two clips for each text
  same = which[:, None] == which
  scores = same.astype(float)
  assert statistics.recall_in_pools(scores, pool=60, ks=(1,), pools=2)[1] == pytest.approx(0.5)
  assert statistics.recall_in_pools(scores, pool=60, ks=(1,), pools=2, relevant_NxN=same)[1] == 1
  constant = statistics.recall_in_pools(np.zeros((60, 60)), pool=60, ks=(1, 10), pools=2, relevant_NxN=same)
  assert constant[1] == pytest.approx(2 / 60) and constant[10] == pytest.approx(1 - (50 * 49) / (60 * 59))
  other = np.eye(60)[np.arange(60) ^ 1]  # the second clip of the text comes first
  assert statistics.recall_in_pools(other, pool=60, ks=(1,), pools=2, relevant_NxN=same)[1] == 1


def test_recall_falls_with_the_pool():
  rng = np.random.default_rng(0)
  x = rng.standard_normal((220, 6))
  scores = x @ (x + 0.8 * rng.standard_normal(x.shape)).T
  small, large = (statistics.recall_in_pools(scores, pool=p, pools=50)[1] for p in (20, 200))
  assert 1 / 200 < large < small < 1


def test_the_oracle_counts_the_facts_that_a_text_tells():
  texts = [{'lead': 'flute', 'tempo': 'slow'}, {'drums': 'none'}, {}]
  clips = [{'lead': 'flute', 'tempo': 'fast', 'drums': 'none'}, {'lead': 'flute', 'tempo': 'slow'}]
  np.testing.assert_array_equal(statistics.attribute_agreement(texts, clips), [[1, 2], [1, 0], [0, 0]])
