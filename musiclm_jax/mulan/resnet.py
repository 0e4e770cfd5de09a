"""Audio tower of MuLan as a residual network over the log-mel spectrogram: ResNet-50 at the paper's size.

Bottleneck blocks (arXiv 1512.03385, table 1) with the stride in the 3 x 3 convolution, as in most published weights.
MuLan reads the spectrogram as an image of one channel and averages what comes out (arXiv 2208.12415, section 3.2).

B batch, F frames, M mel bands, T and S places along time and bands, C channels, G groups of channels, D width.
"""
from __future__ import annotations

import dataclasses

from flax import nnx
import jax
import jax.numpy as jnp

from musiclm_jax.mulan.audio_tower import pool, SpectrogramConfig, SpectrogramTower
from musiclm_jax.nn.conv import Conv2d

_EXPANSION = 4  # of a bottleneck: channels after it over channels inside it


@dataclasses.dataclass(frozen=True, kw_only=True)
class ResNetTowerConfig(SpectrogramConfig):
  """Sizes of the residual audio tower.

  Attributes:
    channels: of the first convolution, and inside the blocks of the first stage; 64 in ResNet-50. They double with
      every stage.
    blocks: of each stage; (3, 4, 6, 3) in ResNet-50.
    groups: of the normalisation, at most, a divisor of `channels`.
  """

  channels: int = 64
  blocks: tuple[int, ...] = (3, 4, 6, 3)
  groups: int = 32

  def __post_init__(self):
    super().__post_init__()
    object.__setattr__(self, 'blocks', tuple(self.blocks))
    if not self.blocks or min(self.blocks) < 1:
      raise ValueError(f'MuLan audio tower: every stage needs a block, found {self.blocks}')
    if self.channels < 1 or self.channels % self.groups:
      raise ValueError(f'MuLan audio tower: {self.channels} channels cannot be split into {self.groups} groups')

  def tower(self, rngs: nnx.Rngs) -> ResNetTower:
    return ResNetTower(self, rngs=rngs)

  @property
  def width(self) -> int:
    return _EXPANSION * self.channels * 2 ** (len(self.blocks) - 1)


