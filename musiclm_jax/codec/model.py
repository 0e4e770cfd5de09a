"""SoundStream (arXiv 2107.03312): causal encoder and decoder around a residual quantizer.

B batch, N samples, F frames, D latent width, Q levels (q: the first few of them).
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

  def __post_init__(self):
    for name in ('widths', 'strides', 'dilations'):
      object.__setattr__(self, name, tuple(getattr(self, name)))
    if len(self.widths) != len(self.strides) + 1:
      raise ValueError(
          f'codec: {len(self.strides)} strides need {len(self.strides) + 1} widths, found {self.widths}')

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
  """[B, N, 1] audio to [B, F, D] latents (section III-A)."""
  layers: dict[str, streaming.Streamable] = {
      'patch': streaming.Fold(config.patch),
      'first': conv.CausalConv(config.patch, config.widths[0], config.kernel, rngs=rngs),
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
  """[B, F, D] latents to [B, N, 1] audio: the encoder in reverse (section III-B)."""
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
  layers['last'] = conv.CausalConv(config.widths[0], config.patch, config.kernel, scale=0.1, rngs=rngs)
  layers['patch'] = streaming.Unfold(config.patch)
  return streaming.Chain(layers)


class SoundStream(nnx.Module):
  """The codec: audio to tokens and back, whole or frame by frame."""

  def __init__(self, config: SoundStreamConfig, *, rngs: nnx.Rngs):
    self.config = config
    self.encoder = make_encoder(config, rngs)
    self.decoder = make_decoder(config, rngs)
    self.quantizer = quantize.ResidualQuantizer(config.levels, config.codebook_size, config.latent, rngs=rngs)

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

  def encode_latents(self, audio_BxN: jax.Array) -> jax.Array:
    """Latents before quantization, float32 [B, F, D]; N must be a multiple of the stride."""
    self._check_audio(audio_BxN)
    latents = self.encoder(audio_BxN[..., None]).astype(jnp.float32)
    return axes.constrain(latents, 'batch', None, None)

  def decode_latents(self, latents_BxFxD: jax.Array) -> jax.Array:
    """Audio, float32 [B, F * stride]."""
    return self.decoder(latents_BxFxD)[..., 0].astype(jnp.float32)

  def encode(self, audio_BxN: jax.Array, levels: int | None = None) -> jax.Array:
    """Tokens of the first `levels` levels (None: all), int32 [B, F, Q], of mono audio in [-1, 1].

    Raises ValueError where N is not a multiple of the stride or there are fewer levels.
    """
    return self.quantizer.encode(self.encode_latents(audio_BxN), self.config.first_levels(levels))

  def decode(self, indices_BxFxq: jax.Array) -> jax.Array:
    """Audio, float32 [B, F * stride], from the tokens of any number of first levels."""
    self._check_levels(indices_BxFxq)
    return self.decode_latents(self.quantizer.decode(indices_BxFxq))

  def init_state(self, batch: int, dtype=jnp.float32) -> CodecState:
    """The state of a stream that begins in silence."""
    return CodecState(self.encoder.init_state(batch, dtype), self.decoder.init_state(batch, dtype))

  def encode_step(self, audio_BxN: jax.Array, state: CodecState) -> tuple[jax.Array, CodecState]:
    """Tokens [B, F, Q] of the next whole frames of a stream."""
    self._check_audio(audio_BxN)
    latents, after = self.encoder.step(audio_BxN[..., None], state.encoder)
    return self.quantizer.encode(latents), state._replace(encoder=after)

  def decode_step(self, indices_BxFxq: jax.Array, state: CodecState) -> tuple[jax.Array, CodecState]:
    """Audio [B, F * stride] of the next frames of a stream."""
    self._check_levels(indices_BxFxq)
    audio, after = self.decoder.step(self.quantizer.decode(indices_BxFxq), state.decoder)
    return audio[..., 0].astype(jnp.float32), state._replace(decoder=after)

  def _check_audio(self, audio_BxN: jax.Array):
    if audio_BxN.ndim != 2 or audio_BxN.shape[1] % self.config.stride:
      raise ValueError(
          f'the codec needs mono audio [batch, samples] with a multiple of {self.config.stride} samples; '
          f'found shape {audio_BxN.shape}: pad or crop it')

  def _check_levels(self, indices_BxFxq: jax.Array):
    if indices_BxFxq.ndim != 3 or not 1 <= indices_BxFxq.shape[-1] <= self.config.levels:
      raise ValueError(
          f'the codec decodes tokens [batch, frames, 1 to {self.config.levels} levels]; found shape '
          f'{indices_BxFxq.shape}')
