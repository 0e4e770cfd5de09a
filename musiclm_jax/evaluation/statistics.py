"""N-gram baselines, significance and intervals, recall in random pools.

N recordings (or rows), F frames, Q levels, K codes, P pool size.
"""
from __future__ import annotations

from collections.abc import Iterable, Sequence
import dataclasses
import math

import numpy as np
from scipy import special

from musiclm_jax.data import token_counts

# --- n-grams ------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class NGrams:
  """Unigram and bigram of each level, fitted on training tokens by `fit_ngrams`.

  The bigram of a token knows the token of the same level in the frame before, and nothing of other levels.

  Attributes:
    unigram_QxK, bigram_QxKxK: natural-log probabilities; bigram[q, previous, next].
  """

  unigram_QxK: np.ndarray
  bigram_QxKxK: np.ndarray

  def unigram_bits(self, tokens_NxFxQ: np.ndarray) -> np.ndarray:
    """Bits of each held-out token, [N, F, Q]."""
    levels_Q = np.arange(self.unigram_QxK.shape[0])
    return -self.unigram_QxK[levels_Q, np.asarray(tokens_NxFxQ)] / math.log(2)

  def bigram_bits(self, tokens_NxFxQ: np.ndarray) -> np.ndarray:
    """Bits of each held-out token, [N, F, Q]; the first frame of a row has no predecessor: its unigram."""
    tokens_NxFxQ = np.asarray(tokens_NxFxQ)
    levels_Q = np.arange(self.unigram_QxK.shape[0])
    bits_NxFxQ = self.unigram_bits(tokens_NxFxQ)
    bits_NxFxQ[:, 1:] = -self.bigram_QxKxK[levels_Q, tokens_NxFxQ[:, :-1], tokens_NxFxQ[:, 1:]] / math.log(2)
    return bits_NxFxQ


def fit_ngrams(rows: Iterable[np.ndarray], codebook_size: int) -> NGrams:
  """N-grams of the training tokens `rows`: an array [N, F, Q], or any arrays [F, Q] of differing lengths.

  The unigram adds 0.5 to each count (Jeffreys' prior: with tens of counts a code it hardly matters). The
  bigram is absolute discounting interpolated with that unigram (Ney, Essen and Kneser 1994),

    p(x | c) = max(n(c, x) - d, 0) / n(c) + d * distinct(c) / n(c) * p(x),   d = n1 / (n1 + 2 n2),

  with n1 and n2 the numbers of pairs seen once and twice. With K^2 pairs and few of them seen, adding a
  constant would make the bigram worse than the unigram, and a baseline has to be as good as it can be.
  """
  pairs = unigram = None
  for tokens_FxQ in rows:
    tokens_FxQ = np.asarray(tokens_FxQ)
    levels = tokens_FxQ.shape[-1]
    if unigram is None:
      unigram = np.zeros((levels, codebook_size), np.int64)
      pairs = np.zeros((levels, codebook_size, codebook_size), np.int32)
    unigram += token_counts.level_counts(tokens_FxQ, codebook_size)
    np.add.at(pairs, (np.arange(levels), tokens_FxQ[:-1], tokens_FxQ[1:]), 1)
  if unigram is None or not unigram.sum():
    raise ValueError('n-gram baselines: there are no training tokens to fit them on')
  smooth_QxK = unigram + 0.5
  smooth_QxK = smooth_QxK / smooth_QxK.sum(-1, keepdims=True)
  bigram = [_discounted(pairs[q], smooth_QxK[q]) for q in range(len(pairs))]
  return NGrams(np.log(smooth_QxK), np.log(np.stack(bigram)))


def _discounted(pairs_KxK: np.ndarray, unigram_K: np.ndarray) -> np.ndarray:
  """Conditional probabilities [previous, next] by interpolated absolute discounting."""
  once, twice = np.sum(pairs_KxK == 1), np.sum(pairs_KxK == 2)
  # Where every pair is common neither number says anything; the discount then hardly matters.
  discount = once / (once + 2 * twice) if once and twice else 0.5
  seen_Kx1 = pairs_KxK.sum(1, keepdims=True)
  distinct_Kx1 = (pairs_KxK > 0).sum(1, keepdims=True)
  total_Kx1 = np.maximum(seen_Kx1, 1)
  probability_KxK = np.maximum(pairs_KxK - discount, 0) / total_Kx1
  backed_off_Kx1 = np.where(seen_Kx1 > 0, discount * distinct_Kx1 / total_Kx1, 1.0)
  return probability_KxK + backed_off_Kx1 * unigram_K


# --- significance ------------------------------------------------------------


def paired_permutation_test(
    a_N: np.ndarray, b_N: np.ndarray, *, samples: int = 20000, seed: int = 0) -> float:
  """One-sided p-value of mean(a - b) > 0 under exchange of the two members of each pair.

  All 2^N exchanges are counted for N <= 16, else `samples` random ones, the observed one among them, so that
  the smallest p-value is 1 / samples and a true null gives p <= x with probability at most x.
  """
  difference_N = np.asarray(a_N, np.float64) - np.asarray(b_N, np.float64)
  count = len(difference_N)
  if count == 0 or difference_N.ndim != 1:
    raise ValueError(f'permutation test: two vectors of pairs are needed, found shape {difference_N.shape}')
  observed = difference_N.sum()
  if count <= 16:
    signs_SxN = 1.0 - 2.0 * ((np.arange(2**count)[:, None] >> np.arange(count)) & 1)
  else:
    signs_SxN = np.random.default_rng(seed).integers(0, 2, (samples, count)) * 2.0 - 1.0
    signs_SxN[0] = 1.0
  # Exchanges that tie with the observation must count, whatever the order of the additions.
  slack = 1e-9 * np.abs(difference_N).sum()
  return float(np.mean(signs_SxN @ difference_N >= observed - slack))


