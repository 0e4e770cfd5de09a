"""Gradients of each loss at the decoded audio: measuring changes nothing, balancing gives each loss its share."""
from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from musiclm_jax.codec import balance, objective
from musiclm_jax.training import optimizer as optimizers, state as states
from musiclm_jax.training.optimizer import Adam
from musiclm_jax.training.state import Skeleton
from tests.codec import configs
from tests.codec.test_objective import batch, close, gradient, split

WEIGHTS = objective.LossWeights(adversarial=4.0, feature=3.0, reconstruction=2.0, waveform=1.0)
PLAIN = configs.replace(configs.TRAINING, weights=WEIGHTS)
MEASURED = configs.replace(PLAIN, gradients='measured')
BALANCED = configs.replace(PLAIN, gradients='balanced', balance_steps=10)
NAMES = ('reconstruction', 'waveform', 'adversarial', 'feature')


@pytest.fixture(scope='module')
def given():
  return batch()


@pytest.fixture(scope='module')
def plain(given):
  return gradient(PLAIN, given)


def test_measuring_changes_neither_loss_nor_gradient_nor_variables(given, plain):
  (loss, aux), grads = gradient(MEASURED, given)
  np.testing.assert_allclose(loss, plain[0][0], rtol=1e-6)
  close(grads, plain[1], rtol=1e-3, atol=1e-5)
  close(aux.statistics, plain[0][1].statistics)
  assert {f'gradient_{name}' for name in NAMES} < set(aux.metrics)
  assert jax.tree.structure(split(MEASURED)[1:]) == jax.tree.structure(split(PLAIN)[1:])


def pulls_of(training, given):
  """The gradient of each weighted loss at the decoded audio, by differentiating each of them alone."""
  graph, params, buffers = split(training)
  model = nnx.merge(graph, params, buffers)
  keys = jax.random.split(jax.random.key(0))
  latents = model.encode_latents(given['audio'])
  decoded = model.decode_latents(model.quantizer.quantize(
      latents, levels_B=training._levels(keys[0], given['slot'])).values_BxTxD)
  judges = training._judges(model, given['audio'])
  loss = lambda x, name: jnp.sum(training._generator_terms(given['audio'], x, judges)[name])
  return {name: np.asarray(jax.jit(jax.grad(loss), static_argnums=1)(decoded, name)) * weight
          for name, weight in training.term_weights.items()}


def test_the_sizes_are_norms_of_the_gradients(given):
  expected = {name: np.mean(np.linalg.norm(g, axis=-1)) for name, g in pulls_of(MEASURED, given).items()}
  (_, aux), _ = gradient(MEASURED, given)
  assert all(size > 0 for size in expected.values())
  for name, size in expected.items():
    np.testing.assert_allclose(aux.metrics[f'gradient_{name}'], size, rtol=1e-3)


def test_factors_give_each_loss_its_share_and_keep_the_total():
  average = balance.GradientSizes(3)
  weights, shares = {'a': 0.5, 'b': 2.0, 'c': 1.0}, {'a': 1.0, 'b': 2.0, 'c': 5.0}
  assert balance.balanced(average, weights, shares) == {name: pytest.approx(w) for name, w in weights.items()}
  average.sum[...], average.examples[...] = jnp.array([40.0, 2.0, 8e-3]), jnp.array(4.0)
  factors = balance.balanced(average, weights, shares)
  sizes = {'a': 10.0, 'b': 0.5, 'c': 2e-3}
  pulled = np.array([factors[name] * size for name, size in sizes.items()])
  np.testing.assert_allclose(pulled / pulled.sum(), np.array([1, 2, 5]) / 8, rtol=1e-5)
  np.testing.assert_allclose(pulled.sum(), sum(weights[name] * size for name, size in sizes.items()), rtol=1e-5)


def test_a_loss_that_has_stopped_pulling_is_not_divided_by_zero():
  average = balance.GradientSizes(2)
  average.sum[...], average.examples[...] = jnp.array([0.0, 3.0]), jnp.array(2.0)
  factors = balance.balanced(average, {'a': 1.0, 'b': 1.0}, {'a': 1.0, 'b': 1.0})
  assert all(np.isfinite(f) for f in factors.values())


def test_the_balanced_gradient_is_that_of_the_scaled_losses(given):
  """With an average of what the batch itself pulls: then the shares hold for this very gradient."""
  graph, params, buffers = split(BALANCED)
  pulls = pulls_of(BALANCED, given)
  weights = BALANCED.term_weights
  sizes = {name: np.mean(np.linalg.norm(g, axis=-1)) / weights[name] for name, g in pulls.items()}
  buffers['gradient_sizes'] = {'sum': 4 * jnp.array([sizes[name] for name in weights]), 'examples': jnp.array(4.0)}
  total = sum(weights[name] * sizes[name] for name in weights)
  factors = {name: getattr(WEIGHTS, name) / 10 * total / sizes[name] for name in weights}

  def loss(training, scale):
    def scalar(params):
      model = nnx.merge(graph, params, buffers)
      total, aux = training.loss(model, given, jax.random.key(0), training=True)
      return (total, aux) if scale is None else (
          sum(scale[name] * aux.metrics[name] for name in scale)
          + training.weights.commitment * aux.metrics['commitment'] + aux.metrics['discriminator'], aux)
    return jax.jit(jax.value_and_grad(scalar, has_aux=True))(params)

  (_, aux), grads = loss(BALANCED, None)
  (_, _), expected = loss(PLAIN, factors)
  close(grads, expected, rtol=1e-3, atol=1e-5)
  np.testing.assert_allclose(aux.metrics['balance_feature'], factors['feature'] / weights['feature'], rtol=1e-3)


def test_losses_without_weight_are_left_out(given):
  training = configs.replace(BALANCED, weights=configs.replace(WEIGHTS, waveform=0.0))
  (loss, aux), grads = gradient(training, given)
  assert 'gradient_waveform' not in aux.metrics and 'waveform' in aux.metrics
  assert split(training)[2]['gradient_sizes']['sum'].shape == (3,)
  assert all(np.isfinite(x).all() for x in jax.tree.leaves((loss, grads)))


def test_microbatches_change_nothing_over_several_steps():
  """The averages are of whole batches: two microbatches give the same factors, and so the same parameters."""
  skeleton = Skeleton.of(BALANCED)
  optimizer = optimizers.by_group(BALANCED, nnx.to_pure_dict(skeleton.params), Adam(1e-3))
  states_after = []
  for microbatches in (1, 2):
    step = jax.jit(states.make_step(BALANCED, skeleton, optimizer, microbatches=microbatches))
    state = states.create(BALANCED, optimizer, jax.random.key(0), keep_ema=False)
    for i in range(3):
      state, metrics = step(state, batch(seed=i), jax.random.key(1))
    states_after.append((state.params, state.buffers['gradient_sizes'], metrics))
  assert float(states_after[0][1]['examples']) == pytest.approx(4 * (1 + 0.9 + 0.81))
  assert abs(float(metrics['balance_waveform']) - 1) > 1e-3
  close(states_after[0], states_after[1], rtol=1e-3, atol=2e-5)


def test_an_unknown_way_is_refused():
  with pytest.raises(ValueError, match='"measured" or "balanced", found \'on\''):
    configs.replace(PLAIN, gradients='on')
