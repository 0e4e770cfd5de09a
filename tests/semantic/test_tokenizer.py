"""Semantic tokens: frame counts, moments, k-means against scikit-learn, empty clusters."""
from __future__ import annotations

import functools

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn import cluster

from musiclm_jax.nn.quantize import scaling_of
from musiclm_jax.semantic import tokenizer as ours
from musiclm_jax.training import accumulate
from musiclm_jax.training.partition import Partitioner
from musiclm_jax.training.state import Skeleton
from tests.semantic import configs

KEY = jax.random.key(5)


def _fit(codebook_size=6, iterations=3, layer=1, decorrelate=False):
  return ours.SemanticTokenizer(configs.encoder(), layer=layer, codebook_size=codebook_size, iterations=iterations,
                                seconds=0.8, decorrelate=decorrelate)


@functools.cache
def _buffers(codebook_size=6):
  return configs.split(_fit(codebook_size).model(nnx.Rngs(0)))[2]


def _rows(count=400, seed=0):
  """Clusters of unequal size and spread, far from the origin, with dimensions of very different scale."""
  rng = np.random.default_rng(seed)
  centres = rng.normal(0, 3, (8, 16))
  rows = centres[rng.integers(0, 8, count)] + rng.normal(0, 1, (count, 16))
  return (100 + rows * np.geomspace(0.01, 10, 16)).astype(np.float32)


def _run(fit, rows, chunk, start=None):
  """What the engine does, in chunks with a padded last one. Yields (phase, buffers before, buffers, metrics)."""
  buffers = _buffers(fit.codebook_size)
  for phase, iterations in fit.phases():
    buffers = fit.begin(buffers, jnp.asarray(rows), phase, KEY)
    if start is not None and phase == ours.KMEANS:
      buffers = {**buffers, 'quantizer': {**buffers['quantizer'], 'codebook': jnp.asarray(start)[None]}}
    for _ in range(iterations):
      total = None
      for first in range(0, len(rows), chunk):
        part = rows[first:first + chunk]
        weight = np.r_[np.ones(len(part)), np.zeros(chunk - len(part))].astype(np.float32)
        part = np.concatenate([part, np.full((chunk - len(part), rows.shape[1]), 1e3, np.float32)])
        sums = fit.statistics(buffers, jnp.asarray(part), jnp.asarray(weight), phase)
        total = sums if total is None else jax.tree.map(jnp.add, total, sums)
      before = buffers
      buffers, metrics = fit.fitted(buffers, total, phase)
      yield phase, before, buffers, metrics


