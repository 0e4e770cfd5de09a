"""Attention: one function, and what computes it on each kind of device.

Shapes: B batch, T query length, S key length, H heads, K head width, G groups of successive examples, R distances
(T + S - 1), n queries of a block, s keys that a block may see; `...` stands for examples and heads.
"""
from __future__ import annotations

from collections.abc import Callable
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from musiclm_jax import axes

KINDS = ('auto', 'xla', 'blockwise', 'cudnn', 'pallas')
_PLATFORMS = {'cudnn': 'gpu', 'pallas': 'tpu'}  # where a kernel runs
_TYPES = {'cudnn': (jnp.bfloat16, jnp.float16), 'pallas': (jnp.bfloat16, jnp.float32)}  # what it computes in

_NEGATIVE = -1e30  # finite, so that a row with every key masked gives a number and not NaN
_BLOCK = 128  # queries a block, where nobody chooses
_RESIDENT = 2 ** 18  # logits of a block on a CPU that need not be cut further
_FEW = 8  # queries at most whose logits are computed at once: there is nothing to save
_SEGMENTS = 8  # lengths of visible keys at most that a causal pass is compiled for
_TILE = 2 ** 16  # logits that stay in a core's cache
# Logits of a head that an accelerator without a kernel for them computes at once, which is faster than blocks and takes
# more memory.
_WHOLE = 1024 ** 2
_SPREAD = 4096 ** 2  # logits of a head over which a bias by distance is spread for a kernel
_HIDDEN = -1e4  # a logit without any weight, in half precision


