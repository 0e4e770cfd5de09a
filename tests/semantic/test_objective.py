"""The w2v-BERT losses: hand-made cases, independence of microbatches, what masked frames may see, parity."""
from __future__ import annotations

import dataclasses
import functools
import math

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from musiclm_jax.semantic import objective as ours
from musiclm_jax.semantic.model import GumbelQuantizer
from tests.semantic import configs

KEY = jax.random.key(3)


@functools.cache
def _loss():
  """Objective, its state, and the jitted loss with gradient, shared by the tests to compile once."""
  objective = configs.training()
  graphdef, params, buffers = configs.split(configs.started(objective))

  @functools.partial(jax.jit, static_argnames='training')
  def run(params, buffers, batch, *, training=True):
    def loss(params):
      return objective.loss(nnx.merge(graphdef, params, buffers), batch, KEY, training=training)
    return jax.value_and_grad(loss, has_aux=True)(params)

  return objective, params, buffers, run


def test_span_mask_has_the_number_of_starts_it_was_asked_for():
  keys = jax.random.split(KEY, 200)
  masks = np.asarray(jax.vmap(lambda k: ours.span_mask(k, 30, 3, 5))(keys))
  counts = masks.sum(1)
  assert counts.min() >= 5 and counts.max() == 15
  assert 5 < counts.mean() < 15
  # A frame in the middle is masked more often than the first, and both sometimes.
  assert masks[:, 15].mean() > masks[:, 0].mean() > 0
  single = np.asarray(jax.vmap(lambda k: ours.span_mask(k, 30, 1, 5))(keys))
  assert np.all(single.sum(1) == 5) and np.all(np.abs(np.diff(single.astype(int))).sum(1) <= 2)


def test_spans_lie_within_a_shorter_clip():
  keys = jax.random.split(KEY, 200)
  masks = lambda length: np.asarray(jax.vmap(lambda k: ours.span_mask(k, 30, 3, 5, length))(keys))
  whole, short = masks(jnp.int32(30)), masks(jnp.int32(12))
  np.testing.assert_array_equal(whole, np.asarray(jax.vmap(lambda k: ours.span_mask(k, 30, 3, 5))(keys)))
  assert not short[:, 12:].any() and short.sum(1).min() == 5 and 5 < short.sum(1).mean() < whole.sum(1).mean()
  assert (masks(jnp.int32(3)) == (np.arange(30) < 3)).all(), 'cut where the clip is shorter than a span'


def test_what_follows_a_clip_is_not_heard_and_counts_in_nothing():
  objective, params, buffers, _ = _loss()
  graphdef, *_ = configs.split(objective.model(nnx.Rngs(0)))
  run = jax.jit(lambda batch: objective.loss(nnx.merge(graphdef, params, buffers), batch, KEY, training=True))
  batch = configs.batch(objective)
  half = objective.samples // 2
  length = jnp.array([objective.samples, half] * (len(batch['audio']) // 2), jnp.int32)
  cut = jnp.where(jnp.arange(objective.samples) < length[:, None], batch['audio'], 0)
  padded = {**batch, 'length': length, 'audio': cut}
  first, second = run(padded), run({**batch, 'length': length})
  jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), first, second)
  np.testing.assert_allclose(first[1].statistics['hard'].sum(-1), len(batch['audio']), rtol=1e-5)
  heard = {**batch, 'length': jnp.full_like(length, objective.samples)}
  (loss, _), (plain, _) = run(heard), run(batch)
  np.testing.assert_allclose(loss, plain, rtol=1e-6)
  assert abs(float(loss) - float(first[0])) > 1e-4


