"""Convolutions against PyTorch, known answers and shapes."""
from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from musiclm_jax import axes
from musiclm_jax.nn import conv


def noise(*shape, seed=0):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def with_bias(module):
  module.b = nnx.Param(noise(*module.b.shape, seed=3), axes=('channel_out',))
  return module


@pytest.mark.parity
@pytest.mark.parametrize('kernel, stride, dilation', [(7, 1, 1), (7, 1, 3), (1, 1, 1), (10, 5, 1), (4, 4, 1)])
def test_causal_conv_equals_torch_with_left_padding(kernel, stride, dilation):
  torch = pytest.importorskip('torch')
  ours = with_bias(conv.CausalConv(3, 5, kernel, stride=stride, dilation=dilation, rngs=nnx.Rngs(0)))
  theirs = torch.nn.Conv1d(3, 5, kernel, stride=stride, dilation=dilation)
  with torch.no_grad():
    theirs.weight.copy_(torch.tensor(np.asarray(ours.w[...]).transpose(2, 1, 0)))
    theirs.bias.copy_(torch.tensor(np.asarray(ours.b[...])))
    x = noise(2, 40, 3)
    left = (kernel - 1) * dilation + 1 - stride
    padded = torch.nn.functional.pad(torch.tensor(x.transpose(0, 2, 1)), (left, 0))
    expected = theirs(padded).numpy().transpose(0, 2, 1)
  np.testing.assert_allclose(ours(x), expected, atol=1e-5)


@pytest.mark.parity
@pytest.mark.parametrize('stride', [2, 5])
def test_causal_upsample_equals_torch_without_its_tail(stride):
  torch = pytest.importorskip('torch')
  ours = with_bias(conv.CausalUpsample(3, 4, stride, rngs=nnx.Rngs(0)))
  theirs = torch.nn.ConvTranspose1d(3, 4, 2 * stride, stride=stride)
  with torch.no_grad():
    theirs.weight.copy_(torch.tensor(np.asarray(ours.w[...]).transpose(1, 2, 0)))
    theirs.bias.copy_(torch.tensor(np.asarray(ours.b[...])))
    x = noise(2, 6, 3)
    expected = theirs(torch.tensor(x.transpose(0, 2, 1))).numpy().transpose(0, 2, 1)[:, :6 * stride]
  np.testing.assert_allclose(ours(x), expected, atol=1e-5)


@pytest.mark.parity
@pytest.mark.parametrize('groups', [1, 2])
def test_centred_convolutions_equal_torch(groups):
  torch = pytest.importorskip('torch')
  ours = conv.Conv1d(4, 6, 5, stride=1, groups=groups, rngs=nnx.Rngs(0))
  x = noise(2, 17, 4)
  weight = torch.tensor(np.asarray(ours.w[...]).transpose(2, 1, 0))
  expected = torch.nn.functional.conv1d(torch.tensor(x.transpose(0, 2, 1)), weight, padding=2, groups=groups)
  np.testing.assert_allclose(ours(x), expected.numpy().transpose(0, 2, 1), atol=1e-5)
  plane = conv.Conv2d(4, 6, (3, 5), rngs=nnx.Rngs(0))
  x = noise(2, 9, 8, 4)
  weight = torch.tensor(np.asarray(plane.w[...]).transpose(3, 2, 0, 1))
  expected = torch.nn.functional.conv2d(torch.tensor(x.transpose(0, 3, 1, 2)), weight, padding=(1, 2))
  np.testing.assert_allclose(plane(x), expected.numpy().transpose(0, 2, 3, 1), atol=1e-5)


@pytest.mark.parametrize(('stride', 'kernel', 'length'), [(1, 5, 17), (4, 41, 50), (4, 41, 47), (3, 2, 20)])
def test_grouped_convolutions_by_products_are_those_of_xla(stride, kernel, length):
  layer = conv.Conv1d(8, 12, kernel, stride=stride, groups=4, rngs=nnx.Rngs(0))
  x, w = noise(2, length + kernel - 1, 8), layer.w[...]
  both = (layer._by_products, layer._native)
  ours, theirs = (f(x, w) for f in both)
  np.testing.assert_allclose(ours, theirs, atol=1e-5)
  weight = noise(*theirs.shape)
  ours, theirs = (jax.grad(lambda x, w, f=f: jnp.sum(weight * f(x, w)), argnums=(0, 1))(x, w) for f in both)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), ours, theirs)


def test_a_kernel_that_is_no_multiple_of_the_stride_is_refused():
  with pytest.raises(ValueError, match='kernel 7, stride 2'):
    conv.CausalConv(1, 1, 7, stride=2, rngs=nnx.Rngs(0))


def test_every_kernel_names_an_axis_that_can_be_split():
  for module in (
      conv.CausalConv(3, 5, 7, rngs=nnx.Rngs(0)), conv.CausalUpsample(3, 4, 2, rngs=nnx.Rngs(0)),
      conv.Conv1d(4, 6, 5, rngs=nnx.Rngs(0)), conv.Conv2d(4, 6, (3, 3), rngs=nnx.Rngs(0))):
    names = module.w.get_metadata()['axes']
    assert len(names) == module.w.ndim and set(names) - {None} <= set(axes.PARAMETER_AXES)
    assert any(names)


def test_a_residual_unit_adds_to_its_input():
  unit = conv.residual_unit(4, 7, 3, rngs=nnx.Rngs(0))
  unit.inner.pointwise.w = nnx.Param(np.zeros((1, 4, 4), np.float32))
  x = noise(1, 10, 4)
  np.testing.assert_array_equal(unit(x), x)
