import dataclasses

from flax import nnx
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest

from musiclm_jax.nn.transformer import TransformerConfig
from musiclm_jax.specs import Stage, TokenSpec
from musiclm_jax.token_lm import sample as sampling
from musiclm_jax.token_lm.draw import draw, Sampling
from musiclm_jax.token_lm.model import Points
from musiclm_jax.token_lm.objective import NextToken
from musiclm_jax.token_lm.sample import row_nats, sample, sample_rows
from musiclm_jax.token_lm.sequence import build, codes

MULAN, SEMANTIC = TokenSpec('mulan', 16, 3), TokenSpec('semantic', 16, 1, 25)
ACOUSTIC = TokenSpec('acoustic', 16, 6, 50)
COARSE, FINE = ACOUSTIC.part('coarse', 0, 2), ACOUSTIC.part('fine', 2, 4)
STAGES = {'semantic': Stage('semantic', (MULAN,), SEMANTIC, 0.4),
          'coarse': Stage('coarse', (MULAN, SEMANTIC), COARSE, 0.2),
          'fine': Stage('fine', (COARSE,), FINE, 0.12),
          'points': Stage('points', (MULAN, SEMANTIC), COARSE, 0.2),
          'unconditional': Stage('unconditional', (), SEMANTIC, 0.4)}
POINTS = {'points': Points(8, noise=0.3, continuous=True)}
NET = TransformerConfig(width=32, depth=2, heads=2, mlp_width=48, dropout=0.1)


def objective_of(name: str, **changes) -> NextToken:
  return NextToken(STAGES[name], dataclasses.replace(NET, **changes), points=POINTS.get(name))


def batch_of(stage: Stage, size: int = 4) -> dict[str, jax.Array]:
  shape = lambda spec: (size, spec.frames(stage.seconds), spec.levels)
  streams = {s.feature: jax.random.randint(jax.random.key(i), shape(s), 0, 16)
             for i, s in enumerate((MULAN, SEMANTIC, ACOUSTIC))}
  return {**streams, 'slot': jnp.arange(size)}


@pytest.mark.parametrize('positions', ['rotary', 't5'])
@pytest.mark.parametrize('name', STAGES)
def test_greedy_cached_sampling_is_the_full_pass(name, positions):
  objective = objective_of(name, positions=positions)
  model, batch = objective.model(nnx.Rngs(0)), batch_of(objective.stage)
  keys = jax.random.split(jax.random.key(0), 4)
  found = sample(model, objective.layout, batch, keys, Sampling(0.0))
  logits = model.target_logits(build(objective.layout, batch, found), objective.layout)
  np.testing.assert_array_equal(found, jnp.argmax(logits, axis=-1))
  continued = sample(model, objective.layout, batch, keys, Sampling(0.0), prefix_BxFxQ=found[:, :3])
  np.testing.assert_array_equal(continued, found)


def test_a_draw_does_not_depend_on_its_batch():
  objective = objective_of('coarse')
  model, batch = objective.model(nnx.Rngs(0)), batch_of(objective.stage)
  keys = jax.random.split(jax.random.key(0), 4)
  whole = sample(model, objective.layout, batch, keys, Sampling(1.0))
  part = sample(model, objective.layout, {k: v[2:] for k, v in batch.items()}, keys[2:], Sampling(1.0))
  np.testing.assert_array_equal(whole[2:], part)
  assert not np.array_equal(whole, sample(model, objective.layout, batch, keys[::-1], Sampling(1.0)))


def test_guidance_zero_ignores_the_condition_and_one_is_plain():
  objective = objective_of('semantic')
  model, batch = objective.model(nnx.Rngs(0)), batch_of(objective.stage)
  other = {**batch, 'mulan': (batch['mulan'] + 5) % 16}
  keys = jax.random.split(jax.random.key(0), 4)
  run = lambda streams, guidance: sample(model, objective.layout, streams, keys, Sampling(1.0, guidance=guidance))
  np.testing.assert_array_equal(run(batch, 0.0), run(other, 0.0))
  np.testing.assert_array_equal(run(batch, 1.0 + 1e-7), run(batch, 1.0))
  nothing = sample(model, objective.layout, batch, keys, Sampling(1.0), keep={'mulan': jnp.zeros((4,), int)})
  np.testing.assert_array_equal(nothing, run(batch, 0.0))


def test_guidance_is_towards_the_text_and_keeps_what_follows_the_music():
  objective = objective_of('coarse')
  model, batch = objective.model(nnx.Rngs(0)), batch_of(objective.stage)
  keys = jax.random.split(jax.random.key(0), 4)
  run = lambda streams, **options: sample(model, objective.layout, streams, keys, **options)
  without_text = run(batch, sampling=Sampling(1.0), keep={'mulan': jnp.zeros((4,), int)})
  np.testing.assert_array_equal(run(batch, sampling=Sampling(1.0, guidance=0.0)), without_text)
  other = {**batch, 'semantic': (batch['semantic'] + 5) % 16}
  assert not np.array_equal(run(other, sampling=Sampling(1.0, guidance=0.0)), without_text)
  both = run(batch, sampling=Sampling(1.0, guidance=0.0), keep={'semantic': jnp.zeros((4,), int)})
  assert not np.array_equal(both, without_text)
  fine = objective_of('fine')
  model, batch = fine.model(nnx.Rngs(0)), batch_of(fine.stage)
  plain, guided = (sample(model, fine.layout, batch, keys, Sampling(1.0, guidance=g)) for g in (1.0, 7.0))
  np.testing.assert_array_equal(plain, guided)


