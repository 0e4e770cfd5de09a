"""Stereo: shapes, a codec of one channel unchanged, where a sound is, and the losses of each channel."""
from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from musiclm_jax.codec import discriminators, model
from musiclm_jax.nn import spectral
from musiclm_jax.training import metrics
from tests.codec import configs
from tests.codec.test_objective import gradient, split

CODEC = configs.replace(configs.CODEC, channels=2)
TRAINING = configs.replace(
    configs.TRAINING, codec=CODEC, discriminators=configs.replace(
        configs.DISCRIMINATORS, waveform_scales=2, waveform_width=4, waveform_max_width=8))


def stereo(batch=2, frames=5, seed=0):
  x = np.random.default_rng(seed).uniform(-0.5, 0.5, (batch, frames * CODEC.stride, 2))
  return jnp.asarray(x, jnp.float32)


@pytest.fixture(scope='module')
def codec():
  return model.SoundStream(CODEC, rngs=nnx.Rngs(0))


def test_two_channels_in_two_channels_out_whole_and_in_steps(codec):
  x = stereo()
  tokens = codec.encode(x)
  assert tokens.shape == (2, 5, 3)
  whole = codec.decode(tokens)
  assert whole.shape == x.shape and np.abs(whole[..., 0] - whole[..., 1]).max() > 1e-4
  state, heard = codec.init_state(2), []
  for f in range(5):
    step, state = codec.encode_step(x[:, f * 48:(f + 1) * 48], state)
    np.testing.assert_array_equal(step[:, 0], tokens[:, f])
    audio, state = codec.decode_step(step, state)
    heard.append(audio)
  np.testing.assert_allclose(jnp.concatenate(heard, axis=1), whole, atol=1e-5)


def test_each_channel_matters_to_the_tokens(codec):
  x = stereo()
  latents = codec.encode_latents(x)
  for channel in (0, 1):
    assert np.abs(codec.encode_latents(x.at[..., channel].multiply(-1)) - latents).max() > 1e-4
  assert np.abs(codec.encode_latents(x[..., ::-1]) - latents).max() > 1e-4


@pytest.mark.parametrize('shape', [(1, 48), (1, 48, 1), (1, 48, 3), (1, 50, 2)])
def test_other_shapes_are_refused(codec, shape):
  with pytest.raises(ValueError, match='audio .batch, samples, 2 channels. with a multiple of 48 samples'):
    codec.encode(jnp.zeros(shape))


def test_reconstruction_hears_where_between_the_channels_a_sound_is():
  """The channels sound alike, one of them upside down: what is in the middle and what is at the sides are exchanged."""
  x = stereo(frames=10)[..., 0]
  pair = lambda right: jnp.stack([x, right], axis=-1)
  centre, wide = pair(x), pair(-x)
  by_channel = configs.TRAINING.reconstruction(centre[..., 1], wide[..., 1])
  np.testing.assert_allclose(by_channel, configs.TRAINING.reconstruction(x, x), atol=1e-3)
  apart = TRAINING.reconstruction(centre, wide) - TRAINING.reconstruction(centre, centre)
  assert (apart > 2 * TRAINING.unit).all()


def test_reconstruction_of_two_equal_channels_is_that_of_one_without_their_empty_side():
  x, y = stereo(seed=1)[..., 0], stereo(seed=2)[..., 0]
  double = lambda a: jnp.stack([a, a], axis=-1)
  one = configs.TRAINING.reconstruction(x, y)
  np.testing.assert_allclose(TRAINING.reconstruction(double(x), double(y)), 0.75 * one, rtol=0.01)


def test_the_discriminators_hear_the_channels_together():
  judges = discriminators.Discriminators(TRAINING.discriminators, 2, rngs=nnx.Rngs(0))
  graph, state = nnx.split(judges)
  call = jax.jit(lambda s, x: nnx.merge(graph, s)(x))
  x = stereo(frames=16)
  swapped = call(state, x[..., ::-1])
  for judgement, other in zip(call(state, x), swapped, strict=True):
    assert judgement.logits.shape[0] == 2
    assert np.abs(judgement.logits - other.logits).max() > 1e-6


def test_a_step_of_training_reaches_every_parameter():
  given = {'audio': stereo(4), 'slot': jnp.arange(4, dtype=jnp.int32)}
  spec = TRAINING.batch_spec(4)
  assert {name: x.shape for name, x in given.items()} == {name: s.shape for name, s in spec.items()}
  (loss, _), grads = gradient(TRAINING, given)
  assert np.isfinite(loss)
  for path, leaf in jax.tree_util.tree_leaves_with_path(grads):
    # As many real as decoded frames inside the margin of the hinge pull the last bias both ways.
    balanced = [k.key for k in path[-2:]] == ['last', 'b'] and path[0].key == 'discriminators'
    assert np.isfinite(leaf).all() and (balanced or np.abs(leaf).max() > 0), jax.tree_util.keystr(path)


def test_evaluation_measures_every_channel():
  graph, params, buffers = split(TRAINING)
  training = configs.replace(TRAINING, seconds=0.1)
  given = {'audio': stereo(frames=50), 'slot': jnp.arange(2)}
  model = nnx.merge(graph, params, buffers)
  found = metrics.held_out(training, jax.jit(lambda given, key: training.loss(model, given, key, training=False)),
                           [given], jax.random.key(0))
  decoded = np.asarray(jax.jit(lambda x: model.decode(model.encode(x)))(given['audio']))
  alone = lambda measure: [float(np.mean(measure(np.asarray(given['audio'])[..., c], decoded[..., c]))) for c in (0, 1)]
  for name, by_channel in (('si_sdr', alone(spectral.si_sdr)), ('log_mel_distance', alone(spectral.log_mel_distance))):
    assert found[name] == pytest.approx(np.mean(by_channel), rel=1e-3)
    assert by_channel[0] != pytest.approx(by_channel[1], rel=1e-2)
