"""The one transformer: attention, block, stack, and cached decoding.

Embeddings, learned absolute positions and output heads live with the models that use them.

Shapes: B batch, L or T query length, S key length, D width, H heads, K head width, F feed-forward width,
N layers, A position axes, R rows, P products side by side.
"""
from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from flax import nnx
import jax
import jax.numpy as jnp

from musiclm_jax import axes
from musiclm_jax.nn.attention import KINDS, attend_cached, attention

_UNROLLED = 6  # layers at most that a scan writes out
_GPU_ROWS = 8  # rows at least of a product on a GPU

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    'gelu': lambda x: jax.nn.gelu(x, approximate=False),
    'relu': jax.nn.relu,
    'silu': jax.nn.silu,
}


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
  """Orthogonal choices of the block; every network of the project is one setting of them.

  Attributes:
    width, depth, heads, mlp_width: D, N, H and F.
    head_dim: K; 0 means width / heads, and any other value need not divide the width.
    gated: two input matrices in the feed-forward, act(x W_g) * (x W_i) (GEGLU, arXiv 2002.05202).
    norm: "rms" (scale only) or "layer" (scale and bias); norm_first: before each sub-layer (with one more
      at the end of the stack) or after each residual sum, as BERT has it.
    positions: "rotary" (arXiv 2104.09864), "t5" (one relative bias table shared by all layers,
      arXiv 1910.10683) or "none".
    relative_buckets, relative_max_distance: of the T5 bias. T5's 128 positions are 0.64 s of coarse tokens;
      set it to the crop. The nearest distances, half of the buckets, have one each; the maximum must be beyond them.
    attention: what computes it, as in `attention.attention`; "auto" chooses by the device.
    attention_block: queries a block, where it is computed in blocks; 0 chooses.
    remat: recompute each layer's activations in the backward pass.
  """

  width: int
  depth: int
  heads: int
  mlp_width: int
  head_dim: int = 0
  gated: bool = True
  activation: str = 'gelu'
  norm: str = 'rms'
  norm_epsilon: float = 1e-6
  norm_first: bool = True
  bias: bool = False
  causal: bool = True
  positions: str = 'rotary'
  relative_buckets: int = 32
  relative_max_distance: int = 128
  dropout: float = 0.0
  remat: bool = False
  attention_block: int = 0
  attention: str = 'auto'

  def __post_init__(self):
    if self.positions not in ('rotary', 't5', 'none'):
      raise ValueError(f'positions must be "rotary", "t5" or "none", found {self.positions!r}')
    if self.norm not in ('rms', 'layer'):
      raise ValueError(f'norm must be "rms" or "layer", found {self.norm!r}')
    if self.attention not in KINDS:
      raise ValueError(f'attention must be one of {list(KINDS)}, found {self.attention!r}')
    if self.activation not in ACTIVATIONS:
      raise ValueError(f'activation must be one of {sorted(ACTIVATIONS)}, found {self.activation!r}')
    for names, least in ((('width', 'depth', 'heads', 'mlp_width'), 1), (('head_dim', 'attention_block'), 0)):
      for name in names:
        if getattr(self, name) < least:
          raise ValueError(f'{name} must be at least {least}, found {getattr(self, name)}')
    axes.check_dropout(self.dropout)
    exact = self.relative_buckets // (2 if self.causal else 4)
    if self.positions == 't5' and not 1 <= exact < self.relative_max_distance:
      raise ValueError(f'of {self.relative_buckets} relative_buckets the {exact} nearest distances have one each: '
                       'there must be one such distance at least, and relative_max_distance must be greater, found '
                       f'{self.relative_max_distance}')
    if not self.head_dim and self.width % self.heads:
      raise ValueError(f'width {self.width} is not a multiple of {self.heads} heads; set head_dim')

  @property
  def head_width(self) -> int:
    return self.head_dim or self.width // self.heads


@jax.custom_vjp
def product(x_xD: jax.Array, w_DxF: jax.Array) -> jax.Array:
  """x W over the last axis of x, [..., F].

  Its own gradient, because of CPUs: there one operand of a product over rows is copied to its transpose, and whatever
  computes that operand (a GELU and its gradient) is fused into the strided copy. The narrower one is cheaper, which is
  not the one that the automatic rule takes: feed-forward layers with GELU train twice as fast.
  """
  return x_xD @ w_DxF


