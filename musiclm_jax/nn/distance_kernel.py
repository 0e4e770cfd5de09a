"""The Pallas kernel of TPUs for causal attention with a bias by distance, as of T5.

Logits stay on the chip: those of a block of keys and a block of queries are computed, used and computed again for the
gradient (arXiv 2205.14135). Of a bias by distance a head has only as many different blocks as it has blocks of
queries: one for the pairs on the diagonal, which hides what causality hides as well, one for those next to it, and so
on. These tiles lie beside the head's keys while it is computed. The gradient of a bias is summed in such tiles over
all pairs and examples, and by distance after that, outside.

A block of logits has keys as rows and queries as columns, so that the sums of a softmax need no lanes exchanged and
no logits are transposed.

Shapes: G groups of successive examples, B examples (of a group, where there are groups), T length, H heads, K head
width, n blocks, b keys or queries of a block.
"""
from __future__ import annotations

import math

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp

_LEAST = -1e30  # below any logit, and finite
_ON_CHIP = 15 * 2 ** 20  # bytes that every TPU has for a kernel: v4 has 16 MiB
_LOGITS = 4  # blocks of logits that are in use at a time

_pallas_call = pl.pallas_call


def fitting_block(T: int, K: int, dtype: jnp.dtype) -> int:
  """Keys or queries of a block: of the sizes that fit on the chip what leaves least to fill up; 0 if none fits."""
  fit = [b for b in ((512, 384, 256, 128) if T > 128 else (128,)) if _bytes_on_chip(T, K, b, dtype) <= _ON_CHIP]
  return min(fit, key=lambda b: (-T % b + (T if b == 128 < T else 0), -b), default=0)


