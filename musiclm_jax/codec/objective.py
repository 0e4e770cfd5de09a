"""Adversarial training of the codec (SoundStream, arXiv 2107.03312, section III).

B batch, N samples, F frames, D latent width, Q levels, K codes, M mel bands.
"""
from __future__ import annotations

import dataclasses
import math
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp

from musiclm_jax import axes, objective, specs
from musiclm_jax.codec import discriminators, model as soundstream
from musiclm_jax.nn import quantize, spectral

# Mean absolute amplitude of music, about: the unit in which the waveform term counts.
_TYPICAL_AMPLITUDE = 0.08
# Rows for each code that the k-means start asks for.
_ROWS_PER_CODE = 4


@dataclasses.dataclass(frozen=True)
class LossWeights:
  """Weights of the generator's terms; the first three are the paper's (section III-E).

  The three terms of the paper are divided by one constant, `CodecTraining.unit`, which changes neither their
  balance nor what Adam does: the total is then about the mean error of the log-mel spectrogram in nepers,
  and the weights of the terms that the paper does not state, and gradient clipping, mean the same for every
  set of windows. These are our choice:

  Attributes:
    waveform: mean |x - y| in units of 0.08, about the mean amplitude of music. The paper has no such term
      and gets the phase from its discriminators; a short training learns phase from this term only.
    commitment: squared distance of each latent to its codes.
  """

  adversarial: float = 1.0
  feature: float = 100.0
  reconstruction: float = 1.0
  waveform: float = 0.0
  commitment: float = 0.1