def _product_backward(kept: tuple[jax.Array, jax.Array], g_xF: jax.Array) -> tuple[jax.Array, jax.Array]:
  x_xD, w_DxF = kept
  rows = tuple(range(x_xD.ndim - 1))
  over_rows = ((rows, rows), ((), ()))  # without a reshape, which would have to gather axes that are sharded
  if x_xD.shape[-1] <= g_xF.shape[-1]:
    dw_DxF = jax.lax.dot_general(x_xD, g_xF, over_rows)
  else:
    dw_DxF = jax.lax.dot_general(g_xF, x_xD, over_rows).T
  return g_xF @ w_DxF.T, dw_DxF


product.defvjp(lambda x, w: (x @ w, (x, w)), _product_backward)


def by_rows(f: Callable[[jax.Array], jax.Array], x_BxTx: jax.Array) -> jax.Array:
  """f(x), which treats each row x[b, t] alone; on a GPU it is given 8 rows at least.

  XLA makes sums of products with one row: decoding one sequence at the paper's size took 1.42 ms a token on an H200.
  With 8 rows, which go through the library's kernels, it takes 0.84 ms.
  """
  B, T = x_BxTx.shape[:2]
  if axes.platform() != 'gpu' or not isinstance(B * T, int) or B * T >= _GPU_ROWS:
    return f(x_BxTx)
  rows_1xRx = x_BxTx.reshape(1, B * T, *x_BxTx.shape[2:])
  rows_1xRx = jnp.pad(rows_1xRx, [(0, _GPU_ROWS - B * T if i == 1 else 0) for i in range(x_BxTx.ndim)])
  y_1xRx = f(jax.lax.optimization_barrier(rows_1xRx))  # without which XLA takes the rows away again
  return y_1xRx[0, :B * T].reshape(B, T, *y_1xRx.shape[2:])


class Linear(nnx.Module):
  """y = x W + b, with W ~ N(0, scale^2 / in_width)."""

  def __init__(self, in_width: int, out_width: int, *, axes: tuple = ('embed', 'mlp'), bias: bool = False,
               scale: float = 1.0, rngs: nnx.Rngs):
    w = jax.random.normal(rngs.params(), (in_width, out_width)) * (scale / math.sqrt(in_width))
    self.w = nnx.Param(w, axes=axes)
    self.b = nnx.Param(jnp.zeros((out_width,)), axes=(None,)) if bias else None

  def __call__(self, x: jax.Array) -> jax.Array:
    y = product(x, self.w[...].astype(x.dtype))
    return y if self.b is None else y + self.b[...].astype(x.dtype)


def together(linears: Sequence[Linear], x_BxTxD: jax.Array) -> jax.Array:
  """What several products of one shape make of x, [B, T, P, F], as one product: few rows decode faster.

  A loop puts their matrices side by side once.
  """
  w_DxPxF = jnp.stack([linear.w[...] for linear in linears], axis=1).astype(x_BxTxD.dtype)
  y_BxTxPxF = by_rows(lambda x: jnp.einsum('BTD,DPF->BTPF', x, w_DxPxF), x_BxTxD)
  if linears[0].b is None:
    return y_BxTxPxF
  return y_BxTxPxF + jnp.stack([linear.b[...] for linear in linears]).astype(x_BxTxD.dtype)


class Norm(nnx.Module):
  """Layer or root-mean-square normalisation over the last axis, its statistics in float32."""

  def __init__(self, width: int, *, kind: str = 'rms', epsilon: float = 1e-6):
    self.epsilon = epsilon
    self.scale = nnx.Param(jnp.ones((width,)), axes=(None,))
    self.bias = nnx.Param(jnp.zeros((width,)), axes=(None,)) if kind == 'layer' else None

  def __call__(self, x: jax.Array) -> jax.Array:
    y = x.astype(jnp.float32)
    if self.bias is not None:
      y = y - jnp.mean(y, axis=-1, keepdims=True)
    y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + self.epsilon)
    y = y * self.scale[...].astype(jnp.float32)
    if self.bias is not None:
      y = y + self.bias[...].astype(jnp.float32)
    return y.astype(x.dtype)