def _bytes_on_chip(T: int, K: int, block: int, dtype: jnp.dtype) -> int:
  """What the backward pass holds, in pieces of 8 x 128 words: two of all but the bias."""
  n, size = -(-T // block), jnp.dtype(dtype).itemsize
  rows, columns = block * -(-K // 128) * 128, -(-K * size // 32) * 32 // size * block
  head = n * (2 * columns * size + columns * 4 + 2 * 8 * block * 4)  # q and g; dq; sums
  parts = (4 * rows + columns) * size  # k, v, dk, dv; k in columns
  return 2 * (head + parts) + (3 * n + _LOGITS) * block * block * 4


def attend(q_BxTxHxK: jax.Array, k_BxTxHxK: jax.Array, v_BxTxHxK: jax.Array, tiles_GxHxNxbxb: jax.Array) -> jax.Array:
  """Causal softmax attention, logits scaled by 1/sqrt(K). Returns [B, T, H, K].

  tiles: float32 [G, H, n, b, b], what is added to the logits of a block of queries and the o-th block before it, at
    [o, key, query]; it hides what causality hides. Each of G equal groups of examples has its own.
  """
  batch, T, H, K = q_BxTxHxK.shape
  groups, _, n, block, _ = tiles_GxHxNxbxb.shape

  def cut(x):  # [G, B, H, n, b, K]
    x = jnp.pad(x, ((0, 0), (0, n * block - T), (0, 0), (0, 0)))
    return x.reshape(groups, batch // groups, n, block, H, K).transpose(0, 1, 4, 2, 3, 5)

  y = _attend(cut(q_BxTxHxK).swapaxes(-1, -2), cut(k_BxTxHxK), cut(v_BxTxHxK), tiles_GxHxNxbxb)
  return y.transpose(0, 1, 3, 5, 2, 4).reshape(batch, n * block, H, K)[:, :T]


def _product(a: jax.Array, b: jax.Array, contracted: tuple[int, int] = (1, 0)) -> jax.Array:
  precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else jax.lax.Precision.DEFAULT
  return jax.lax.dot_general(a, b, (((contracted[0],), (contracted[1],)), ((), ())), precision=precision,
                             preferred_element_type=jnp.float32)


def _forward_kernel(q_ref, k_ref, v_ref, tiles_ref, y_ref, log_total_ref):
  """For one block of queries [K, b]: its output [K, b], and the logarithm of each softmax's sum [1, b]."""
  i, (K, b) = pl.program_id(3), q_ref.shape
  q = q_ref[...]

  def block(j, carry):
    y, top, total = carry
    logits = _product(k_ref[j], q) / math.sqrt(K) + tiles_ref[i - j]
    higher = jnp.maximum(top, jnp.max(logits, axis=0, keepdims=True))
    weights, shrink = jnp.exp(logits - higher), jnp.exp(top - higher)
    y = y * shrink + _product(v_ref[j], weights.astype(v_ref.dtype))
    return y, higher, total * shrink + jnp.sum(weights, axis=0, keepdims=True)

  start = jnp.zeros((K, b), jnp.float32), jnp.full((1, b), _LEAST, jnp.float32), jnp.zeros((1, b), jnp.float32)
  y, top, total = jax.lax.fori_loop(0, i + 1, block, start)
  y_ref[...] = (y / total).astype(y_ref.dtype)
  log_total_ref[...] = top + jnp.log(total)


def _backward_kernel(q_ref, k_ref, key_columns_ref, v_ref, g_ref, log_total_ref, inner_ref, tiles_ref, dq_ref, dk_ref,
                     dv_ref, dtiles_ref):
  """For one block of keys: their gradients [b, K], and its part of those of the head's queries and tiles."""
  example, j = pl.program_id(2), pl.program_id(3)
  n, K, _ = q_ref.shape
  k, key_columns, v = k_ref[...], key_columns_ref[...], v_ref[...]

  @pl.when(j == 0)
  def _():
    dq_ref[...] = jnp.zeros_like(dq_ref)

  @pl.when((j == 0) & (example == 0))
  def _():
    dtiles_ref[...] = jnp.zeros_like(dtiles_ref)

  def block(i, carry):
    dk, dv = carry
    q, g = q_ref[i], g_ref[i]
    weights = jnp.exp(_product(k, q) / math.sqrt(K) + tiles_ref[i - j] - log_total_ref[i])
    dlogits = weights * (_product(v, g) - inner_ref[i])
    dtiles_ref[i - j] += dlogits
    low = dlogits.astype(q.dtype)
    dq_ref[i] += _product(key_columns, low)
    return dk + _product(low, q, (1, 1)), dv + _product(weights.astype(g.dtype), g, (1, 1))

  none = jnp.zeros(k.shape, jnp.float32)
  dk, dv = jax.lax.fori_loop(j, n, block, (none, none))
  dk_ref[...] = (dk / math.sqrt(K)).astype(dk_ref.dtype)
  dv_ref[...] = dv.astype(dv_ref.dtype)


@jax.custom_vjp
def _attend(q, k, v, tiles):
  """Queries in columns [G, B, H, n, K, b], keys and values [G, B, H, n, b, K], tiles [G, H, n, b, b]; as columns."""
  return _forward(q, k, v, tiles)[0]


def _forward(q, k, v, tiles):
  value_columns = v.swapaxes(-1, -2)
  rows = jax.ShapeDtypeStruct((*q.shape[:-2], 1, q.shape[-1]), jnp.float32)
  y, log_total = _call(_forward_kernel, (q, k, value_columns, tiles), ('block', 'head', 'head', 'bias'),
                       (jax.ShapeDtypeStruct(q.shape, v.dtype), rows), ('block', 'block'), products=2)
  return y, (q, k, v, tiles, y, log_total)


def _backward(kept, g):
  q, k, v, tiles, y, log_total = kept
  inner = jnp.sum(g.astype(jnp.float32) * y.astype(jnp.float32), axis=-2, keepdims=True)
  like = lambda x, dtype: jax.ShapeDtypeStruct(x.shape, dtype)
  dq, dk, dv, dtiles = _call(
      _backward_kernel, (q, k, k.swapaxes(-1, -2), v, g, log_total, inner, tiles),
      ('head', 'block', 'block', 'block', 'head', 'head', 'head', 'bias'),
      (like(q, jnp.float32), like(k, k.dtype), like(v, v.dtype), like(tiles, jnp.float32)),
      ('head', 'block', 'block', 'tiles'), products=5)
  return (dq / math.sqrt(q.shape[-2])).astype(q.dtype), dk, dv, dtiles


_attend.defvjp(_forward, _backward)


def _of_a_head(x, **how):
  return pl.BlockSpec((None,) * 2 + x.shape[2:], lambda g, h, e, i: (g, h, 0, 0, 0), **how)


# What a place (group, head, example, block) of the grid gets of an array. Of a bias, the same for all examples of a
# head, one is held; of all else two, so that the next is fetched meanwhile.
_PARTS = {'block': lambda x: pl.BlockSpec((None,) * 4 + x.shape[4:], lambda g, h, e, i: (g, e, h, i, 0, 0)),
          'head': lambda x: pl.BlockSpec((None,) * 3 + x.shape[3:], lambda g, h, e, i: (g, e, h, 0, 0, 0)),
          'tiles': _of_a_head, 'bias': lambda x: _of_a_head(x, pipeline_mode=pl.Buffered(1))}


def _call(kernel, arrays, parts, results, result_parts, *, products: int):
  """The kernel at every place of the grid, the blocks of a head and the examples of a head after one another."""
  groups, examples, H, n, K, b = arrays[0].shape
  specs = [_PARTS[part](x) for part, x in zip((*parts, *result_parts), (*arrays, *results), strict=True)]
  pairs = groups * examples * H * (n * (n + 1) // 2)
  cost = pl.CostEstimate(flops=2 * products * pairs * K * b * b, transcendentals=pairs * b * b,
                         bytes_accessed=sum(math.prod(x.shape) * x.dtype.itemsize for x in (*arrays, *results)))
  return _pallas_call(
      kernel, grid=(groups, H, examples, n), in_specs=specs[:len(arrays)], out_specs=tuple(specs[len(arrays):]),
      out_shape=results, cost_estimate=cost, name=kernel.__name__.strip('_'),
      compiler_params=pltpu.CompilerParams(dimension_semantics=('parallel', 'parallel', 'arbitrary', 'arbitrary'))
  )(*arrays)
