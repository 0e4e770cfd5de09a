"""MuLan: audio and text in one space (arXiv 2208.12415).

B batch, N samples, W windows of one clip, L text tokens, E dimensions of the joint space.
"""
from __future__ import annotations

import dataclasses
import math
import pathlib

from flax import nnx
import jax
import jax.numpy as jnp

from musiclm_jax.mulan.audio_tower import SpectrogramConfig
from musiclm_jax.mulan.text_tower import TextTower, TextTowerConfig
from musiclm_jax.nn.transformer import Linear

VOCABULARY_ASSET = 'vocabulary.model'  # its name in a checkpoint
# Read as a file: no code of the tokenizer is needed here.
_BUILTIN_VOCABULARY = pathlib.Path(__file__).parents[1] / 'text' / 'english.model'


@dataclasses.dataclass(frozen=True)
class MuLanConfig:
  """Both towers and the joint space.

  Attributes:
    audio: a `TransformerTowerConfig` or a `ResNetTowerConfig`.
    embedding: E; 128 in the paper.
    temperature: the initial temperature of the contrastive loss (trained as its logarithm); 0.1 in the paper.
    hop_seconds: distance between the windows of audio that is longer than one; 1 s in MusicLM
      (arXiv 2301.11325, section 3.1).
    vocabulary: the file of the text tokenizer, or "builtin"; it travels with each checkpoint.
  """

  audio: SpectrogramConfig
  text: TextTowerConfig
  embedding: int = 128
  temperature: float = 0.1
  hop_seconds: float = 1.0
  vocabulary: str = 'builtin'

  @property
  def hop_samples(self) -> int:
    return round(self.hop_seconds * self.audio.mel.sample_rate)

  def assets(self) -> dict[str, bytes]:
    """The text tokenizer's model, which the text tower needs. FileNotFoundError where it is gone."""
    path = _BUILTIN_VOCABULARY if self.vocabulary == 'builtin' else pathlib.Path(self.vocabulary)
    if not path.is_file():
      raise FileNotFoundError(f'no vocabulary file {path}; name another one, or "builtin"')
    return {VOCABULARY_ASSET: path.read_bytes()}

  def windows(self, samples: int) -> int:
    """Whole windows in `samples`, one at least: a rest shorter than the hop is not heard."""
    return 1 + max(0, samples - self.audio.window_samples) // self.hop_samples


def unit(x_BxE: jax.Array) -> jax.Array:
  """Scaled to length 1 along the last axis, in float32; a zero vector stays zero."""
  x_BxE = x_BxE.astype(jnp.float32)
  return x_BxE * jax.lax.rsqrt(jnp.maximum(jnp.sum(jnp.square(x_BxE), axis=-1, keepdims=True), 1e-24))


class MuLan(nnx.Module):
  """Two towers, each with a linear projection into the joint space; embeddings have length 1."""

  def __init__(self, config: MuLanConfig, *, rngs: nnx.Rngs):
    self.config = config
    self.audio = config.audio.tower(rngs)
    self.text = TextTower(config.text, rngs=rngs)
    self.audio_projection = Linear(config.audio.width, config.embedding, axes=('embed', None), rngs=rngs)
    self.text_projection = Linear(config.text.width, config.embedding, axes=('embed', None), rngs=rngs)
    self.log_temperature = nnx.Param(jnp.full((), math.log(config.temperature), jnp.float32), axes=())

  @property
  def temperature(self) -> jax.Array:
    return jnp.exp(self.log_temperature[...].astype(jnp.float32))

  def embed_window(
      self, audio_BxN: jax.Array, length_B: jax.Array | None = None, keys_B: jax.Array | None = None,
  ) -> jax.Array:
    """Embeddings [B, E], float32, of clips of at most one window; arguments as in `SpectrogramTower.__call__`."""
    missing = self.config.audio.window_samples - audio_BxN.shape[1]
    if missing > 0:
      if length_B is None:
        length_B = jnp.full(audio_BxN.shape[:1], audio_BxN.shape[1], jnp.int32)
      audio_BxN = jnp.pad(audio_BxN, ((0, 0), (0, missing)))
    x_BxD = self.audio(audio_BxN, length_B, keys_B)
    return unit(self.audio_projection(x_BxD.astype(self.audio.dtype)))

  def embed_audio(self, audio_BxN: jax.Array, length_B: jax.Array | None = None) -> jax.Array:
    """Embeddings [B, E] of length 1, float32, of clips of any length.

    Longer than one window: the mean over all whole windows, `hop_seconds` apart, scaled back to length 1
    (arXiv 2301.11325, section 3.1). Shorter: padded, and the padding is masked.

    Args:
      audio_BxN: mono audio in [-1, 1] at the sample rate of the tower.
      length_B: valid samples of each clip; None: all N.
    """
    config = self.config
    window, count = config.audio.window_samples, config.windows(audio_BxN.shape[1])
    if count == 1:
      length_B = None if length_B is None else jnp.minimum(length_B, window)
      return self.embed_window(audio_BxN[:, :window], length_B)

    def embed(first):
      clip_BxN = jax.lax.dynamic_slice_in_dim(audio_BxN, first, window, axis=1)
      if length_B is None:
        return self.embed_window(clip_BxN)
      whole_B = (first == 0) | (first + window <= length_B)
      x_BxE = self.embed_window(clip_BxN, jnp.clip(length_B - first, 0, window))
      return jnp.where(whole_B[:, None], x_BxE, 0)

    # One window of all clips at a time: memory does not grow with the length of the clips.
    x_WxBxE = jax.lax.map(embed, jnp.arange(count) * config.hop_samples)
    return unit(x_WxBxE.sum(axis=0))

  def embed_text(self, text_BxL: jax.Array, keys_B: jax.Array | None = None) -> jax.Array:
    """Embeddings [B, E] of length 1, float32, of token ids (0 behind the end of a text)."""
    x_BxD = self.text(text_BxL, keys_B)
    return unit(self.text_projection(x_BxD.astype(self.text.position[...].dtype)))
