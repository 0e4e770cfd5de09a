import dataclasses

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from musiclm_jax import axes
from musiclm_jax.nn import transformer
from musiclm_jax.nn.transformer import Transformer, TransformerConfig, product

SMALL = TransformerConfig(width=16, depth=2, heads=2, mlp_width=24)
VARIANTS = {
    'rotary': {}, 't5': {'positions': 't5'}, 'none': {'positions': 'none'}, 'free head': {'head_dim': 6},
    'layer norm': {'norm': 'layer', 'bias': True, 'gated': False}, 'post norm': {'norm_first': False, 'norm': 'layer'},
    'blocks': {'attention_block': 5}, 't5 blocks': {'positions': 't5', 'attention_block': 4},
}


def make(**changes) -> Transformer:
  return Transformer(dataclasses.replace(SMALL, **changes), rngs=nnx.Rngs(0))


@pytest.fixture
def x_BxLxD():
  return jax.random.normal(jax.random.key(1), (2, 13, 16))


@pytest.mark.parametrize('changes', VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize('split', [(13,), (6, 1, 1, 5), (1,) * 13])
def test_cached_decoding_is_the_full_pass(changes, split, x_BxLxD):
  model = make(**changes)
  cache = model.init_cache(2, 13)
  outputs, place = [], 0
  for new in split:
    y, cache = model.extend(x_BxLxD[:, place:place + new], cache)
    outputs.append(y)
    place += new
  np.testing.assert_allclose(jnp.concatenate(outputs, axis=1), model(x_BxLxD), atol=2e-6)
  assert int(cache.filled) == 13


@pytest.mark.parametrize('changes', VARIANTS.values(), ids=VARIANTS)
def test_no_output_depends_on_a_later_input(changes, x_BxLxD):
  model = make(**changes)
  gradient = jax.grad(lambda x: model(x)[:, 6].sum())(x_BxLxD)
  assert np.all(np.asarray(gradient[:, 7:]) == 0)
  assert np.all(np.abs(np.asarray(gradient[:, :7])).sum((0, 2)) > 0)


@pytest.mark.parametrize('causal', [True, False])
def test_blocks_change_nothing(causal, x_BxLxD):
  plain, blocked = make(causal=causal), make(causal=causal, attention_block=4)
  valid = jnp.arange(13)[None] < jnp.array([[13], [9]])
  loss = lambda model, x: jnp.sum(jnp.square(model(x, valid_BxL=valid)))
  np.testing.assert_allclose(plain(x_BxLxD, valid_BxL=valid), blocked(x_BxLxD, valid_BxL=valid), atol=2e-6)
  np.testing.assert_allclose(jax.grad(loss, 1)(plain, x_BxLxD), jax.grad(loss, 1)(blocked, x_BxLxD), atol=2e-4)


def test_padding_does_not_leak(x_BxLxD):
  model = make(causal=False)
  valid = jnp.arange(13)[None] < jnp.array([[9], [9]])
  disturbed = x_BxLxD.at[:, 9:].set(1e3)
  a, b = (model(x, valid_BxL=valid)[:, :9] for x in (x_BxLxD, disturbed))
  np.testing.assert_array_equal(a, b)
  short = model(x_BxLxD[:, :9])
  np.testing.assert_allclose(a, short, atol=2e-6)


def test_rematerialisation_changes_no_gradient(x_BxLxD):
  gradients = [jax.grad(lambda x, m=make(remat=remat): jnp.sum(jnp.square(m(x))))(x_BxLxD) for remat in (False, True)]
  np.testing.assert_allclose(*gradients, atol=1e-4)


@pytest.mark.parametrize('widths', [(5, 9), (9, 5), (6, 6)])
@pytest.mark.parametrize('rows', [(), (7,), (2, 3, 4)])
def test_products_have_the_gradients_of_the_automatic_rule(widths, rows):
  generator = np.random.default_rng(0)
  x, w, g = (jnp.asarray(generator.normal(size=shape), jnp.float32)
             for shape in ((*rows, widths[0]), widths, (*rows, widths[1])))
  ours, theirs = (jax.vjp(f, x, w) for f in (product, jnp.matmul))
  np.testing.assert_array_equal(ours[0], theirs[0])
  for a, b in zip(ours[1](g), theirs[1](g), strict=True):
    assert a.shape == b.shape
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_stacked_layers_are_the_layers_one_by_one(x_BxLxD):
  model = make()
  graphdef, state = nnx.split(model.layers.stack)
  x = x_BxLxD
  for i in range(2):
    x = nnx.merge(graphdef, jax.tree.map(lambda v, i=i: v[i], state))(x, jnp.arange(13)[None])
  np.testing.assert_allclose(model.final_norm(x), model(x_BxLxD), atol=2e-6)
  _, params = nnx.split(model)
  axes = {v.axes for path, v in nnx.to_flat_state(params) if 'stack' in path}
  assert all(a[0] == 'layer' for a in axes)


@pytest.mark.parametrize('distance, bucket', [
    (0, 0), (1, 1), (15, 15), (16, 16), (20, 17), (32, 21), (64, 26), (100, 30), (128, 31), (5000, 31)])
def test_t5_buckets(distance, bucket):
  found = transformer.relative_bucket(jnp.array([-distance]), causal=True, buckets=32, max_distance=128)
  assert int(found[0]) == bucket


@pytest.mark.parametrize('causal, exact', [(True, 16), (False, 8)])
def test_the_shortest_maximum_that_is_allowed_keeps_buckets_in_order(causal, exact):
  config = dataclasses.replace(SMALL, positions='t5', causal=causal, relative_max_distance=exact + 1)
  buckets = transformer.relative_bucket(-jnp.arange(64), causal=causal, buckets=config.relative_buckets,
                                        max_distance=config.relative_max_distance)
  assert buckets[:exact].tolist() == list(range(exact)) and bool((jnp.diff(buckets) >= 0).all())
  assert int(buckets.max()) == 2 * exact - 1


def test_a_longer_maximum_tells_distant_positions_apart():
  # T5's 128 positions are 0.64 s of coarse tokens: beyond that, everything would look the same.
  buckets = transformer.relative_bucket(-jnp.array([200, 1000, 2000]), causal=True, buckets=32, max_distance=2304)
  assert len(set(buckets.tolist())) == 3


def test_rotary_logits_depend_on_distance_alone():
  q, k = jax.random.normal(jax.random.key(0), (2, 1, 1, 1, 16))
  def logit(place_q, place_k):
    rotated = [transformer.rotate(v, jnp.array([[p[0]], [p[1]]], jnp.float32)) for v, p in ((q, place_q), (k, place_k))]
    return float(jnp.sum(rotated[0] * rotated[1]))
  assert logit((5, 2), (3, 1)) == pytest.approx(logit((105, 52), (103, 51)), abs=1e-4)
  assert logit((5, 2), (3, 1)) != pytest.approx(logit((5, 3), (3, 1)), abs=1e-3)


def test_dropout_is_one_mask_an_example(x_BxLxD):
  model = make(dropout=0.5)
  keys = jax.random.split(jax.random.key(3), 2)
  both = model(x_BxLxD, keys_B=keys)
  np.testing.assert_allclose(model(x_BxLxD[1:], keys_B=keys[1:]), both[1:], atol=2e-6)
  assert not np.allclose(both, model(x_BxLxD))


@pytest.mark.parametrize('changes, words', [
    ({'positions': 'sine'}, 'positions'), ({'norm': 'batch'}, 'norm'), ({'activation': 'x'}, 'activation'),
    ({'width': 15}, 'head_dim'), ({'heads': 0}, 'heads must be at least 1'), ({'depth': 0}, 'depth must be at least 1'),
    ({'attention_block': -1}, 'attention_block must be at least 0'),
    ({'dropout': -0.1}, 'dropout must be'), ({'dropout': 1.0}, 'dropout must be'),
    ({'dropout': 0.999}, 'dropout must be'), ({'dropout': 0.001}, 'dropout must be'),  # rounded to all, to none
    ({'positions': 't5', 'relative_max_distance': 16}, '16 nearest distances .* must be greater, found 16'),
    ({'positions': 't5', 'relative_buckets': 1}, 'one such distance at least'),
    ({'positions': 't5', 'causal': False, 'relative_max_distance': 8}, 'of 32 relative_buckets the 8 nearest')])
def test_wrong_choices_are_named(changes, words):
  with pytest.raises(ValueError, match=words):
    dataclasses.replace(SMALL, **changes)


@pytest.mark.parity
def test_t5_bias_and_buckets_equal_the_reference():
  t5 = pytest.importorskip('transformers.models.t5.modeling_t5')
  torch = pytest.importorskip('torch')
  distance = np.arange(-3000, 3000)
  for causal, maximum in ((True, 128), (False, 128), (True, 2304)):
    theirs = t5.T5Attention._relative_position_bucket(
        torch.tensor(distance), bidirectional=not causal, num_buckets=32, max_distance=maximum).numpy()
    ours = np.asarray(transformer.relative_bucket(
        jnp.asarray(distance), causal=causal, buckets=32, max_distance=maximum))
    # At the exact edge of a logarithmic bucket the two roundings may differ by one.
    assert np.mean(theirs == ours) > 0.995 and np.max(np.abs(theirs - ours)) <= 1


@pytest.mark.parametrize('batch, symbolic', [(1, False), (3, False), (9, False), (1, True)])
def test_a_gpu_decodes_few_rows_in_products_of_eight(batch, symbolic, monkeypatch):
  """The same values, in products that are not of one row; an open batch is left as it is."""
  model = make()
  x = jax.random.normal(jax.random.key(1), (batch, 5, model.config.width))

  def run(x):
    _, cache = model.extend(x[:, :4], model.init_cache(x.shape[0], 5))
    return model.extend(x[:, 4:], cache)[0]

  expected = run(x)
  monkeypatch.setattr(axes, 'platform', lambda: 'gpu')
  if symbolic:
    spec = jax.ShapeDtypeStruct((*jax.export.symbolic_shape('b'), *x.shape[1:]), x.dtype)
    np.testing.assert_allclose(jax.export.export(jax.jit(run))(spec).call(x), expected, rtol=1e-5, atol=1e-5)
    return
  np.testing.assert_allclose(jax.jit(run)(x), expected, rtol=1e-5, atol=1e-5)
  assert ('tensor<1x8x' in jax.jit(run).lower(x).as_text()) == (batch < 8)


def test_the_gradient_of_a_row_in_bfloat16_counts_every_look_up():
  """In bfloat16 a sum of ones ends at 256."""
  embedding = transformer.Embedding(4, 8, rngs=nnx.Rngs(0))
  graphdef, state = nnx.split(embedding)

  def total(state):
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), state)
    return jnp.sum(nnx.merge(graphdef, half)(jnp.ones((6450,), jnp.int32)).astype(jnp.float32))

  gradient = jax.grad(total)(state)['table'][...]
  np.testing.assert_allclose(gradient[1], 6450, rtol=2**-8)
  np.testing.assert_array_equal(gradient[0], 0)
