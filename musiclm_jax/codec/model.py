"""SoundStream (arXiv 2107.03312): causal encoder and decoder around a residual quantizer.

B batch, N samples, F frames, D latent width, Q levels (q: the first few of them). Audio of more than one channel has
them as a last axis: what is [B, N] for one channel is [B, N, C] for C of them.
"""
from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

from flax import nnx
import jax
import jax.numpy as jnp

from musiclm_jax import axes, specs
from musiclm_jax.nn import conv, quantize, streaming


@dataclasses.dataclass(frozen=True)
class SoundStreamConfig:
  """Sizes of the codec; every choice is an integer.

  Attributes:
    patch: samples that form one position of the first layer. The paper has 1; a larger patch leaves out the
      layers at full rate, which cost most.
    widths: channels after the first convolution and after each downsampling (the paper doubles them).
    strides: downsampling of each block; patch * product(strides) samples make one frame.
    dilations: one residual unit each, in every block.
    kernel, latent_kernel: of the first, last and dilated convolutions; of the ones next to the latents' side
      of the encoder.
    latent: D, the width that is quantized. The paper does not state it.
    levels, codebook_size: Q and K of the residual quantizer.
    channels: of the audio, coded together.
    denoise_at: where a condition says whether noise is to be taken out: "encoder" (fewer bits are spent on it),
      "decoder" (the listener decides), or "" for a codec without that choice (section III-F).
  """

  widths: tuple[int, ...]
  strides: tuple[int, ...]
  latent: int
  levels: int
  codebook_size: int
  patch: int = 1
  dilations: tuple[int, ...] = (1, 3, 9)
  kernel: int = 7
  latent_kernel: int = 3
  sample_rate: int = 24000
  channels: int = 1
  denoise_at: str = ''

  def __post_init__(self):
    for name in ('widths', 'strides', 'dilations'):
      object.__setattr__(self, name, tuple(getattr(self, name)))
    if len(self.widths) != len(self.strides) + 1:
      raise ValueError(
          f'codec: {len(self.strides)} strides need {len(self.strides) + 1} widths, found {self.widths}')
    if self.channels < 1 or self.denoise_at not in ('', 'encoder', 'decoder'):
      raise ValueError(f'codec: there must be a channel, and denoise_at must be "", "encoder" or "decoder"; found '
                       f'{self.channels} and {self.denoise_at!r}')

  @property
  def stride(self) -> int:
    """Samples a frame: 480 for MusicLM."""
    return self.patch * math.prod(self.strides)

  def first_levels(self, levels: int | None) -> int:
    """How many that is, with None for all of them; ValueError where there are fewer."""
    if levels is not None and not 1 <= levels <= self.levels:
      raise ValueError(f'the codec has {self.levels} levels; {levels} were asked for')
    return levels or self.levels

  @property
  def token_spec(self) -> specs.TokenSpec:
    return specs.TokenSpec(
        'acoustic', codebook_size=self.codebook_size, levels=self.levels,
        frame_rate=self.sample_rate / self.stride)


class CodecState(NamedTuple):
  """Streaming state; both halves may be stepped alone."""

  encoder: streaming.State
  decoder: streaming.State


def make_encoder(config: SoundStreamConfig, rngs: nnx.Rngs) -> streaming.Chain:
  """[B, N, C] audio to [B, F, D] latents (section III-A)."""
  layers: dict[str, streaming.Streamable] = {
      'patch': streaming.Fold(config.patch),
      'first': conv.CausalConv(config.patch * config.channels, config.widths[0], config.kernel, rngs=rngs),
  }
  for i, stride in enumerate(config.strides):
    width, next_width = config.widths[i:i + 2]
    layers |= {
        f'unit_{i}_{j}': conv.residual_unit(width, config.kernel, dilation, rngs=rngs)
        for j, dilation in enumerate(config.dilations)}
    layers[f'elu_{i}'] = streaming.Elu()
    layers[f'down_{i}'] = conv.CausalConv(width, next_width, 2 * stride, stride=stride, rngs=rngs)
  layers['elu'] = streaming.Elu()
  layers['last'] = conv.CausalConv(config.widths[-1], config.latent, config.latent_kernel, rngs=rngs)
  return streaming.Chain(layers)


