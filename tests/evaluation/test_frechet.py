"""The Frechet distance on distributions with known answers."""
from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg

from musiclm_jax.evaluation import frechet


def exact(mean, covariance):
  """Moments of many rows with exactly this mean and covariance."""
  count = 1e9
  mean = np.asarray(mean, float)
  return frechet.Moments(count, count * mean, (count - 1) * covariance + count * np.outer(mean, mean))


@pytest.mark.parametrize('width', [4, 128])
def test_known_answers(width):
  eye, zero = np.eye(width), np.zeros(width)
  standard = exact(zero, eye)
  assert frechet.distance(standard, standard) == pytest.approx(0, abs=1e-6)
  assert frechet.distance(standard, exact(zero + 1, eye)) == pytest.approx(width, rel=1e-6)
  assert frechet.distance(standard, exact(zero, 4 * eye)) == pytest.approx(width, rel=1e-6)


def test_agrees_with_the_matrix_root_and_is_symmetric():
  rng = np.random.default_rng(0)
  a = rng.standard_normal((60, 5)) @ rng.standard_normal((5, 5))
  b = rng.standard_normal((50, 5)) @ rng.standard_normal((5, 5)) + 1
  ca, cb, gap = np.cov(a.T), np.cov(b.T), a.mean(0) - b.mean(0)
  expected = gap @ gap + np.trace(ca + cb - 2 * scipy.linalg.sqrtm(ca @ cb).real)
  assert frechet.frechet_distance(a, b) == pytest.approx(expected, rel=1e-8)
  assert frechet.frechet_distance(b, a) == pytest.approx(expected, rel=1e-8)


def test_rank_deficient_covariances_are_fine():
  rng = np.random.default_rng(0)
  few = rng.standard_normal((5, 20))
  assert frechet.frechet_distance(few, few) == pytest.approx(0, abs=1e-6)
  assert np.isfinite(frechet.frechet_distance(few, rng.standard_normal((6, 20))))


def test_moments_of_parts_add_up():
  x = np.random.default_rng(0).standard_normal((30, 3))
  whole = frechet.moments(x)
  parts = frechet.moments(x[:7]) + frechet.moments(x[7:])
  np.testing.assert_allclose(parts.covariance, whole.covariance)
  np.testing.assert_allclose(whole.covariance, np.cov(x.T))
  np.testing.assert_allclose(parts.mean, x.mean(0))


def test_one_row_is_refused():
  with pytest.raises(ValueError, match='at least 2'):
    frechet.frechet_distance(np.ones((1, 2)), np.ones((3, 2)))