_LEAST_GROUPS = 5  # fewer say nothing of how much groups differ: two often agree by chance


@dataclasses.dataclass(frozen=True)
class Interval:
  """A value between `low` and `high`, which are infinite where too little is known to bound it."""

  value: float
  low: float
  high: float

  @property
  def bounds(self) -> list[float | None]:
    """[low, high] as JSON can hold them: None for what is not bounded, which reaches no bar."""
    return [end if math.isfinite(end) else None for end in (self.low, self.high)]

  def as_dict(self, name: str = 'value') -> dict[str, float | list[float | None]]:
    return {name: self.value, 'interval': self.bounds}


def bootstrap_interval(
    values_N: np.ndarray, groups_N: np.ndarray | None = None, *, confidence: float = 0.95,
    samples: int = 4000, seed: int = 0) -> Interval:
  """Mean of the values with a bootstrap interval over groups (recordings; default: each value).

  Values of one recording are not independent, so whole recordings are drawn with replacement; the mean is
  over values, each recording weighing as many as it has. Percentiles of the draws alone claim too much where there are
  few groups (5 of them cover the mean 83 times of 100 for 95): they are moved away from it by as much as Student's t
  is wider than a normal distribution, but not beyond the mean of every group. Fewer than 5 groups bound nothing.
  """
  values_N = np.asarray(values_N, np.float64)
  groups_N = np.arange(len(values_N)) if groups_N is None else np.asarray(groups_N)
  if len(values_N) == 0 or len(values_N) != len(groups_N):
    raise ValueError(f'bootstrap: {len(values_N)} values with {len(groups_N)} groups')
  _, index_N = np.unique(groups_N, return_inverse=True)
  mean, groups = float(values_N.mean()), int(index_N.max()) + 1
  if groups < _LEAST_GROUPS:
    return Interval(mean, -math.inf, math.inf)
  totals_G = np.bincount(index_N, weights=values_N)
  counts_G = np.bincount(index_N).astype(np.float64)
  draws_SxG = np.random.default_rng(seed).integers(0, len(totals_G), (samples, len(totals_G)))
  means_S = totals_G[draws_SxG].sum(1) / counts_G[draws_SxG].sum(1)
  tail = (1 - confidence) / 2
  wider = special.stdtrit(groups - 1, 1 - tail) / special.ndtri(1 - tail) * math.sqrt(groups / (groups - 1))
  means_G = totals_G / counts_G
  ends = mean + wider * (np.quantile(means_S, [tail, 1 - tail]) - mean)
  low, high = np.clip(ends, means_G.min(), means_G.max())
  return Interval(mean, float(low), float(high))


def majority_share(labels_N: Sequence) -> float:
  """Accuracy of always answering the most frequent label: the chance level of a classifier."""
  _, counts = np.unique(np.asarray(labels_N), return_counts=True)
  return float(counts.max() / counts.sum())


# --- retrieval ------------------------------------------------------------


def recall_in_pools(
    scores_NxN: np.ndarray, *, pool: int, ks: Sequence[int] = (1, 10), pools: int = 200, seed: int = 0,
    relevant_NxN: np.ndarray | None = None) -> dict[int, float]:
  """Share of queries with a right item among the best k of a random pool of `pool` items, for each k.

  `scores[i, j]` says how well item j fits query i; item i is right, and item j where `relevant[i, j]`. Each of
  `pools` draws takes `pool` of the N pairs and ranks its items for each of its queries. Ties count as broken at
  random. Chance is k / pool where nothing but the own item is right. Raises ValueError for fewer pairs than the pool
  holds.
  """
  count = len(scores_NxN)
  relevant_NxN = np.eye(count, dtype=bool) if relevant_NxN is None else np.asarray(relevant_NxN, bool)
  if pool > count:
    raise ValueError(f'recall in pools of {pool}: only {count} pairs were given')
  rng = np.random.default_rng(seed)
  hits = {k: 0.0 for k in ks}
  for _ in range(pools):
    index_P = rng.choice(count, pool, replace=False)
    chosen = np.ix_(index_P, index_P)
    scores_PxP, relevant_PxP = scores_NxN[chosen], relevant_NxN[chosen]
    best_Px1 = np.max(scores_PxP, axis=1, keepdims=True, where=relevant_PxP, initial=-np.inf)
    greater_P = np.sum(scores_PxP > best_Px1, axis=1)
    equal_PxP = scores_PxP == best_Px1  # a right item among them
    equal_P, right_P = equal_PxP.sum(axis=1), np.sum(equal_PxP & relevant_PxP, axis=1)
    for k in ks:
      places_P = np.clip(k - greater_P, 0, equal_P)
      # Of the equal ones so many come first: how likely is a right one among them?
      none_P = special.binom(equal_P - places_P, right_P) / special.binom(equal_P, right_P)
      hits[k] += float(np.mean(1.0 - none_P))
  return {k: value / pools for k, value in hits.items()}


def attribute_agreement(queries: Sequence[dict], items: Sequence[dict]) -> np.ndarray:
  """Score [queries, items] of an oracle that reads attributes: how many of a query's facts an item shares.

  A query names only some attributes (what its text says); only those are compared. Values may be of any
  type that `==` compares; one that a list of alternatives holds counts as equal to it.
  """
  scores = np.zeros((len(queries), len(items)))
  for name in sorted({name for query in queries for name in query}):
    for i, query in enumerate(queries):
      if name in query:
        wanted = query[name]
        wanted = wanted if isinstance(wanted, (list, tuple, set, frozenset)) else (wanted,)
        scores[i] += [item.get(name) in wanted for item in items]
  return scores
