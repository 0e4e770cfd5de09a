"""Denoising: what is asked of whom, gains, the condition of the codec and its gradient."""
from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from musiclm_jax.codec import denoising, model
from musiclm_jax.training import metrics
from tests.codec import configs
from tests.codec.test_objective import batch, gradient, split


def codec_of(half):
  return configs.replace(configs.CODEC, denoise_at=half)


def training_of(half, **changes):
  return configs.replace(configs.TRAINING, codec=codec_of(half), **changes)


def noisy_batch(size=4):
  noise = np.random.default_rng(9).normal(size=(size, configs.TRAINING.samples)).astype(np.float32)
  return {**batch(size), 'noise': jnp.asarray(noise)}


def mixed(count=600, **changes):
  rng = np.random.default_rng(0)
  music, noise = (jnp.asarray(rng.normal(0, s, (count, 50)), jnp.float32) for s in (0.3, 5.0))
  options = {'noisy_share': 0.5, 'gains_db': (-30.0, 0.0), **changes}
  return music, noise, denoising.add_noise(music, noise, jax.random.key(3), jnp.arange(count), **options)


def test_the_target_is_the_music_where_it_is_to_be_denoised_and_what_is_heard_elsewhere():
  music, _, made = mixed()
  denoise = np.asarray(made.denoise_B)
  np.testing.assert_array_equal(made.target_BxN[denoise], music[denoise])
  np.testing.assert_array_equal(made.target_BxN[~denoise], made.heard_BxN[~denoise])
  noisy = np.abs(made.heard_BxN - music).max(-1) > 0
  # All four cases, so also music without noise that is "to be denoised".
  for a in (denoise, ~denoise):
    for b in (noisy, ~noisy):
      assert 0.15 < np.mean(a & b) < 0.35


def test_gains_are_even_in_decibels_relative_to_the_peak_of_the_music():
  music, _, made = mixed(noisy_share=1.0)
  peak = lambda x: np.abs(x).max(-1)
  gains = 20 * np.log10(peak(np.asarray(made.heard_BxN - music)) / peak(np.asarray(music)))
  assert -30.1 < gains.min() < -29 and -1 < gains.max() < 0.1
  np.testing.assert_allclose(np.quantile(gains, [0.25, 0.5, 0.75]), [-22.5, -15, -7.5], atol=2)


def test_silence_stays_silent_and_each_draw_belongs_to_its_slot():
  silent = denoising.add_noise(jnp.zeros((3, 8)), jnp.ones((3, 8)), jax.random.key(0), jnp.arange(3), noisy_share=1.0,
                               gains_db=(-30.0, 0.0))
  np.testing.assert_array_equal(silent.heard_BxN, 0)
  music, noise, made = mixed(20)
  part = denoising.add_noise(music[7:9], noise[7:9], jax.random.key(3), jnp.arange(7, 9), noisy_share=0.5,
                             gains_db=(-30.0, 0.0))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a[7:9], b, rtol=1e-6), made, part)


@pytest.mark.parametrize('half', ['encoder', 'decoder'])
def test_the_condition_is_learned_and_reaches_nothing_but_its_half(half):
  training = training_of(half, noisy_share=1.0)
  given = noisy_batch(8)
  (loss, _), grads = gradient(training, given)
  assert np.isfinite(loss)
  for name in ('scale', 'bias'):
    by_condition = np.abs(grads['film'][name]).max(-1)
    assert (by_condition > 0).all(), name  # both conditions occur among eight slots


@pytest.mark.parametrize('half', ['encoder', 'decoder'])
def test_the_codec_hears_the_noise_and_is_compared_with_what_was_asked_for(half):
  training = training_of(half, noisy_share=1.0, noise_gains_db=(0.0, 0.0), dropout_share=0.0)
  given, key = noisy_batch(8), jax.random.key(0)
  graph, params, buffers = split(training)
  params['film'] = {name: jax.random.normal(jax.random.key(7), x.shape) for name, x in params['film'].items()}
  codec = nnx.merge(graph, params, buffers)
  _, aux = jax.jit(lambda: training.loss(codec, given, key, training=True))()
  made = training._noisy(given, key, 1.0)
  assert 0 < made.denoise_B.sum() < 8

  def error(heard, target, denoise_B):
    ask = lambda side: {'denoise': denoise_B} if side == half else {}
    decoded = codec.decode(codec.encode(heard, **ask('encoder')), **ask('decoder'))
    return float(jnp.mean(jnp.abs(target - decoded)))

  right = error(made.heard_BxN, made.target_BxN, made.denoise_B)
  assert float(aux.metrics['waveform']) == pytest.approx(right, rel=1e-4)
  for wrong in (error(made.heard_BxN, made.heard_BxN, made.denoise_B),
                error(made.heard_BxN, made.target_BxN, ~made.denoise_B),
                error(given['audio'], made.target_BxN, made.denoise_B)):
    assert float(aux.metrics['waveform']) != pytest.approx(wrong, rel=1e-3)