class Embedding(nnx.Module):
  """A table of rows, looked up by integer id."""

  def __init__(self, rows: int, width: int, *, axes: tuple = ('vocab', 'embed'), scale: float = 0.02,
               rngs: nnx.Rngs):
    self.table = nnx.Param(jax.random.normal(rngs.params(), (rows, width)) * scale, axes=axes)

  def __call__(self, ids: jax.Array) -> jax.Array:
    return rows_of(self.table[...], ids)


@jax.custom_vjp
def rows_of(table_NxD: jax.Array, ids_x: jax.Array) -> jax.Array:
  """Rows of a table, [..., D].

  Its gradient sums all look-ups of a row in float32: in bfloat16 a sum of ones ends at 256.
  """
  return jnp.take(table_NxD, ids_x, axis=0)


def _rows_backward(kept: tuple[jax.Array, jax.Array], g_xD: jax.Array) -> tuple[jax.Array, None]:
  table_NxD, ids_x = kept
  _, transposed = jax.vjp(lambda table: jnp.take(table, ids_x, axis=0), jnp.zeros(table_NxD.shape, jnp.float32))
  return transposed(g_xD.astype(jnp.float32))[0].astype(table_NxD.dtype), None


rows_of.defvjp(lambda table, ids: (rows_of(table, ids), (table, ids)), _rows_backward)


class Layers(nnx.Module):
  """`depth` modules of one kind with their variables stacked on a leading axis, run by one scan.

  Compile time does not grow with the depth (but up to 6 layers stand one after another: they still compile soon enough,
  and a step on CPU takes a tenth less), and each variable's `axes` gain a leading "layer".
  """

  def __init__(self, make: Callable[[nnx.Rngs], nnx.Module], depth: int, *, rngs: nnx.Rngs, remat: bool = False):
    self.depth, self.remat = depth, remat
    graphdef, _ = nnx.split(nnx.eval_shape(lambda: make(nnx.Rngs(0))))
    stacked = jax.vmap(lambda key: nnx.state(make(nnx.Rngs(key))))(jax.random.split(rngs.params(), depth))
    for _, variable in nnx.to_flat_state(stacked):
      variable.set_metadata(axes=('layer', *variable.axes))
    self.stack = nnx.merge(graphdef, stacked)

  def scan(self, f: Callable[..., tuple[Any, Any]], x: Any, *xs: Any) -> tuple[Any, Any]:
    """x, y_i = f(layer_i, x, *xs_i) for each layer in turn; returns the last x and the stacked y."""
    graphdef, state = nnx.split(self.stack)

    def body(x, inputs):
      layer_state, *rest = inputs
      return f(nnx.merge(graphdef, layer_state), x, *rest)

    unroll = self.depth if self.depth <= _UNROLLED else 1
    return jax.lax.scan(jax.checkpoint(body) if self.remat else body, x, (state, *xs), unroll=unroll)

  def apart(self) -> list[nnx.Module]:
    """The modules one by one, with their own copies of the variables.

    For decoding, where a layer is little work: taken from the stack again in each step, its variables would be copied.
    """
    graphdef, state = nnx.split(self.stack)
    return [nnx.merge(graphdef, jax.tree.map(lambda x, i=i: x[i], state)) for i in range(self.depth)]


