"""Audio tower of MuLan: what all kinds of it share, and the Audio Spectrogram Transformer over one fixed window.

The layout is AST's (arXiv 2104.01778): overlapping patches of the log-mel spectrogram, one linear embedding
of a patch, learned class tokens and positions, a bidirectional transformer with the norms first. MuLan uses
it on 10 s windows (arXiv 2208.12415, section 3.2); the other kind is in `resnet`.

B batch, N samples, F frames, M mel bands, T patches along time, S patches along the bands, P values of one
patch, L tokens (class tokens first), D width.
"""
from __future__ import annotations

import dataclasses

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from musiclm_jax.nn.spectral import MelConfig, log_mel
from musiclm_jax.nn.transformer import Linear, Transformer, TransformerConfig

# Initial standard deviation of learned positions and class tokens, as in BERT and AST.
POSITION_DEVIATION = 0.02


@dataclasses.dataclass(frozen=True, kw_only=True)
class SpectrogramConfig:
  """What an audio tower of any kind reads. Each kind has a `width`: D, of what comes out.

  Attributes:
    mel: the spectrogram; its values are shifted by `mel_mean` and divided by `mel_deviation`.
    seconds: the fixed window that the tower sees at once, a whole number of frames; 10 s in the paper.
    time_masks, time_mask_frames, band_masks, band_mask_bands: SpecAugment (arXiv 1904.08779) in training: how
      many masks a clip, and the widest one; 0 for none.
    remat: whether blocks are computed again for the gradient, which saves memory.
  """

  mel: MelConfig
  seconds: float
  mel_mean: float = -6.0
  mel_deviation: float = 3.0
  time_masks: int = 0
  time_mask_frames: int = 0
  band_masks: int = 0
  band_mask_bands: int = 0
  remat: bool = False

  def __post_init__(self):
    if abs(self.window_frames * self.mel.hop - self.seconds * self.mel.sample_rate) > 1e-3:
      raise ValueError(
          f'MuLan audio tower: a window of {self.seconds} s is no whole number of frames of {self.mel.hop} '
          f'samples at {self.mel.sample_rate} Hz')
    if self.time_mask_frames > self.window_frames or self.band_mask_bands > self.mel.bands:
      raise ValueError(
          f'MuLan audio tower: masks of {self.time_mask_frames} frames and {self.band_mask_bands} bands are '
          f'larger than the window of {self.window_frames} frames x {self.mel.bands} bands')

  @property
  def window_frames(self) -> int:
    return round(self.seconds * self.mel.frame_rate)

  @property
  def window_samples(self) -> int:
    return self.window_frames * self.mel.hop

  def tower(self, rngs: nnx.Rngs) -> SpectrogramTower:
    """The network of this kind, with fresh parameters."""
    raise NotImplementedError


@dataclasses.dataclass(frozen=True, kw_only=True)
class TransformerTowerConfig(SpectrogramConfig):
  """Sizes of the Audio Spectrogram Transformer.

  Attributes:
    patch_frames, patch_bands, stride_frames, stride_bands: a patch, and the distance between patches; AST has
      16 x 16 patches every 10 frames and 10 bands.
    class_tokens: learned tokens before the patches whose average is the output; 1 in MuLan, 2 in AST (class
      and distillation token), 0 for the mean over the patches.
  """

  patch_frames: int
  patch_bands: int
  stride_frames: int
  stride_bands: int
  width: int
  depth: int
  heads: int
  mlp_width: int
  class_tokens: int = 1
  dropout: float = 0.0

  def __post_init__(self):
    super().__post_init__()
    if min(self.time_patches, self.band_patches) < 1:
      raise ValueError(
          f'MuLan audio tower: patches of {self.patch_frames} frames x {self.patch_bands} bands do not fit '
          f'in a window of {self.window_frames} frames x {self.mel.bands} bands')

  def tower(self, rngs: nnx.Rngs) -> TransformerTower:
    return TransformerTower(self, rngs=rngs)

  @property
  def time_patches(self) -> int:
    return (self.window_frames - self.patch_frames) // self.stride_frames + 1

  @property
  def band_patches(self) -> int:
    return (self.mel.bands - self.patch_bands) // self.stride_bands + 1

  @property
  def tokens(self) -> int:
    return self.class_tokens + self.time_patches * self.band_patches

  @property
  def transformer(self) -> TransformerConfig:
    return TransformerConfig(
        width=self.width, depth=self.depth, heads=self.heads, mlp_width=self.mlp_width, gated=False,
        norm='layer', norm_epsilon=1e-12, norm_first=True, bias=True, causal=False, positions='none',
        dropout=self.dropout, remat=self.remat)


def patches(x_BxFxM: jax.Array, config: TransformerTowerConfig) -> jax.Array:
  """Overlapping patches, [B, S * T, P]: bands change slowest, as in AST; within a patch, frames do."""
  # A gather by constant indices; nothing upstream is trained, so its (slow) transpose is never needed.
  frames_TxP = _windows(config.time_patches, config.patch_frames, config.stride_frames)
  bands_SxP = _windows(config.band_patches, config.patch_bands, config.stride_bands)
  x = x_BxFxM[:, frames_TxP][..., bands_SxP]  # B, T, patch_frames, S, patch_bands
  return x.transpose(0, 3, 1, 2, 4).reshape(x.shape[0], config.band_patches * config.time_patches, -1)


def _windows(count: int, size: int, stride: int) -> np.ndarray:
  return np.arange(count)[:, None] * stride + np.arange(size)