def make_decoder(config: SoundStreamConfig, rngs: nnx.Rngs) -> streaming.Chain:
  """[B, F, D] latents to [B, N, C] audio: the encoder in reverse (section III-B)."""
  layers: dict[str, streaming.Streamable] = {
      'first': conv.CausalConv(config.latent, config.widths[-1], config.kernel, rngs=rngs)}
  for i in reversed(range(len(config.strides))):
    width, next_width = config.widths[i + 1], config.widths[i]
    layers[f'elu_{i}'] = streaming.Elu()
    layers[f'up_{i}'] = conv.CausalUpsample(width, next_width, config.strides[i], rngs=rngs)
    layers |= {
        f'unit_{i}_{j}': conv.residual_unit(next_width, config.kernel, dilation, rngs=rngs)
        for j, dilation in enumerate(config.dilations)}
  layers['elu'] = streaming.Elu()
  # A small scale: untrained output is near silence and not a burst of noise.
  layers['last'] = conv.CausalConv(
      config.widths[0], config.patch * config.channels, config.kernel, scale=0.1, rngs=rngs)
  layers['patch'] = streaming.Unfold(config.patch)
  return streaming.Chain(layers)


class Film(nnx.Module):
  """Feature-wise affine modulation by a one-hot condition of two (arXiv 1709.07871); at first it changes nothing."""

  def __init__(self, width: int):
    self.scale = nnx.Param(jnp.ones((2, width), jnp.float32), axes=(None, 'channel_out'))
    self.bias = nnx.Param(jnp.zeros((2, width), jnp.float32), axes=(None, 'channel_out'))

  def __call__(self, x_BxFxD: jax.Array, condition: bool | jax.Array) -> jax.Array:
    """`condition` is one for all, or bool [B]."""
    condition_B = jnp.broadcast_to(jnp.asarray(condition, jnp.int32), x_BxFxD.shape[:1])
    one_hot_Bx2 = jax.nn.one_hot(condition_B, 2, dtype=x_BxFxD.dtype)
    scale_BxD, bias_BxD = one_hot_Bx2 @ self.scale[...], one_hot_Bx2 @ self.bias[...]
    return x_BxFxD * scale_BxD[:, None] + bias_BxD[:, None]


