import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from musiclm_jax.training import integrity, optimizer as optimizers
from musiclm_jax.training import state as states
from musiclm_jax.training.optimizer import Adam
from musiclm_jax.training.state import Skeleton
from tests.training.toys import Batches, Regression


def one_step(objective, optimizer=Adam(0.1), *, batch_size=8, **options):
  skeleton = Skeleton.of(objective)
  params = jax.eval_shape(lambda: states.split_model(objective.model(states.nnx.Rngs(0)))[0])
  transform = optimizers.by_group(objective, params, optimizer, options.pop('frozen', ()))
  state = states.create(objective, transform, jax.random.key(0), keep_ema=options.get('ema_decay', 0) > 0)
  step = states.make_step(objective, skeleton, transform, **options)
  return state, *step(state, Batches(batch_size)(0), jax.random.key(1))


@pytest.mark.parametrize('microbatches', [2, 4, 8])
def test_microbatches_change_nothing(microbatches):
  _, whole, metrics = one_step(Regression())
  _, split, split_metrics = one_step(Regression(), microbatches=microbatches)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), whole, split)
  assert float(metrics['loss']) == pytest.approx(float(split_metrics['loss']), rel=1e-5)
  assert float(split.buffers['seen']) == 8


def test_a_group_without_weight_is_not_moved_at_all():
  before, after, _ = one_step(Regression(extra_weight=0.0))
  np.testing.assert_array_equal(before.params['extra'], after.params['extra'])
  assert not np.array_equal(before.params['w'], after.params['w'])


def test_frozen_parameters_stay():
  before, after, _ = one_step(Regression(), frozen=('w',))
  np.testing.assert_array_equal(before.params['w'], after.params['w'])
  assert not np.array_equal(before.params['extra'], after.params['extra'])
  before, after, _ = one_step(Regression(), frozen=('',))
  jax.tree.map(np.testing.assert_array_equal, before.params, after.params)


def test_each_group_is_clipped_on_its_own():
  sgd = lambda clip: optax.chain(optax.clip_by_global_norm(clip), optax.sgd(1.0))
  before, after, metrics = one_step(Regression(), {'main': sgd(1e-3), 'extra': sgd(1e9)})
  moved = {name: float(jnp.linalg.norm(after.params[name] - before.params[name])) for name in ('w', 'extra')}
  assert moved['w'] == pytest.approx(1e-3, rel=1e-3)
  assert moved['extra'] == pytest.approx(float(metrics['gradient_norm_extra']), rel=1e-4)


class Spoilt(Regression):
  """A finite loss, whose gradient is not finite where `spoilt` says so."""

  spoilt = 'gradient'

  def loss(self, model, batch, key, *, training):
    loss, aux = super().loss(model, batch, key, training=training)
    if self.spoilt == 'gradient':
      loss = loss + jnp.sqrt(jnp.sum(0 * model.w[...]))  # 0, with an infinite slope
    if self.spoilt == 'statistics':
      aux = aux._replace(statistics={'seen': jnp.float32(jnp.inf)})
    return loss, aux


@pytest.mark.parametrize('spoilt, microbatches', [('gradient', 1), ('gradient', 2), ('statistics', 1)])
def test_a_step_that_is_not_finite_changes_nothing_but_the_step(spoilt, microbatches):
  objective = Spoilt()
  object.__setattr__(objective, 'spoilt', spoilt)
  options = {'ema_decay': 0.9, 'microbatches': microbatches}
  before, after, metrics = one_step(objective, skip_nonfinite=True, **options)
  assert np.isfinite(metrics['loss']) and metrics['skipped'] == 1 and after.step == 1
  same = lambda tree: dataclasses.replace(tree, step=jnp.int32(0))
  jax.tree.map(np.testing.assert_array_equal, same(before), same(after))
  _, spoiled, _ = one_step(objective, **options)
  assert not all(np.isfinite(x).all() for x in jax.tree.leaves(spoiled))


def test_a_finite_step_is_the_same_whether_others_may_be_skipped_or_not():
  _, plain, _ = one_step(Regression())
  _, after, metrics = one_step(Regression(), skip_nonfinite=True)
  assert metrics['skipped'] == 0
  jax.tree.map(np.testing.assert_array_equal, plain, after)


