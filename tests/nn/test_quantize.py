from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from musiclm_jax.nn import quantize
from musiclm_jax.nn.quantize import ResidualQuantizer

Q, K, D = 4, 8, 5


@pytest.fixture
def x_BxTxD():
  return jax.random.normal(jax.random.key(1), (6, 20, D))


@pytest.fixture
def fitted(x_BxTxD) -> ResidualQuantizer:
  graphdef, _ = nnx.split(ResidualQuantizer(Q, K, D, rngs=nnx.Rngs(0)))
  return nnx.merge(graphdef, quantize.kmeans_start(x_BxTxD.reshape(-1, D), Q, K, jax.random.key(0)))


def buffers_of(quantizer) -> dict:
  return nnx.to_pure_dict(nnx.state(quantizer))


def test_decoding_the_indices_gives_the_quantized_values(fitted, x_BxTxD):
  out = fitted.quantize(x_BxTxD)
  np.testing.assert_allclose(fitted.decode(out.indices_BxTxQ), out.values_BxTxD, atol=1e-6)
  np.testing.assert_array_equal(fitted.encode(x_BxTxD), out.indices_BxTxQ)


@pytest.mark.parametrize('levels', range(1, Q + 1))
def test_fewer_levels_are_a_prefix(fitted, x_BxTxD, levels):
  full = fitted.encode(x_BxTxD)
  np.testing.assert_array_equal(fitted.encode(x_BxTxD, levels), full[..., :levels])
  dropped = fitted.quantize(x_BxTxD, levels_B=jnp.full((6,), levels))
  np.testing.assert_array_equal(dropped.indices_BxTxQ[..., :levels], full[..., :levels])
  np.testing.assert_allclose(dropped.values_BxTxD, fitted.decode(full[..., :levels]), atol=1e-6)


def test_each_level_of_a_fitted_codebook_lowers_the_error(fitted, x_BxTxD):
  indices = fitted.encode(x_BxTxD)
  errors = [float(jnp.mean(jnp.square(x_BxTxD - fitted.decode(indices[..., :q])))) for q in range(1, Q + 1)]
  assert all(a > b for a, b in zip(errors, errors[1:]))


def test_as_many_codes_as_points_leave_no_error():
  points = jax.random.normal(jax.random.key(2), (K, D))
  rows = jnp.tile(points, (5, 1))
  buffers = quantize.kmeans_start(rows, 1, K, jax.random.key(0))
  index = quantize.nearest(rows, buffers['codebook'][0])
  np.testing.assert_allclose(buffers['codebook'][0][index], rows, atol=1e-5)


def test_a_row_that_is_not_finite_is_seen_in_the_start():
  rows = jax.random.normal(jax.random.key(0), (200, D))
  assert len(np.unique(quantize.spread_rows(rows, 8, jax.random.key(1)), axis=0)) == 8
  assert not np.isfinite(quantize.spread_rows(rows.at[7, 2].set(jnp.nan), 8, jax.random.key(1))).all()
  repeated = quantize.spread_rows(jnp.ones((20, D)), 3, jax.random.key(1))  # no row differs
  np.testing.assert_array_equal(repeated, np.ones((3, D)))


def test_inertia_is_that_of_scikit_learn():
  sklearn_cluster = pytest.importorskip('sklearn.cluster')
  # Correlated features without separate clusters: where there are few, either may miss the better of two solutions.
  rows = np.asarray(jax.random.normal(jax.random.key(0), (4000, 8)) @ jax.random.normal(jax.random.key(1), (8, 8)))
  ours = quantize.kmeans(jnp.asarray(rows), 32, jax.random.key(3), iterations=30)
  distance = np.min(np.sum(np.square(rows[:, None] - np.asarray(ours)), axis=-1), axis=-1)
  theirs = sklearn_cluster.KMeans(32, n_init=1, random_state=0).fit(rows).inertia_
  assert distance.sum() <= 1.02 * theirs


def test_moving_average_is_the_formula(fitted, x_BxTxD):
  old = buffers_of(fitted)
  out = fitted.quantize(x_BxTxD, slot_B=jnp.arange(6), batch_size=6, key=jax.random.key(4))
  new, metrics = quantize.ema_update(old, out.statistics, decay=0.9, dead_code_share=0.0)
  index = np.asarray(out.indices_BxTxQ[..., 0]).reshape(-1)
  count = np.bincount(index, minlength=K)
  np.testing.assert_allclose(new['count'][0], 0.9 * old['count'][0] + 0.1 * count, rtol=1e-5)
  total = np.zeros((K, D))
  np.add.at(total, index, np.asarray(x_BxTxD).reshape(-1, D))
  expected = (0.9 * old['sum'][0] + 0.1 * total) / new['count'][0][:, None]
  np.testing.assert_allclose(new['codebook'][0], expected, atol=1e-5)
  assert np.all(np.asarray(metrics['restarts']) == 0)