def mask_spectrogram(x_BxFxM: jax.Array, keys_B: jax.Array, config: SpectrogramConfig) -> jax.Array:
  """SpecAugment without time warping (arXiv 1904.08779, section 2): masked values become 0, the mean.

  Each mask has a width drawn from 0 to the widest, inclusive, and a place drawn over all that fit.
  """
  _, frames, bands = x_BxFxM.shape

  def keep(key, length, masks, widest):
    width_key, place_key = jax.random.split(key)
    width = jax.random.randint(width_key, (masks, 1), 0, widest + 1)
    first = jnp.floor(jax.random.uniform(place_key, (masks, 1)) * (length - width + 1)).astype(jnp.int32)
    place = jnp.arange(length)
    return ~jnp.any((place >= first) & (place < first + width), axis=0)

  def one(x_FxM, key):
    time_key, band_key = jax.random.split(key)
    keep_F = keep(time_key, frames, config.time_masks, config.time_mask_frames)
    keep_M = keep(band_key, bands, config.band_masks, config.band_mask_bands)
    return jnp.where(keep_F[:, None] & keep_M, x_FxM, 0)

  return jax.vmap(one)(x_BxFxM, keys_B)


class SpectrogramTower(nnx.Module):
  """Windows of audio -> one vector each, before the projection into the joint space."""

  config: SpectrogramConfig

  @property
  def dtype(self) -> jnp.dtype:
    """In which it computes."""
    raise NotImplementedError

  def __call__(
      self, audio_BxN: jax.Array, length_B: jax.Array | None = None, keys_B: jax.Array | None = None,
  ) -> jax.Array:
    """One vector [B, D] a window.

    Args:
      audio_BxN: exactly `config.window_samples` samples at 24 kHz.
      length_B: valid samples of each example; None: all. What lies behind does not change the result.
      keys_B: one key an example for dropout and SpecAugment; None: neither.
    """
    config = self.config
    if audio_BxN.shape[1] != config.window_samples:
      raise ValueError(
          f'the MuLan audio tower takes windows of {config.window_samples} samples, found '
          f'{audio_BxN.shape[1]}; embed_audio takes any length')
    if length_B is not None:
      audio_BxN = jnp.where(jnp.arange(audio_BxN.shape[1]) < length_B[:, None], audio_BxN, 0)
    mel_BxFxM = (log_mel(audio_BxN, config.mel) - config.mel_mean) / config.mel_deviation
    dropout_keys_B = None
    if keys_B is not None:
      mask_keys_B, dropout_keys_B = jnp.unstack(jax.vmap(jax.random.split)(keys_B), axis=1)
      mel_BxFxM = mask_spectrogram(mel_BxFxM, mask_keys_B, config)
    return self.from_spectrogram(mel_BxFxM, length_B, dropout_keys_B)

  def from_spectrogram(
      self, mel_BxFxM: jax.Array, length_B: jax.Array | None = None, keys_B: jax.Array | None = None,
  ) -> jax.Array:
    """As `__call__`, from the normalised log-mel spectrogram [B, window_frames, bands]."""
    raise NotImplementedError


class TransformerTower(SpectrogramTower):
  """The Audio Spectrogram Transformer."""

  def __init__(self, config: TransformerTowerConfig, *, rngs: nnx.Rngs):
    self.config = config
    size = config.patch_frames * config.patch_bands
    self.patch = Linear(size, config.width, axes=(None, 'embed'), bias=True, rngs=rngs)
    draw = lambda rows: POSITION_DEVIATION * jax.random.normal(rngs.params(), (rows, config.width))
    self.class_token = nnx.Param(draw(config.class_tokens), axes=(None, 'embed'))
    self.position = nnx.Param(draw(config.tokens), axes=(None, 'embed'))
    self.transformer = Transformer(config.transformer, rngs=rngs)

  @property
  def dtype(self) -> jnp.dtype:
    return self.position[...].dtype

  def from_spectrogram(
      self, mel_BxFxM: jax.Array, length_B: jax.Array | None = None, keys_B: jax.Array | None = None,
  ) -> jax.Array:
    config = self.config
    position_LxD = self.position[...]
    x_BxLxD = self.patch(patches(mel_BxFxM.astype(position_LxD.dtype), config))
    class_CxD = self.class_token[...]
    class_BxCxD = jnp.broadcast_to(class_CxD, (x_BxLxD.shape[0], *class_CxD.shape))
    x_BxLxD = jnp.concatenate([class_BxCxD, x_BxLxD], axis=1) + position_LxD
    valid_BxL = None if length_B is None else self._valid(length_B)
    x_BxLxD = self.transformer(x_BxLxD, valid_BxL=valid_BxL, keys_B=keys_B)
    return pool(x_BxLxD, valid_BxL, config.class_tokens)

  def _valid(self, length_B: jax.Array) -> jax.Array:
    """Tokens that count: class tokens, and patches that begin before the end; always one patch at least."""
    config = self.config
    first_T = np.arange(config.time_patches) * config.stride_frames * config.mel.hop
    valid_BxT = (first_T < length_B[:, None]) | (first_T == 0)
    valid_BxL = jnp.tile(valid_BxT, (1, config.band_patches))
    return jnp.pad(valid_BxL, ((0, 0), (config.class_tokens, 0)), constant_values=True)


def pool(x_BxLxD: jax.Array, valid_BxL: jax.Array | None, class_tokens: int) -> jax.Array:
  """Mean over the class tokens, or over all valid tokens where there are none; float32 [B, D]."""
  x_BxLxD = x_BxLxD.astype(jnp.float32)
  if class_tokens:
    return x_BxLxD[:, :class_tokens].mean(axis=1)
  if valid_BxL is None:
    return x_BxLxD.mean(axis=1)
  weight_BxLx1 = valid_BxL[..., None].astype(jnp.float32)
  return (x_BxLxD * weight_BxLx1).sum(axis=1) / jnp.maximum(weight_BxLx1.sum(axis=1), 1.0)