def rotate(x_BxTxHxK: jax.Array, positions_AxT: jax.Array, *, base: float = 10_000.0) -> jax.Array:
  """Rotary embedding; the head's width is shared equally among the A position axes.

  With A = 2 one half of each head sees the place in the sequence and the other the moment in the music, so
  tokens of streams with different rates that sound at the same time are neighbours.
  `positions` may be [A, T] or [A, B, T].
  """
  num_axes = positions_AxT.shape[0]
  width = x_BxTxHxK.shape[-1] // num_axes // 2 * 2
  pieces = []
  for axis in range(num_axes):
    part = x_BxTxHxK[..., axis * width:(axis + 1) * width].astype(jnp.float32)
    frequencies = base ** (-jnp.arange(0, width, 2, dtype=jnp.float32) / width)
    angle = positions_AxT[axis].astype(jnp.float32)[..., None] * frequencies
    angle = angle.reshape((-1, angle.shape[-2], 1, width // 2))
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    a, b = part[..., :width // 2], part[..., width // 2:]
    pieces.append(jnp.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1))
  pieces.append(x_BxTxHxK[..., num_axes * width:].astype(jnp.float32))
  return jnp.concatenate(pieces, axis=-1).astype(x_BxTxHxK.dtype)


def relative_bucket(distance: jax.Array, *, causal: bool, buckets: int, max_distance: int) -> jax.Array:
  """T5's bucket of (key position - query position): exact when near, logarithmic when far.

  Source: arXiv 1910.10683, section 2.1, with the sign convention of the published model.
  """
  bucket = jnp.zeros_like(distance)
  if causal:
    distance = -jnp.minimum(distance, 0)
  else:
    buckets //= 2
    bucket = jnp.where(distance > 0, buckets, 0)
    distance = jnp.abs(distance)
  exact = buckets // 2
  ratio = jnp.log(jnp.maximum(distance, 1).astype(jnp.float32) / exact) / math.log(max_distance / exact)
  far = exact + (ratio * (buckets - exact)).astype(jnp.int32)
  return bucket + jnp.where(distance < exact, distance, jnp.minimum(far, buckets - 1))


class Cache(NamedTuple):
  """Keys and values of the positions seen so far, and how many those are. An explicit pytree.

  Each layer has arrays of its own, heads before positions: a step writes into them in place and reads them as they
  lie. Any other arrangement copies the whole cache in every step.
  """

  k_BxHxSxK: tuple[jax.Array, ...]  # by layer
  v_BxHxSxK: tuple[jax.Array, ...]
  filled: jax.Array  # int32 scalar

  def longer(self, length: int) -> Cache:
    """The same positions in a cache for `length` of them."""
    pad = lambda x: jnp.pad(x, ((0, 0), (0, 0), (0, length - x.shape[2]), (0, 0)))
    return Cache(tuple(map(pad, self.k_BxHxSxK)), tuple(map(pad, self.v_BxHxSxK)), self.filled)


class Attention(nnx.Module):
  """Multi-head self-attention with its four projections."""

  def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs):
    c, inner = config, config.heads * config.head_width
    self.config = c
    self.q = Linear(c.width, inner, axes=('embed', 'heads'), bias=c.bias, rngs=rngs)
    self.k = Linear(c.width, inner, axes=('embed', 'heads'), bias=c.bias, rngs=rngs)
    self.v = Linear(c.width, inner, axes=('embed', 'heads'), bias=c.bias, rngs=rngs)
    self.out = Linear(inner, c.width, axes=('heads', 'embed'), bias=c.bias, scale=1 / math.sqrt(2 * c.depth),
                      rngs=rngs)

  def project(self, x_BxTxD: jax.Array, positions_AxT: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Queries, keys and values [B, T, H, K], rotated where the positions are rotary."""
    shape = (*x_BxTxD.shape[:-1], self.config.heads, self.config.head_width)
    q, k, v = (linear(x_BxTxD).reshape(shape) for linear in (self.q, self.k, self.v))
    if self.config.positions == 'rotary':
      q, k = rotate(q, positions_AxT), rotate(k, positions_AxT)
    return q, k, v

  def project_few(self, x_BxTxD: jax.Array, positions_AxT: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`project` as one product."""
    y_BxTxPxM = together((self.q, self.k, self.v), x_BxTxD)
    H, K = self.config.heads, self.config.head_width
    both, v = jnp.split(y_BxTxPxM.reshape(*x_BxTxD.shape[:2], 3 * H, K), [2 * H], axis=2)
    q, k = jnp.split(rotate(both, positions_AxT) if self.config.positions == 'rotary' else both, 2, axis=2)
    return q, k, v

  def merge(self, y_BxTxHxK: jax.Array) -> jax.Array:
    return self.out(y_BxTxHxK.reshape((*y_BxTxHxK.shape[:2], -1)))


class FeedForward(nnx.Module):
  """act(x W_in) W_out, or act(x W_gate) * (x W_in) W_out."""

  def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs):
    c = config
    self.activation = c.activation
    self.wi = Linear(c.width, c.mlp_width, bias=c.bias, rngs=rngs)
    self.gate = Linear(c.width, c.mlp_width, bias=c.bias, rngs=rngs) if c.gated else None
    self.wo = Linear(c.mlp_width, c.width, axes=('mlp', 'embed'), bias=c.bias, scale=1 / math.sqrt(2 * c.depth),
                     rngs=rngs)

  def __call__(self, x_BxTxD: jax.Array) -> jax.Array:
    return self.wo(self._inner(*(linear(x_BxTxD) for linear in self._inputs)))

  def few(self, x_BxTxD: jax.Array) -> jax.Array:
    """The same of few rows, with one product less."""
    parts_PxBxTxF = jnp.moveaxis(together(self._inputs, x_BxTxD), 2, 0)
    return by_rows(self.wo, self._inner(*parts_PxBxTxF))

  @property
  def _inputs(self) -> tuple[Linear, ...]:
    return (self.wi,) if self.gate is None else (self.wi, self.gate)

  def _inner(self, inner_BxTxF: jax.Array, gate_BxTxF: jax.Array | None = None) -> jax.Array:
    act = ACTIVATIONS[self.activation]
    return act(inner_BxTxF) if gate_BxTxF is None else act(gate_BxTxF) * inner_BxTxF


class Block(nnx.Module):
  """Self-attention and feed-forward, each with its norm and residual sum."""

  def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs):
    c = config
    self.config = c
    self.attention = Attention(c, rngs=rngs)
    self.feed_forward = FeedForward(c, rngs=rngs)
    self.attention_norm = Norm(c.width, kind=c.norm, epsilon=c.norm_epsilon)
    self.feed_forward_norm = Norm(c.width, kind=c.norm, epsilon=c.norm_epsilon)

  def _residual(self, x, norm, sublayer, keys_B, which):
    """One residual sum; `which` keeps the dropout masks of the two sub-layers apart."""
    y = sublayer(norm(x) if self.config.norm_first else x)
    if keys_B is not None:
      y = axes.dropout(y, self.config.dropout, jax.vmap(lambda key: jax.random.fold_in(key, which))(keys_B))
    return x + y if self.config.norm_first else norm(x + y)

  def __call__(self, x_BxTxD, positions_AxT, *, mask=None, bias=None, keys_B=None) -> jax.Array:
    c = self.config

    def attend(h):
      q, k, v = self.attention.project(h, positions_AxT)
      y = attention(q, k, v, mask=mask, bias_GxHxR=bias, causal=c.causal, kind=c.attention, block=c.attention_block)
      return self.attention.merge(y)

    x = self._residual(x_BxTxD, self.attention_norm, attend, keys_B, 0)
    x = self._residual(x, self.feed_forward_norm, self.feed_forward, keys_B, 1)
    return axes.constrain(x, 'batch', 'length', 'embed_activation')

  def extend(self, x_BxTxD, positions_AxT, k_BxHxSxK, v_BxHxSxK, filled, *, mask, bias):
    """The same block for T new positions; returns x, and the layer's cache with their keys and values in it."""
    cached = k_BxHxSxK, v_BxHxSxK

    def attend(h):
      nonlocal cached
      q, *new = self.attention.project_few(h, positions_AxT)
      cached = [jax.lax.dynamic_update_slice_in_dim(old, x.swapaxes(1, 2).astype(old.dtype), filled, axis=2)
                for old, x in zip(cached, new)]
      return by_rows(self.attention.merge, attend_cached(q, *cached, mask=mask, bias_GxHxR=bias))

    x = self._residual(x_BxTxD, self.attention_norm, attend, None, 0)
    return self._residual(x, self.feed_forward_norm, self.feed_forward.few, None, 1), *cached


