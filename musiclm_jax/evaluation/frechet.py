"""The Frechet distance between two sets of embeddings, from moments that add up.

N rows, D width.
"""
from __future__ import annotations

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Moments:
  """Sums over rows; moments of two sets of rows add field by field, so that any split gives the same.

  Attributes:
    count: rows. total: [D]. outer: sum of outer products [D, D]. All float64.
  """

  count: float
  total: np.ndarray
  outer: np.ndarray

  def __add__(self, other: Moments) -> Moments:
    return Moments(self.count + other.count, self.total + other.total, self.outer + other.outer)

  @property
  def mean(self) -> np.ndarray:
    return self.total / self.count

  @property
  def covariance(self) -> np.ndarray:
    """Unbiased; raises ValueError for fewer than two rows."""
    if self.count < 2:
      raise ValueError(f'Frechet distance: {self.count:g} rows have no covariance; at least 2 are needed')
    return (self.outer - np.outer(self.total, self.mean)) / (self.count - 1)


def moments(x_NxD: np.ndarray) -> Moments:
  """The sums over the rows of `x`."""
  x_NxD = np.asarray(x_NxD, np.float64)
  return Moments(float(len(x_NxD)), x_NxD.sum(0), x_NxD.T @ x_NxD)


def _root(covariance_DxD: np.ndarray) -> np.ndarray:
  """Symmetric square root; eigenvalues that rounding made negative count as 0."""
  values, vectors = np.linalg.eigh(covariance_DxD)
  return (vectors * np.sqrt(np.maximum(values, 0.0))) @ vectors.T


def distance(a: Moments, b: Moments) -> float:
  """|mean_a - mean_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)), in squared units of the embedding.

  Dowson and Landau 1982, as used by FID (arXiv 1706.08500) and FAD (arXiv 1812.08466). tr (S_a S_b)^(1/2) is
  the sum of the roots of the eigenvalues of the symmetric matrix S_a^(1/2) S_b S_a^(1/2), which `eigh` gives
  without the complex parts of a general matrix root. The estimate grows as rows get fewer: only distances
  from equal numbers of rows may be compared.
  """
  covariance_a, covariance_b = a.covariance, b.covariance
  root_a = _root(covariance_a)
  cross = np.linalg.eigvalsh(root_a @ covariance_b @ root_a)
  difference = a.mean - b.mean
  value = difference @ difference + np.trace(covariance_a) + np.trace(covariance_b)
  return float(max(0.0, value - 2.0 * np.sum(np.sqrt(np.maximum(cross, 0.0)))))


def frechet_distance(a_NxD: np.ndarray, b_NxD: np.ndarray) -> float:
  """`distance` of two sets of rows."""
  return distance(moments(a_NxD), moments(b_NxD))
