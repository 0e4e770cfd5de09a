"""The conformer: attention for what is far, a depthwise convolution for what is near (arXiv 2005.08100).

Its attention and feed-forward are those of `transformer`; the convolution module and the order of the four
sub-layers are its own.

Shapes: B batch, T frames, D width, W kernel width, N layers.
"""
from __future__ import annotations

import dataclasses
import math

from flax import nnx
import jax
import jax.numpy as jnp

from musiclm_jax import axes
from musiclm_jax.nn.transformer import (
    Attention, attention, FeedForward, Layers, Linear, Norm, TransformerConfig)


@dataclasses.dataclass(frozen=True)
class ConformerConfig:
  """A stack of conformer blocks.

  Attributes:
    width, depth, heads, mlp_width: as in `TransformerConfig`; each block has two feed-forwards.
    kernel: frames that the depthwise convolution sees, an odd number.
    positions: "rotary" or "none".
    dropout: after each of the four sub-layers.
    attention, attention_block, remat: as in `TransformerConfig`.
  """

  width: int
  depth: int
  heads: int
  mlp_width: int
  kernel: int = 5
  positions: str = 'rotary'
  dropout: float = 0.0
  attention_block: int = 0
  remat: bool = False
  attention: str = 'auto'

  def __post_init__(self):
    if self.kernel < 1 or self.kernel % 2 == 0:
      raise ValueError(f'the conformer kernel must be odd, to be centred on its frame; found {self.kernel}')
    if self.positions not in ('rotary', 'none'):
      raise ValueError(f'conformer positions must be "rotary" or "none", found {self.positions!r}')
    if self.depth < 1:
      raise ValueError(f'a conformer needs at least one block, found depth {self.depth}')
    if self.heads > 0 and self.width % self.heads:
      raise ValueError(f'conformer width {self.width} is not a multiple of {self.heads} heads')
    axes.check_dropout(self.dropout)
    self.sublayers  # noqa: B018 (which checks the rest)

  @property
  def sublayers(self) -> TransformerConfig:
    """The setting of the shared attention and feed-forward: layer norms, biases, no gate, both directions."""
    return TransformerConfig(
        width=self.width, depth=self.depth, heads=self.heads, mlp_width=self.mlp_width, gated=False,
        activation='silu', norm='layer', norm_epsilon=1e-5, bias=True, causal=False, positions=self.positions,
        attention=self.attention, attention_block=self.attention_block)


class Convolution(nnx.Module):
  """Pointwise GLU, depthwise convolution, norm, swish, pointwise.

  The paper's batch normalisation is a layer normalisation here: batch statistics would make the loss depend
  on the number of microbatches and of devices, and inference on running averages.
  """

  def __init__(self, config: ConformerConfig, *, rngs: nnx.Rngs):
    c = config
    self.expand = Linear(c.width, 2 * c.width, rngs=rngs)
    depthwise = jax.random.normal(rngs.params(), (c.kernel, c.width)) / math.sqrt(c.kernel)
    self.depthwise = nnx.Param(depthwise, axes=(None, 'embed'))
    self.norm = Norm(c.width, kind='layer', epsilon=1e-5)
    small = 1 / math.sqrt(2 * c.depth)
    self.project = Linear(c.width, c.width, axes=('mlp', 'embed'), scale=small, rngs=rngs)

  def __call__(self, x_BxTxD: jax.Array, valid_BxT: jax.Array | None = None) -> jax.Array:
    value, gate = jnp.split(self.expand(x_BxTxD), 2, axis=-1)
    y = value * jax.nn.sigmoid(gate)
    if valid_BxT is not None:
      y = jnp.where(valid_BxT[..., None], y, 0)
    return self.project(jax.nn.silu(self.norm(depthwise_convolution(y, self.depthwise[...]))))


@jax.custom_vjp
def depthwise_convolution(x_BxTxD: jax.Array, kernel_WxD: jax.Array) -> jax.Array:
  """Centred depthwise convolution over time, zeros beyond both ends, in the type of x.

  W shifted multiplies: they fuse into one loop, where a grouped convolution is slow on CPU. So are the W sums over
  all frames that autodiff makes of the kernel's gradient: here they are products.
  """
  shifts = _shifts(x_BxTxD, kernel_WxD.shape[0])
  return sum(x * k for x, k in zip(shifts, kernel_WxD.astype(x_BxTxD.dtype)))


def _shifts(x_BxTxD: jax.Array, width: int) -> list[jax.Array]:
  """x as each place of a kernel of that width sees it."""
  length, reach = x_BxTxD.shape[1], width // 2
  padded = jnp.pad(x_BxTxD, ((0, 0), (reach, reach), (0, 0)))
  return [padded[:, i:i + length] for i in range(width)]


def _depthwise_forward(x_BxTxD: jax.Array, kernel_WxD: jax.Array):
  return depthwise_convolution(x_BxTxD, kernel_WxD), (x_BxTxD, kernel_WxD)