class Transformer(nnx.Module):
  """A stack of blocks; with norms first, one more norm at the end."""

  def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs):
    c = config
    self.config = c
    self.layers = Layers(lambda r: Block(c, rngs=r), c.depth, rngs=rngs, remat=c.remat)
    self.final_norm = Norm(c.width, kind=c.norm, epsilon=c.norm_epsilon) if c.norm_first else None
    table = jax.random.normal(rngs.params(), (c.relative_buckets, c.heads)) / math.sqrt(c.width)
    self.relative = nnx.Param(table, axes=(None, 'heads')) if c.positions == 't5' else None

  def _bias(self, distance_R: jax.Array, groups: int = 1) -> jax.Array | None:
    """T5 bias [G, H, R] of distances in the sequence, the same for all groups of examples, or None.

    Each group has a copy of the table to look up in: its gradient is summed into the buckets before groups on other
    devices are added.
    """
    if self.relative is None:
      return None
    bucket_R = relative_bucket(distance_R, causal=self.config.causal, buckets=self.config.relative_buckets,
                               max_distance=self.config.relative_max_distance)
    # float32, in which the gradient sums all distances of a bucket.
    table_GxNxH = jnp.broadcast_to(self.relative[...].astype(jnp.float32), (groups, *self.relative.shape))
    table_GxNxH = axes.constrain(table_GxNxH, 'batch', None, 'heads_activation') if groups > 1 else table_GxNxH
    return jax.vmap(lambda table: jnp.take(table, bucket_R, axis=0))(table_GxNxH).transpose(0, 2, 1)

  def __call__(self, x_BxLxD: jax.Array, *, valid_BxL: jax.Array | None = None,
               positions_AxL: jax.Array | None = None, keys_B: jax.Array | None = None) -> jax.Array:
    """Full pass. `valid` marks the keys that may be looked at; `keys_B` turn dropout on."""
    length = x_BxLxD.shape[1]
    place_L = jnp.arange(length)
    positions = place_L[None] if positions_AxL is None else positions_AxL
    mask = None if valid_BxL is None else valid_BxL[:, None, None, :]
    bias = self._bias(jnp.arange(1 - length, length), axes.parts('batch'))

    def layer(block, x, index):
      keys = None if keys_B is None else jax.vmap(lambda key: jax.random.fold_in(key, index))(keys_B)
      return block(x, positions, mask=mask, bias=bias, keys_B=keys), ()

    x, _ = self.layers.scan(layer, x_BxLxD, jnp.arange(self.config.depth))
    return x if self.final_norm is None else self.final_norm(x)

  def init_cache(self, batch: int, length: int, dtype: Any = jnp.float32) -> Cache:
    """An empty cache for `length` positions."""
    shape = (batch, self.config.heads, length, self.config.head_width)
    empty = lambda: tuple(jnp.zeros(shape, dtype) for _ in range(self.config.depth))
    return Cache(empty(), empty(), jnp.zeros((), jnp.int32))

  def extend(self, x_BxTxD: jax.Array, cache: Cache, *, positions_AxL: jax.Array | None = None,
             layers: Sequence[Block] | None = None) -> tuple[jax.Array, Cache]:
    """The next T positions: prefill with many, decode with one. Equals the full causal pass.

    Args:
      positions_AxL: of the cache's whole length; the slice in use is taken here.
      layers: `self.layers.apart()`, where a loop of many steps takes it from outside.
    """
    if not self.config.causal:
      raise ValueError('only a causal transformer can be extended')
    length, new = cache.k_BxHxSxK[0].shape[2], x_BxTxD.shape[1]
    place_L = jnp.arange(length)
    positions = place_L[None] if positions_AxL is None else positions_AxL
    now = jax.lax.dynamic_slice_in_dim(positions, cache.filled, new, axis=1)
    place_T = cache.filled + jnp.arange(new)
    mask = (place_L[None, :] <= place_T[:, None])[None, None]
    bias = self._bias(jnp.arange(new + length - 1) - (new - 1) - cache.filled)

    x, cached = x_BxTxD, []
    for block, k, v in zip(layers or self.layers.apart(), cache.k_BxHxSxK, cache.v_BxHxSxK, strict=True):
      x, *own = block.extend(x, now, k, v, cache.filled, mask=mask, bias=bias)
      cached.append(own)
    x = x if self.final_norm is None else self.final_norm(x)
    return x, Cache(*(tuple(both) for both in zip(*cached)), cache.filled + new)