def test_codes_of_heard_frames_count_as_much_as_is_said():
  objective, params, buffers, _ = _loss()
  graphdef, *_ = configs.split(objective.model(nnx.Rngs(0)))
  batch = configs.batch(objective)
  half = {**batch, 'length': jnp.full(len(batch['audio']), objective.samples // 2, jnp.int32)}

  @functools.partial(jax.jit, static_argnums=0)
  def run(weight, batch):
    return dataclasses.replace(objective, heard_weight=weight).loss(
        nnx.merge(graphdef, params, buffers), batch, KEY, training=False)

  (none, without), (some, _), (one, aux) = (run(weight, batch) for weight in (0.0, 0.5, 1.0))
  np.testing.assert_allclose(one - none, 2 * (some - none), rtol=1e-4)
  assert 0.5 < float(one - none) / float(without.metrics['masked_cross_entropy']) < 2
  assert 'heard_accuracy' not in without.metrics and 0 <= float(aux.metrics['heard_accuracy']) <= 1
  # What follows a clip counts in nothing.
  cut = {**half, 'audio': jnp.where(jnp.arange(objective.samples) < objective.samples // 2, batch['audio'], 0)}
  np.testing.assert_allclose(run(1.0, cut)[0], run(1.0, half)[0], rtol=1e-5)


def test_heard_frames_are_those_of_the_clip_that_are_not_masked(monkeypatch):
  objective, params, buffers, _ = _loss()
  graphdef, *_ = configs.split(objective.model(nnx.Rngs(0)))
  batch = configs.batch(objective)
  frames = jnp.array([objective.frames, objective.frames // 2] * (len(batch['audio']) // 2))
  counted, loss_of = [], ours.prediction_loss
  monkeypatch.setattr(ours, 'prediction_loss', lambda logits, ids, where: counted.append(where) or loss_of(
      logits, ids, where))
  short = {'length': frames * objective.encoder.samples_per_frame}
  for length, clips in ({}, objective.frames), (short, frames[:, None]):
    counted.clear()
    dataclasses.replace(objective, heard_weight=0.5).loss(
        nnx.merge(graphdef, params, buffers), {**batch, **length}, KEY, training=False)
    masked, heard = map(np.asarray, counted)
    assert masked.any() and heard.any() and not (masked & heard).any()
    np.testing.assert_array_equal(masked | heard, jnp.broadcast_to(jnp.arange(objective.frames) < clips, masked.shape))


def test_prediction_loss_is_that_of_the_frames_it_is_asked_of():
  logits = jnp.zeros((1, 4, 1, 2)).at[0, :, 0, 0].set(jnp.array([9.0, 9.0, -9.0, -9.0]))
  ids = jnp.zeros((1, 4, 1), jnp.int32)
  for where, share in (((1, 1, 0, 0), 1.0), ((0, 0, 1, 1), 0.0), ((0, 1, 1, 1), 1 / 3)):
    loss, right = ours.prediction_loss(logits, ids, jnp.array([where], bool))
    np.testing.assert_allclose(right, [share], rtol=1e-6)
    np.testing.assert_allclose(loss, [9 * (1 - share)], atol=1e-3)


def test_the_start_hears_the_clips_alone():
  objective = configs.training()
  batch = configs.batch(objective)
  length = jnp.full(len(batch['audio']), objective.samples // 2, jnp.int32)
  start = lambda **more: objective.start(objective.model(nnx.Rngs(0)), {**batch, **more}, KEY)
  cut = jnp.where(jnp.arange(objective.samples) < length[:, None], batch['audio'], 0)
  jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5), start(audio=cut, length=length),
               start(length=length))
  whole = start(length=2 * length)
  jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5), whole, start())
  assert np.abs(start(audio=cut)['mel_mean'] - start(length=length)['mel_mean']).max() > 0.1


def test_distractors_are_other_masked_frames_and_all_of_them():
  masked = jnp.asarray([0, 1, 1, 0, 0, 1, 1, 0], bool)
  counts = np.asarray(ours.negative_counts(KEY, masked, 300))[np.asarray(masked)]
  assert np.all(counts.sum(1) == 300)
  assert not counts[:, ~np.asarray(masked)].any()
  among = counts[:, np.asarray(masked)]
  assert np.all(np.diag(among) == 0)
  assert np.all(among[~np.eye(4, dtype=bool)] > 60)  # 100 expected


def test_contrastive_loss_by_hand():
  rng = np.random.default_rng(0)
  context, target = rng.normal(size=(2, 1, 6, 4)).astype(np.float32)
  masked = jnp.asarray([[1, 1, 0, 1, 1, 0]], bool)
  counts = jax.vmap(lambda m: ours.negative_counts(KEY, m, 5))(masked)
  loss, _ = ours.contrastive_loss(context, target, masked, counts, temperature=0.1)
  cosine = (context[0] @ target[0].T) / np.outer(
      np.linalg.norm(context[0], axis=1), np.linalg.norm(target[0], axis=1))
  expected = []
  for t in np.flatnonzero(masked[0]):
    drawn = np.repeat(np.arange(6), np.asarray(counts[0, t]).astype(int))
    logits = np.concatenate([[cosine[t, t]], cosine[t, drawn]]) / 0.1
    expected.append(np.log(np.exp(logits - logits[0]).sum()))
  np.testing.assert_allclose(loss, [np.mean(expected)], rtol=1e-4)


def test_contrastive_loss_of_perfect_and_of_collapsed_targets():
  masked = jnp.ones((1, 6), bool)
  counts = jax.vmap(lambda m: ours.negative_counts(KEY, m, 50))(masked)
  distinct = jnp.eye(6)[None]
  loss, found = ours.contrastive_loss(distinct, distinct, masked, counts, temperature=0.1)
  assert float(loss[0]) < 0.01 and float(found[0]) == 1
  pairs = jnp.repeat(jnp.eye(3), 2, axis=0)[None]  # two frames a code
  loss, found = ours.contrastive_loss(pairs, pairs, masked, counts, temperature=0.1)
  assert float(loss[0]) > 1 and float(found[0]) == 1
  same = jnp.ones((1, 6, 6))
  loss, found = ours.contrastive_loss(same, same, masked, counts, temperature=0.1)
  np.testing.assert_allclose(loss, np.log(51), rtol=1e-5)
  assert float(found[0]) == 0


def test_diversity_is_the_perplexity_loss_where_the_average_is_up_to_date():
  logits = jax.random.normal(KEY, (3, 5, 2, 8))

  def batch_form(logits):
    usage = jnp.mean(jax.nn.softmax(logits, -1), axis=(0, 1))
    return jnp.mean(1 - jnp.exp(-jnp.sum(usage * jnp.log(usage), -1)) / 8)

  usage = jnp.mean(jax.nn.softmax(logits, -1), axis=(0, 1))
  mean_form = lambda logits: jnp.mean(ours.diversity_loss(jax.nn.softmax(logits, -1), usage))
  np.testing.assert_allclose(mean_form(logits), batch_form(logits), rtol=1e-5)
  np.testing.assert_allclose(jax.grad(mean_form)(logits), jax.grad(batch_form)(logits), atol=1e-7)


def test_diversity_is_zero_for_uniform_and_near_one_for_one_code():
  uniform = jnp.full((2, 5, 1, 8), 1 / 8)
  one = jax.nn.one_hot(jnp.zeros((2, 5, 1), int), 8)
  np.testing.assert_allclose(ours.diversity_loss(uniform, uniform[0, 0]), 0, atol=1e-6)
  np.testing.assert_allclose(ours.diversity_loss(one, one[0, 0]), 1 - 1 / 8, atol=1e-6)


@pytest.mark.slow
def test_microbatches_do_not_change_the_loss():
  objective, params, buffers, run = _loss()
  batch = configs.batch(objective)
  # Usage far from uniform, so that the diversity term has a gradient.
  usage = jax.nn.softmax(jax.random.normal(KEY, buffers['soft_usage'].shape))
  buffers = {**buffers, 'soft_usage': usage}
  (loss, aux), gradient = run(params, buffers, batch)
  parts = [run(params, buffers, {k: v[i:i + 2] for k, v in batch.items()}) for i in (0, 2)]
  np.testing.assert_allclose(loss, np.mean([part[0][0] for part in parts]), rtol=1e-5)
  mean = jax.tree.map(lambda a, b: (a + b) / 2, *(part[1] for part in parts))
  jax.tree.map(functools.partial(np.testing.assert_allclose, atol=2e-5), gradient, mean)
  total = jax.tree.map(jnp.add, *(part[0][1].statistics for part in parts))
  jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), aux.statistics, total)


def test_every_term_reaches_the_parameters_it_is_there_for():
  objective, params, buffers, run = _loss()
  buffers = {**buffers, 'soft_usage': jax.nn.softmax(jax.random.normal(KEY, buffers['soft_usage'].shape))}
  _, gradient = run(params, buffers, configs.batch(objective))
  unused = [jax.tree_util.keystr(path) for path, g in jax.tree_util.tree_leaves_with_path(gradient)
            if not np.any(np.abs(np.asarray(g)) > 0)]
  assert not unused


def test_a_masked_frame_does_not_see_itself():
  objective = configs.training()
  features = jax.random.normal(KEY, (3, objective.frames, 16))
  keys = jax.random.split(KEY, 3)
  inputs, masked = objective.masked(features, keys)
  assert 0 < np.mean(masked) < 1
  other, _ = objective.masked(features + 1, keys)
  np.testing.assert_array_equal(np.all(np.asarray(inputs == other), axis=-1), masked)
  np.testing.assert_array_equal(np.asarray(inputs)[~np.asarray(masked)], np.asarray(features)[~np.asarray(masked)])


def test_update_averages_usage_and_counts_the_step():
  objective, params, buffers, run = _loss()
  first, second = (run(params, buffers, configs.batch(objective, seed=s))[0][1].statistics for s in (1, 2))
  one, _ = objective.update(buffers, first, KEY)
  np.testing.assert_allclose(one['hard_usage'], first['hard'] / 4, rtol=1e-6)  # no trace of the uniform start
  two, _ = objective.update(one, second, KEY)
  np.testing.assert_allclose(two['hard_usage'], (first['hard'] + second['hard']) / 8, rtol=1e-5)
  late, _ = objective.update({**one, 'steps': jnp.int32(10_000)}, second, KEY)
  np.testing.assert_allclose(late['hard_usage'], 0.99 * one['hard_usage'] + 0.01 * second['hard'] / 4, rtol=1e-4)
  assert int(two['steps']) == 2
  np.testing.assert_allclose(two['soft_usage'].sum(-1), 1, rtol=1e-5)


def test_gumbel_temperature_is_annealed_and_then_stays():
  objective = configs.training()
  temperatures = [float(objective.gumbel_temperature(jnp.int32(s))) for s in (0, 50, 100, 1000)]
  np.testing.assert_allclose(temperatures, [2.0, 1.0, 0.5, 0.5], rtol=1e-5)


def test_gumbel_codes_are_drawn_from_the_softmax():
  quantizer = GumbelQuantizer(4, 1, 3, 6, rngs=nnx.Rngs(0))
  x = jnp.broadcast_to(jnp.asarray([0.3, -0.2, 0.1, 0.4]), (1, 4000, 4))
  codes = quantizer(x, temperature=2.0, keys_B=KEY[None])
  vectors = quantizer.project(quantizer.vectors[...][0])
  drawn = np.argmin(((np.asarray(codes.vectors_BxTxE)[0, :, None] - np.asarray(vectors)) ** 2).sum(-1), axis=-1)
  share = np.bincount(drawn, minlength=3) / 4000
  np.testing.assert_allclose(share, codes.probabilities_BxTxGxV[0, 0, 0], atol=0.03)
  assert int(codes.ids_BxTxG[0, 0, 0]) == int(np.argmax(codes.probabilities_BxTxGxV[0, 0, 0]))


def test_evaluation_is_the_same_every_time_and_start_normalises():
  objective, params, buffers, run = _loss()
  batch = configs.batch(objective)
  mel_mean = np.asarray(buffers['mel_mean'])
  assert np.all(mel_mean < -1) and np.all(np.asarray(buffers['mel_deviation']) > 0)
  (first, aux), _ = run(params, buffers, batch, training=False)
  (second, _), _ = run(params, buffers, batch, training=False)
  assert float(first) == float(second)
  assert float(aux.metrics['contrastive_chance']) == pytest.approx(math.log(1 + objective.negatives))
  assert float(aux.metrics['masked_cross_entropy_chance']) == float(aux.metrics['target_entropy'])


def test_every_other_group_starts_from_decorrelated_rows():
  """Two clusters that differ in a direction of little variance: only decorrelated rows show them."""
  generator = np.random.default_rng(0)
  loud = generator.normal(size=(600, 1)) * np.ones((1, 8))
  kind = np.where(np.arange(600) % 2, 1.0, -1.0)
  direction = np.r_[np.ones(4), -np.ones(4)]
  rows = jnp.float32(loud + 0.15 * kind[:, None] * direction + generator.normal(0, 0.1, (600, 8)))
  quantizer = GumbelQuantizer(8, 2, 2, 12, rngs=nnx.Rngs(0))
  agree, loudness = [], []
  for key in jax.random.split(KEY, 7):  # one start in six ends at other clusters of the decorrelated rows
    quantizer.logits.w[...], quantizer.logits.b[...] = quantizer.kmeans_start(rows, key)
    ids = np.asarray(quantizer(rows[None]).ids_BxTxG)[0]
    agree.append([abs(np.corrcoef(group, kind)[0, 1]) for group in ids.T])
    loudness.append([abs(np.corrcoef(group, loud[:, 0])[0, 1]) for group in ids.T])
  agree, loudness = np.median(agree, axis=0), np.median(loudness, axis=0)
  assert agree[0] < 0.2 and agree[1] > 0.9 and loudness[0] > 0.7


def test_silence_starts_with_finite_codes():
  quantizer = GumbelQuantizer(8, 2, 4, 12, rngs=nnx.Rngs(0))
  for start in quantizer.kmeans_start(jnp.full((40, 8), -11.5), KEY):
    assert np.all(np.isfinite(start))


def test_codes_start_as_clusters_of_the_features():
  generator = np.random.default_rng(0)
  cluster = generator.integers(0, 8, 400)
  centres = generator.normal(size=(8, 16))
  # Dimensions of very different spread count alike.
  rows = (centres[cluster] + generator.normal(0, 0.05, (400, 16))) * np.geomspace(0.01, 10, 16) + 3
  quantizer = GumbelQuantizer(16, 2, 8, 12, rngs=nnx.Rngs(0))
  quantizer.logits.w[...], quantizer.logits.b[...] = quantizer.kmeans_start(jnp.float32(rows), KEY)
  ids = np.asarray(quantizer(jnp.float32(rows)[None]).ids_BxTxG)[0]
  for group in ids.T:
    assert len({(c, i) for c, i in zip(cluster, group)}) == 8 == len(set(group))


@pytest.mark.parametrize('targets', ['features', 'spectrogram'])
def test_the_codes_do_not_shape_the_features(targets):
  objective = configs.training(encoder=configs.encoder(targets=targets))
  _, params, buffers = configs.split(objective.model(nnx.Rngs(0)))
  # Where all codes are used alike, diversity has no gradient.
  buffers = {**buffers, 'soft_usage': jax.nn.softmax(jax.random.normal(KEY, buffers['soft_usage'].shape))}
  graphdef, _, _ = configs.split(objective.model(nnx.Rngs(0)))

  @jax.jit
  @jax.grad
  def gradient(params, weight):
    weighted = dataclasses.replace(objective, diversity_weight=weight)
    return weighted.loss(nnx.merge(graphdef, params, buffers), configs.batch(objective), KEY, training=True)[0]

  without, with_diversity = gradient(params, 0.0), gradient(params, 1.0)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
               without['subsampling'], with_diversity['subsampling'])
  difference = np.abs(without['quantizer']['logits']['w'] - with_diversity['quantizer']['logits']['w'])
  assert difference.max() > 1e-5