def test_a_codec_without_the_choice_has_neither_its_parameters_nor_noise():
  assert 'film' not in split(configs.TRAINING)[1]
  assert 'noise' not in configs.TRAINING.batch_spec(2)
  spec = training_of('encoder').batch_spec(2)
  assert spec['noise'] == spec['audio']


@pytest.mark.parametrize('half', ['encoder', 'decoder'])
def test_at_first_the_condition_changes_nothing_and_in_a_stream_it_may_change_with_every_step(half):
  codec = model.SoundStream(codec_of(half), rngs=nnx.Rngs(0))
  without = model.SoundStream(configs.CODEC, rngs=nnx.Rngs(0))
  x = batch(2)['audio'][:, :4 * 48]
  ask = lambda denoise, side: {'denoise': denoise} if side == half else {}
  np.testing.assert_array_equal(codec.encode(x, **ask(True, 'encoder')), without.encode(x))
  codec.film.scale[...] = jax.random.normal(jax.random.key(0), (2, 6))
  codec.film.bias[...] = jax.random.normal(jax.random.key(1), (2, 6))
  whole = {d: codec.decode(codec.encode(x, **ask(d, 'encoder')), **ask(d, 'decoder')) for d in (False, True)}
  assert np.abs(whole[True] - whole[False]).max() > 1e-3
  one_each = codec.decode(codec.encode(x, **ask(jnp.array([True, False]), 'encoder')),
                          **ask(jnp.array([True, False]), 'decoder'))
  np.testing.assert_allclose(one_each, jnp.stack([whole[True][0], whole[False][1]]), atol=1e-5)
  state, heard = codec.init_state(2), []
  for f, denoise in enumerate([True, True, False, False]):
    tokens, state = codec.encode_step(x[:, f * 48:(f + 1) * 48], state, **ask(denoise, 'encoder'))
    audio, state = codec.decode_step(tokens, state, **ask(denoise, 'decoder'))
    heard.append(audio)
  np.testing.assert_allclose(jnp.concatenate(heard[:2], axis=1), whole[True][:, :96], atol=1e-5)


def test_asking_a_codec_that_cannot_is_refused():
  x = jnp.zeros((1, 48))
  plain, at_decoder = (model.SoundStream(c, rngs=nnx.Rngs(0)) for c in (configs.CODEC, codec_of('decoder')))
  with pytest.raises(ValueError, match='the encoder of this codec cannot denoise: it was trained without denoise_at'):
    plain.encode(x, denoise=True)
  with pytest.raises(ValueError, match='the encoder of this codec cannot denoise: its decoder does'):
    at_decoder.encode(x, denoise=True)
  with pytest.raises(ValueError, match='denoise_at must be'):
    codec_of('both')


def test_two_microbatches_are_one_batch():
  training = training_of('encoder')
  whole = noisy_batch()
  (loss, aux), grads = gradient(training, whole)
  parts = [gradient(training, jax.tree.map(lambda x, i=i: x[i::2], whole)) for i in range(2)]
  np.testing.assert_allclose(sum(p[0][0] for p in parts) / 2, loss, rtol=1e-4)
  jax.tree.map(lambda a, b, w: np.testing.assert_allclose((a + b) / 2, w, rtol=1e-3, atol=1e-5),
               parts[0][1], parts[1][1], grads)
  jax.tree.map(lambda a, b, w: np.testing.assert_allclose(a + b, w, rtol=1e-3, atol=1e-5),
               *(p[0][1].statistics for p in parts), aux.statistics)


def test_evaluation_says_how_much_noise_is_left():
  training = training_of('encoder', seconds=0.1)
  graph, params, buffers = split(training)
  rng = np.random.default_rng(0)
  given = {'audio': rng.uniform(-0.5, 0.5, (2, training.samples)).astype(np.float32),
           'noise': rng.normal(size=(2, training.samples)).astype(np.float32), 'slot': jnp.arange(2)}
  model = nnx.merge(graph, params, buffers)
  loss = jax.jit(lambda given, key: training.loss(model, given, key, training=False))
  found = metrics.held_out(training, loss, [given], jax.random.key(0))
  assert -5 < found['si_sdr_noisy'] < 45
  assert np.isfinite(found['si_sdr_denoised'])