def test_moving_average_of_the_parameters():
  before, after, _ = one_step(Regression(), ema_decay=0.9)
  np.testing.assert_allclose(after.ema['w'], 0.9 * before.params['w'] + 0.1 * after.params['w'], rtol=1e-6)


def test_a_start_may_change_any_variable_and_no_other():
  objective = Regression()
  transform = optimizers.by_group(objective, jax.eval_shape(lambda: states.split_model(objective.model(
      states.nnx.Rngs(0)))[0]), Adam(0.1))
  state = states.create(objective, transform, jax.random.key(0), keep_ema=True)

  class Started(Regression):
    found = {'extra': jnp.array([5.0, 6.0]), 'seen': jnp.array(7.0)}

    def start(self, model, batch, key):
      return self.found

  started = states.started(Started(), Skeleton.of(objective), state, Batches(8)(0), jax.random.key(1))
  np.testing.assert_array_equal(started.params['extra'], [5, 6])
  np.testing.assert_array_equal(started.ema['extra'], [5, 6])
  np.testing.assert_array_equal(started.params['w'], state.params['w'])
  assert float(started.buffers['seen']) == 7
  Started.found = {'nothing': jnp.zeros(())}
  with pytest.raises(ValueError, match='names variables that the model does not have'):
    states.started(Started(), Skeleton.of(objective), state, Batches(8)(0), jax.random.key(1))


def test_bfloat16_compute_keeps_float32_parameters():
  _, after, _ = one_step(Regression(), compute_dtype=jnp.bfloat16)
  assert {x.dtype for x in jax.tree.leaves(after.params)} == {jnp.dtype('float32')}


def test_an_optimizer_is_needed_for_every_group():
  with pytest.raises(ValueError, match=r"\['main'\].*\('main', 'extra'\)"):
    one_step(Regression(), {'main': Adam(0.1)})


@pytest.mark.parametrize('adam, step, rate', [
    (Adam(1.0, warmup_steps=10), 5, 0.5), (Adam(1.0, warmup_steps=10), 50, 1.0),
    (Adam(1.0, schedule='cosine', decay_steps=100), 50, 0.5), (Adam(1.0, schedule='cosine', decay_steps=100), 100, 0.0),
    (Adam(1.0, warmup_steps=100, schedule='inverse_sqrt'), 400, 0.5)])
def test_schedules(adam, step, rate):
  assert float(adam.rate()(step)) == pytest.approx(rate, abs=1e-6)


def test_the_schedule_has_a_length_of_its_own():
  with pytest.raises(ValueError, match='decay_steps 5 must exceed warmup_steps 10'):
    Adam(1.0, warmup_steps=10, schedule='cosine', decay_steps=5).rate()


def test_weight_decay_spares_vectors():
  stacked = {'w': jnp.ones((3, 2, 2)), 'b': jnp.ones((3, 2)), 'scale': jnp.ones((3, 2))}
  params = {'w': jnp.ones((2, 2)), 'b': jnp.ones((2,)), 'layers': stacked}
  transform = Adam(1.0, weight_decay=0.5, clip_norm=0.0).transform()
  updates, _ = transform.update(jax.tree.map(jnp.zeros_like, params), transform.init(params), params)
  np.testing.assert_allclose(updates['layers']['w'], -0.5)
  np.testing.assert_allclose([updates['layers']['b'], updates['layers']['scale']], 0)
  np.testing.assert_allclose(updates['w'], -0.5)
  np.testing.assert_allclose(updates['b'], 0)


def test_two_runs_of_a_step_are_equal_and_steps_differ():
  objective = dataclasses.replace(Regression())
  a, b = one_step(objective)[1], one_step(objective)[1]
  jax.tree.map(np.testing.assert_array_equal, a, b)


def test_parameters_that_are_no_numbers_are_named():
  tree = {'params': {'w': jnp.ones((3, 2)), 'count': jnp.array([1, 2])}, 'ema': {}}
  integrity.check_finite(tree, 7)
  integrity.check_finite({'ema': {}}, 7)
  for value in (jnp.nan, jnp.inf):
    spoilt = {**tree, 'buffers': {'mean': jnp.array([0.0, value], jnp.bfloat16)}}
    with pytest.raises(integrity.NonFinite, match='buffers/mean is not finite after step 7'):
      integrity.check_finite(spoilt, 7)
