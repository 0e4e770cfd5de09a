"""The one residual vector quantizer: lookup, encode, decode, and the two ways to fit it.

k-means is one level of it. It is fitted by an exponential moving average inside an objective (SoundStream) or
by `accumulate` over frozen features (semantic tokens, MuLan tokens).

Shapes: B batch, T frames, N rows, M candidate rows, D width, Q levels, K codes.
"""
from __future__ import annotations

import math
from typing import NamedTuple

from flax import nnx
import jax
import jax.numpy as jnp

# Directions that vary less than this share of the one that varies most hold more noise than music.
_LEAST_VARIANCE = 3e-3
# Rows of each batch that may replace dead codes, a level: more than are ever dead at once after the start.
CANDIDATES = 32


class Quantized(NamedTuple):
  """Result of `ResidualQuantizer.quantize`.

  Attributes:
    values: [B, T, D], the sum of the chosen codes over the levels in use, without a gradient.
    indices: int32 [B, T, Q]; levels beyond those in use are encoded and counted too.
    commitment: [B], squared distance of each level's residual to its (fixed) code, summed over the levels in
      use and averaged over frames and width; its gradient goes to the input only.
    statistics: sums for `ema_update`.
  """

  values_BxTxD: jax.Array
  indices_BxTxQ: jax.Array
  commitment_B: jax.Array
  statistics: dict[str, jax.Array]


def nearest(x_NxD: jax.Array, codebook_KxD: jax.Array) -> jax.Array:
  """Index of the nearest code in Euclidean distance, int32 [...]; ties go to the lower index."""
  x = x_NxD.astype(jnp.float32)
  codes = codebook_KxD.astype(jnp.float32)
  # |x|^2 is the same for every code and is left out.
  score = jnp.sum(jnp.square(codes), axis=-1) - 2 * jnp.matmul(x, codes.T, precision=jax.lax.Precision.HIGHEST)
  return jnp.argmin(score, axis=-1).astype(jnp.int32)


