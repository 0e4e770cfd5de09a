"""One scalar, two groups; quantizer dropout; microbatches; the codebooks' start and update; metrics."""
from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from musiclm_jax import specs
from musiclm_jax.codec import discriminators, objective
from musiclm_jax.data import token_counts
from musiclm_jax.nn import spectral
from musiclm_jax.training import metrics
from tests.codec import configs

TRAINING = configs.TRAINING


def split(training=TRAINING):
  graph, params, buffers = nnx.split(training.model(nnx.Rngs(0)), nnx.Param, ...)
  return graph, nnx.to_pure_dict(params), nnx.to_pure_dict(buffers)


def batch(size=4, seed=0):
  x = np.random.default_rng(seed).uniform(-0.5, 0.5, size=(size, TRAINING.samples))
  return {'audio': jnp.asarray(x, jnp.float32), 'slot': jnp.arange(size, dtype=jnp.int32)}


def gradient(training, given, key=jax.random.key(0)):
  graph, params, buffers = split(training)

  def loss(params):
    return training.loss(nnx.merge(graph, params, buffers), given, key, training=True)

  return jax.jit(jax.value_and_grad(loss, has_aux=True))(params)


def shapes(tree):
  return jax.tree.map(lambda x: (x.shape, x.dtype), tree)


def close(a, b, **kwargs):
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **{'rtol': 1e-4, 'atol': 1e-6, **kwargs}), a, b)


def test_the_batch_spec_is_what_the_loss_takes():
  spec = TRAINING.batch_spec(4)
  assert shapes(batch()) == shapes(spec)


def test_each_group_has_its_own_gradient_exactly():
  """One backward pass of the sum equals the gradients of two separate losses."""
  given = batch()
  graph, params, buffers = split()
  (_, _), both = gradient(TRAINING, given)

  def decoded(params):
    model = nnx.merge(graph, params, buffers)
    keys = jax.random.split(jax.random.key(0))
    latents = model.encode_latents(given['audio'])
    values = model.quantizer.quantize(latents, levels_B=TRAINING._levels(keys[0], given['slot'])).values_BxTxD
    return model, model.decode_latents(latents + jax.lax.stop_gradient(values - latents))

  def discriminator(judges):
    model, fake = decoded({**params, 'discriminators': judges})
    pair = model.discriminators(given['audio']), model.discriminators(fake)
    return jnp.mean(discriminators.discriminator_loss(*pair))

  close(jax.grad(discriminator)(params['discriminators']), both['discriminators'])

  # The generator's gradient is that of the objective when the discriminators' own term is taken away.
  def generator(rest):
    model = nnx.merge(graph, {**rest, 'discriminators': params['discriminators']}, buffers)
    total, aux = TRAINING.loss(model, given, jax.random.key(0), training=True)
    return total - aux.metrics['discriminator']

  rest = {name: value for name, value in params.items() if name != 'discriminators'}
  close(jax.jit(jax.grad(generator))(rest), {name: both[name] for name in rest})
  assert max(np.abs(g).max() for g in jax.tree.leaves(both['discriminators'])) > 1e-4


def test_the_generator_feels_the_discriminators():
  without = configs.replace(
      TRAINING, weights=objective.LossWeights(adversarial=0.0, feature=0.0, waveform=1.0))
  (_, aux), alone = gradient(without, batch())
  _, both = gradient(TRAINING, batch())
  assert 'discriminator' not in aux.metrics
  assert any(np.abs(a - b).max() > 1e-7 for a, b in zip(
      jax.tree.leaves(alone['decoder']), jax.tree.leaves(both['decoder'])))
  assert all(np.abs(g).max() == 0 for g in jax.tree.leaves(alone['discriminators']))
  assert without.active() == {'generator': True, 'discriminator': False}
  assert TRAINING.active() == {'generator': True, 'discriminator': True}


def test_groups_cover_all_parameters():
  _, params, _ = split()
  assert {TRAINING.group((name,)) for name in params} == set(TRAINING.groups)
  assert TRAINING.group(('encoder', 'first', 'w')) == 'generator'


def test_two_microbatches_are_one_batch():
  whole = batch()
  (loss, aux), grads = gradient(TRAINING, whole)
  parts = [gradient(TRAINING, jax.tree.map(lambda x, i=i: x[i::2], whole)) for i in range(2)]
  mean = lambda *xs: sum(xs) / 2
  close(mean(*(p[0][0] for p in parts)), loss)
  close(jax.tree.map(mean, *(p[0][1].metrics for p in parts)), aux.metrics)
  close(jax.tree.map(mean, *(p[1] for p in parts)), grads, atol=1e-5)
  close(jax.tree.map(jnp.add, *(p[0][1].statistics for p in parts)), aux.statistics, atol=1e-5)


