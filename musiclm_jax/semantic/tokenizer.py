"""Semantic tokens: a middle layer of the frozen encoder, normalised, then k-means.

Source: AudioLM (arXiv 2209.03143, section III-B): without a normalisation of each dimension a few of them decide it
all. Dimensions of a network vary together, though: what many of them hold (how loud, which instrument) still decides.
So they may be decorrelated, too, which is what ships. k-means is the residual quantizer with one level.

Shapes: B batch, N samples or rows, M sampled rows, T frames, W windows, D width, K clusters.
"""
from __future__ import annotations

import dataclasses
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from musiclm_jax.nn.quantize import (
    code_sums, lloyd_step, nearest, perplexity, ResidualQuantizer, scaling_of, spread_rows)
from musiclm_jax.objective import Batch, Fit
from musiclm_jax.semantic.model import W2vBert, W2vBertConfig
from musiclm_jax.specs import TokenSpec

NORMALISE, KMEANS = 'normalise', 'kmeans'
# Of a window's frames, those nearest to either end, which the neighbouring window hears better: what is left out.
_EDGE = 1 / 8
# How far the halves of a split cluster start from its centre, as a share of the cluster's radius.
_SPLIT = 0.1


class SemanticModel(nnx.Module):
  """The frozen encoder with the normalisation and the clusters on top of one layer.

  Audio beyond `seconds` is heard in windows of that length, neighbours overlapping by a quarter, and each frame is
  taken from the window whose middle is nearest: memory does not grow with the square of the length, and the network
  hears no more at once than the clusters were fitted on. Layer 0 is the same in windows and as a whole; from 1 on
  attention reaches over the whole window.
  """

  def __init__(self, config: W2vBertConfig, layer: int, codebook_size: int, seconds: float, *, rngs: nnx.Rngs):
    width = config.masked.width
    self.layer, self.codebook_size, self.frame_rate = layer, codebook_size, config.frame_rate
    self.samples_per_frame, self.window_frames = config.samples_per_frame, max(1, int(seconds * config.frame_rate))
    self.encoder = W2vBert(config, rngs=rngs)
    self.mean = nnx.Variable(jnp.zeros((width,)), axes=(None,))
    self.scaling = nnx.Variable(jnp.eye(width), axes=(None, None))
    self.quantizer = ResidualQuantizer(1, codebook_size, width, rngs=rngs)

  @property
  def token_spec(self) -> TokenSpec:
    return TokenSpec('semantic', codebook_size=self.codebook_size, frame_rate=self.frame_rate)

  def features(self, audio_BxN: jax.Array, length_B: jax.Array | None = None) -> jax.Array:
    """Output [B, N // 960, D] of the chosen layer, float32, before the normalisation."""
    size, frames = self.samples_per_frame, audio_BxN.shape[1] // self.samples_per_frame
    # A length that an exported program leaves open cannot be cut: there the caller does not give more than a window.
    if not isinstance(frames, int) or frames <= self.window_frames:
      return self.encoder.layer(audio_BxN, self.layer, length_B)
    starts_W, window_T, place_T = windows(frames, self.window_frames)

    def heard(start):
      part_BxN = jax.lax.dynamic_slice_in_dim(audio_BxN, start * size, self.window_frames * size, axis=1)
      # An empty window would be one of masked keys alone; a window of at least a frame means as little beyond it.
      part_B = None if length_B is None else jnp.clip(length_B - start * size, size, self.window_frames * size)
      return self.encoder.layer(part_BxN, self.layer, part_B)

    features_WxBxTxD = jax.lax.map(heard, jnp.asarray(starts_W))
    return features_WxBxTxD[window_T, :, place_T].swapaxes(0, 1)

  def tokens(self, audio_BxN: jax.Array, length_B: jax.Array | None = None) -> jax.Array:
    """Semantic tokens int32 [B, T, 1] of mono audio at the encoder's rate, one for each `samples_per_frame` samples;
    those beyond `length_B` samples mean nothing."""
    features = jax.lax.stop_gradient(self.features(audio_BxN, length_B))
    return self.quantizer.encode(normalised(features, self.mean[...], self.scaling[...]))