def test_a_few_steps_learn_the_targets():
  objective, params, buffers, run = _loss()
  optimizer = optax.adam(3e-3)
  state = optimizer.init(params)
  apply = jax.jit(lambda g, s, p: (lambda u, s: (optax.apply_updates(p, u), s))(*optimizer.update(g, s, p)))
  batch, history = configs.batch(objective), []
  for _ in range(60):
    (_, aux), gradient = run(params, buffers, batch)
    params, state = apply(gradient, state, params)
    history.append(float(aux.metrics['masked_cross_entropy']))
  assert np.mean(history[-5:]) < 0.8 * np.mean(history[:5])


@pytest.mark.parametrize('change', [{'seconds': 0.1}, {'mask_span': 1}])
def test_too_short_crops_are_refused(change):
  with pytest.raises(ValueError, match='frames'):
    configs.training(**change)


@pytest.mark.parity
def test_contrastive_and_diversity_losses_are_those_of_wav2vec2():
  torch = pytest.importorskip('torch')
  pytest.importorskip('transformers')
  from transformers.models.wav2vec2_conformer import modeling_wav2vec2_conformer as reference
  from transformers.models.wav2vec2.modeling_wav2vec2 import _sample_negative_indices
  rng = np.random.default_rng(0)
  context, target = rng.normal(size=(2, 2, 12, 6)).astype(np.float32)
  masked = np.zeros((2, 12), bool)
  masked[0, 2:7], masked[1, 4:11] = True, True
  negatives = _sample_negative_indices((2, 12), 9, masked)
  flat = torch.from_numpy(target.reshape(-1, 6))
  logits = reference.Wav2Vec2ConformerForPreTraining.compute_contrastive_logits(
      torch.from_numpy(target)[None], flat[negatives.reshape(-1)].view(2, 12, 9, 6).permute(2, 0, 1, 3),
      torch.from_numpy(context), 0.1)
  each = torch.nn.functional.cross_entropy(
      logits.permute(1, 2, 0).reshape(24, 10), torch.zeros(24, dtype=torch.long), reduction='none').view(2, 12).numpy()
  expected = [each[b][masked[b]].mean() for b in range(2)]

  counts = np.zeros((2, 12, 12), np.float32)
  for b in range(2):
    for t in np.flatnonzero(masked[b]):
      np.add.at(counts[b, t], negatives[b, t] - 12 * b, 1)
  loss, _ = ours.contrastive_loss(context, target, masked, counts, temperature=0.1)
  np.testing.assert_allclose(loss, expected, atol=1e-4)

  probabilities = np.asarray(jax.nn.softmax(jax.random.normal(KEY, (2, 12, 2, 8))))
  perplexity = reference.Wav2Vec2ConformerGumbelVectorQuantizer._compute_perplexity(
      torch.from_numpy(probabilities.reshape(24, 2, 8)))
  diversity = ours.diversity_loss(probabilities, probabilities.mean((0, 1)))
  np.testing.assert_allclose(np.mean(diversity), (16 - float(perplexity)) / 16, atol=1e-4)


