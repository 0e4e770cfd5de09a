"""The contrastive objective: its formula, its chunks, and that it learns."""
from __future__ import annotations

import math

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from musiclm_jax import specs
from musiclm_jax.mulan.objective import MuLanTraining, contrastive_loss, recall_at_1
from tests.mulan import configs


def _loss_and_gradient(objective, model, batch, *, training=True):
  graphdef, params, rest = nnx.split(model, nnx.Param, ...)

  @jax.jit
  def run(params):
    def loss(params):
      merged = nnx.merge(graphdef, params, rest)
      value, aux = objective.loss(merged, batch, jax.random.key(3), training=training)
      return value, aux.metrics
    return jax.value_and_grad(loss, has_aux=True)(params)

  (value, metrics), gradient = run(nnx.to_pure_dict(params))
  return value, metrics, gradient


def test_loss_equals_the_formula_in_numpy():
  rng = np.random.default_rng(0)
  a, t = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in rng.normal(size=(2, 5, 8)))
  s = a @ t.T / 0.2
  e = np.exp(s)
  symmetric = [
      -0.5 * (math.log(e[i, i] / e[i].sum()) + math.log(e[i, i] / e[:, i].sum())) for i in range(5)]
  decoupled = [
      -math.log(e[i, i] / sum(e[i, j] + e[j, i] for j in range(5) if j != i)) for i in range(5)]
  a, t = jnp.float32(a), jnp.float32(t)
  np.testing.assert_allclose(contrastive_loss(a, t, 0.2), symmetric, rtol=1e-5)
  np.testing.assert_allclose(contrastive_loss(a, t, 0.2, decoupled=True), decoupled, rtol=1e-5)


@pytest.mark.parametrize('decoupled', [False, True])
def test_chance_is_the_loss_of_embeddings_that_are_all_alike(decoupled):
  objective = MuLanTraining(configs.config(), decoupled=decoupled)
  alike = jnp.tile(jnp.float32([[0.6, 0.8]]), (7, 1))
  loss = contrastive_loss(alike, alike, 0.1, decoupled=decoupled).mean()
  _, metrics, _ = _loss_and_gradient(objective, configs.model(objective.mulan), configs.batch(objective.mulan, size=7))
  assert metrics['loss_chance'] == pytest.approx(float(loss), rel=1e-5)
  assert MuLanTraining(configs.config()).chance(512) == pytest.approx(6.2383, abs=1e-4)
  assert MuLanTraining(configs.config()).chance(6144) == pytest.approx(8.7232, abs=1e-4)


def test_loss_of_fresh_towers_is_near_chance():
  cfg = configs.config(temperature=1.0)
  loss, metrics, _ = _loss_and_gradient(MuLanTraining(cfg), configs.model(cfg), configs.batch(cfg, size=32))
  assert loss == pytest.approx(math.log(32), abs=0.3)
  assert metrics['temperature'] == pytest.approx(1.0) and metrics['loss'] == loss


def test_the_gap_is_measured_and_pulled_together_where_asked():
  cfg = configs.config()
  model, batch = configs.model(cfg), configs.batch(cfg, size=6)
  run = lambda weight: _loss_and_gradient(MuLanTraining(cfg, gap_weight=weight), model, batch, training=False)
  plain, metrics, _ = run(0.0)
  pulled, same, _ = run(2.0)
  assert plain == metrics['loss'] == same['loss'] and 0 < metrics['gap'] <= 4
  assert pulled == pytest.approx(float(plain + 2 * metrics['gap']), rel=1e-5)
  audio_BxE, text_BxE = MuLanTraining(cfg).embeddings(model, batch, jax.random.key(3), training=False)
  assert metrics['gap'] == pytest.approx(float(jnp.mean(2 - 2 * jnp.sum(audio_BxE * text_BxE, axis=-1))), rel=1e-4)


def test_recall_counts_ties_as_misses():
  x = jnp.eye(4)
  assert recall_at_1(x, x) == 1.0
  assert recall_at_1(x, x[jnp.array([0, 1, 3, 2])]) == 0.5
  assert recall_at_1(jnp.ones((4, 2)), jnp.ones((4, 2))) == 0.0


@pytest.mark.parametrize('decoupled', [False, True])
def test_chunks_change_neither_the_loss_nor_the_gradient(decoupled):
  cfg = configs.config(
      audio={'dropout': 0.1, 'time_masks': 1, 'time_mask_frames': 5, 'remat': True}, text={'dropout': 0.1})
  model, batch = configs.model(cfg), configs.batch(cfg)
  batch['length'] = np.array([9600, 9600, 5000, 9600, 700, 9600], np.int32)
  direct = _loss_and_gradient(MuLanTraining(cfg, decoupled=decoupled), model, batch)
  norm = math.sqrt(sum(float(jnp.sum(g**2)) for g in jax.tree.leaves(direct[2])))
  assert norm > 0.1
  chunked = _loss_and_gradient(MuLanTraining(cfg, chunks=3, decoupled=decoupled), model, batch)
  assert chunked[0] == pytest.approx(float(direct[0]), rel=1e-5)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5 * norm), chunked[2], direct[2])
  with pytest.raises(ValueError, match='batch of 6 cannot be computed in 4'):
    _loss_and_gradient(MuLanTraining(cfg, chunks=4), model, batch)


def test_every_parameter_has_a_gradient():
  cfg = configs.config()
  _, _, gradient = _loss_and_gradient(MuLanTraining(cfg), configs.model(cfg), configs.batch(cfg))
  paths = jax.tree.leaves_with_path(gradient)
  # A bias of the keys shifts all logits of a query alike: softmax does not see it.
  dead = [jax.tree_util.keystr(p) for p, g in paths if not jnp.any(jnp.abs(g) > 1e-9)]
  assert all("'k'" in name and "'b'" in name for name in dead), dead
  assert "['log_temperature']" in [jax.tree_util.keystr(p) for p, _ in paths]


def test_a_few_steps_pair_texts_with_clips():
  cfg = configs.config()
  objective, batch = MuLanTraining(cfg), configs.batch(cfg, size=16)
  # Clips that differ in loudness and pitch, as texts do in their first word.
  hertz = 200 * (1 + np.arange(16)[:, None])
  batch['audio'] = np.sin(
      2 * np.pi * hertz * np.arange(cfg.audio.window_samples) / 24000).astype(np.float32)
  batch['text'][:, 0] = 1 + np.arange(16)
  graphdef, params, rest = nnx.split(configs.model(cfg), nnx.Param, ...)
  params = nnx.to_pure_dict(params)
  optimizer = optax.adam(3e-3)
  state = optimizer.init(params)

  @jax.jit
  def step(params, state):
    def loss(params):
      value, aux = objective.loss(nnx.merge(graphdef, params, rest), batch, jax.random.key(0), training=True)
      return value, aux.metrics
    gradient, metrics = jax.grad(loss, has_aux=True)(params)
    updates, state = optimizer.update(gradient, state)
    return optax.apply_updates(params, updates), state, metrics

  for _ in range(80):
    params, state, metrics = step(params, state)
  assert metrics['loss'] < 0.5 * math.log(16) and metrics['recall@1'] > 0.8


def test_objective_survives_specs_json_and_states_its_batch():
  objective = MuLanTraining(configs.config(), chunks=2, decoupled=True)
  assert specs.from_json(specs.to_json(objective)) == objective
  assert not objective.mean_over_examples
  batch = configs.batch(objective.mulan, size=4)
  for name, spec in objective.batch_spec(4).items():
    assert batch[name].shape == spec.shape and batch[name].dtype == spec.dtype
