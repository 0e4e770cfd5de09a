"""The discriminators of SoundStream (arXiv 2107.03312, section III-D).

B batch, N samples, A channels of the audio, T time, F frequency bins, C channels of a layer.
"""
from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

from flax import nnx
import jax
import jax.numpy as jnp

from musiclm_jax.nn import conv, spectral


_GROUPED = 4  # layers of a waveform discriminator


def _groups(width: int) -> int:
  """Of a waveform layer that reads so many channels: four channels each."""
  return max(1, width // 4)


@dataclasses.dataclass(frozen=True)
class DiscriminatorsConfig:
  """One discriminator on the complex STFT and `waveform_scales` on the waveform.

  Attributes:
    window, hop: of the STFT (1024 and 256 in the paper).
    width, kernel, stride: channels of the first convolution (32), its taps along time and frequency (7), and
      its strides (1, 1).
    multipliers, strides: of each residual block, `width` times which, and (time, frequency). The paper has
      six blocks with strides that alternate (1, 2) and (2, 2); the multipliers follow public
      reimplementations.
    waveform_scales: discriminators at the full, half, quarter rate and so on (3 in the paper).
    waveform_width, waveform_max_width: channels after the first and at most after later layers (16, 1024).
  """

  width: int
  window: int = 1024
  hop: int = 256
  kernel: int = 7
  stride: tuple[int, int] = (1, 1)
  multipliers: tuple[int, ...] = (1, 2, 4, 4, 8, 8)
  strides: tuple[tuple[int, int], ...] = ((1, 2), (2, 2)) * 3
  waveform_scales: int = 0
  waveform_width: int = 16
  waveform_max_width: int = 1024

  def __post_init__(self):
    object.__setattr__(self, 'stride', tuple(self.stride))
    object.__setattr__(self, 'multipliers', tuple(self.multipliers))
    object.__setattr__(self, 'strides', tuple(tuple(s) for s in self.strides))
    if len(self.multipliers) != len(self.strides):
      raise ValueError(
          f'discriminator: {len(self.multipliers)} multipliers for {len(self.strides)} strides')
    for before, after in zip(self.waveform_widths, self.waveform_widths[1:]) if self.waveform_scales else ():
      if before % _groups(before) or after % _groups(before):
        raise ValueError(f'discriminator: a waveform layer from {before} to {after} channels cannot have '
                         f'{_groups(before)} groups; take multiples of 4')
    if (self.window // 2) % math.prod(f for _, f in (self.stride, *self.strides)):
      raise ValueError(
          f'discriminator: {self.window // 2} bins cannot be divided by the frequency strides of '
          f'{self.stride} and {self.strides}')

  @property
  def waveform_widths(self) -> tuple[int, ...]:
    """Channels of a waveform discriminator after its first layer and after each grouped one."""
    return tuple(min(4 ** i * self.waveform_width, max(self.waveform_width, self.waveform_max_width))
                 for i in range(_GROUPED + 1))

  @property
  def last_bins(self) -> int:
    """Frequency bins that the last convolution aggregates: F / 2^6 in the paper."""
    return self.window // 2 // math.prod(f for _, f in (self.stride, *self.strides))


class Judgement(NamedTuple):
  """Of one discriminator: logits [B, T] and the features of each inner layer, [B, ...]."""

  logits: jax.Array
  features: tuple[jax.Array, ...]


def _activation(x: jax.Array) -> jax.Array:
  return jax.nn.leaky_relu(x, 0.2)


class _ResidualBlock(nnx.Module):
  """3 x 3, then a strided convolution two taps wider than its stride; the shortcut is strided and 1 x 1."""

  def __init__(self, in_width: int, out_width: int, stride: tuple[int, int], *, rngs: nnx.Rngs):
    self.inner = conv.Conv2d(in_width, in_width, (3, 3), rngs=rngs)
    self.strided = conv.Conv2d(in_width, out_width, (stride[0] + 2, stride[1] + 2), stride=stride, rngs=rngs)
    self.shortcut = conv.Conv2d(in_width, out_width, (1, 1), stride=stride, rngs=rngs)

  def __call__(self, x_BxTxFxC: jax.Array) -> jax.Array:
    y = self.strided(_activation(self.inner(x_BxTxFxC)))
    return _activation(y + self.shortcut(x_BxTxFxC)) * math.sqrt(0.5)


class StftDiscriminator(nnx.Module):
  """Judges the real and imaginary parts of the STFT of all channels; one logit for each downsampled frame."""

  def __init__(self, config: DiscriminatorsConfig, channels: int = 1, *, rngs: nnx.Rngs):
    self.config = config
    self.first = conv.Conv2d(
        2 * channels, config.width, (config.kernel, config.kernel), stride=config.stride, rngs=rngs)
    widths = [config.width, *(m * config.width for m in config.multipliers)]
    for i, stride in enumerate(config.strides):
      setattr(self, f'block_{i}', _ResidualBlock(widths[i], widths[i + 1], stride, rngs=rngs))
    self.last = conv.Conv2d(widths[-1], 1, (1, config.last_bins), padding='VALID', rngs=rngs)

  def __call__(self, audio_BxNxA: jax.Array) -> Judgement:
    window = self.config.window
    # Scaled to unit energy of the window: noise keeps its level whatever the window.
    scale = float((spectral.hann(window) ** 2).sum()) ** -0.5
    spectra = [spectral.stft(audio_BxNxA[..., a], window, self.config.hop)[..., :window // 2] * scale
               for a in range(audio_BxNxA.shape[-1])]
    x = _activation(self.first(jnp.stack([part for s in spectra for part in (s.real, s.imag)], axis=-1)))
    features = [x]
    for i in range(len(self.config.strides)):
      x = getattr(self, f'block_{i}')(x)
      features.append(x)
    return Judgement(self.last(x)[:, :, 0, 0].astype(jnp.float32), tuple(features))


class WaveformDiscriminator(nnx.Module):
  """Plain, four grouped (group size 4, stride 4, channels x 4), and two more plain convolutions in time."""

  def __init__(self, config: DiscriminatorsConfig, channels: int = 1, *, rngs: nnx.Rngs):
    widths = config.waveform_widths
    self.layer_0 = conv.Conv1d(channels, widths[0], 15, rngs=rngs)
    for i, (before, after) in enumerate(zip(widths, widths[1:])):
      layer = conv.Conv1d(before, after, 41, stride=4, groups=_groups(before), rngs=rngs)
      setattr(self, f'layer_{i + 1}', layer)
    width = widths[-1]
    self.layer_5 = conv.Conv1d(width, width, 5, rngs=rngs)
    self.last = conv.Conv1d(width, 1, 3, rngs=rngs)

  def __call__(self, audio_BxNxA: jax.Array) -> Judgement:
    x, features = audio_BxNxA, []
    for i in range(_GROUPED + 2):
      x = _activation(getattr(self, f'layer_{i}')(x))
      features.append(x)
    return Judgement(self.last(x)[..., 0].astype(jnp.float32), tuple(features))


class Discriminators(nnx.Module):
  """All discriminators; each waveform scale hears the audio at half the rate of the one before.

  They hear the channels of the audio together: how those belong together is part of what makes it sound real.
  """

  def __init__(self, config: DiscriminatorsConfig, channels: int = 1, *, rngs: nnx.Rngs):
    self.config = config
    self.stft = StftDiscriminator(config, channels, rngs=rngs)
    for i in range(config.waveform_scales):
      setattr(self, f'waveform_{i}', WaveformDiscriminator(config, channels, rngs=rngs))

  def __call__(self, audio_BxN: jax.Array) -> list[Judgement]:
    """Judges [B, N], or [B, N, A] where there are more channels than one."""
    x_BxNxA = audio_BxN.reshape(*audio_BxN.shape[:2], -1)
    judgements = [self.stft(x_BxNxA)]
    for i in range(self.config.waveform_scales):
      judgements.append(getattr(self, f'waveform_{i}')(x_BxNxA))
      batch, length, channels = x_BxNxA.shape
      x_BxNxA = x_BxNxA[:, :length // 2 * 2].reshape(batch, -1, 2, channels).mean(axis=2)
    return judgements


def _mean_per_example(x_Bx_: jax.Array) -> jax.Array:
  return jnp.mean(x_Bx_.astype(jnp.float32).reshape(x_Bx_.shape[0], -1), axis=-1)


def balance(real: list[Judgement], fake: list[Judgement]) -> dict[str, jax.Array]:
  """Who is winning: the mean logit and the share judged right (by its sign), of real and of decoded audio.

  A share of 1 on both sides leaves the generator without a direction; shares of 0.5 leave the discriminators unused.
  """
  mean = lambda values: sum(jnp.mean(v.astype(jnp.float32)) for v in values) / len(values)
  return {'logit_real': mean([r.logits for r in real]), 'logit_decoded': mean([f.logits for f in fake]),
          'judged_real': mean([r.logits > 0 for r in real]), 'judged_decoded': mean([f.logits < 0 for f in fake])}


def discriminator_loss(real: list[Judgement], fake: list[Judgement]) -> jax.Array:
  """Hinge loss [B], averaged over discriminators and time (equation 1); 2 where all logits are 0."""
  per = [
      _mean_per_example(jax.nn.relu(1 - r.logits)) + _mean_per_example(jax.nn.relu(1 + f.logits))
      for r, f in zip(real, fake)]
  return sum(per) / len(per)


def adversarial_loss(fake: list[Judgement]) -> jax.Array:
  """What the generator minimises, hinge form [B] (equation 2); 1 where all logits are 0."""
  per = [_mean_per_example(jax.nn.relu(1 - f.logits)) for f in fake]
  return sum(per) / len(per)


def feature_loss(real: list[Judgement], fake: list[Judgement]) -> jax.Array:
  """Mean absolute difference of the inner features [B], averaged over layers (equation 3)."""
  per = [
      _mean_per_example(jnp.abs(jax.lax.stop_gradient(a) - b))
      for r, f in zip(real, fake) for a, b in zip(r.features, f.features)]
  return sum(per) / len(per)
