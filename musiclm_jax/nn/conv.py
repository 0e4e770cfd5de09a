"""Convolutions: causal ones in time that can run in steps, and the two-dimensional ones of discriminators.

B batch, T positions, C channels in, E channels out, K kernel, S stride.
"""
from __future__ import annotations

import fractions
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp

from musiclm_jax.nn import streaming

_SPLIT_FROM = 8  # channels


def _kernel(shape: tuple[int, ...], rngs: nnx.Rngs, fan_in: int, scale: float = 1.0) -> nnx.Param:
  """Normal with standard deviation scale / sqrt(fan_in)."""
  value = jax.random.normal(rngs.params(), shape, jnp.float32) * (scale * fan_in ** -0.5)
  # Stereo, real and imaginary parts, the few inputs of a group: nothing is won by splitting those.
  channel_in = 'channel_in' if shape[-2] >= _SPLIT_FROM else None
  return nnx.Param(value, axes=(None,) * (len(shape) - 2) + (channel_in, 'channel_out'))


def _bias(width: int) -> nnx.Param:
  return nnx.Param(jnp.zeros((width,), jnp.float32), axes=('channel_out',))


class CausalConv(streaming.Streamable):
  """A convolution in time that sees nothing after the end of its own stride.

  Output t sees the inputs up to (t + 1) * stride - 1. Zeros stand for what came before the first input.
  `kernel` must be a multiple of `stride`, and strides come without dilation. The output is what
  torch.nn.Conv1d gives for an input padded on the left with (kernel - 1) * dilation + 1 - stride zeros.
  """

  def __init__(
      self, in_width: int, out_width: int, kernel: int, *, stride: int = 1, dilation: int = 1,
      scale: float = 1.0, rngs: nnx.Rngs):
    if kernel % stride or (stride > 1 and dilation > 1):
      raise ValueError(
          f'a causal convolution needs a kernel that is a multiple of the stride and no dilation beside a '
          f'stride; found kernel {kernel}, stride {stride}, dilation {dilation}')
    self.stride, self.dilation = stride, dilation
    self.kernel, self.in_width = kernel, in_width
    self.w = _kernel((kernel, in_width, out_width), rngs, kernel * in_width, scale)
    self.b = _bias(out_width)

  @property
  def block(self) -> int:
    return self.stride

  @property
  def rate(self) -> fractions.Fraction:
    return fractions.Fraction(1, self.stride)

  @property
  def past(self) -> int:
    """Inputs before a block that its output sees."""
    return (self.kernel - 1) * self.dilation + 1 - self.stride

  def init_state(self, batch: int, dtype: Any = jnp.float32):
    return jnp.zeros((batch, self.past, self.in_width), dtype)

  def step(self, x_BxTxC, state):
    w_KxCxE = self.w[...]
    seen = jnp.concatenate([state.astype(x_BxTxC.dtype), x_BxTxC], axis=1)
    state = seen[:, seen.shape[1] - self.past:]
    seen = seen.astype(w_KxCxE.dtype)
    if self.stride > 1 or self.kernel == 1:
      y = self._blocks(seen, x_BxTxC.shape[1] // self.stride, w_KxCxE)
    else:
      y = jax.lax.conv_general_dilated(
          seen, w_KxCxE, (1,), 'VALID', rhs_dilation=(self.dilation,),
          dimension_numbers=('NWC', 'WIO', 'NWC'))
    return y + self.b[...], state

  def _blocks(self, seen, outputs, w_KxCxE):
    """Strided: blocks of S inputs side by side, then one matrix product; much faster than a strided loop."""
    batch, size = seen.shape[0], self.stride * self.in_width
    blocks = seen.reshape(batch, seen.shape[1] // self.stride, size)
    near = self.kernel // self.stride
    blocks = jnp.concatenate([blocks[:, i:i + outputs] for i in range(near)], axis=-1)
    return blocks @ w_KxCxE.reshape(near * size, -1)


class CausalUpsample(streaming.Streamable):
  """A causal transposed convolution with a kernel of twice its stride.

  Input t gives the outputs t * stride to (t + 1) * stride - 1 together with input t - 1: what
  torch.nn.ConvTranspose1d gives without its last `stride` outputs.
  """

  def __init__(self, in_width: int, out_width: int, stride: int, *, rngs: nnx.Rngs):
    self.stride, self.in_width, self.out_width = stride, in_width, out_width
    # Each output sums over two inputs, hence the fan-in.
    self.w = _kernel((2 * stride, in_width, out_width), rngs, 2 * in_width)
    self.b = _bias(out_width)

  @property
  def rate(self) -> fractions.Fraction:
    return fractions.Fraction(self.stride)

  def init_state(self, batch: int, dtype: Any = jnp.float32):
    return jnp.zeros((batch, 1, self.in_width), dtype)

  def step(self, x_BxTxC, state):
    w_2SxCxE = self.w[...]
    batch, length, _ = x_BxTxC.shape
    seen = jnp.concatenate([state.astype(x_BxTxC.dtype), x_BxTxC], axis=1)
    state = seen[:, length:]
    seen = seen.astype(w_2SxCxE.dtype)
    pairs = jnp.concatenate([seen[:, 1:], seen[:, :-1]], axis=-1)
    w_2CxSE = w_2SxCxE.reshape(2, self.stride, self.in_width, self.out_width).transpose(0, 2, 1, 3)
    y = pairs @ w_2CxSE.reshape(2 * self.in_width, self.stride * self.out_width)
    return y.reshape(batch, length * self.stride, self.out_width) + self.b[...], state


def residual_unit(width: int, kernel: int, dilation: int, *, rngs: nnx.Rngs) -> streaming.Streamable:
  """x + conv1(elu(conv_kernel(elu(x)))): the residual unit of SoundStream (arXiv 2107.03312, figure 3)."""
  return streaming.Residual(streaming.Chain({
      'elu': streaming.Elu(),
      'dilated': CausalConv(width, width, kernel, dilation=dilation, rngs=rngs),
      'elu_inner': streaming.Elu(),
      # Less than 1, so that a stack of units without normalisation starts near the identity.
      'pointwise': CausalConv(width, width, 1, scale=0.5, rngs=rngs),
  }))


class Conv1d(nnx.Module):
  """A centred convolution in time [B, T, C], optionally grouped; for networks that need not be causal."""

  def __init__(
      self, in_width: int, out_width: int, kernel: int, *, stride: int = 1, groups: int = 1, rngs: nnx.Rngs):
    self.stride, self.groups, self.kernel = stride, groups, kernel
    self.w = _kernel((kernel, in_width // groups, out_width), rngs, kernel * in_width // groups)
    self.b = _bias(out_width)

  def __call__(self, x_BxTxC: jax.Array) -> jax.Array:
    w = self.w[...]
    left, right = (self.kernel - 1) // 2, self.kernel // 2
    padded = jnp.pad(x_BxTxC.astype(w.dtype), ((0, 0), (left, right), (0, 0)))
    if self.groups == 1:
      return self._native(padded, w) + self.b[...]
    # On CPU XLA computes gradients of grouped convolutions at a thousandth of the speed of its products. Elsewhere
    # the windows would only cost memory.
    return jax.lax.platform_dependent(padded, w, cpu=self._by_products, default=self._native) + self.b[...]

  def _native(self, padded_BxTxC, w_KxIxE):
    return jax.lax.conv_general_dilated(
        padded_BxTxC, w_KxIxE, (self.stride,), 'VALID', dimension_numbers=('NWC', 'WIO', 'NWC'),
        feature_group_count=self.groups)

  def _by_products(self, padded_BxTxC, w_KxIxE):
    """The same by one matrix product for each group, over windows side by side."""
    (batch, length, width), stride, groups = padded_BxTxC.shape, self.stride, self.groups
    outputs, near = (length - self.kernel) // stride + 1, -(-self.kernel // stride)
    missing = (outputs - 1 + near) * stride - length
    blocks = jnp.pad(padded_BxTxC[:, :length + min(missing, 0)], ((0, 0), (0, max(missing, 0)), (0, 0)))
    blocks = blocks.reshape(batch, outputs - 1 + near, stride, groups, width // groups)
    windows_BxTxKxGxI = jnp.concatenate([blocks[:, i:i + outputs] for i in range(near)], axis=2)
    w_KxIxE = jnp.pad(w_KxIxE, ((0, near * stride - self.kernel), (0, 0), (0, 0)))
    w_KxIxGxe = w_KxIxE.reshape(*w_KxIxE.shape[:2], groups, -1)
    y_BxTxGxe = jnp.einsum('BTKGI,KIGe->BTGe', windows_BxTxKxGxI, w_KxIxGxe)
    return y_BxTxGxe.reshape(batch, outputs, -1)


class Conv2d(nnx.Module):
  """A centred convolution over [B, T, F, C]: ceil(T / stride) by ceil(F / stride) outputs.

  `padding` may also be zeros before and after, of T and of F.
  """

  def __init__(
      self, in_width: int, out_width: int, kernel: tuple[int, int], *, stride: tuple[int, int] = (1, 1),
      padding: str | tuple[tuple[int, int], tuple[int, int]] = 'SAME', bias: bool = True, rngs: nnx.Rngs):
    self.stride, self.padding = tuple(stride), padding
    self.w = _kernel((*kernel, in_width, out_width), rngs, kernel[0] * kernel[1] * in_width)
    self.b = _bias(out_width) if bias else None

  def __call__(self, x_BxTxFxC: jax.Array) -> jax.Array:
    w = self.w[...]
    y = jax.lax.conv_general_dilated(
        x_BxTxFxC.astype(w.dtype), w, self.stride, self.padding, dimension_numbers=('NHWC', 'HWIO', 'NHWC'))
    return y if self.b is None else y + self.b[...]