def _depthwise_backward(saved, gradient_BxTxD: jax.Array):
  x_BxTxD, kernel_WxD = saved
  rows_N = jnp.ones(gradient_BxTxD.shape[0] * gradient_BxTxD.shape[1], x_BxTxD.dtype)
  total = lambda y_BxTxD: jnp.matmul(rows_N, y_BxTxD.reshape(len(rows_N), -1), preferred_element_type=jnp.float32)
  kernel_gradient = jnp.stack([total(x * gradient_BxTxD) for x in _shifts(x_BxTxD, kernel_WxD.shape[0])])
  return depthwise_convolution(gradient_BxTxD, kernel_WxD[::-1]), kernel_gradient.astype(kernel_WxD.dtype)


depthwise_convolution.defvjp(_depthwise_forward, _depthwise_backward)


class ConformerBlock(nnx.Module):
  """Half feed-forward, attention, convolution, half feed-forward, norm (arXiv 2005.08100, section 2.4)."""

  def __init__(self, config: ConformerConfig, *, rngs: nnx.Rngs):
    c, s = config, config.sublayers
    self.config = c
    self.feed_forward_1 = FeedForward(s, rngs=rngs)
    self.attention = Attention(s, rngs=rngs)
    self.convolution = Convolution(c, rngs=rngs)
    self.feed_forward_2 = FeedForward(s, rngs=rngs)
    self.feed_forward_1_norm = Norm(c.width, kind=s.norm, epsilon=s.norm_epsilon)
    self.attention_norm = Norm(c.width, kind=s.norm, epsilon=s.norm_epsilon)
    self.convolution_norm = Norm(c.width, kind=s.norm, epsilon=s.norm_epsilon)
    self.feed_forward_2_norm = Norm(c.width, kind=s.norm, epsilon=s.norm_epsilon)
    self.final_norm = Norm(c.width, kind=s.norm, epsilon=s.norm_epsilon)

  def _dropped(self, y, keys_B, which):
    if keys_B is None:
      return y
    return axes.dropout(y, self.config.dropout, jax.vmap(lambda key: jax.random.fold_in(key, which))(keys_B))

  def __call__(self, x_BxTxD: jax.Array, positions_1xT: jax.Array, *, valid_BxT: jax.Array | None = None,
               keys_B: jax.Array | None = None) -> jax.Array:
    mask = None if valid_BxT is None else valid_BxT[:, None, None, :]

    def attend(h):
      q, k, v = self.attention.project(h, positions_1xT)
      return self.attention.merge(attention(
          q, k, v, mask=mask, kind=self.config.attention, block=self.config.attention_block))

    x = x_BxTxD
    x = x + 0.5 * self._dropped(self.feed_forward_1(self.feed_forward_1_norm(x)), keys_B, 0)
    x = x + self._dropped(attend(self.attention_norm(x)), keys_B, 1)
    x = x + self._dropped(self.convolution(self.convolution_norm(x), valid_BxT), keys_B, 2)
    x = x + 0.5 * self._dropped(self.feed_forward_2(self.feed_forward_2_norm(x)), keys_B, 3)
    return axes.constrain(self.final_norm(x), 'batch', 'length', 'embed_activation')


class Conformer(nnx.Module):
  """A stack of conformer blocks; each ends with its own norm, so the stack needs no other."""

  def __init__(self, config: ConformerConfig, *, rngs: nnx.Rngs):
    c = config
    self.config = c
    self.layers = Layers(lambda r: ConformerBlock(c, rngs=r), c.depth, rngs=rngs, remat=c.remat)

  def __call__(self, x_BxTxD: jax.Array, *, valid_BxT: jax.Array | None = None,
               keys_B: jax.Array | None = None, num_layers: int | None = None) -> jax.Array:
    """Output of the first `num_layers` blocks (all by default), [B, T, D].

    `valid` marks the frames that are not padding; `keys_B` turn dropout on.
    """
    run = self._block(x_BxTxD.shape[1], valid_BxT, keys_B)

    def layer(block, x, index):
      if num_layers is None or num_layers == self.config.depth:
        return run(block, x, index), ()
      # The scan goes over all blocks, but a block that is not wanted costs nothing.
      return jax.lax.cond(index < num_layers, lambda x: run(block, x, index), lambda x: x, x), ()

    x, _ = self.layers.scan(layer, x_BxTxD, jnp.arange(self.config.depth))
    return x

  def every_layer(self, x_BxTxD: jax.Array) -> jax.Array:
    """Output of each block, [N, B, T, D]; the last is that of the stack."""
    run = self._block(x_BxTxD.shape[1], None, None)
    _, y_NxBxTxD = self.layers.scan(lambda block, x, index: (y := run(block, x, index), y), x_BxTxD,
                                    jnp.arange(self.config.depth))
    return y_NxBxTxD

  def _block(self, length: int, valid_BxT: jax.Array | None, keys_B: jax.Array | None):
    positions = jnp.arange(length)[None]

    def run(block, x, index):
      keys = None if keys_B is None else jax.vmap(lambda key: jax.random.fold_in(key, index))(keys_B)
      return block(x, positions, valid_BxT=valid_BxT, keys_B=keys)

    return run