def test_quantizer_dropout_draws_every_number_of_levels():
  slots = jnp.arange(400)
  drawn = TRAINING._levels(jax.random.key(0), slots)
  shares = np.bincount(drawn, minlength=5)[1:4] / 400
  np.testing.assert_allclose(shares, 1 / 3, atol=0.08)
  half = configs.replace(TRAINING, dropout_share=0.0)._levels(jax.random.key(0), slots)
  np.testing.assert_array_equal(half, 3)
  np.testing.assert_array_equal(drawn[7:9], TRAINING._levels(jax.random.key(0), slots[7:9]))


def test_the_start_fits_the_codebooks_to_the_first_batch():
  graph, params, buffers = split()
  given = batch()
  started = jax.jit(
      lambda p, b, x: TRAINING.start(nnx.merge(graph, p, b), x, jax.random.key(1)))(params, buffers, given)
  assert shapes(started) == shapes(buffers)

  def error(b):
    model = nnx.merge(graph, params, b)
    latents = model.encode_latents(given['audio'])
    return float(jnp.mean((latents - model.quantizer.decode(model.quantizer.encode(latents))) ** 2))

  power = float(jnp.mean(nnx.merge(graph, params, buffers).encode_latents(given['audio']) ** 2))
  assert error(started) < 0.2 * power < error(buffers)


def test_update_moves_the_codebooks_only():
  _, params, buffers = split()
  (_, aux), _ = gradient(TRAINING, batch())
  after, metrics = TRAINING.update(buffers, aux.statistics, jax.random.key(0))
  levels = {f'{name}_{level}' for name in ('perplexity', 'restarts') for level in (1, 2, 3)}
  assert set(metrics) == levels | {'restarts', 'perplexity_1_floor'}
  assert float(metrics['restarts']) == pytest.approx(np.mean([metrics[f'restarts_{level}'] for level in (1, 2, 3)]))
  assert float(metrics['perplexity_1_floor']) == pytest.approx(0.2 * 8)
  assert jax.tree.map(jnp.shape, after) == jax.tree.map(jnp.shape, buffers)
  assert np.abs(after['quantizer']['codebook'] - buffers['quantizer']['codebook']).max() > 0


def test_it_is_told_who_is_winning():
  (_, aux), _ = gradient(TRAINING, batch())
  for name in ('judged_real', 'judged_decoded'):
    assert 0 <= aux.metrics[name] <= 1
  real = discriminators.Judgement(jnp.array([[2.0, -1.0]]), ())
  fake = discriminators.Judgement(jnp.array([[-3.0, -1.0, 4.0, -4.0]]), ())
  found = discriminators.balance([real], [fake])
  expected = {'logit_real': 0.5, 'logit_decoded': -1.0, 'judged_real': 0.5, 'judged_decoded': 0.75}
  assert found == {name: pytest.approx(value) for name, value in expected.items()}


def test_a_few_steps_reduce_the_reconstruction():
  optax = pytest.importorskip('optax')
  graph, params, buffers = split()
  given = batch()
  adam = optax.adam(3e-3)

  @jax.jit
  def step(params, buffers, state, key):
    loss = lambda p: TRAINING.loss(nnx.merge(graph, p, buffers), given, key, training=True)
    (_, aux), grads = jax.value_and_grad(loss, has_aux=True)(params)
    updates, state = adam.update(grads, state)
    buffers, _ = TRAINING.update(buffers, aux.statistics, key)
    return optax.apply_updates(params, updates), buffers, state, aux.metrics['reconstruction']

  state, losses = adam.init(params), []
  for i in range(60):
    params, buffers, state, loss = step(params, buffers, state, jax.random.key(i))
    losses.append(float(loss))
  assert np.isfinite(losses).all() and np.mean(losses[-5:]) < 0.8 * np.mean(losses[:5])


