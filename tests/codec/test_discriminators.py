"""Known answers of the adversarial losses, shapes of the discriminators."""
import math

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from musiclm_jax.codec import discriminators as d
from tests.codec import configs


def judgement(logits, *features):
  return d.Judgement(jnp.asarray(logits, jnp.float32), tuple(jnp.asarray(f, jnp.float32) for f in features))


def test_hinge_losses_at_zero_logits():
  zero = [judgement(np.zeros((3, 5))), judgement(np.zeros((3, 7)))]
  np.testing.assert_allclose(d.discriminator_loss(zero, zero), np.full(3, 2.0))
  np.testing.assert_allclose(d.adversarial_loss(zero), np.ones(3))


def test_hinge_losses_of_a_perfect_discriminator():
  real, fake = [judgement(np.full((1, 4), 2.0))], [judgement(np.full((1, 4), -2.0))]
  np.testing.assert_allclose(d.discriminator_loss(real, fake), [0.0])
  np.testing.assert_allclose(d.adversarial_loss(fake), [3.0])


def test_feature_loss_is_the_mean_over_layers_and_zero_for_equal_input():
  real = [judgement(np.zeros((1, 1)), np.zeros((1, 4)), np.zeros((1, 100)))]
  fake = [judgement(np.zeros((1, 1)), np.full((1, 4), 3.0), np.full((1, 100), -1.0))]
  np.testing.assert_allclose(d.feature_loss(real, fake), [2.0])
  np.testing.assert_allclose(d.feature_loss(real, real), [0.0])


def test_the_targets_of_the_feature_loss_have_no_gradient():
  fake = [judgement(np.zeros((1, 1)), np.ones((1, 3)))]
  loss = lambda x: d.feature_loss([d.Judgement(jnp.zeros((1, 1)), (x,))], fake).sum()
  gradient = jax.grad(loss)(jnp.zeros((1, 3)))
  np.testing.assert_array_equal(gradient, 0)


@pytest.mark.parametrize('scales', [0, 2])
def test_one_logit_for_each_downsampled_frame(scales):
  config = configs.replace(
      configs.DISCRIMINATORS, waveform_scales=scales, waveform_width=4, waveform_max_width=8)
  judges = d.Discriminators(config, rngs=nnx.Rngs(0))
  x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 1280)), jnp.float32)
  graph, state = nnx.split(judges)
  judgements = jax.jit(lambda s: nnx.merge(graph, s)(x))(state)
  assert len(judgements) == 1 + scales
  assert judgements[0].logits.shape == (2, 1280 // 32 // 2)
  for i in range(scales):
    assert judgements[1 + i].logits.shape == (2, math.ceil(1280 / 2 ** i / 256))
    assert len(judgements[1 + i].features) == 6


def test_full_size_has_the_papers_last_convolution():
  config = d.DiscriminatorsConfig(width=32, waveform_scales=3)
  judges = nnx.eval_shape(lambda: d.Discriminators(config, rngs=nnx.Rngs(0)))
  assert judges.stft.last.w.shape == (1, 1024 // 2 // 2 ** 6, 256, 1)
  assert judges.stft.block_0.strided.w.shape == (3, 4, 32, 32)
  assert judges.stft.block_1.strided.w.shape == (4, 4, 32, 64)
  assert judges.waveform_2.layer_4.w.shape == (41, 4, 1024)
  assert math.prod(judges.waveform_0.layer_5.w.shape) == 5 * 1024 * 1024


def test_bins_and_channels_that_cannot_be_divided_are_refused():
  with pytest.raises(ValueError, match='50 bins'):
    configs.replace(configs.DISCRIMINATORS, window=100)
  with pytest.raises(ValueError, match='from 18 to 72 channels cannot have 4 groups'):
    configs.replace(configs.DISCRIMINATORS, waveform_scales=1, waveform_width=18)