@pytest.mark.parity
def test_quantizer_is_the_one_of_wav2vec2():
  torch = pytest.importorskip('torch')
  transformers = pytest.importorskip('transformers')
  from transformers.models.wav2vec2_conformer import modeling_wav2vec2_conformer as reference_module
  torch.manual_seed(0)
  reference = reference_module.Wav2Vec2ConformerGumbelVectorQuantizer(transformers.Wav2Vec2ConformerConfig(
      num_codevector_groups=2, num_codevectors_per_group=8, codevector_dim=12, conv_dim=(16,), conv_stride=(2,),
      conv_kernel=(2,), num_feat_extract_layers=1)).eval()
  torch.nn.init.normal_(reference.codevectors)
  quantizer = GumbelQuantizer(16, 2, 8, 12, rngs=nnx.Rngs(0))
  quantizer.logits.w[...] = reference.weight_proj.weight.detach().numpy().T
  quantizer.logits.b[...] = reference.weight_proj.bias.detach().numpy()
  quantizer.vectors[...] = reference.codevectors.detach().numpy().reshape(2, 8, 6)
  quantizer.project.w[...] = np.eye(12)
  x = np.random.default_rng(0).normal(size=(2, 9, 16)).astype(np.float32)
  vectors, perplexity = reference(torch.tensor(x))
  codes = quantizer(jnp.asarray(x))
  np.testing.assert_allclose(codes.vectors_BxTxE, vectors.detach().numpy(), atol=1e-4)
  usage = np.asarray(jax.nn.one_hot(codes.ids_BxTxG, 8)).mean((0, 1))
  np.testing.assert_allclose(np.exp(-(usage * np.log(np.maximum(usage, 1e-30))).sum(-1)).sum(), float(perplexity),
                             rtol=1e-4)