def test_rows_of_padding_are_not_fitted():
  fit = _fit(layer=2)
  audio = jax.random.normal(KEY, (3, 19200)) * 0.1
  length = np.array([19200, 9600, 19200 // 4], np.int32)
  skeleton = Skeleton.of(fit)
  _, params, buffers = configs.split(fit.model(nnx.Rngs(0)))
  gather = lambda *batches: accumulate.gather_features(
      fit, skeleton, params, buffers, [dict(b) for b in batches], Partitioner(data=1), num_batches=len(batches))
  together = gather({'audio': audio, 'length': length})
  alone = [gather({'audio': clip[None, :n]}) for clip, n in zip(audio, length)]
  assert [len(rows) for rows in alone] == [20, 10, 5]
  np.testing.assert_allclose(together, np.concatenate(alone), atol=1e-4)
  some = gather({'audio': audio, 'length': length, 'weight': np.array([0.0, 1.0, 1.0], np.float32)})
  np.testing.assert_array_equal(some, together[20:])


def test_tokens_are_one_for_each_960_samples():
  fit = _fit(layer=2)
  model = fit.model(nnx.Rngs(0))
  tokens = jax.jit(lambda audio: model.tokens(audio))
  for samples in (9600, 10559, 1000):
    result = tokens(jnp.asarray(np.random.default_rng(0).normal(0, 0.1, (2, samples)), jnp.float32))
    assert result.shape == (2, samples // 960, 1) and result.dtype == jnp.int32
    assert 0 <= int(result.min()) and int(result.max()) < 6
  with pytest.raises(ValueError, match='fewer than one frame'):
    model.tokens(jnp.zeros((1, 959)))


@pytest.mark.parametrize('frames, window', [(3, 8), (8, 8), (9, 8), (20, 8), (21, 8), (750, 125), (1000, 1)])
def test_windows_cover_each_frame_away_from_their_edges(frames, window):
  starts, window_T, place_T = ours.windows(frames, window)
  assert (starts[window_T] + place_T == np.arange(frames)).all()
  assert (place_T >= 0).all() and (place_T < window).all() and (starts + window <= max(frames, window)).all()
  edge = int(window / 8)
  inner = (np.arange(frames) >= edge) & (np.arange(frames) < frames - edge)
  assert (place_T[inner] >= edge).all() and (place_T[inner] < window - edge).all()
  assert len(starts) <= 1 + -(-max(0, frames - window) // (window - 2 * edge))


def _long(layer, frames=50):
  model = _fit(layer=layer).model(nnx.Rngs(0))  # windows of 20 frames
  return model, jnp.asarray(np.random.default_rng(0).normal(0, 0.1, (2, frames * 960)), jnp.float32)


def test_long_audio_in_windows_is_the_whole_where_a_layer_hears_little():
  model, audio = _long(layer=0)
  whole = model.encoder.layer(audio, 0)
  _, _, place_T = ours.windows(50, 20)
  inner = (place_T > 0) & (place_T < 19) | (np.arange(50) == 0)
  np.testing.assert_allclose(model.features(audio)[:, inner], whole[:, inner], atol=1e-5)


def test_each_frame_of_long_audio_is_that_of_its_window():
  model, audio = _long(layer=3)
  found = model.features(audio)
  assert found.shape == (2, 50, 16)
  starts, window_T, place_T = ours.windows(50, 20)
  for number, start in enumerate(starts):
    alone = model.encoder.layer(audio[:, start * 960:(start + 20) * 960], 3)
    mine = np.flatnonzero(window_T == number)
    np.testing.assert_allclose(found[:, mine], alone[:, place_T[mine]], atol=1e-5)


def test_what_follows_a_clip_of_long_audio_is_not_heard():
  model, audio = _long(layer=3)
  length = jnp.array([27 * 960 + 5, 50 * 960])
  short = model.features(audio.at[0, 27 * 960:].set(1.0), length)
  np.testing.assert_allclose(short[0, :27], model.features(audio, length)[0, :27], atol=1e-5)
  np.testing.assert_allclose(short[1], model.features(audio)[1], atol=1e-5)
  assert np.isfinite(short).all()


def test_token_spec_is_the_one_of_the_model():
  fit = _fit()
  spec = fit.token_spec
  assert (spec.name, spec.codebook_size, spec.levels, spec.frame_rate) == ('semantic', 6, 1, 25.0)
  assert nnx.eval_shape(lambda: fit.model(nnx.Rngs(0))).token_spec == spec


def test_layers_differ():
  audio = jnp.asarray(np.random.default_rng(0).normal(0, 0.1, (1, 9600)), jnp.float32)
  first, second = (_fit(layer=layer).model(nnx.Rngs(0)).features(audio) for layer in (1, 2))
  assert first.shape == (1, 10, 16) and not np.allclose(first, second, atol=1e-2)


def test_normalisation_has_the_moments_of_all_rows():
  rows = _rows()
  phase, _, buffers, metrics = next(_run(_fit(), rows, chunk=150))
  assert phase == ours.NORMALISE and float(metrics['rows']) == 400
  np.testing.assert_allclose(buffers['mean'], rows.astype(np.float64).mean(0), rtol=1e-5)
  np.testing.assert_allclose(buffers['scaling'], np.diag(1 / rows.astype(np.float64).std(0)), rtol=1e-3)


def test_decorrelated_dimensions_have_variance_1_and_no_covariance():
  mixed = _rows() @ np.random.default_rng(1).normal(0, 1, (16, 16)).astype(np.float32)
  _, _, buffers, _ = next(_run(_fit(decorrelate=True), mixed, chunk=150))
  normal = np.asarray(ours.normalised(mixed, buffers['mean'], buffers['scaling']), np.float64)
  covariance = np.cov(normal.T, bias=True)
  spread, direction = np.linalg.eigh(np.corrcoef(mixed.astype(np.float64).T))
  assert np.sum(spread > 3e-3 * spread[-1]) > 4
  kept = direction * np.minimum(1, spread / (3e-3 * spread[-1])) @ direction.T  # what hardly varies is not blown up
  np.testing.assert_allclose(covariance, kept, atol=0.02)


def test_decorrelation_does_not_depend_on_the_basis():
  """k-means of decorrelated rows is that of the same rows turned and stretched."""
  rows = np.random.default_rng(2).normal(0, 1, (400, 16)).astype(np.float32)
  turn, _ = np.linalg.qr(np.random.default_rng(3).normal(0, 1, (16, 16)))
  turned = (rows * np.geomspace(0.4, 2.5, 16) @ turn).astype(np.float32)
  distance = []
  for x in (rows, turned):
    _, _, buffers, _ = next(_run(_fit(decorrelate=True), x, chunk=400))
    normal = np.asarray(ours.normalised(x, buffers['mean'], buffers['scaling']))
    distance.append(np.linalg.norm(normal[:50, None] - normal[None, :50], axis=-1))
  np.testing.assert_allclose(*distance, atol=0.05)


@pytest.mark.parametrize('decorrelate', [False, True])
def test_a_constant_dimension_does_not_blow_up(decorrelate):
  rows = _rows()
  rows[:, 3] = 7
  *_, (_, _, buffers, metrics) = _run(_fit(decorrelate=decorrelate), rows, chunk=400)
  assert np.all(np.isfinite(buffers['quantizer']['codebook'])) and np.all(np.isfinite(buffers['scaling']))
  np.testing.assert_allclose(ours.normalised(rows, buffers['mean'], buffers['scaling'])[:, 3], 0, atol=1e-3)


def test_kmeans_from_the_same_start_is_that_of_scikit_learn():
  rows = _rows()
  normal = (rows - rows.mean(0)) / rows.std(0)
  start = normal[:6]
  fit = _fit(iterations=8)
  results = [r for r in _run(fit, rows, chunk=150, start=start) if r[0] == ours.KMEANS]
  inertia = [float(metrics['inertia']) for *_, metrics in results]
  assert np.all(np.diff(inertia) <= 1e-4)
  reference = cluster.KMeans(6, init=start, n_init=1, max_iter=8, tol=0, algorithm='lloyd').fit(normal)
  ours_final = np.asarray(results[-1][2]['quantizer']['codebook'][0])
  final = ((normal[:, None] - ours_final) ** 2).sum(-1).min(1).sum()
  assert final == pytest.approx(reference.inertia_, rel=1e-3)


def test_kmeans_from_its_own_start_is_as_good_as_that_of_scikit_learn():
  rows = _rows(1500)
  normal = (rows - rows.mean(0)) / rows.std(0)
  *_, (_, before, _, metrics) = _run(_fit(codebook_size=24, iterations=15), rows, chunk=1500)
  reference = cluster.KMeans(24, n_init=3, max_iter=15, random_state=0).fit(normal)
  assert float(metrics['inertia']) * len(rows) <= 1.02 * reference.inertia_


def test_the_order_of_the_rows_and_the_size_of_the_chunks_do_not_matter():
  rows, fit = _rows(), _fit()
  *_, (_, _, whole, _) = _run(fit, rows, chunk=400, start=rows[:6])
  *_, (_, _, parts, _) = _run(fit, rows, chunk=77, start=rows[:6])
  np.testing.assert_allclose(whole['quantizer']['codebook'], parts['quantizer']['codebook'], atol=1e-4)


def test_empty_clusters_split_the_widest():
  codes = jnp.asarray([[0.0, 0.0], [9.0, 9.0], [5.0, 0.0], [9.0, 9.0]])
  count, distance = jnp.asarray([10.0, 0.0, 20.0, 0.0]), jnp.asarray([80.0, 0.0, 10.0, 0.0])
  moved = np.asarray(ours.split_widest(codes, count, distance))
  np.testing.assert_allclose((moved[0] + moved[1]) / 2, [0, 0], atol=1e-6)  # the widest and the first empty one
  np.testing.assert_allclose((moved[2] + moved[3]) / 2, [5, 0], atol=1e-6)
  assert 0 < np.linalg.norm(moved[0]) < 2
  np.testing.assert_array_equal(moved, ours.split_widest(codes, count, distance))
  np.testing.assert_array_equal(ours.split_widest(codes, count + 1, distance), codes)
  # Nothing to split: clusters of equal rows stay as they are.
  np.testing.assert_array_equal(ours.split_widest(codes, count, distance * 0), codes)


def test_all_clusters_end_up_in_use():
  rows = _rows()
  start = np.concatenate([np.zeros((1, 16)), np.full((5, 16), 50.0)]).astype(np.float32)
  *_, (_, _, _, metrics) = _run(_fit(iterations=8), rows, chunk=400, start=start)
  assert float(metrics['empty_clusters']) == 0 and float(metrics['perplexity']) > 3


@pytest.mark.parametrize('change, message', [
    ({'layer': 5}, 'layer 5'), ({'layer': -1}, 'layer -1'), ({'codebook_size': 1}, 'clusters')])
def test_settings_that_cannot_work_are_refused(change, message):
  with pytest.raises(ValueError, match=message):
    _fit(**change)


@pytest.mark.parametrize('decorrelate', [False, True])
def test_rows_that_never_change_give_finite_numbers(decorrelate):
  scaling, constant = scaling_of(jnp.zeros((5, 5)), decorrelate=decorrelate)
  assert np.all(np.isfinite(scaling)) and int(constant) == 5