def test_new_numbers_do_not_compile_again():
  objective = objective_of('semantic')
  model, batch = objective.model(nnx.Rngs(0)), batch_of(objective.stage)
  keys = jax.random.split(jax.random.key(0), 4)
  sample(model, objective.layout, batch, keys, Sampling(1.0))
  before = sampling._sample_rows._cache_size()
  other = {**batch, 'mulan': batch['mulan'][::-1]}
  sample(model, objective.layout, other, keys[::-1], Sampling(0.3, top_k=4, top_p=0.5))
  assert sampling._sample_rows._cache_size() == before


def test_truncated_draws():
  logits = jnp.log(jnp.array([[0.5, 0.25, 0.15, 0.1]]))
  keys = jax.random.split(jax.random.key(0), 400)
  def support(**changes):
    s = Sampling(**changes)
    draws = draw(jnp.tile(logits, (400, 1)), keys, s.numbers)
    return set(draws.tolist())
  assert support() == {0, 1, 2, 3}
  assert support(top_k=2) == {0, 1}
  assert support(top_p=0.6) == {0, 1}
  assert support(top_p=0.01) == {0}
  assert support(temperature=0.0) == {0}


@pytest.mark.parametrize('bad', [{'temperature': float('nan')}, {'temperature': -1}, {'top_p': 0}, {'top_k': -1}])
def test_impossible_sampling_is_refused(bad):
  with pytest.raises(ValueError, match='sampling needs'):
    Sampling(**bad)


@pytest.mark.parametrize('name', STAGES)
def test_loss_is_that_of_the_target_alone(name):
  objective = objective_of(name)
  model, batch = objective.model(nnx.Rngs(0)), batch_of(objective.stage)
  nats = objective.token_nats(model, batch)
  assert nats.shape == codes(batch, objective.stage.target).shape
  # A fresh model is near the uniform distribution over one codebook, never over the whole vocabulary.
  assert float(nats.mean()) == pytest.approx(np.log(16), abs=0.1)


def test_every_target_token_is_predicted_without_seeing_itself_or_later_ones():
  objective = objective_of('coarse')
  model, batch = objective.model(nnx.Rngs(0)), batch_of(objective.stage)
  base = objective.token_nats(model, batch)
  changed = objective.token_nats(model, {**batch, 'acoustic': batch['acoustic'].at[:, 5, 1].add(1) % 16})
  same = np.isclose(base, changed, atol=1e-5)
  flat = same.reshape(4, -1)
  assert flat[:, :11].all() and not flat[:, 11].all()
  assert not flat[:, 12:].all(axis=1).any()


@pytest.mark.parametrize('name', STAGES)
def test_likelihood_of_rows_is_that_of_the_objective(name):
  objective = objective_of(name)
  model, batch = objective.model(nnx.Rngs(0)), batch_of(objective.stage)
  rows = build(objective.layout, batch, codes(batch, objective.stage.target))
  nats = row_nats(model, rows, objective.layout.positions_2xL, objective.layout.condition_length)
  given = objective.layout.condition_length
  assert not nats[:, :given].any()
  np.testing.assert_allclose(nats[:, given:], objective.token_nats(model, batch).reshape(4, -1), atol=1e-5)


@pytest.mark.parametrize('name', ['coarse', 'points'])
@pytest.mark.parametrize('stream', ['mulan', 'semantic'])
def test_conditions_are_used_and_can_be_dropped(name, stream):
  objective = objective_of(name)
  model, batch = objective.model(nnx.Rngs(0)), batch_of(objective.stage)
  other = {**batch, stream: (batch[stream] + 3) % 16}
  assert not np.allclose(objective.token_nats(model, batch), objective.token_nats(model, other), atol=1e-5)
  keep = {stream: jnp.zeros((4,), int)}
  dropped = [objective.token_nats(model, streams, keep=keep) for streams in (batch, other)]
  np.testing.assert_allclose(*dropped, atol=1e-6)


def test_training_truncates_and_drops_conditions_at_the_stated_rates():
  objective = dataclasses.replace(objective_of('coarse'), condition_dropout=0.25)
  shown = objective._shown_levels(jax.random.split(jax.random.key(0), 4000))
  mulan, semantic = np.asarray(shown['mulan']), np.asarray(shown['semantic'])
  assert set(mulan) == {0, 1, 2, 3} and set(semantic) == {0, 1}
  assert np.mean(mulan == 0) == pytest.approx(0.25, abs=0.03)
  assert np.mean(semantic == 0) == pytest.approx(0.25, abs=0.03)
  for levels in (1, 2, 3):
    assert np.mean(mulan == levels) == pytest.approx(0.75 / levels / (1 + 1 / 2 + 1 / 3), abs=0.03)