def test_dead_codes_become_residuals_of_their_level(fitted, x_BxTxD):
  old = buffers_of(fitted)
  old['count'] = old['count'].at[1, 3].set(1e-4)
  old['codebook'] = old['codebook'].at[1, 3].set(100.0)
  old['sum'] = old['codebook'] * old['count'][..., None]
  graphdef, _ = nnx.split(fitted)
  out = nnx.merge(graphdef, old).quantize(x_BxTxD, slot_B=jnp.arange(6), batch_size=6, key=jax.random.key(4))
  new, metrics = quantize.ema_update(old, out.statistics)
  first = old['codebook'][0][out.indices_BxTxQ[..., 0]]
  residuals = np.asarray(x_BxTxD - first).reshape(-1, D)
  distance = np.abs(residuals - np.asarray(new['codebook'][1, 3])).sum(-1)
  assert distance.min() < 1e-4
  np.testing.assert_allclose(metrics['restarts'], [0, 1 / K, 0, 0])
  mean = np.mean(0.99 * old['count'][1] + 0.01 * out.statistics['count'][1])
  np.testing.assert_allclose(new['count'][1, 3], mean, rtol=1e-5)


def test_statistics_of_parts_add_up_to_those_of_the_whole(fitted, x_BxTxD):
  levels = jnp.array([1, 2, 3, 4, 2, 1])
  whole = fitted.quantize(x_BxTxD, levels_B=levels, slot_B=jnp.arange(6), batch_size=6, key=jax.random.key(4))
  parts = [fitted.quantize(x_BxTxD[i::2], levels_B=levels[i::2], slot_B=jnp.arange(6)[i::2], batch_size=6,
                           key=jax.random.key(4)).statistics for i in range(2)]
  jax.tree.map(lambda w, a, b: np.testing.assert_allclose(w, a + b, atol=1e-5), whole.statistics, *parts)


def test_candidates_are_residuals_of_their_level_from_all_over_the_global_batch(fitted, x_BxTxD):
  """Also where the batch arrives in parts: each part gives the rows that it has, and zeros for the others."""
  parts = [fitted.quantize(x_BxTxD[i::3], slot_B=jnp.arange(6)[i::3], batch_size=6, key=jax.random.key(4))
           for i in range(3)]
  candidates_QxMxD = sum(np.asarray(p.statistics['candidates']) for p in parts)
  indices = fitted.encode(x_BxTxD)
  origins = set()
  for level in range(Q):
    before = fitted.decode(indices[..., :level]) if level else jnp.zeros_like(x_BxTxD)
    residuals_NxD = np.asarray(x_BxTxD - before).reshape(-1, D)
    distance_MxN = np.abs(candidates_QxMxD[level][:, None] - residuals_NxD).max(-1)
    np.testing.assert_allclose(distance_MxN.min(-1), 0, atol=1e-5)
    # Two codes that are replaced in one step are not made equal.
    assert len(set(distance_MxN.argmin(-1).tolist())) == len(distance_MxN)
    origins |= set((distance_MxN.argmin(-1) // 20).tolist())
  assert origins == set(range(6))


def test_a_step_over_eight_devices_is_that_of_one(fitted):
  """The codebooks follow the global batch: counts, sums and the rows that replace dead codes."""
  old = buffers_of(fitted)
  old['count'] = old['count'].at[1, 3].set(1e-4).at[2, 5].set(1e-4)
  graphdef, _ = nnx.split(fitted)

  @jax.jit
  def step(buffers, x_BxTxD, levels_B, slot_B):
    out = nnx.merge(graphdef, buffers).quantize(
        x_BxTxD, levels_B=levels_B, slot_B=slot_B, batch_size=16, key=jax.random.key(4))
    return quantize.ema_update(buffers, out.statistics), out.indices_BxTxQ

  batch = (jax.random.normal(jax.random.key(5), (16, 20, D)), jnp.arange(16) % Q + 1, jnp.arange(16))
  (one, metrics), indices = step(old, *batch)
  assert jnp.sum(metrics['restarts']) * K >= 2
  mesh = jax.sharding.Mesh(np.array(jax.devices()[:8]), ('data',))
  put = lambda tree, spec: jax.device_put(tree, jax.sharding.NamedSharding(mesh, spec))
  (many, sharded_metrics), sharded_indices = step(put(old, jax.P()), *put(batch, jax.P('data')))
  assert len(sharded_indices.sharding.device_set) == 8
  np.testing.assert_array_equal(indices, sharded_indices)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), (one, metrics),
               (many, sharded_metrics))


def test_commitment_pulls_the_input_to_its_codes(fitted, x_BxTxD):
  gradient = jax.grad(lambda x: fitted.quantize(x, levels_B=jnp.ones((6,), int)).commitment_B.sum())(x_BxTxD)
  code = fitted.decode(fitted.encode(x_BxTxD, 1))
  np.testing.assert_allclose(gradient, 2 * (x_BxTxD - code) / (20 * D), atol=1e-5)


def test_perplexity_known_answers():
  found = quantize.perplexity(jnp.array([[1., 1, 1, 1], [4, 0, 0, 0], [1, 1, 0, 0]]))
  np.testing.assert_allclose(found, [4, 1, 2], rtol=1e-5)