def windows(frames: int, window: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """How `frames` are covered by windows: first frame of each [W], and for each frame its window [T] and place [T]."""
  if frames <= window:
    return np.zeros(1, int), np.zeros(frames, int), np.arange(frames)
  stride = window - 2 * int(window * _EDGE)
  count = 1 + -(-(frames - window) // stride)
  starts_W = np.minimum(np.arange(count) * stride, frames - window)
  middle_W = starts_W + (window - 1) / 2
  window_T = np.abs(np.arange(frames)[:, None] - middle_W).argmin(1)
  return starts_W, window_T, np.arange(frames) - starts_W[window_T]


def normalised(features_xD: jax.Array, mean_D: jax.Array, scaling_DxD: jax.Array) -> jax.Array:
  """(x - mean) S, in float32."""
  return jnp.matmul(features_xD.astype(jnp.float32) - mean_D, scaling_DxD, precision=jax.lax.Precision.HIGHEST)


@dataclasses.dataclass(frozen=True)
class SemanticTokenizer(Fit):
  """Fits the normalisation in one pass over the rows, then k-means in `iterations` passes.

  Attributes:
    encoder: sizes of the frozen network; its values come from a w2v-BERT run.
    layer: whose output is clustered: 0 is the convolutions, from 1 on blocks count over both stacks. MusicLM takes the
      7th of the masked-prediction stack's 12 (arXiv 2301.11325, section 4.1): 19 where 12 come before it.
    codebook_size: K.
    iterations: of Lloyd's algorithm.
    seconds: length of the crops that the rows are computed from, and of the windows in which longer audio is heard.
    decorrelate: whether dimensions are decorrelated; without, each is divided by its own deviation only.
  """

  encoder: W2vBertConfig
  layer: int
  codebook_size: int
  iterations: int
  seconds: float
  decorrelate: bool = False

  def __post_init__(self):
    last = len(self.encoder.layer_names) - 1
    if not 0 <= self.layer <= last:
      raise ValueError(f'layer {self.layer} is not one of 0 to {last}: {", ".join(self.encoder.layer_names)}')
    if self.codebook_size < 2 or self.iterations < 1:
      raise ValueError(f'k-means needs at least 2 clusters and 1 iteration, found {self.codebook_size} and '
                       f'{self.iterations}')

  @property
  def token_spec(self) -> TokenSpec:
    return TokenSpec('semantic', codebook_size=self.codebook_size, frame_rate=self.encoder.frame_rate)

  def model(self, rngs: nnx.Rngs) -> SemanticModel:
    return SemanticModel(self.encoder, self.layer, self.codebook_size, self.seconds, rngs=rngs)

  def batch_spec(self, batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
    samples = round(self.seconds * self.encoder.mel.sample_rate)
    return {'audio': jax.ShapeDtypeStruct((batch_size, samples), jnp.float32),
            'slot': jax.ShapeDtypeStruct((batch_size,), jnp.int32)}

  def features(self, model: SemanticModel, batch: Batch) -> jax.Array:
    features = model.features(batch['audio'], batch.get('length'))
    return features.reshape(-1, features.shape[-1])

  def counted(self, batch: dict[str, np.ndarray]) -> np.ndarray | None:
    valid_BxT = self.encoder.valid(batch['audio'].shape[1], batch.get('length'))
    return None if valid_BxT is None else np.asarray(valid_BxT).reshape(-1)

  def phases(self) -> tuple[tuple[str, int], ...]:
    return ((NORMALISE, 1), (KMEANS, self.iterations))

  def begin(self, buffers: Any, sample_MxD: jax.Array, phase: str, key: jax.Array) -> Any:
    """Rough moments for the first phase, a k-means++ start for the second, both from the sample."""
    if phase == NORMALISE:
      # Sums of squares are taken around the sample's mean, where they lose no digits.
      return {**buffers, 'mean': jnp.mean(sample_MxD, axis=0), 'scaling': jnp.eye(sample_MxD.shape[1])}
    codes = spread_rows(self._normalised(buffers, sample_MxD), self.codebook_size, key)
    return self._with_codes(buffers, codes, jnp.ones((self.codebook_size,)))

  def statistics(self, buffers: Any, rows_NxD: jax.Array, weight_N: jax.Array, phase: str) -> Any:
    rows = self._normalised(buffers, rows_NxD)
    weight_N = weight_N.astype(jnp.float32)
    if phase == NORMALISE:
      products_DxD = jnp.matmul((weight_N[:, None] * rows).T, rows, precision=jax.lax.Precision.HIGHEST)
      return {'rows': jnp.sum(weight_N), 'sum': weight_N @ rows, 'products': products_DxD}
    codes = buffers['quantizer']['codebook'][0]
    index = nearest(rows, codes)
    count, total = code_sums(rows, index, self.codebook_size, weight_N)
    distance_N = weight_N * jnp.sum(jnp.square(rows - codes[index]), axis=-1)
    return {'count': count, 'sum': total,
            'distance': jax.ops.segment_sum(distance_N, index, self.codebook_size)}

  def fitted(self, buffers: Any, statistics: Any, phase: str) -> tuple[Any, dict[str, jax.Array]]:
    """New moments or clusters. Metrics of k-means describe the clusters that the rows were assigned to."""
    if phase == NORMALISE:
      offset_D = statistics['sum'] / statistics['rows']
      covariance_DxD = statistics['products'] / statistics['rows'] - offset_D[:, None] * offset_D
      scaling, constant = scaling_of(covariance_DxD, decorrelate=self.decorrelate)
      return ({**buffers, 'mean': buffers['mean'] + offset_D, 'scaling': scaling},
              {'rows': statistics['rows'], 'constant_dimensions': constant})
    count, distance = statistics['count'], statistics['distance']
    codes = lloyd_step(buffers['quantizer']['codebook'][0], count, statistics['sum'])
    codes = split_widest(codes, count, distance)
    metrics = {'inertia': jnp.sum(distance) / jnp.sum(count), 'perplexity': perplexity(count),
               'empty_clusters': jnp.sum(count == 0)}
    return self._with_codes(buffers, codes, count), metrics

  def _normalised(self, buffers: Any, rows_NxD: jax.Array) -> jax.Array:
    return normalised(rows_NxD, buffers['mean'], buffers['scaling'])

  def _with_codes(self, buffers: Any, codes_KxD: jax.Array, count_K: jax.Array) -> Any:
    # The quantizer's own moving sums stay consistent with its codes.
    return {**buffers, 'quantizer': {'codebook': codes_KxD[None], 'count': count_K[None],
                                     'sum': (count_K[:, None] * codes_KxD)[None]}}


def split_widest(codes_KxD: jax.Array, count_K: jax.Array, distance_K: jax.Array) -> jax.Array:
  """Moves clusters without rows next to the ones with the largest summed squared distance, and splits those.

  The two halves start on both sides of the centre along a fixed pseudo-random direction, so that the result
  depends on nothing but the sums: the same for any order of the rows and any number of devices.
  """
  width = codes_KxD.shape[1]
  empty_K = count_K == 0
  # The i-th empty cluster takes the i-th widest one. There are never more empty than filled ones to split
  # usefully; a cluster of one row or of equal rows has nothing to give.
  order_K = jnp.argsort(-jnp.where(empty_K, -1.0, distance_K))
  rank_K = jnp.cumsum(empty_K) - 1
  donor_K = order_K[rank_K]
  usable_K = empty_K & (distance_K[donor_K] > 0) & ~empty_K[donor_K]
  radius_K = jnp.sqrt(distance_K / jnp.maximum(count_K, 1.0) / width)
  direction = jax.random.normal(jax.random.key(0), codes_KxD.shape)
  shift_KxD = _SPLIT * radius_K[donor_K][:, None] * direction
  moved = jnp.where(usable_K[:, None], codes_KxD[donor_K] + shift_KxD, codes_KxD)
  # The donor moves the other way. Unusable entries write to a row that does not exist, which drops them.
  target_K = jnp.where(usable_K, donor_K, codes_KxD.shape[0])
  return moved.at[target_K].add(-shift_KxD, mode='drop')