def test_points_are_heard_level_by_level():
  model, batch = objective_of('points').model(nnx.Rngs(0)), batch_of(STAGES['points'])
  rows = build(objective_of('points').layout, batch, codes(batch, COARSE), keep={'mulan': jnp.array([3, 2, 0, 3])})
  found, plain, codebook = model.embed(rows), model.embedding(rows), model.mulan.codebook[...]
  np.testing.assert_array_equal(found[:, 3:], plain[:, 3:])
  for b, shown in enumerate((3, 2, 0, 3)):
    for level in range(3):
      point = sum(codebook[q, batch['mulan'][b, 0, q]] for q in range(level + 1))
      wanted = model.point(point) if level < shown else plain[b, level]
      np.testing.assert_allclose(found[b, level], wanted, atol=1e-5)


def test_a_point_beside_another_has_its_first_codes_and_its_distance():
  objective = objective_of('points')
  model = objective.model(nnx.Rngs(0))
  # Levels each a quarter as large as the one before, as those of a fitted quantizer are; points near length 1.
  first = model.mulan.codebook[...] / jnp.linalg.norm(model.mulan.codebook[...], axis=-1, keepdims=True)
  model.mulan.codebook[...] = first / 4.0 ** jnp.arange(3)[:, None, None]
  on_sphere = jax.random.normal(jax.random.key(1), (500, 1, 8))
  clip = model.mulan.encode(on_sphere / jnp.linalg.norm(on_sphere, axis=-1, keepdims=True))
  share = {}
  for noise in (1e-6, 0.1, 0.5):
    model.points = dataclasses.replace(objective.points, noise=noise)
    beside = model.beside(clip, jax.random.split(jax.random.key(0), 500))
    assert beside.shape == clip.shape
    share[noise] = np.asarray((beside == clip).mean((0, 1)))
  assert share[1e-6][0] > 0.95 and share[0.1][0] > 0.85  # but for what scaling back to length 1 moves
  assert share[0.5][1] < share[0.1][1] - 0.2 and (np.diff(share[0.5]) < -0.1).all()


def test_noise_is_an_examples_own_and_of_training_alone():
  objective = dataclasses.replace(objective_of('points', dropout=0.0), condition_dropout=0.0, truncate=())
  model, batch = objective.model(nnx.Rngs(0)), batch_of(objective.stage)
  loss = lambda batch, training, key=jax.random.key(0): float(objective.loss(model, batch, key, training=training)[0])
  assert loss(batch, False) == loss(batch, False, jax.random.key(1))
  assert loss(batch, True) != loss(batch, True, jax.random.key(1))  # nothing but the noise is random
  halves = [{k: v[part] for k, v in batch.items()} for part in (slice(0, 2), slice(2, 4))]
  assert np.mean([loss(half, True) for half in halves]) == pytest.approx(loss(batch, True), abs=1e-6)


def test_points_need_mulan_tokens_first():
  for name in ('fine', 'unconditional'):
    with pytest.raises(ValueError, match=f'the {name} stage has no MuLan tokens'):
      dataclasses.replace(objective_of(name), points=Points(8))


@pytest.mark.parametrize('name', ['coarse', 'points'])
@pytest.mark.parametrize('guided', [False, True])
def test_sampling_can_be_exported_for_any_batch_and_length(name, guided):
  objective = objective_of(name)
  model, batch = objective.model(nnx.Rngs(0)), batch_of(objective.stage)
  graphdef, state = nnx.split(model)
  state = nnx.to_pure_dict(state)

  def run(state, rows, null, positions, condition_length, key_data, numbers):
    merged = nnx.merge(graphdef, state)
    return sample_rows(merged, rows, null, positions, condition_length, jax.random.wrap_key_data(key_data), numbers)

  b, t, n = jax.export.symbolic_shape('b, t, n', constraints=('t >= 3',) if name == 'points' else ())
  of = jax.ShapeDtypeStruct
  rows = of((b, t), jnp.int32)
  shapes = (jax.tree.map(lambda x: of(x.shape, x.dtype), state), rows, rows if guided else None,
            of((2, t + n), jnp.float32), of((), jnp.int32), of((b, 2), jnp.uint32),
            jax.tree.map(lambda x: of(x.shape, x.dtype), Sampling().numbers))
  exported = jax.export.export(jax.jit(run))(*shapes)
  layout, numbers = objective.layout, Sampling(1.0, guidance=2.0).numbers
  keys = jax.random.key_data(jax.random.split(jax.random.key(0), 4))
  for size, frames in ((4, 0), (2, 4)):
    target = codes(batch, objective.stage.target)[:size, :frames]
    part = {k: v[:size] for k, v in batch.items()}
    rows = build(layout, part, target)
    null = build(layout, part, target, keep={'mulan': jnp.zeros((size,), jnp.int32)}) if guided else None
    arrays = (rows, null, layout.positions_2xL, np.int32(layout.condition_length), keys[:size], numbers)
    np.testing.assert_array_equal(exported.call(state, *arrays), run(state, *arrays))