def code_sums(x_NxD: jax.Array, indices_N: jax.Array, codebook_size: int,
              weight_N: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
  """How many rows chose each code [K], and the sum of those rows [K, D]."""
  weight_N = jnp.ones(x_NxD.shape[:1]) if weight_N is None else weight_N
  count_K = jax.ops.segment_sum(weight_N, indices_N, codebook_size)
  sum_KxD = jax.ops.segment_sum(x_NxD * weight_N[:, None], indices_N, codebook_size)
  return count_K, sum_KxD


class ResidualQuantizer(nnx.Module):
  """Q codebooks of K codes, each quantizing what the levels before it left over (arXiv 2107.03312, III-C)."""

  def __init__(self, levels: int, codebook_size: int, width: int, *, rngs: nnx.Rngs):
    codes = jax.random.normal(rngs.params(), (levels, codebook_size, width))
    self.codebook = nnx.Variable(codes, axes=(None, 'codebook', None))
    self.count = nnx.Variable(jnp.ones((levels, codebook_size)), axes=(None, 'codebook'))
    self.sum = nnx.Variable(codes + 0, axes=(None, 'codebook', None))

  def quantize(self, x_BxTxD: jax.Array, *, levels_B: jax.Array | None = None, slot_B: jax.Array | None = None,
               batch_size: int = 0, key: jax.Array | None = None) -> Quantized:
    """Quantizes with statistics for training.

    Args:
      levels_B: how many first levels each example uses (quantizer dropout); None for all.
      slot_B, batch_size, key: place in the global batch, its size, and the step's key. With them the
        statistics carry candidate rows for dead codes: frames of the global batch chosen by the key, the same
        ones for any split into microbatches or devices.
    """
    B, T, D = x_BxTxD.shape
    codebooks = self.codebook[...].astype(jnp.float32)
    Q, K, _ = codebooks.shape
    used_BxQ = jnp.ones((B, Q)) if levels_B is None else (jnp.arange(Q) < levels_B[:, None]).astype(jnp.float32)
    pick = None
    if key is not None:
      # Different ones: of two equal codes the second would never be the nearest.
      draw = lambda k: jax.random.choice(k, batch_size * T, (min(CANDIDATES, batch_size * T),), replace=False)
      chosen_QxM, frame_QxM = jnp.divmod(jax.vmap(draw)(jax.random.split(key, Q)), T)
      pick = (chosen_QxM[:, None] == slot_B[None, :, None]).astype(jnp.float32), frame_QxM

    def level(carry, inputs):
      residual, values, commitment = carry
      codebook_KxD, used_B, *picked = inputs
      index = nearest(jax.lax.stop_gradient(residual), codebook_KxD)
      code = jnp.take(codebook_KxD, index, axis=0)
      fixed = jax.lax.stop_gradient(residual)
      # Examples that drop this level still show it what its residuals are like.
      count, total = code_sums(fixed.reshape(-1, D), index.reshape(-1), K)
      candidates = jnp.einsum('BM,BMD->MD', picked[0], fixed[:, picked[1]]) if picked else ()
      commitment += used_B * jnp.mean(jnp.square(residual - code), axis=(1, 2))
      return (residual - code, values + used_B[:, None, None] * code, commitment), (index, count, total, candidates)

    x = x_BxTxD.astype(jnp.float32)
    start = (x, jnp.zeros_like(jax.lax.stop_gradient(x)), jnp.zeros((B,)))
    (_, values, commitment), (index, count, total, candidates) = jax.lax.scan(
        level, start, (codebooks, used_BxQ.T, *(pick or ())))
    statistics = {'count': count, 'sum': total, 'candidates': candidates}
    return Quantized(jax.lax.stop_gradient(values), jnp.moveaxis(index, 0, -1), commitment, statistics)

  def encode(self, x_xD: jax.Array, levels: int | None = None) -> jax.Array:
    """Indices int32 [..., q] of the first `levels` levels (all by default)."""

    def level(residual, codebook_KxD):
      index = nearest(residual, codebook_KxD)
      return residual - jnp.take(codebook_KxD, index, axis=0), index

    codebooks = self.codebook[...].astype(jnp.float32)[:levels]
    _, index = jax.lax.scan(level, x_xD.astype(jnp.float32), codebooks)
    return jnp.moveaxis(index, 0, -1)

  def decode(self, indices_xQ: jax.Array) -> jax.Array:
    """The sum of the codes [..., D], for any number of first levels."""
    codebooks = self.codebook[...].astype(jnp.float32)

    def level(total, inputs):
      codebook_KxD, index = inputs
      return total + jnp.take(codebook_KxD, index, axis=0), ()

    zero = jnp.zeros((*indices_xQ.shape[:-1], codebooks.shape[-1]))
    total, _ = jax.lax.scan(level, zero, (codebooks[:indices_xQ.shape[-1]], jnp.moveaxis(indices_xQ, -1, 0)))
    return total


def perplexity(count_xK: jax.Array) -> jax.Array:
  """exp of the entropy of the code distribution: K where all codes are used alike, 1 where one is."""
  p = count_xK / jnp.maximum(jnp.sum(count_xK, axis=-1, keepdims=True), 1e-9)
  return jnp.exp(-jnp.sum(jnp.where(p > 0, p * jnp.log(jnp.maximum(p, 1e-30)), 0), axis=-1))


def ema_update(buffers: dict[str, jax.Array], statistics: dict[str, jax.Array], *, decay: float = 0.99,
               dead_code_share: float = 0.1) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
  """One step of the moving average over the global batch, then dead codes are replaced.

  N <- decay N + (1 - decay) n, likewise for the sums; code = sum / N (arXiv 1711.00937, appendix A.1). A
  code is dead where N falls below min(2, dead_code_share * mean N): SoundStream's 2 is a count for its own batch,
  and at a small batch it would replace every code in every step. It is replaced by one of the step's
  candidate rows, which are residuals of that very level, and starts with the mean count.

  Returns the buffers and metrics: `perplexity` [Q] of the moving average (a batch has fewer frames than there are
  codes), `restarts` [Q], the share of codes replaced.
  """
  count_QxK = decay * buffers['count'] + (1 - decay) * statistics['count']
  sum_QxKxD = decay * buffers['sum'] + (1 - decay) * statistics['sum']
  used_Q = perplexity(count_QxK)
  mean_Q = jnp.mean(count_QxK, axis=-1, keepdims=True)
  dead_QxK = count_QxK < jnp.minimum(2.0, dead_code_share * mean_Q)
  candidates_QxMxD = statistics['candidates']
  rank_QxK = jnp.cumsum(dead_QxK, axis=-1) - 1
  replaced_QxK = dead_QxK & (rank_QxK < candidates_QxMxD.shape[1])
  row_QxKxD = jnp.take_along_axis(
      candidates_QxMxD, jnp.clip(rank_QxK, 0, candidates_QxMxD.shape[1] - 1)[..., None], axis=1)
  count_QxK = jnp.where(replaced_QxK, mean_Q, count_QxK)
  sum_QxKxD = jnp.where(replaced_QxK[..., None], row_QxKxD * mean_Q[..., None], sum_QxKxD)
  # A code that nobody has chosen for long keeps its place: dividing two vanishing numbers would lose it.
  codebook = jnp.where(count_QxK[..., None] > 1e-6, sum_QxKxD / jnp.maximum(count_QxK, 1e-6)[..., None],
                       buffers['codebook'])
  metrics = {'perplexity': used_Q, 'restarts': jnp.mean(replaced_QxK, axis=-1)}
  return {'codebook': codebook, 'count': count_QxK, 'sum': sum_QxKxD}, metrics


def spread_rows(x_NxD: jax.Array, count: int, key: jax.Array) -> jax.Array:
  """Greedy k-means++ start: rows drawn one after another, each the best of a few candidates.

  Candidates are drawn with probability by squared distance to the nearest row so far; the one that lowers the sum
  of those distances most is taken (Arthur and Vassilvitskii, 2007, section 4, with 2 + ln K candidates). Fewer
  distinct rows than `count` give repeats.
  """
  trials = 2 + int(math.log(count))
  first_key, key = jax.random.split(key)
  first = x_NxD[jax.random.randint(first_key, (), 0, x_NxD.shape[0])]
  squares_N, x_DxN = jnp.sum(jnp.square(x_NxD), axis=-1), x_NxD.T

  def draw(distance_N, step_key):
    below_N = jnp.cumsum(distance_N)
    place_L = jax.random.uniform(step_key, (trials,)) * below_N[-1]
    # Without a row that differs from those so far, it is the last one.
    chosen_L = jnp.minimum(jnp.searchsorted(below_N, place_L, side='right'), len(below_N) - 1)
    rows_LxD = x_NxD[chosen_L] + 0 * below_N[-1]  # what is not finite is seen in all that follows
    products_LxN = jnp.matmul(rows_LxD, x_DxN, precision=jax.lax.Precision.HIGHEST)
    to_rows_LxN = squares_N - 2 * products_LxN + squares_N[chosen_L][:, None]
    nearest_LxN = jnp.minimum(distance_N, jnp.maximum(to_rows_LxN, 0))
    best = jnp.argmin(jnp.sum(nearest_LxN, axis=1))
    return nearest_LxN[best], rows_LxD[best]

  start = jnp.sum(jnp.square(x_NxD - first), axis=-1)
  _, rows = jax.lax.scan(draw, start, jax.random.split(key, count - 1))
  return jnp.concatenate([first[None], rows])


def scaling_of(covariance_DxD: jax.Array, *, decorrelate: bool) -> tuple[jax.Array, jax.Array]:
  """S [D, D] with which the dimensions of (x - mean) S have variance 1 and, where asked for, no correlation.

  A dimension that never changes carries nothing; dividing by its deviation would make noise of it. Directions that
  hardly vary keep less than 1, for the same reason. Of all matrices that decorrelate what was brought to variance 1,
  the symmetric one changes little where the covariance does, however near its eigenvalues lie (and k-means does not
  care for a rotation). Returns S and the number of dimensions that never change.
  """
  variance_D = jnp.diagonal(covariance_DxD)
  constant_D = variance_D <= 1e-10
  deviation_D = jnp.where(constant_D, 1.0, jnp.sqrt(jnp.maximum(variance_D, 1e-20)))
  if not decorrelate:
    return jnp.diag(1 / deviation_D), jnp.sum(constant_D)
  spread_D, direction_DxD = jnp.linalg.eigh(covariance_DxD / (deviation_D[:, None] * deviation_D))
  least = jnp.maximum(_LEAST_VARIANCE * spread_D[-1], 1e-10)  # 0 where nothing ever changes
  shrunk_DxD = direction_DxD * jax.lax.rsqrt(jnp.maximum(spread_D, least))
  product = jnp.matmul(shrunk_DxD, direction_DxD.T, precision=jax.lax.Precision.HIGHEST)
  return product / deviation_D[:, None], jnp.sum(constant_D)


def lloyd_step(codebook_KxD: jax.Array, count_K: jax.Array, sum_KxD: jax.Array) -> jax.Array:
  """Centres moved to the mean of their rows; a centre without rows stays."""
  return jnp.where(count_K[:, None] > 0, sum_KxD / jnp.maximum(count_K, 1e-9)[:, None], codebook_KxD)


def kmeans(x_NxD: jax.Array, count: int, key: jax.Array, *, iterations: int = 10) -> jax.Array:
  """Centres [count, D] of rows that fit in memory; `accumulate` fits those that do not."""

  def lloyd(_, centres):
    return lloyd_step(centres, *code_sums(x_NxD, nearest(x_NxD, centres), count))

  return jax.lax.fori_loop(0, iterations, lloyd, spread_rows(x_NxD, count, key))


def kmeans_start(x_NxD: jax.Array, levels: int, codebook_size: int, key: jax.Array) -> dict[str, jax.Array]:
  """Buffers of a quantizer fitted to rows by residual k-means, level after level: the data-dependent start."""

  def level(residual, level_key):
    codes = kmeans(residual, codebook_size, level_key)
    index = nearest(residual, codes)
    count, total = code_sums(residual, index, codebook_size)
    # Counts start at their mean at least, so that no code counts as dead before it had a chance.
    count_safe = jnp.maximum(count, jnp.mean(count))
    return residual - codes[index], (codes, count_safe, codes * count_safe[:, None])

  _, (codebook, count, total) = jax.lax.scan(
      level, x_NxD.astype(jnp.float32), jax.random.split(key, levels))
  return {'codebook': codebook, 'count': count, 'sum': total}