class SoundStream(nnx.Module):
  """The codec: audio to tokens and back, whole or frame by frame.

  `denoise`, of the half that `denoise_at` names, is a bool, or bool [B]; in a stream it may change from step to step.
  """

  def __init__(self, config: SoundStreamConfig, *, rngs: nnx.Rngs):
    self.config = config
    self.encoder = make_encoder(config, rngs)
    self.decoder = make_decoder(config, rngs)
    self.quantizer = quantize.ResidualQuantizer(config.levels, config.codebook_size, config.latent, rngs=rngs)
    if config.denoise_at:
      self.film = Film(config.latent)

  @property
  def token_spec(self) -> specs.TokenSpec:
    return self.config.token_spec

  @property
  def latency(self) -> int:
    """Samples that a frame waits for, from its first one to its decoded audio."""
    return self.encoder.latency

  @property
  def encoder_reach(self) -> int:
    """Frames before its own that the tokens of a frame hear: crops of audio and of tokens agree from there on."""
    c, scale = self.config, self.config.patch
    samples = (c.kernel - 1) * scale
    for stride in c.strides:
      samples += scale * (c.kernel - 1) * sum(c.dilations) + scale * (2 * stride - 1)
      scale *= stride
    samples += (c.latent_kernel - 1) * scale
    return -(-samples // c.stride)

  def encode_latents(self, audio_BxN: jax.Array, denoise: bool | jax.Array = False) -> jax.Array:
    """Latents before quantization, float32 [B, F, D]; N must be a multiple of the stride."""
    latents = self.encoder(self._samples(audio_BxN)).astype(jnp.float32)
    return axes.constrain(self._modulated('encoder', latents, denoise), 'batch', None, None)

  def decode_latents(self, latents_BxFxD: jax.Array, denoise: bool | jax.Array = False) -> jax.Array:
    """Audio, float32 [B, F * stride]."""
    return self._audio(self.decoder(self._modulated('decoder', latents_BxFxD, denoise)))

  def encode(
      self, audio_BxN: jax.Array, levels: int | None = None, denoise: bool | jax.Array = False) -> jax.Array:
    """Tokens of the first `levels` levels (None: all), int32 [B, F, Q], of audio in [-1, 1].

    Raises ValueError where N is not a multiple of the stride, there are fewer levels, or the encoder cannot denoise.
    """
    return self.quantizer.encode(self.encode_latents(audio_BxN, denoise), self.config.first_levels(levels))

  def decode(self, indices_BxFxq: jax.Array, denoise: bool | jax.Array = False) -> jax.Array:
    """Audio, float32 [B, F * stride], from the tokens of any number of first levels."""
    self._check_levels(indices_BxFxq)
    return self.decode_latents(self.quantizer.decode(indices_BxFxq), denoise)

  def init_state(self, batch: int, dtype=jnp.float32) -> CodecState:
    """The state of a stream that begins in silence."""
    return CodecState(self.encoder.init_state(batch, dtype), self.decoder.init_state(batch, dtype))

  def encode_step(self, audio_BxN: jax.Array, state: CodecState, denoise: bool | jax.Array = False
                  ) -> tuple[jax.Array, CodecState]:
    """Tokens [B, F, Q] of the next whole frames of a stream."""
    latents, after = self.encoder.step(self._samples(audio_BxN), state.encoder)
    return self.quantizer.encode(self._modulated('encoder', latents, denoise)), state._replace(encoder=after)

  def decode_step(self, indices_BxFxq: jax.Array, state: CodecState, denoise: bool | jax.Array = False
                  ) -> tuple[jax.Array, CodecState]:
    """Audio [B, F * stride] of the next frames of a stream."""
    self._check_levels(indices_BxFxq)
    latents = self._modulated('decoder', self.quantizer.decode(indices_BxFxq), denoise)
    audio, after = self.decoder.step(latents, state.decoder)
    return self._audio(audio), state._replace(decoder=after)

  def _modulated(self, half: str, latents_BxFxD: jax.Array, denoise: bool | jax.Array) -> jax.Array:
    """The condition applied at the bottleneck, if it belongs to this half of the codec."""
    if self.config.denoise_at == half:
      return self.film(latents_BxFxD, denoise)
    if denoise is not False:
      able = f'its {self.config.denoise_at} does' if self.config.denoise_at else 'it was trained without denoise_at'
      raise ValueError(f'the {half} of this codec cannot denoise: {able}')
    return latents_BxFxD

  def _samples(self, audio_BxN: jax.Array) -> jax.Array:
    """[B, N, C], after a look at the shape."""
    channels = self.config.channels
    fits = audio_BxN.ndim > 1 and audio_BxN.shape[2:] == specs.channel_axis(channels)
    if not fits or audio_BxN.shape[1] % self.config.stride:
      wanted = 'mono audio [batch, samples]' if channels == 1 else f'audio [batch, samples, {channels} channels]'
      raise ValueError(
          f'the codec needs {wanted} with a multiple of {self.config.stride} samples; '
          f'found shape {audio_BxN.shape}: pad or crop it')
    return audio_BxN[..., None] if channels == 1 else audio_BxN

  def _audio(self, samples_BxNxC: jax.Array) -> jax.Array:
    return (samples_BxNxC[..., 0] if self.config.channels == 1 else samples_BxNxC).astype(jnp.float32)

  def _check_levels(self, indices_BxFxq: jax.Array):
    if indices_BxFxq.ndim != 3 or not 1 <= indices_BxFxq.shape[-1] <= self.config.levels:
      raise ValueError(
          f'the codec decodes tokens [batch, frames, 1 to {self.config.levels} levels]; found shape '
          f'{indices_BxFxq.shape}')