class _GroupNorm(nnx.Module):
  """Group normalisation (arXiv 1803.08494) over the frames that count.

  The network's own batch normalisation would tie an example to those that happen to be computed beside it: to the
  device, and to the chunk.
  """

  def __init__(self, width: int, groups: int, *, scale: float = 1.0):
    self.groups = groups
    self.scale = nnx.Param(jnp.full((width,), scale), axes=(None,))
    self.bias = nnx.Param(jnp.zeros((width,)), axes=(None,))

  def __call__(self, x_BxTxSxC: jax.Array, valid_BxT: jax.Array | None) -> jax.Array:
    B, T, S, C = x_BxTxSxC.shape
    x = x_BxTxSxC.astype(jnp.float32).reshape(B, T, S, self.groups, C // self.groups)
    weight = jnp.ones((B, T)) if valid_BxT is None else valid_BxT.astype(jnp.float32)
    weight = (weight / (S * (C // self.groups) * weight.sum(axis=1, keepdims=True)))[..., None, None, None]
    mean = jnp.sum(weight * x, axis=(1, 2, 4), keepdims=True)
    variance = jnp.sum(weight * jnp.square(x - mean), axis=(1, 2, 4), keepdims=True)
    y = ((x - mean) * jax.lax.rsqrt(variance + 1e-5)).reshape(B, T, S, C)
    return (y * self.scale[...].astype(jnp.float32) + self.bias[...].astype(jnp.float32)).astype(x_BxTxSxC.dtype)


class _Unit(nnx.Module):
  """A convolution without bias, and the normalisation."""

  def __init__(self, in_width: int, out_width: int, kernel: int, stride: int, groups: int, *, scale: float = 1.0,
               rngs: nnx.Rngs):
    self.stride = stride
    # Outputs are centred on every `stride`-th frame, whatever the number of frames.
    self.convolution = Conv2d(in_width, out_width, (kernel, kernel), stride=(stride, stride),
                              padding=((kernel // 2, kernel // 2),) * 2, bias=False, rngs=rngs)
    self.norm = _GroupNorm(out_width, groups, scale=scale)

  def __call__(self, x_BxTxSxC, valid_BxT):
    """What it makes of x, and which frames of that count; frames that do not count are 0."""
    y, valid_BxT = self.convolution(x_BxTxSxC), _every(valid_BxT, self.stride)
    return _kept(self.norm(y, valid_BxT), valid_BxT), valid_BxT


class _Bottleneck(nnx.Module):
  """1 x 1 to fewer channels, 3 x 3, and 1 x 1 to four times as many, beside a shortcut."""

  def __init__(self, in_width: int, width: int, stride: int, groups: int, *, rngs: nnx.Rngs):
    out = _EXPANSION * width
    self.narrow = _Unit(in_width, width, 1, 1, groups, rngs=rngs)
    self.middle = _Unit(width, width, 3, stride, groups, rngs=rngs)
    # The block begins as its shortcut (arXiv 1706.02677, section 5.1).
    self.widen = _Unit(width, out, 1, 1, groups, scale=0.0, rngs=rngs)
    same = in_width == out and stride == 1
    self.shortcut = None if same else _Unit(in_width, out, 1, stride, groups, rngs=rngs)

  def __call__(self, x, valid_BxT):
    y, _ = self.narrow(x, valid_BxT)
    y, valid = self.middle(jax.nn.relu(y), valid_BxT)
    y, _ = self.widen(jax.nn.relu(y), valid)
    beside = x if self.shortcut is None else self.shortcut(x, valid_BxT)[0]
    return jax.nn.relu(y + beside), valid


class ResNetTower(SpectrogramTower):
  """Windows of audio -> one vector each, before the projection into the joint space."""

  def __init__(self, config: ResNetTowerConfig, *, rngs: nnx.Rngs):
    self.config = config
    self.first = _Unit(1, config.channels, 7, 2, config.groups, rngs=rngs)
    width = config.channels
    for stage, blocks in enumerate(config.blocks):
      inner = config.channels * 2 ** stage
      for i in range(blocks):
        stride = 2 if i == 0 and stage else 1
        setattr(self, f'block_{stage + 1}_{i + 1}', _Bottleneck(width, inner, stride, config.groups, rngs=rngs))
        width = _EXPANSION * inner

  @property
  def dtype(self) -> jnp.dtype:
    return self.first.convolution.w[...].dtype

  def from_spectrogram(
      self, mel_BxFxM: jax.Array, length_B: jax.Array | None = None, keys_B: jax.Array | None = None) -> jax.Array:
    """The mean over the frames that count and all bands, float32 [B, D]."""
    del keys_B  # no dropout
    valid_BxT = None
    if length_B is not None:
      first_F = jnp.arange(mel_BxFxM.shape[1]) * self.config.mel.hop
      valid_BxT = (first_F < length_B[:, None]) | (first_F == 0)
    x = _kept(mel_BxFxM.astype(self.dtype)[..., None], valid_BxT)
    x, valid_BxT = self.first(x, valid_BxT)
    x = jax.lax.reduce_window(jax.nn.relu(x), -jnp.inf, jax.lax.max, (1, 3, 3, 1), (1, 2, 2, 1),
                              ((0, 0), (1, 1), (1, 1), (0, 0)))
    valid_BxT = _every(valid_BxT, 2)
    x = _kept(x, valid_BxT)
    for stage, blocks in enumerate(self.config.blocks):
      for i in range(blocks):
        block = getattr(self, f'block_{stage + 1}_{i + 1}')
        run = lambda x, valid, block=block: block(x, valid)
        x, valid_BxT = (jax.checkpoint(run) if self.config.remat else run)(x, valid_BxT)
    return pool(x.astype(jnp.float32).mean(axis=2), valid_BxT, 0)


def _every(valid_BxT: jax.Array | None, stride: int) -> jax.Array | None:
  """Which places count after a stride: those whose centre did."""
  return valid_BxT if valid_BxT is None or stride == 1 else valid_BxT[:, ::stride]


def _kept(x_BxTxSxC: jax.Array, valid_BxT: jax.Array | None) -> jax.Array:
  return x_BxTxSxC if valid_BxT is None else jnp.where(valid_BxT[:, :, None, None], x_BxTxSxC, 0)
