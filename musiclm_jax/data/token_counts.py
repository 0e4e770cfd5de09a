"""How often codes occur, and how many of them are in even use.

N rows, F frames, Q levels, K codes.
"""
from __future__ import annotations

import numpy as np


def level_counts(tokens_NxFxQ: np.ndarray, codebook_size: int) -> np.ndarray:
  """How often each code occurs at each level, int64 [Q, K]. Raises ValueError for a code outside [0, K)."""
  rows_MxQ = np.asarray(tokens_NxFxQ).reshape(-1, np.shape(tokens_NxFxQ)[-1])
  if rows_MxQ.size and not 0 <= rows_MxQ.min() <= rows_MxQ.max() < codebook_size:
    raise ValueError(f'tokens from {rows_MxQ.min()} to {rows_MxQ.max()} are not codes of a codebook of '
                     f'{codebook_size}')
  return np.stack([np.bincount(column, minlength=codebook_size) for column in rows_MxQ.T])


def entropy(counts_xK: np.ndarray) -> np.ndarray:
  """Entropy in nats of the distribution that the counts along the last axis estimate (0 for no counts)."""
  counts_xK = np.asarray(counts_xK, np.float64)
  share = counts_xK / np.maximum(counts_xK.sum(-1, keepdims=True), 1e-300)
  return -np.sum(share * np.log(np.where(share > 0, share, 1.0)), axis=-1)


def perplexity(counts_xK: np.ndarray) -> np.ndarray:
  """exp(entropy) of the codes that were counted: the number of codes in even use, between 1 and K."""
  return np.exp(entropy(counts_xK))
