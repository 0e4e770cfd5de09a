"""w2v-BERT: log-mel, convolutions, a contrastive and a masked-prediction conformer (arXiv 2108.06209).

The quantizer of the contrastive half turns the features under the masks into discrete codes. Its vectors are
the targets of the contrastive loss, its ids those of the masked prediction.

Shapes: B batch, N samples, F mel frames, M mel bands, T frames of the encoder (25 a second), D width, G code
groups, V codes a group, E width of the contrastive space.
"""
from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from musiclm_jax.nn.conformer import Conformer, ConformerConfig
from musiclm_jax.nn.conv import Conv2d
from musiclm_jax.nn.quantize import kmeans, scaling_of
from musiclm_jax.nn.spectral import MelConfig, log_mel
from musiclm_jax.nn.transformer import Linear, Norm

# Two layers of stride 2 in time and in frequency (arXiv 2108.06209, section 2.1).
SUBSAMPLING = 4


@dataclasses.dataclass(frozen=True)
class W2vBertConfig:
  """Sizes of the encoder.

  Attributes:
    mel: the spectrogram; its frame rate is 4 times that of the features (100 and 25 Hz).
    channels: of the two convolutions.
    contrastive, masked: the two conformer stacks, of one width.
    groups, codes: G and V of the product quantizer; ids of group g are in [0, V).
    code_width: E, of the code vectors and of the space in which the contrastive loss compares.
    targets: what the quantizer makes codes of: "spectrogram", the mel frames of a feature as they are, or "features",
      the output of the convolutions, as in the paper. Features turn in training to what is easiest to predict, which
      is what lasts: rhythm is lost from their codes first. A spectrogram stays what it is (arXiv 2202.01855 predicts
      codes of it, too).
  """

  mel: MelConfig
  channels: int
  contrastive: ConformerConfig
  masked: ConformerConfig
  groups: int
  codes: int
  code_width: int
  targets: str = 'features'

  def __post_init__(self):
    if self.targets not in ('spectrogram', 'features'):
      raise ValueError(f'targets must be "spectrogram" or "features", found {self.targets!r}')
    if self.contrastive.width != self.masked.width:
      raise ValueError(
          f'the contrastive stack has width {self.contrastive.width} and the masked-prediction stack '
          f'{self.masked.width}; they must agree')
    if self.mel.bands % SUBSAMPLING:
      raise ValueError(f'{self.mel.bands} mel bands are not a multiple of {SUBSAMPLING}')
    if self.groups < 1 or self.codes < 2 or self.code_width % self.groups:
      raise ValueError(
          f'code_width {self.code_width} cannot be shared by {self.groups} groups of {self.codes} codes')

  @property
  def samples_per_frame(self) -> int:
    return self.mel.hop * SUBSAMPLING

  @property
  def frame_rate(self) -> float:
    return self.mel.sample_rate / self.samples_per_frame

  def valid(self, samples: int, length_B: jax.Array | None) -> jax.Array | None:
    """Which of the frames of so many samples are whole frames of clips of those lengths, bool [B, T]; None for all."""
    if length_B is None:
      return None
    return jnp.arange(samples // self.samples_per_frame) < (length_B // self.samples_per_frame)[:, None]

  @property
  def target_width(self) -> int:
    """Of the rows that the quantizer makes codes of."""
    return self.masked.width if self.targets == 'features' else SUBSAMPLING * self.mel.bands

  @property
  def layer_names(self) -> tuple[str, ...]:
    """The convolutions, then the blocks of both stacks; a layer is named by its place among them."""
    blocks = lambda name, depth: (f'{name} {i}' for i in range(1, depth + 1))
    return ('convolutions', *blocks('contrastive', self.contrastive.depth), *blocks('masked', self.masked.depth))


class Codes(NamedTuple):
  """What `GumbelQuantizer` makes of features.

  Attributes:
    vectors: [B, T, E] of the chosen codes, straight-through to the logits.
    ids: int32 [B, T, G], the most likely codes: targets of the masked prediction.
    probabilities: [B, T, G, V], without noise and temperature.
  """

  vectors_BxTxE: jax.Array
  ids_BxTxG: jax.Array
  probabilities_BxTxGxV: jax.Array


class GumbelQuantizer(nnx.Module):
  """Product quantization with a straight-through Gumbel softmax (arXiv 2006.11477, section 2)."""

  def __init__(self, width: int, groups: int, codes: int, code_width: int, *, rngs: nnx.Rngs):
    self.shape = (groups, codes)
    # A random partition, sharp from step 0 (unit weights on normalised features, as wav2vec 2.0 starts), until
    # `kmeans_start` gives a better one.
    # Rows of a spectrogram are few: nothing is gained by sharding them.
    self.logits = Linear(width, groups * codes, axes=(None, 'codebook'), bias=True, scale=width**0.5, rngs=rngs)
    vectors = jax.random.normal(rngs.params(), (groups, codes, code_width // groups))
    self.vectors = nnx.Param(vectors, axes=(None, 'codebook', None))
    self.project = Linear(code_width, code_width, bias=True, rngs=rngs)

  def kmeans_start(self, rows_NxD: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Weights and biases of the logits with which the code of a row is the nearest centre of a k-means.

    With z = S (x - mean) the scaled row the logit of centre c is z c - |c|^2 / 2, which is -|z - c|^2 / 2 but for a
    term that all codes share. The first group, and every other one, scales each dimension to variance 1: its codes
    tell what most dimensions share, as loudness and so beats. The others decorrelate them, too: their codes tell
    pitches and timbres.
    """
    mean_D = jnp.mean(rows_NxD, axis=0)
    product = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
    centred_NxD = rows_NxD - mean_D
    covariance_DxD = product(centred_NxD.T, centred_NxD) / len(rows_NxD)
    weights, biases = [], []
    for group, group_key in enumerate(jax.random.split(key, self.shape[0])):
      scaling_DxD, _ = scaling_of(covariance_DxD, decorrelate=group % 2 == 1)
      centres_VxD = kmeans(product(centred_NxD, scaling_DxD), self.shape[1], group_key)
      weights.append(product(scaling_DxD, centres_VxD.T))
      biases.append(-product(mean_D, weights[-1]) - jnp.sum(jnp.square(centres_VxD), axis=-1) / 2)
    return jnp.concatenate(weights, axis=1), jnp.concatenate(biases)

  def __call__(self, x_BxTxD: jax.Array, *, temperature: jax.Array | float = 1.0,
               keys_B: jax.Array | None = None) -> Codes:
    """With `keys_B` the codes are sampled by Gumbel noise, without they are the most likely ones."""
    shape = (*x_BxTxD.shape[:2], *self.shape)
    logits = self.logits(x_BxTxD).reshape(shape).astype(jnp.float32)
    noisy = logits
    if keys_B is not None:
      noisy = logits + jax.vmap(lambda key: jax.random.gumbel(key, shape[1:]))(keys_B)
    chosen = jnp.argmax(noisy, axis=-1)
    soft = jax.nn.softmax(noisy / temperature, axis=-1)
    weights = jax.nn.one_hot(chosen, self.shape[1]) + soft - jax.lax.stop_gradient(soft)
    dtype = x_BxTxD.dtype
    vectors = jnp.einsum('BTGV,GVE->BTGE', weights.astype(dtype), self.vectors[...].astype(dtype))
    return Codes(
        vectors_BxTxE=self.project(vectors.reshape(*shape[:2], -1)),
        ids_BxTxG=jnp.argmax(logits, axis=-1).astype(jnp.int32),
        probabilities_BxTxGxV=jax.nn.softmax(logits, axis=-1))


class Subsampling(nnx.Module):
  """Two 3 x 3 convolutions of stride (2, 2) over time and frequency, then a normalised linear map."""

  def __init__(self, bands: int, channels: int, width: int, *, rngs: nnx.Rngs):
    self.first = Conv2d(1, channels, (3, 3), stride=(2, 2), rngs=rngs)
    self.second = Conv2d(channels, channels, (3, 3), stride=(2, 2), rngs=rngs)
    self.out = Linear(bands // SUBSAMPLING * channels, width, axes=('mlp', 'embed'), bias=True, rngs=rngs)
    self.norm = Norm(width, kind='layer', epsilon=1e-5)

  def __call__(self, x_BxFxM: jax.Array, valid_BxT: jax.Array | None = None) -> jax.Array:
    """[B, T, D] with T = F / 4; F must be a multiple of 4. What is not valid counts as the end of the sequence."""
    y = jax.nn.silu(self.first(_kept(x_BxFxM[..., None], valid_BxT)))
    y = jax.nn.silu(self.second(_kept(y, valid_BxT)))
    return self.norm(self.out(y.reshape(*y.shape[:2], -1)))


def _kept(x_BxFx_: jax.Array, valid_BxT: jax.Array | None) -> jax.Array:
  """x with zeros where it is not valid; F is a multiple of T."""
  if valid_BxT is None:
    return x_BxFx_
  valid_BxF = jnp.repeat(valid_BxT, x_BxFx_.shape[1] // valid_BxT.shape[1], axis=1)
  return jnp.where(valid_BxF.reshape(*valid_BxF.shape, *(1,) * (x_BxFx_.ndim - 2)), x_BxFx_, 0)


class W2vBert(nnx.Module):
  """The encoder with its quantizer and heads.

  Buffers: mean and deviation of the mel bands, from the first batch; usage of the codes, soft and hard, as
  moving averages; the number of steps taken, which anneals the Gumbel temperature.
  """

  def __init__(self, config: W2vBertConfig, *, rngs: nnx.Rngs):
    c, width = config, config.masked.width
    self.config = c
    self.subsampling = Subsampling(c.mel.bands, c.channels, width, rngs=rngs)
    self.input = Linear(width, width, bias=True, rngs=rngs)
    self.contrastive = Conformer(c.contrastive, rngs=rngs)
    self.masked = Conformer(c.masked, rngs=rngs)
    self.quantizer = GumbelQuantizer(c.target_width, c.groups, c.codes, c.code_width, rngs=rngs)
    self.context = Linear(width, c.code_width, bias=True, rngs=rngs)
    self.prediction = Linear(width, c.groups * c.codes, axes=('embed', 'codebook'), bias=True, rngs=rngs)
    self.mel_mean = nnx.Variable(jnp.zeros((c.mel.bands,)), axes=(None,))
    self.mel_deviation = nnx.Variable(jnp.ones((c.mel.bands,)), axes=(None,))
    uniform = jnp.full((c.groups, c.codes), 1 / c.codes)
    self.soft_usage = nnx.Variable(uniform, axes=(None, 'codebook'))
    self.hard_usage = nnx.Variable(uniform + 0, axes=(None, 'codebook'))
    self.steps = nnx.Variable(jnp.zeros((), jnp.int32), axes=())

  def spectrogram(self, audio_BxN: jax.Array, valid_BxT: jax.Array | None = None) -> jax.Array:
    """Normalised log-mel [B, 4 (N // 960), M]; samples beyond the last whole frame of features are not used."""
    length = audio_BxN.shape[1] // self.config.samples_per_frame * self.config.samples_per_frame
    if not length:
      raise ValueError(
          f'{audio_BxN.shape[1]} samples are fewer than one frame of {self.config.samples_per_frame} samples')
    mel_BxFxM = log_mel(_kept(audio_BxN[:, :length], valid_BxT), self.config.mel)
    x = (mel_BxFxM - self.mel_mean[...]) / self.mel_deviation[...]
    return x.astype(self.input.w[...].dtype)

  def features(self, audio_BxN: jax.Array, valid_BxT: jax.Array | None = None) -> jax.Array:
    """Features [B, N // 960, D] before any mask.

    `valid` marks the frames of each clip; their features are those of the clip without what comes after it.
    """
    return self.subsampling(self.spectrogram(audio_BxN, valid_BxT), valid_BxT)

  def target_rows(self, mel_BxFxM: jax.Array, features_BxTxD: jax.Array) -> jax.Array:
    """What the quantizer makes codes of, [B, T, `target_width`], from the spectrogram and its features.

    Our choice: no gradient of the codes reaches the features. What reaches them turns them to what is easiest to
    predict, and the codes collapse: at size tiny from 210 in use to 60 within 2,000 steps.
    """
    if self.config.targets == 'features':
      return jax.lax.stop_gradient(features_BxTxD)
    return mel_BxFxM.reshape(*features_BxTxD.shape[:2], -1)

  def layer(self, audio_BxN: jax.Array, layer: int, length_B: jax.Array | None = None) -> jax.Array:
    """Features [B, N // 960, D] after one of `config.layer_names`, nothing masked, float32.

    With `length_B`, samples, the whole frames within it get what they would get from the clip alone.
    """
    valid_BxT = self.config.valid(audio_BxN.shape[1], length_B)
    x = self.features(audio_BxN, valid_BxT)
    first = self.config.contrastive.depth
    if layer:
      x = self.contrastive(self.input(x), valid_BxT=valid_BxT, num_layers=min(layer, first))
    if layer > first:
      x = self.masked(x, valid_BxT=valid_BxT, num_layers=layer - first)
    return x.astype(jnp.float32)

  def every_layer(self, audio_BxN: jax.Array) -> jax.Array:
    """Features after each of `config.layer_names`, nothing masked, float32 [layers, B, N // 960, D]."""
    x_BxTxD = self.features(audio_BxN)
    contrastive = self.contrastive.every_layer(self.input(x_BxTxD))
    masked = self.masked.every_layer(contrastive[-1])
    return jnp.concatenate([x_BxTxD[None], contrastive, masked]).astype(jnp.float32)


def mel_statistics(audio_BxN: jax.Array, config: MelConfig, valid_BxT: jax.Array | None = None
                   ) -> tuple[jax.Array, jax.Array]:
  """Mean and standard deviation [M] of the log-mel bands over the valid frames, T of which are `SUBSAMPLING` T frames
  of mel; a band that never changes gets deviation 1."""
  where = None
  if valid_BxT is not None:
    where = jnp.repeat(valid_BxT, SUBSAMPLING, axis=1)[..., None]
    audio_BxN = _kept(audio_BxN[:, :where.shape[1] * config.hop], valid_BxT)
  mel_BxFxM = log_mel(audio_BxN, config)
  deviation = jnp.std(mel_BxFxM, axis=(0, 1), where=where)
  return jnp.mean(mel_BxFxM, axis=(0, 1), where=where), jnp.where(deviation > np.float32(1e-3), deviation, 1.0)