def test_evaluation_reports_quality_by_number_of_levels():
  graph, params, buffers = split()
  training = configs.replace(TRAINING, seconds=0.1)
  model = nnx.merge(graph, params, buffers)
  x = np.random.default_rng(0).uniform(-0.5, 0.5, size=(3, 2, training.samples)).astype(np.float32)
  x[0, 1] = x[1] = 0  # clips without any sound have no SI-SDR, here a whole batch of them
  loss = jax.jit(lambda given, key: training.loss(model, given, key, training=False))
  found = metrics.held_out(training, loss, [{'audio': a, 'slot': jnp.arange(2)} for a in x], jax.random.key(0))
  clips = x.reshape(-1, x.shape[-1])
  for levels, name in ((TRAINING.codec.levels, ''), (1, '_1_levels')):
    decoded = np.asarray(jax.jit(lambda x, n=levels: model.decode(model.encode(x, n)))(clips))
    ratio = spectral.si_sdr(clips, decoded)
    assert np.isnan(ratio).sum() == 3
    assert found[f'si_sdr{name}'] == pytest.approx(np.nanmean(ratio), rel=1e-3)
    assert found[f'log_mel_distance{name}'] == pytest.approx(
        float(np.mean(spectral.log_mel_distance(clips, decoded))), rel=1e-3)
  assert found['si_sdr'] != pytest.approx(found['si_sdr_1_levels'], rel=1e-2)
  silent = metrics.held_out(training, loss, [{'audio': x[1], 'slot': jnp.arange(2)}], jax.random.key(0))
  assert 'si_sdr' not in silent and np.isfinite(list(silent.values())).all()


def test_held_out_perplexity_is_that_of_all_batches_together():
  graph, params, buffers = split()
  loss = jax.jit(lambda given: TRAINING.loss(
      nnx.merge(graph, params, buffers), given, jax.random.key(0), training=False))
  given = [batch(seed=seed) for seed in (1, 2)]
  found = metrics.held_out(TRAINING, lambda x, key: loss(x), given, jax.random.key(0))
  encode = jax.jit(nnx.merge(graph, params, buffers).encode)
  codes_BxFxQ = np.concatenate([encode(x['audio']) for x in given])
  count_QxK = token_counts.level_counts(codes_BxFxQ, TRAINING.codec.codebook_size)
  for level, count_K in enumerate(count_QxK):
    assert found[f'perplexity_{level + 1}'] == pytest.approx(token_counts.perplexity(count_K), rel=1e-5)
    assert found[f'codes_used_share_{level + 1}'] == pytest.approx(np.mean(count_K > 0))
  assert found['perplexity_frames'] == codes_BxFxQ[..., 0].size
  alone = metrics.held_out(TRAINING, lambda x, key: loss(x), given[:1], jax.random.key(0))
  assert alone['perplexity_1'] != pytest.approx(found['perplexity_1'], rel=1e-3)


def test_media_are_the_clips_and_their_reconstructions():
  training = configs.replace(TRAINING, codec=configs.replace(TRAINING.codec, levels=6))
  model = training.model(nnx.Rngs(0))
  given = batch(2)
  media = jax.jit(training.media)(model, given)
  assert media.sample_rate == training.codec.sample_rate
  assert list(media.audio) == ['levels_01', 'levels_04', 'levels_06', 'original']
  np.testing.assert_array_equal(media.audio['original'], given['audio'])
  for levels in (1, 4, 6):
    decoded = model.decode(model.encode(given['audio'], levels))
    np.testing.assert_allclose(media.audio[f'levels_{levels:02}'], decoded, rtol=1e-4, atol=1e-5)


def magnitudes(audio_BxN, window):
  """Mel spectrograms of the transform as it is, again and in NumPy."""
  hop = window // 4
  padded = np.pad(audio_BxN, ((0, 0), ((window - hop) // 2, window)))
  frames = np.lib.stride_tricks.sliding_window_view(padded, window, axis=1)[:, ::hop][:, :audio_BxN.shape[1] // hop]
  config = spectral.MelConfig(window=window, hop=hop, bands=TRAINING.bands)
  return np.abs(np.fft.rfft(frames * spectral.hann(window))) @ spectral.mel_matrix(config)


def test_reconstruction_loss_is_equation_4():
  x, y = (np.asarray(batch(seed=seed)['audio'], np.float64) for seed in (0, 1))
  expected, unit = 0.0, 0.0
  for window in TRAINING.windows:
    a, b = magnitudes(x, window), magnitudes(y, window)
    floor = TRAINING.floor * window / 4
    logs = np.linalg.norm(np.log(np.maximum(a, floor)) - np.log(np.maximum(b, floor)), axis=-1)
    expected = expected + np.mean(np.abs(a - b).sum(-1) + np.sqrt(window / 2) * logs, axis=-1)
    unit += np.sqrt(window / 2) * np.sqrt(TRAINING.bands)
  np.testing.assert_allclose(TRAINING.reconstruction(x, y), expected, rtol=2e-3)
  np.testing.assert_allclose(TRAINING.reconstruction(x, x), 0, atol=0.01)
  assert TRAINING.unit == pytest.approx(unit)


def test_the_objective_survives_its_json():
  assert specs.from_json(specs.to_json(TRAINING)) == TRAINING


def test_a_crop_of_partial_frames_is_refused():
  with pytest.raises(ValueError, match='250 samples.*stride of 48'):
    configs.replace(TRAINING, seconds=250 / 24000)
