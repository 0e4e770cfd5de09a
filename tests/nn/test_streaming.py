"""The one contract of all modules that run in steps; a new streamable module is one more line in `CASES`."""
import fractions

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from musiclm_jax.codec import model as soundstream
from musiclm_jax.nn import conv, streaming

CODEC = soundstream.SoundStreamConfig(
    patch=2, widths=(4, 6, 8), strides=(3, 2), latent=5, levels=2, codebook_size=8,
    dilations=(1, 3), kernel=3)

# Name: (module, channels).
CASES = {
    'elu': (lambda rngs: streaming.Elu(), 3),
    'fold': (lambda rngs: streaming.Fold(4), 3),
    'unfold': (lambda rngs: streaming.Unfold(3), 6),
    'conv': (lambda rngs: conv.CausalConv(3, 4, 7, rngs=rngs), 3),
    'dilated conv': (lambda rngs: conv.CausalConv(3, 4, 3, dilation=5, rngs=rngs), 3),
    'pointwise conv': (lambda rngs: conv.CausalConv(3, 4, 1, rngs=rngs), 3),
    'strided conv': (lambda rngs: conv.CausalConv(3, 4, 10, stride=5, rngs=rngs), 3),
    'strided conv without overlap': (lambda rngs: conv.CausalConv(3, 4, 4, stride=4, rngs=rngs), 3),
    'upsample': (lambda rngs: conv.CausalUpsample(3, 4, 5, rngs=rngs), 3),
    'residual unit': (lambda rngs: conv.residual_unit(3, 7, 3, rngs=rngs), 3),
    'up, then down': (lambda rngs: streaming.Chain({
        'up': conv.CausalUpsample(3, 4, 2, rngs=rngs), 'conv': conv.CausalConv(4, 4, 3, rngs=rngs),
        'down': conv.CausalConv(4, 5, 12, stride=6, rngs=rngs)}), 3),
    'codec encoder': (lambda rngs: soundstream.make_encoder(CODEC, rngs), 1),
    'codec decoder': (lambda rngs: soundstream.make_decoder(CODEC, rngs), 5),
    'codec': (lambda rngs: streaming.Chain({
        'encoder': soundstream.make_encoder(CODEC, rngs),
        'decoder': soundstream.make_decoder(CODEC, rngs)}), 1),
}

BLOCKS = 7


@pytest.fixture(params=CASES)
def case(request):
  make, channels = CASES[request.param]
  module = make(nnx.Rngs(1))
  x = np.random.default_rng(0).normal(size=(2, BLOCKS * module.block, channels)).astype(np.float32)
  return module, jnp.asarray(x)


def per_block(module) -> int:
  """Output positions of a block of inputs."""
  count = module.block * module.rate
  assert count.denominator == 1
  return int(count)


def shapes(tree):
  return jax.tree.map(lambda a: (a.shape, a.dtype), tree)


@pytest.mark.parametrize('blocks', [(1,) * BLOCKS, (2, 2, 2, 1), (5, 2)])
def test_steps_equal_the_full_pass(case, blocks):
  module, x = case
  step = jax.jit(module.step)
  state, outputs, start = module.init_state(x.shape[0]), [], 0
  for count in blocks:
    stop = start + count * module.block
    y, after = step(x[:, start:stop], state)
    assert shapes(after) == shapes(state)
    outputs.append(y)
    state, start = after, stop
  np.testing.assert_allclose(np.concatenate(outputs, axis=1), module(x), atol=1e-5)


def test_the_rate_is_the_declared_one(case):
  module, x = case
  assert fractions.Fraction(module(x).shape[1], x.shape[1]) == module.rate


def dependence(module, x):
  """[U, T]: whether output u depends on input t, by the gradient."""

  def outputs(x_TxC):
    return jnp.sum(module(x_TxC[None])[0] ** 2, axis=-1)

  return np.abs(np.asarray(jax.jacrev(outputs)(x[0]))).sum(axis=-1) > 0


def test_no_output_depends_on_a_later_block_and_the_latency_is_the_declared_one(case):
  module, x = case
  depends = dependence(module, x)
  size = per_block(module)
  waits = []
  for k in range(BLOCKS):
    seen = depends[k * size:(k + 1) * size].any(axis=0)
    waits.append(int(np.flatnonzero(seen).max()) + 1 - k * module.block)
  assert max(waits) == module.latency
  assert module.latency == module.block


def test_padding_does_not_leak(case):
  """Neither into the valid part of its own row nor into other rows."""
  module, x = case
  valid = 4 * module.block
  padded = x.at[1, valid:].set(1e3)
  whole, other = np.asarray(module(x)), np.asarray(module(padded))
  np.testing.assert_allclose(other[1, :4 * per_block(module)], whole[1, :4 * per_block(module)], atol=1e-5)
  np.testing.assert_allclose(other[0], whole[0], atol=1e-5)
  assert np.abs(other[1] - whole[1]).max() > 1


def test_a_length_of_partial_blocks_is_refused():
  with pytest.raises(ValueError, match='7 positions are not a multiple of 4'):
    streaming.Fold(4)(jnp.zeros((1, 7, 1)))