@dataclasses.dataclass(frozen=True)
class CodecTraining(objective.Objective):
  """SoundStream with its discriminators.

  Attributes:
    seconds: length of a crop; a whole number of frames.
    batch_size: examples of a step over all devices and microbatches, from which replacements of dead codes
      are drawn.
    windows, bands, smallest_fft: of the multi-scale mel loss (64 to 2048 in powers of two, and 64, in the
      paper). Shorter windows are zero-padded to `smallest_fft` samples (0: not at all), without which most
      of their low bands are empty.
    floor: of the mel loss: amplitudes below it count as equal. Our choice: gradients of a logarithm grow as
      1 / amplitude, and with a floor far below what is heard the quietest cells drown all others.
    dropout_share: share of the examples that use a random number of levels, U{1..Q} (1 in the paper).
    codebook_steps: time constant of the codebooks' moving averages in steps; the decay is 1 - 1 / codebook_steps. The
      paper's 0.99 is 100; at a short training's learning rate codes that slow fall behind the encoder.
    dead_code_share: see `nn.quantize.ema_update`.
  """

  codec: soundstream.SoundStreamConfig
  discriminators: discriminators.DiscriminatorsConfig
  weights: LossWeights
  seconds: float
  batch_size: int
  windows: tuple[int, ...] = (64, 128, 256, 512, 1024, 2048)
  bands: int = 64
  smallest_fft: int = 0
  floor: float = 1e-4
  dropout_share: float = 1.0
  codebook_steps: int = 100
  dead_code_share: float = 0.1

  groups = ('generator', 'discriminator')

  def __post_init__(self):
    object.__setattr__(self, 'windows', tuple(self.windows))
    if self.samples % self.codec.stride:
      raise ValueError(
          f'codec: a crop of {self.seconds} s has {self.samples} samples, which is not a multiple of the '
          f'stride of {self.codec.stride} samples ({self.codec.stride / self.codec.sample_rate:g} s)')
    if self.batch_size < 1:
      raise ValueError(f'codec: batch_size must be at least 1, found {self.batch_size}')

  @property
  def samples(self) -> int:
    return round(self.seconds * self.codec.sample_rate)

  @property
  def token_spec(self) -> specs.TokenSpec:
    return self.codec.token_spec

  @property
  def adversarial(self) -> bool:
    return self.weights.adversarial > 0 or self.weights.feature > 0

  @property
  def unit(self) -> float:
    """The reconstruction loss where every band of the log-mel spectrogram is wrong by one neper."""
    return sum(math.sqrt(s / 2) for s in self.windows) * math.sqrt(self.bands)

  def model(self, rngs: nnx.Rngs) -> nnx.Module:
    return TrainedSoundStream(self.codec, self.discriminators, rngs=rngs)

  def batch_spec(self, batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
    return {
        'audio': jax.ShapeDtypeStruct((batch_size, self.samples), jnp.float32),
        'slot': jax.ShapeDtypeStruct((batch_size,), jnp.int32),
    }

  def group(self, path: tuple[str, ...]) -> str:
    return 'discriminator' if path[0] == 'discriminators' else 'generator'

  def active(self) -> dict[str, bool]:
    return {'generator': True, 'discriminator': self.adversarial}

  def start(self, model: nnx.Module, batch: objective.Batch, key: jax.Array) -> dict[str, Any]:
    """Codebooks by k-means of the untrained latents of the first batch (section III-C).

    A batch may have fewer frames than there are codes: it is then encoded again, shifted by fractions of a
    frame.
    """
    audio = batch['audio']
    stride = self.codec.stride
    rows = audio.shape[0] * audio.shape[1] // stride
    shifts = min(stride, -(-_ROWS_PER_CODE * self.codec.codebook_size // rows))
    offsets = jnp.arange(shifts) * (stride // shifts)
    latents = jax.lax.map(lambda offset: model.encode_latents(jnp.roll(audio, offset, axis=1)), offsets)
    rows_NxD = latents.reshape(-1, self.codec.latent)
    buffers = quantize.kmeans_start(rows_NxD, self.codec.levels, self.codec.codebook_size, key)
    # Counts as one batch would have given them, so that they weigh no more than those of later steps.
    scale = {'codebook': 1.0, 'count': 1 / shifts, 'sum': 1 / shifts}
    return {'quantizer': {name: value * scale[name] for name, value in buffers.items()}}

  def loss(
      self, model: nnx.Module, batch: objective.Batch, key: jax.Array, *, training: bool
  ) -> tuple[jax.Array, objective.Aux]:
    audio = batch['audio'].astype(jnp.float32)
    level_key, candidate_key = jax.random.split(key)
    latents = model.encode_latents(audio)
    quantized = model.quantizer.quantize(
        latents, levels_B=self._levels(level_key, batch['slot']) if training else None, slot_B=batch['slot'],
        batch_size=self.batch_size, key=candidate_key)
    # Straight through: the gradient passes the quantizer as if it were the identity.
    decoded = model.decode_latents(latents + jax.lax.stop_gradient(quantized.values_BxTxD - latents))

    weights = self.weights
    terms = {
        'reconstruction': (weights.reconstruction / self.unit, self.reconstruction(audio, decoded)),
        'waveform': (weights.waveform / _TYPICAL_AMPLITUDE, jnp.mean(jnp.abs(audio - decoded), axis=-1)),
        'commitment': (weights.commitment, quantized.commitment_B),
    }
    if self.adversarial:
      terms |= self._adversarial_terms(model, audio, decoded)
    # A weight of 0 leaves the term out: 0 times infinity would still spoil the gradient.
    total = jnp.mean(sum(weight * term_B for weight, term_B in terms.values() if weight))
    metrics = {name: jnp.mean(term_B) for name, (_, term_B) in terms.items()}
    if not training:
      metrics |= self._evaluation(model, audio, latents)
    return total, objective.Aux(metrics, quantized.statistics)

  def update(self, buffers: Any, statistics: Any, key: jax.Array) -> tuple[Any, dict[str, jax.Array]]:
    del key
    quantizer, metrics = quantize.ema_update(
        buffers['quantizer'], statistics, decay=1 - 1 / self.codebook_steps, dead_code_share=self.dead_code_share)
    per_level = metrics['perplexity']
    shown = {f'perplexity_{level + 1}': per_level[level] for level in sorted({0, self.codec.levels - 1})}
    return {**buffers, 'quantizer': quantizer}, {**shown, 'restarts': jnp.mean(metrics['restarts'])}

  def evaluated(self, statistics: Any) -> dict[str, jax.Array]:
    """How many codes of each level are in even use, and the share in any use, in all held-out frames together."""
    count_QxK = statistics['count']
    return {'perplexity': quantize.perplexity(count_QxK), 'codes_used_share': jnp.mean(count_QxK > 0, axis=-1),
            'perplexity_frames': jnp.sum(count_QxK[0])}

  def media(self, model: nnx.Module, batch: objective.Batch) -> objective.Media:
    """The clips, and what the codec makes of them with all, the first four and the first level."""
    audio = batch['audio'].astype(jnp.float32)
    indices = model.encode(audio)
    decoded = {f'levels_{n:02}': model.decode(indices[..., :n]) for n in self._measured_levels}
    return objective.Media({'original': audio, **decoded}, self.codec.sample_rate)

  def reconstruction(self, audio_BxN: jax.Array, decoded_BxN: jax.Array) -> jax.Array:
    """Multi-scale mel loss [B]: sum over scales s of |S - S'|_1 + sqrt(s / 2) |log S - log S'|_2.

    Norms are over the bands; both are averaged over the frames of the scale (hop s / 4). Equation 4, after
    Gritsenko et al. (arXiv 2008.01160).
    """
    batch = audio_BxN.shape[0]
    both = jnp.concatenate([audio_BxN, decoded_BxN])
    total = jnp.zeros((batch,))
    for window in self.windows:
      config = spectral.MelConfig(
          window=window, hop=window // 4, bands=self.bands, sample_rate=self.codec.sample_rate,
          fft_size=max(window, self.smallest_fft), floor=self.floor)
      mel = spectral.mel(both, config)
      log = jnp.log(jnp.maximum(mel, config.floor))
      linear = jnp.sum(jnp.abs(mel[:batch] - mel[batch:]), axis=-1)
      # The constant keeps the gradient finite where both spectra are silent.
      norm = jnp.sqrt(jnp.sum(jnp.square(log[:batch] - log[batch:]), axis=-1) + 1e-8)
      total += jnp.mean(linear + math.sqrt(window / 2) * norm, axis=-1)
    return total

  def _levels(self, key: jax.Array, slot_B: jax.Array) -> jax.Array:
    """Quantizer dropout (section III-C): how many first levels each example uses."""

    def draw(example_key):
      share_key, count_key = jax.random.split(example_key)
      count = jax.random.randint(count_key, (), 1, self.codec.levels + 1)
      return jnp.where(jax.random.uniform(share_key) < self.dropout_share, count, self.codec.levels)

    return jax.vmap(draw)(axes.example_keys(key, slot_B))

  def _adversarial_terms(self, model, audio, decoded):
    """Generator and discriminator terms in one scalar, each with gradients for its own group only.

    The generator's terms see the discriminators with fixed parameters; the discriminators' term sees fixed
    audio. The forward passes on `decoded` are the same computation, and the compiler merges them.
    """
    graph, params, rest = nnx.split(model.discriminators, nnx.Param, ...)
    fixed = nnx.merge(graph, jax.tree.map(jax.lax.stop_gradient, params), rest)
    real = model.discriminators(audio)
    fake = model.discriminators(jax.lax.stop_gradient(decoded))
    judged = fixed(decoded)
    return {
        'discriminator': (1.0, discriminators.discriminator_loss(real, fake)),
        'adversarial': (self.weights.adversarial / self.unit, discriminators.adversarial_loss(judged)),
        'feature': (self.weights.feature / self.unit, discriminators.feature_loss(real, judged)),
    }

  @property
  def _measured_levels(self) -> list[int]:
    return sorted({1, min(4, self.codec.levels), self.codec.levels})

  def _evaluation(self, model, audio, latents):
    """Quality with all, the first four and the first level."""
    metrics = {}
    indices = model.quantizer.encode(latents)
    for levels in self._measured_levels:
      decoded = model.decode(indices[..., :levels])
      suffix = '' if levels == self.codec.levels else f'_{levels}_levels'
      distance_B = spectral.log_mel_distance(audio, decoded, self.codec.sample_rate)
      metrics[f'log_mel_distance{suffix}'] = jnp.mean(distance_B)
      metrics[f'si_sdr{suffix}'] = jnp.nanmean(spectral.si_sdr(audio, decoded))
    return metrics


class TrainedSoundStream(soundstream.SoundStream):
  """The codec and its discriminators, which only training needs."""

  def __init__(
      self, config: soundstream.SoundStreamConfig, judges: discriminators.DiscriminatorsConfig, *,
      rngs: nnx.Rngs):
    super().__init__(config, rngs=rngs)
    self.discriminators = discriminators.Discriminators(judges, rngs=rngs)