def attention(q_BxTxHxK: jax.Array, k_BxSxHxK: jax.Array, v_BxSxHxK: jax.Array, *, mask: jax.Array | None = None,
              bias_GxHxR: jax.Array | None = None, causal: bool = False, kind: str = 'auto', block: int = 0
              ) -> jax.Array:
  """Softmax attention, softmax in float32, logits scaled by 1/sqrt(K). Returns [B, T, H, K].

  Args:
    mask: bool, broadcastable to [B, H, T, S]; True where a query may look. What a query that may look nowhere finds
      means nothing.
    bias: added to the logits by distance: that of query t and key s is entry s - t + T - 1. Each of G equal groups of
      successive examples has its own.
    causal: query t sees keys 0 to t + S - T only.
    kind: "xla" computes all logits at once and keeps them for the gradient. "blockwise" computes those of some queries
      at a time and again in the backward pass: memory is linear in the lengths. "cudnn" and "pallas" are the fused
      kernels of NVIDIA GPUs and of TPUs; on other devices, and in float32 on GPUs, as networks are evaluated, "auto"
      takes their place. "auto" chooses by the device and by what each can do.
    block: queries a block of "blockwise"; 0 chooses.

  Raises ValueError for a kernel that cannot do what is asked, with the reason.
  """
  B, T, S = *q_BxTxHxK.shape[:2], k_BxSxHxK.shape[1]
  if not all(isinstance(n, int) for n in (B, T, S)):  # what an exported program leaves open cannot be cut
    kind = 'xla'
  if kind == 'auto' or kind in _PLATFORMS and not _at_home(kind, q_BxTxHxK):
    kind = fitting(q_BxTxHxK, k_BxSxHxK, mask, bias_GxHxR, causal)
  elif kind in _PLATFORMS and (reason := _obstacle(_PLATFORMS[kind], q_BxTxHxK, k_BxSxHxK, mask, bias_GxHxR, causal)):
    raise ValueError(f'attention = {kind!r}: {reason}; "auto" chooses what fits')
  if kind == 'cudnn':
    return _cudnn(q_BxTxHxK, k_BxSxHxK, v_BxSxHxK, mask, bias_GxHxR, causal)
  if kind == 'pallas' and bias_GxHxR is not None:
    return _tiled(q_BxTxHxK, k_BxSxHxK, v_BxSxHxK, bias_GxHxR)
  if kind == 'pallas':
    return _splash(q_BxTxHxK, k_BxSxHxK, v_BxSxHxK, mask, causal)
  if kind == 'xla':
    return _plain(q_BxTxHxK, k_BxSxHxK, v_BxSxHxK, mask, bias_GxHxR, causal)
  if causal and T > S:
    raise ValueError(f'causal attention of {T} queries to {S} keys: the first would see none')
  bias_BxHxR = None if bias_GxHxR is None else _of_each_example(bias_GxHxR, q_BxTxHxK.shape[0])
  if not block:  # a causal block leaves out keys; else only what the logits take counts
    block = _BLOCK if causal or axes.platform() != 'cpu' else max(_BLOCK, _RESIDENT // S)
  return _in_blocks(q_BxTxHxK, k_BxSxHxK, v_BxSxHxK, mask, bias_BxHxR, causal, block)


def fitting(q_BxTxHxK: jax.Array, k_BxSxHxK: jax.Array, mask: jax.Array | None, bias_GxHxR: jax.Array | None,
            causal: bool) -> str:
  """The fastest kind that can compute it on the devices of the step."""
  T, S, platform = q_BxTxHxK.shape[1], k_BxSxHxK.shape[1], axes.platform()
  if T <= _FEW:
    return 'xla'
  kernel = {on: kind for kind, on in _PLATFORMS.items()}.get(platform)
  if kernel and _at_home(kernel, q_BxTxHxK) and not _obstacle(platform, q_BxTxHxK, k_BxSxHxK, mask, bias_GxHxR, causal):
    return kernel
  whole = platform != 'cpu' and T * S <= _WHOLE and axes.parts('length') == 1
  return 'xla' if whole else 'blockwise'


def _at_home(kind: str, q_BxTxHxK: jax.Array) -> bool:
  """Whether a kernel is one of this device and computes in this type."""
  return axes.platform() == _PLATFORMS[kind] and q_BxTxHxK.dtype in _TYPES[kind]


def _obstacle(platform: str, q_BxTxHxK: jax.Array, k_BxSxHxK: jax.Array, mask: jax.Array | None,
              bias: jax.Array | None, causal: bool) -> str:
  """Why the kernel of a platform cannot be used there; "" where it can."""
  T, S, K = q_BxTxHxK.shape[1], k_BxSxHxK.shape[1], q_BxTxHxK.shape[3]
  if bias is not None and mask is not None:
    return 'it takes no bias by distance (positions = "t5") beside a mask'
  if bias is not None and platform == 'tpu':
    if not causal:
      return 'it takes a bias by distance (positions = "t5") where attention is causal alone'
    if K % 8:
      return f'beside a bias by distance a head must have a multiple of 8 channels, found {K}'
    if not _tile(q_BxTxHxK):
      return f'beside a bias by distance {T} positions of {K} channels in {q_BxTxHxK.dtype} do not fit on the chip'
  if bias is not None and T * S > _SPREAD:
    return f'it spreads a bias by distance over {_SPREAD} logits a head at most, found {T} x {S}'
  if mask is not None and (mask.ndim != 4 or mask.shape[1:3] != (1, 1)):
    return 'it takes no mask but one of keys, [B, 1, 1, S]'
  if axes.parts('length') > 1:
    return 'it takes no queries that are split over devices (mesh axis "sequence")'
  if platform == 'gpu' and (K % 8 or K > 128):
    return f'a head must have a multiple of 8 and at most 128 channels, found {K}'
  if T != S:
    return f'it takes as many queries as keys, found {T} queries and {S} keys'
  return ''


def _of_each_example(bias_GxHxR: jax.Array, batch: int) -> jax.Array:
  groups, H, R = bias_GxHxR.shape
  if groups == 1:
    return jnp.broadcast_to(bias_GxHxR, (batch, H, R))
  return jnp.broadcast_to(bias_GxHxR[:, None], (groups, batch // groups, H, R)).reshape(batch, H, R)


def by_distance(bias_R: jax.Array, T: int, S: int) -> jax.Array:
  """[..., T, S] from [..., T + S - 1]: entry s - t + T - 1 at (t, s).

  Rows of a length one more than the period, read as rows of the period, each begin one further back: no gather, whose
  gradient would be a scatter.
  """
  lead, none = bias_R.shape[:-1], [(0, 0)] * (bias_R.ndim - 1)
  padded = jnp.pad(bias_R, [*none, (0, 1)])
  rows = jnp.broadcast_to(padded[..., None, :], (*lead, T, T + S)).reshape(*lead, T * (T + S))
  # Filled up to T + 1 rows, for lengths that are left open can be added to and not always subtracted from.
  rows = jnp.pad(rows, [*none, (0, S - 1)]).reshape(*lead, T + 1, T + S - 1)
  return rows[..., :T, T - 1:]


def attend_cached(q_BxTxHxK: jax.Array, k_BxHxSxK: jax.Array, v_BxHxSxK: jax.Array, *, mask: jax.Array,
                  bias_GxHxR: jax.Array | None = None) -> jax.Array:
  """As `attention`, of few queries to keys and values with their heads in front, as a cache holds them.

  All logits at once: lengths may be left open in an exported program, and no gradient has to keep them.
  """
  weights = _weights(jnp.einsum('BTHK,BHSK->BHTS', q_BxTxHxK, k_BxHxSxK, preferred_element_type=jnp.float32),
                     q_BxTxHxK.shape[-1], mask, bias_GxHxR)
  return jnp.einsum('BHTS,BHSK->BTHK', weights.astype(v_BxHxSxK.dtype), v_BxHxSxK)


def _plain(q, k, v, mask, bias_GxHxR, causal):
  T, S = q.shape[1], k.shape[1]
  if causal:
    seen = jnp.arange(S)[None, :] <= jnp.arange(T)[:, None] + (S - T)
    mask = seen if mask is None else mask & seen
  logits = jnp.einsum('BTHK,BSHK->BHTS', q, k, preferred_element_type=jnp.float32)
  return jnp.einsum('BHTS,BSHK->BTHK', _weights(logits, q.shape[-1], mask, bias_GxHxR).astype(v.dtype), v)


def _weights(logits, width, mask, bias_GxHxR):
  """Softmax [B, H, T, S] of products of queries and keys."""
  T, S = logits.shape[2:]
  logits = logits / math.sqrt(width)
  if bias_GxHxR is not None:  # spread over the logits once a group, and not once an example
    bias_GxHxTxS = by_distance(bias_GxHxR.astype(jnp.float32), T, S)
    if len(bias_GxHxTxS) == 1:
      logits = logits + bias_GxHxTxS
    else:
      grouped = logits.reshape(len(bias_GxHxTxS), -1, *logits.shape[1:])
      logits = (grouped + bias_GxHxTxS[:, None]).reshape(logits.shape)
  if mask is not None:
    logits = jnp.where(mask, logits, _NEGATIVE)
  return jax.nn.softmax(logits, axis=-1)


class _Segment(NamedTuple):
  """`count` blocks of `rows` successive queries from `first` on, all of which look among the first `keys` keys."""

  first: int
  rows: int
  count: int
  keys: int


class _Plan(NamedTuple):
  """How a pass is cut: segments of queries; and the heads, of all examples, that are computed at a time (0: all)."""

  segments: tuple[_Segment, ...]
  causal: bool
  heads: int


def _segments(T: int, S: int, block: int, skip: bool) -> tuple[_Segment, ...]:
  """Blocks of all T queries; with `skip`, later segments see more keys."""
  whole, rest = divmod(T, block)
  per = -(-whole // _SEGMENTS) if skip else whole
  cut = [(i * block, block, min(per, whole - i)) for i in range(0, whole, max(per, 1))]
  cut += [(whole * block, rest, 1)] if rest else []
  return tuple(_Segment(first, rows, count, first + rows * count + S - T if skip else S) for first, rows, count in cut)


def _in_blocks(q_BxTxHxK, k_BxSxHxK, v_BxSxHxK, mask, bias_BxHxR, causal: bool, block: int) -> jax.Array:
  """One of three arrangements of the same blocks.

  CPU: a few heads at a time, one after another, whose logits then stay in the cache: training twice as fast. A mesh
  and accelerators: all heads side by side. Queries that are split over devices: each device's are cut for themselves,
  so that no block has to travel.
  """
  B, T, H, K = q_BxTxHxK.shape
  S, parts = k_BxSxHxK.shape[1], axes.parts('length')
  q, k, v = (x.transpose(0, 2, 1, 3) for x in (q_BxTxHxK, k_BxSxHxK, v_BxSxHxK))
  mask = None if mask is None else mask.reshape((1,) * (4 - mask.ndim) + mask.shape)
  if axes.platform() == 'cpu' and axes.num_devices() == 1:
    heads = _TILE // (min(block, T) * S)
    heads = max(n for n in range(1, B * H + 1) if B * H % n == 0 and n <= max(heads, 1))
    y = _blockwise(_Plan(_segments(T, S, block, causal), causal, heads), q, k, v, mask, bias_BxHxR, jnp.int32(S - T))
  elif parts > 1 and T % parts == 0:
    y = _of_each_part(parts, _Plan(_segments(T // parts, S, block, False), causal, 0), q, k, v, mask, bias_BxHxR)
  else:
    y = _blockwise(_Plan(_segments(T, S, block, causal), causal, 0), q, k, v, mask, bias_BxHxR, jnp.int32(S - T))
  return y.transpose(0, 2, 1, 3)


def _of_each_part(parts: int, plan: _Plan, q_BxHxTxK, k_BxHxSxK, v_BxHxSxK, mask, bias_BxHxR) -> jax.Array:
  B, H, T, K = q_BxHxTxK.shape
  S, rows = k_BxHxSxK.shape[2], T // parts
  first_P = jnp.arange(parts, dtype=jnp.int32) * rows
  bias_PxBxHxR = bias_BxHxR if bias_BxHxR is None else jnp.stack([
      bias_BxHxR[..., (parts - 1 - p) * rows:(parts - p) * rows + S - 1] for p in range(parts)])
  whole_mask = mask is None or mask.shape[2] == 1
  if not whole_mask:
    mask = mask.reshape(*mask.shape[:2], parts, rows, mask.shape[3])
  run = jax.vmap(functools.partial(_blockwise, plan), out_axes=2,
                 in_axes=(2, None, None, None if whole_mask else 2, None if bias_BxHxR is None else 0, 0))
  y = run(q_BxHxTxK.reshape(B, H, parts, rows, K), k_BxHxSxK, v_BxHxSxK, mask, bias_PxBxHxR, first_P + (S - T))
  return y.reshape(B, H, T, K)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _blockwise(plan: _Plan, q, k, v, mask, bias, start) -> jax.Array:
  """Queries [B, H, T, K] to keys and values [B, H, S, K], all heads [B, H] at once or `plan.heads` at a time.

  mask: [1 or B, 1 or H, 1 or T, 1 or S] or None. bias: [B, H, R] or None. start: the last key that query 0 sees
  where the plan is causal, int32.
  """
  return _forward(plan, q, k, v, mask, bias, start)[0]


def _forward(plan: _Plan, q, k, v, mask, bias, start):
  def run(arrays, mask):
    q, k, v, bias = arrays
    parts = []
    for segment in plan.segments:
      def block(none, first, segment=segment):
        return none, _block_forward(plan, segment, first, q, k, v, mask, bias, start)
      parts.append(_each_block(block, (), segment)[1])
    return tuple(jnp.concatenate(x, axis=-2) for x in zip(*parts))

  y, top, total = _by_heads(plan, run, (q, k, v, bias), mask)
  return y, (q, k, v, mask, bias, start, y, top, total)


def _backward(plan: _Plan, kept, g):
  q, k, v, mask, bias, start, y, top, total = kept

  def run(arrays, mask):
    q, k, v, bias, y, top, total, g = arrays
    inner = jnp.sum(g.astype(jnp.float32) * y.astype(jnp.float32), axis=-1, keepdims=True)
    sums = tuple(None if x is None else jnp.zeros(x.shape, jnp.float32) for x in (k, v, bias))
    parts = []
    for segment in plan.segments:
      def block(sums, first, segment=segment):
        rows = (jax.lax.dynamic_slice_in_dim(x, first, segment.rows, axis=-2) for x in (top, total, inner, g))
        return _block_backward(plan, segment, first, q, k, v, mask, bias, start, sums, *rows)
      sums, dq = _each_block(block, sums, segment)
      parts.append(dq)
    return jnp.concatenate(parts, axis=-2), *sums

  gradients = _by_heads(plan, run, (q, k, v, bias, y, top, total, g), mask)
  dq, dk, dv, dbias = (None if x is None else d.astype(x.dtype) for d, x in zip(gradients, (q, k, v, bias)))
  return dq, dk, dv, None, dbias, None


_blockwise.defvjp(_forward, _backward)


def _by_heads(plan: _Plan, run: Callable[..., Any], arrays: Any, mask: jax.Array | None) -> Any:
  """run(arrays, mask) for all heads at once, or for `plan.heads` of them at a time."""
  if not plan.heads:
    return run(arrays, mask)
  B, H = arrays[0].shape[:2]
  split = lambda x: x.reshape(B * H // plan.heads, plan.heads, *x.shape[2:])
  arrays = jax.tree.map(split, arrays)
  if mask is None or mask.shape[:2] == (1, 1):
    whole = None if mask is None else mask[0]
    results = jax.lax.map(lambda arrays: run(arrays, whole), arrays)
  else:
    masks = split(jnp.broadcast_to(mask, (B, H, *mask.shape[2:])))
    results = jax.lax.map(lambda both: run(*both), (arrays, masks))
  return jax.tree.map(lambda x: x.reshape(B, H, *x.shape[2:]), results)


def _each_block(block: Callable[..., Any], carry: Any, segment: _Segment) -> Any:
  """carry, results = block(carry, first) for each block of a segment in turn, the results joined along the queries."""
  if segment.count == 1:
    return block(carry, segment.first)
  firsts = segment.first + segment.rows * jnp.arange(segment.count, dtype=jnp.int32)
  carry, results = jax.lax.scan(block, carry, firsts)

  def join(x):
    x = jnp.moveaxis(x, 0, -3)
    return x.reshape(*x.shape[:-3], segment.count * segment.rows, x.shape[-1])

  return carry, jax.tree.map(join, results)


def _logits(plan: _Plan, segment: _Segment, first, q, k, mask, bias, start):
  """Logits of one block in float32 [..., n, s], and where they were allowed, or None."""
  n, s, T = segment.rows, segment.keys, q.shape[-2]
  rows = jax.lax.dynamic_slice_in_dim(q, first, n, axis=-2)
  logits = _product('...nk,...sk->...ns', rows, k[..., :s, :]) / math.sqrt(q.shape[-1])
  # Tied to the logits: else what is the same for all heads or layers, the bias and what causality hides, would be
  # computed and kept for all blocks beforehand, [T, T].
  piece = None if bias is None else jax.lax.dynamic_slice_in_dim(bias, T - first - n, n + s - 1, axis=-1)
  logits, piece, last = jax.lax.optimization_barrier((logits, piece, first + start))
  if bias is not None:
    logits = logits + by_distance(piece, n, s)
  allowed = None
  if mask is not None:
    allowed = mask if mask.shape[-2] == 1 else jax.lax.dynamic_slice_in_dim(mask, first, n, axis=-2)
    allowed = allowed if allowed.shape[-1] == 1 else allowed[..., :s]
  if plan.causal:
    seen = jnp.arange(s)[None, :] <= jnp.arange(n)[:, None] + last
    allowed = seen if allowed is None else allowed & seen
  return (logits if allowed is None else jnp.where(allowed, logits, _NEGATIVE)), allowed


def _block_forward(plan, segment, first, q, k, v, mask, bias, start):
  """Output [..., n, K] of a block, and of each of its softmaxes the largest logit and the sum [..., n, 1]."""
  logits, _ = _logits(plan, segment, first, q, k, mask, bias, start)
  top = jnp.max(logits, axis=-1, keepdims=True)
  weights = jnp.exp(logits - top)
  total = jnp.sum(weights, axis=-1, keepdims=True)
  y = _product('...ns,...sk->...nk', weights.astype(v.dtype), v[..., :segment.keys, :]) / total
  return y.astype(v.dtype), top, total


def _block_backward(plan, segment, first, q, k, v, mask, bias, start, sums, top, total, inner, g):
  """Adds a block's part to the gradients (dk, dv, dbias); returns them and dq [..., n, K]."""
  dk, dv, dbias = sums
  n, s, T = segment.rows, segment.keys, q.shape[-2]
  scale = 1 / math.sqrt(q.shape[-1])
  logits, allowed = _logits(plan, segment, first, q, k, mask, bias, start)
  weights = jnp.exp(logits - top) / total
  dlogits = weights * (_product('...nk,...sk->...ns', g, v[..., :s, :]) - inner)
  if mask is not None:  # a row without a key has weights, but no gradient goes through them
    dlogits = jnp.where(allowed, dlogits, 0)
  if bias is not None:
    _, transposed = jax.vjp(lambda x: by_distance(x, n, s), jnp.zeros((*dlogits.shape[:-2], n + s - 1), jnp.float32))
    dbias = _added(dbias, transposed(dlogits)[0], T - first - n, axis=-1)
  low = dlogits.astype(q.dtype)
  rows = jax.lax.dynamic_slice_in_dim(q, first, n, axis=-2)
  dk = _added(dk, _product('...ns,...nk->...sk', low, rows) * scale, 0, axis=-2)
  dv = _added(dv, _product('...ns,...nk->...sk', weights.astype(g.dtype), g), 0, axis=-2)
  return (dk, dv, dbias), _product('...ns,...sk->...nk', low, k[..., :s, :]) * scale


_product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)


def _added(whole: jax.Array, part: jax.Array, first: Any, *, axis: int) -> jax.Array:
  """`whole` with `part` added to it from `first` on."""
  size = part.shape[axis]
  if whole.shape[axis] == size:
    return whole + part
  there = jax.lax.dynamic_slice_in_dim(whole, first, size, axis=axis)
  return jax.lax.dynamic_update_slice_in_dim(whole, there + part, first, axis=axis)


def _cudnn(q_BxTxHxK: jax.Array, k_BxTxHxK: jax.Array, v_BxTxHxK: jax.Array, mask: jax.Array | None,
           bias_GxHxR: jax.Array | None, causal: bool) -> jax.Array:
  """cuDNN's kernel. It reads a bias and a mask as [T, T], which each device makes of its own part, while the layer is
  computed; the gradient of a bias comes back as such, and is summed by distance there."""
  names, T = ('batch', None, 'heads_activation', None), q_BxTxHxK.shape[1]
  added = T % 2  # the gradient takes even lengths only; what is added stands behind all that counts
  length = T + added

  def kernel(q, k, v, **given):
    filled = (jnp.pad(x, ((0, 0), (0, added), (0, 0), (0, 0))) for x in (q, k, v))
    return _fused(*filled, is_causal=causal, **given)[:, :T]

  def plain(q, k, v):
    if causal or not added:
      return kernel(q, k, v)
    return kernel(q, k, v, mask=jnp.broadcast_to(jnp.arange(length) < T, (1, 1, length, length)))

  def masked(q, k, v, seen):
    seen = jnp.pad(seen, ((0, 0), (0, 0), (0, 0), (0, added)))
    return kernel(q, k, v, mask=jnp.broadcast_to(seen, (len(q), 1, length, length)))

  def biased(q, k, v, bias):
    bias = by_distance(jnp.pad(bias, ((0, 0), (0, 0), (added, added))), length, length).astype(q.dtype)
    if added and not causal:
      bias = jnp.where(jnp.arange(length) < T, bias, _HIDDEN)
    groups = (jnp.split(x, len(bias)) for x in (q, k, v))  # one of them where several devices have one each
    return jnp.concatenate([kernel(*each, bias=own[None]) for *each, own in zip(*groups, bias, strict=True)])

  arrays = q_BxTxHxK, k_BxTxHxK, v_BxTxHxK
  if mask is not None:
    seen = jnp.broadcast_to(mask, (len(q_BxTxHxK), 1, 1, T))
    return axes.apart(masked, (*[names] * 3, ('batch', None, None, None)), *arrays, seen)
  if bias_GxHxR is not None:
    return axes.apart(biased, (*[names] * 3, ('batch', 'heads_activation', None)), *arrays, bias_GxHxR)
  return axes.apart(plain, [names] * 3, *arrays)


_fused = functools.partial(jax.nn.dot_product_attention, implementation='cudnn')


def _tile(q_BxTxHxK: jax.Array) -> int:
  """Queries or keys of a block of our kernel for TPUs; 0 where it cannot be used."""
  from musiclm_jax.nn import distance_kernel
  return distance_kernel.fitting_block(q_BxTxHxK.shape[1], q_BxTxHxK.shape[3], q_BxTxHxK.dtype)


def _tiled(q_BxTxHxK: jax.Array, k_BxTxHxK: jax.Array, v_BxTxHxK: jax.Array, bias_GxHxR: jax.Array) -> jax.Array:
  """Our Pallas kernel, for causal attention with a bias; heads and groups are those of each device."""
  from musiclm_jax.nn import distance_kernel
  names, T, tile = ('batch', None, 'heads_activation', None), q_BxTxHxK.shape[1], _tile(q_BxTxHxK)

  def local(q, k, v, bias):
    return distance_kernel.attend(q, k, v, _tiles(bias, T, tile))

  return axes.apart(local, [names] * 3 + [('batch', 'heads_activation', None)], q_BxTxHxK, k_BxTxHxK, v_BxTxHxK,
                    bias_GxHxR)


def _tiles(bias_GxHxR: jax.Array, T: int, block: int) -> jax.Array:
  """A bias by distance as `distance_kernel` takes it, [G, H, n, block, block], with what causality hides."""
  n = -(-T // block)
  bias = jnp.pad(bias_GxHxR.astype(jnp.float32), ((0, 0), (0, 0), (n * block - T, max(0, block - T))))
  windows = jnp.stack([bias[..., first * block:(first + 2) * block - 1] for first in reversed(range(n))], axis=2)
  tiles = by_distance(windows, block, block).swapaxes(-1, -2)
  seen = (jnp.arange(n) > 0)[:, None, None] | jnp.triu(jnp.ones((block, block), bool))
  return jnp.where(seen, tiles, _NEGATIVE)


def _splash(q_BxTxHxK: jax.Array, k_BxTxHxK: jax.Array, v_BxTxHxK: jax.Array, mask: jax.Array | None,
            causal: bool) -> jax.Array:
  """The Pallas kernel of JAX; lengths are padded to its tiles, and heads are those of each device."""
  from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
  from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
  T, K = q_BxTxHxK.shape[1], q_BxTxHxK.shape[3]
  length = -(-T // 128) * 128
  tile = next(n for n in (512, 384, 256, 128) if length % n == 0)

  def local(q, k, v, *seen_BxT):
    q, k, v = (jnp.pad(x, ((0, 0), (0, length - T), (0, 0), (0, 0))).transpose(0, 2, 1, 3) for x in (q, k, v))
    shape = (length, length)
    mask = masks.MultiHeadMask([masks.CausalMask(shape) if causal else masks.FullMask(shape)] * q.shape[1])
    sizes = kernels.BlockSizes(block_q=tile, block_kv=tile, block_kv_compute=tile, block_q_dkv=tile, block_kv_dkv=tile,
                               block_kv_dkv_compute=tile, block_q_dq=tile, block_kv_dq=tile)
    run = kernels.make_splash_mha_single_device(mask, block_sizes=sizes)
    # Queries look at keys of their segment. What fills up the length lies after all that a causal query sees; else it
    # is a segment of its own, of keys, as are those that a mask hides.
    if seen_BxT:
      keys_BxT = jnp.pad(seen_BxT[0], ((0, 0), (0, length - T))).astype(jnp.int32)
    elif causal or length == T:
      keys_BxT = None
    else:
      keys_BxT = jnp.broadcast_to((jnp.arange(length) < T).astype(jnp.int32), (len(q), length))
    segments = None if keys_BxT is None else kernels.SegmentIds(jnp.ones_like(keys_BxT), keys_BxT)
    y = jax.vmap(run)(q / math.sqrt(K), k, v, segments)
    return y.transpose(0, 2, 1, 3)[:, :T].astype(v.dtype)

  names, more = ('batch', None, 'heads_activation', None), ()
  if mask is not None:
    more = (jnp.broadcast_to(mask[:, 0, 0], (len(q_BxTxHxK), T)),)
  return axes.apart(local, [names] * 3 + [('batch', None)] * len(more), q_BxTxHxK, k_BxTxHxK, v_BxTxHxK, *more)
