"""Adversarial training of the codec (SoundStream, arXiv 2107.03312, section III).

B batch, N samples, F frames, D latent width, Q levels, K codes, M mel bands. Audio of more than one channel has them as
a last axis, as in `model`.
"""
from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple

from flax import nnx
import jax
import jax.numpy as jnp

from musiclm_jax import axes, objective, specs
from musiclm_jax.codec import balance, denoising, discriminators, model as soundstream
from musiclm_jax.nn import quantize, spectral

# Mean absolute amplitude of music, about: the unit in which the waveform term counts.
_TYPICAL_AMPLITUDE = 0.08
# Rows for each code that the k-means start asks for.
_ROWS_PER_CODE = 4
# Under this share of K in even use the first level counts as collapsed.
_COLLAPSED_SHARE = 0.2
# In the order in which they are added up.
_TERMS = ('reconstruction', 'waveform', 'commitment', 'discriminator', 'adversarial', 'feature')
_NOISE = 2  # the use of a step's key; the first two are what `split` makes of it


@dataclasses.dataclass(frozen=True)
class LossWeights:
  """Weights of the generator's terms; the first three are the paper's (section III-E).

  The three terms of the paper are divided by one constant, `CodecTraining.unit`, which changes neither their
  balance nor what Adam does: its second term is then the mean error of the log-mel spectrogram in nepers,
  and the weights of the terms that the paper does not state, and gradient clipping, mean the same for every
  set of windows. These are our choice:

  Attributes:
    waveform: mean |x - y| in units of 0.08, about the mean amplitude of music. The paper has no such term
      and gets the phase from its discriminators; a short training learns phase from this term only.
    commitment: squared distance of each latent to its codes.

  Where gradients are balanced, all but the commitment's are shares of the gradient at the decoded audio, in any unit.
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
    gradients: "measured" reports how hard each loss pulls at the decoded audio (`gradient_feature`: the norm of an
      example's gradient, weighted); "balanced" also scales the pulls to the shares that the weights name; "" does
      neither, and saves a backward pass through the discriminators.
    balance_steps: time constant in steps of the moving averages that balancing goes by (1000 in EnCodec).
    noisy_share, noise_gains_db: for a codec that denoises, see `denoising.add_noise`; the gains are the paper's.
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
  gradients: str = ''
  balance_steps: int = 1000
  noisy_share: float = 0.5
  noise_gains_db: tuple[float, float] = (-30.0, 0.0)

  groups = ('generator', 'discriminator')

  def __post_init__(self):
    for name in ('windows', 'noise_gains_db'):
      object.__setattr__(self, name, tuple(getattr(self, name)))
    if self.samples % self.codec.stride:
      raise ValueError(
          f'codec: a crop of {self.seconds} s has {self.samples} samples, which is not a multiple of the '
          f'stride of {self.codec.stride} samples ({self.codec.stride / self.codec.sample_rate:g} s)')
    if self.batch_size < 1:
      raise ValueError(f'codec: batch_size must be at least 1, found {self.batch_size}')
    if self.gradients not in ('', 'measured', 'balanced'):
      raise ValueError(f'codec: gradients must be "", "measured" or "balanced", found {self.gradients!r}')

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
    """The second term of the reconstruction loss where every band of the log-mel spectrogram is wrong by one neper."""
    return sum(math.sqrt(s / 2) for s in self.windows) * math.sqrt(self.bands)

  @property
  def term_weights(self) -> dict[str, float]:
    """What each loss of the decoded audio is multiplied with; losses of weight 0 are left out."""
    w = self.weights
    given = {'reconstruction': w.reconstruction / self.unit, 'waveform': w.waveform / _TYPICAL_AMPLITUDE,
             'adversarial': w.adversarial / self.unit, 'feature': w.feature / self.unit}
    return {name: weight for name, weight in given.items() if weight}

  def model(self, rngs: nnx.Rngs) -> nnx.Module:
    return TrainedSoundStream(
        self.codec, self.discriminators, balanced=len(self.term_weights) if self.gradients == 'balanced' else 0,
        rngs=rngs)

  def batch_spec(self, batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
    shape = (batch_size, self.samples, *specs.channel_axis(self.codec.channels))
    audio = jax.ShapeDtypeStruct(shape, jnp.float32)
    return {
        'audio': audio, **({'noise': audio} if self.codec.denoise_at else {}),
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
    level_key, candidate_key = jax.random.split(key)
    heard, target, at_encoder, at_decoder = self._task(batch, key, training)
    latents = model.encode_latents(heard, at_encoder)
    quantized = model.quantizer.quantize(
        latents, levels_B=self._levels(level_key, batch['slot']) if training else None, slot_B=batch['slot'],
        batch_size=self.batch_size, key=candidate_key)
    # Straight through: the gradient passes the quantizer as if it were the identity.
    decoded = model.decode_latents(latents + jax.lax.stop_gradient(quantized.values_BxTxD - latents), at_decoder)

    judges = self._judges(model, target) if self.adversarial else None
    terms_of = lambda x: self._generator_terms(target, x, judges)
    metrics, statistics, pulled_B = {}, quantized.statistics, 0.0
    if training and self.gradients:
      terms, metrics, statistics, pulled_B = self._measured(model, terms_of, decoded, statistics)
    else:
      terms = terms_of(decoded)
    terms['commitment'] = quantized.commitment_B
    if judges:
      # The forward passes on `decoded` are the same computation, and the compiler merges them.
      fake = model.discriminators(jax.lax.stop_gradient(decoded))
      terms['discriminator'] = discriminators.discriminator_loss(judges.real, fake)
      metrics |= discriminators.balance(judges.real, fake)
    # A weight of 0 leaves the term out: 0 times infinity would still spoil the gradient.
    weights = {'commitment': self.weights.commitment, 'discriminator': 1.0, **self.term_weights}
    weighted = [weights[name] * terms[name] for name in _TERMS if weights.get(name) and name in terms]
    total = jnp.mean(sum(weighted) + pulled_B)
    metrics |= {name: jnp.mean(term_B) for name, term_B in terms.items()}
    if not training:
      quality, ratios = self._evaluation(model, batch, latents, key)
      metrics, statistics = metrics | quality, {**statistics, 'si_sdr': ratios}
    return total, objective.Aux(metrics, statistics)

  def update(self, buffers: Any, statistics: Any, key: jax.Array) -> tuple[Any, dict[str, jax.Array]]:
    del key
    quantizer, metrics = quantize.ema_update(
        buffers['quantizer'], statistics, decay=1 - 1 / self.codebook_steps, dead_code_share=self.dead_code_share)
    changed = {'quantizer': quantizer}
    if 'gradient_sizes' in buffers:
      changed['gradient_sizes'] = balance.updated(
          buffers['gradient_sizes'], statistics['gradient_sizes'], self.balance_steps)
    by_level = {f'{name}_{level + 1}': metrics[name][level]
                for name in ('perplexity', 'restarts') for level in range(self.codec.levels)}
    return {**buffers, **changed}, {
        **by_level, 'restarts': jnp.mean(metrics['restarts']),
        'perplexity_1_floor': jnp.float32(_COLLAPSED_SHARE * self.codec.codebook_size)}

  def evaluated(self, statistics: Any) -> dict[str, jax.Array]:
    """How many codes of each level are in even use, and the share in any use, in all held-out frames together; and
    SI-SDR over the clips that are not silent, which have none."""
    count_QxK = statistics['count']
    ratios = {name: found['sum'] / found['clips'] for name, found in statistics['si_sdr'].items() if found['clips'] > 0}
    return {'perplexity': quantize.perplexity(count_QxK), 'codes_used_share': jnp.mean(count_QxK > 0, axis=-1),
            'perplexity_frames': jnp.sum(count_QxK[0]), **ratios}

  def media(self, model: nnx.Module, batch: objective.Batch) -> objective.Media:
    """The clips, and what the codec makes of them with all, the first four and the first level."""
    audio = batch['audio'].astype(jnp.float32)
    indices = model.encode(audio)
    decoded = {f'levels_{n:02}': model.decode(indices[..., :n]) for n in self._measured_levels}
    return objective.Media({'original': audio, **decoded}, self.codec.sample_rate)

  def reconstruction(self, audio_BxN: jax.Array, decoded_BxN: jax.Array) -> jax.Array:
    """Multi-scale mel loss [B]: sum over scales s of |S - S'|_1 + sqrt(s / 2) |log S - log S'|_2.

    Norms are over the bands; both are averaged over the frames of the scale (hop s / 4). Equation 4, after
    Gritsenko et al. (arXiv 2008.01160). S are magnitudes as the transform gives them: the balance of the two terms
    depends on it, the paper does not state it, and the code of Gritsenko et al. divides by nothing. It is averaged over
    the channels; of two, their mid and side count as two more: spectra of the channels alone do not tell where between
    them a sound is.
    """
    both = jnp.concatenate([_spectral_views(audio_BxN), _spectral_views(decoded_BxN)])
    batch = both.shape[0] // 2
    total = jnp.zeros((batch,))
    for window in self.windows:
      config = spectral.MelConfig(
          window=window, hop=window // 4, bands=self.bands, sample_rate=self.codec.sample_rate,
          fft_size=max(window, self.smallest_fft), floor=self.floor)
      mel = spectral.mel(both, config)
      log = jnp.log(jnp.maximum(mel, config.floor))
      undivided = spectral.hann(window).sum() / 2  # what `mel` divides by
      linear = undivided * jnp.sum(jnp.abs(mel[:batch] - mel[batch:]), axis=-1)
      # The constant keeps the gradient finite where both spectra are silent.
      norm = jnp.sqrt(jnp.sum(jnp.square(log[:batch] - log[batch:]), axis=-1) + 1e-8)
      total += jnp.mean(linear + math.sqrt(window / 2) * norm, axis=-1)
    return jnp.mean(total.reshape(audio_BxN.shape[0], -1), axis=-1)

  def _levels(self, key: jax.Array, slot_B: jax.Array) -> jax.Array:
    """Quantizer dropout (section III-C): how many first levels each example uses."""

    def draw(example_key):
      share_key, count_key = jax.random.split(example_key)
      count = jax.random.randint(count_key, (), 1, self.codec.levels + 1)
      return jnp.where(jax.random.uniform(share_key) < self.dropout_share, count, self.codec.levels)

    return jax.vmap(draw)(axes.example_keys(key, slot_B))

  def _task(self, batch: objective.Batch, key: jax.Array, training: bool):
    """What the codec hears, what is to come out, and the conditions of its two halves."""
    audio = batch['audio'].astype(jnp.float32)
    if not self.codec.denoise_at or not training:
      return audio, audio, False, False
    heard, target, denoise_B = self._noisy(batch, key, self.noisy_share)
    return heard, target, *self._conditions(denoise_B)

  def _noisy(self, batch: objective.Batch, key: jax.Array, share: float) -> denoising.Noisy:
    """The batch with noise in `share` of its examples."""
    music, noise = (batch[name].astype(jnp.float32) for name in ('audio', 'noise'))
    return denoising.add_noise(music, noise, jax.random.fold_in(key, _NOISE), batch['slot'], noisy_share=share,
                               gains_db=self.noise_gains_db)

  def _conditions(self, denoise: bool | jax.Array) -> tuple[bool | jax.Array, bool | jax.Array]:
    """The condition for the encoder and for the decoder."""
    return tuple(denoise if self.codec.denoise_at == half else False for half in ('encoder', 'decoder'))

  def _judges(self, model: nnx.Module, target: jax.Array) -> _Judges:
    """The generator's terms see the discriminators with fixed parameters; their own term sees fixed audio.

    So one scalar holds both players, each with gradients for its own group only.
    """
    graph, params, rest = nnx.split(model.discriminators, nnx.Param, ...)
    fixed = nnx.merge(graph, jax.tree.map(jax.lax.stop_gradient, params), rest)
    return _Judges(fixed, model.discriminators(target))

  @property
  def _measured_levels(self) -> list[int]:
    return sorted({1, min(4, self.codec.levels), self.codec.levels})

  def _generator_terms(self, target: jax.Array, decoded: jax.Array, judges: _Judges | None) -> dict[str, jax.Array]:
    """Every loss of the decoded audio, [B]."""
    terms = {
        'reconstruction': self.reconstruction(target, decoded),
        'waveform': jnp.mean(jnp.abs(target - decoded), axis=tuple(range(1, target.ndim))),
    }
    if judges:
      judged = judges.fixed(decoded)
      terms |= {'adversarial': discriminators.adversarial_loss(judged),
                'feature': discriminators.feature_loss(judges.real, judged)}
    return terms

  def _measured(self, model: nnx.Module, terms_of: balance.Terms, decoded: jax.Array, statistics: dict[str, Any]):
    """The terms without gradients, their sizes as metrics and statistics, and what carries the gradient instead."""
    weights = self.term_weights
    found = balance.pulls(terms_of, decoded, tuple(weights))
    metrics = {f'gradient_{name}': weight * jnp.mean(found.sizes[name]) for name, weight in weights.items()}
    factors = weights
    if self.gradients == 'balanced':
      shares = {name: getattr(self.weights, name) for name in weights}
      factors = balance.balanced(model.gradient_sizes, weights, shares)
      metrics |= {f'balance_{name}': factors[name] / weight for name, weight in weights.items()}
      statistics = {**statistics, 'gradient_sizes': balance.statistics(found)}
    return found.terms, metrics, statistics, balance.pulled(found, factors, decoded)

  def _evaluation(self, model, batch, latents, key):
    """Metrics and, for `evaluated`, SI-SDR with all, the first four and the first level; of a codec that denoises also
    how far it does."""
    metrics, ratios = {}, {}
    audio = batch['audio'].astype(jnp.float32)

    def ratio(decoded):
      ratio_B = spectral.si_sdr(_by_channel(audio), _by_channel(decoded))
      audible_B = ~jnp.isnan(ratio_B)
      return {'sum': jnp.sum(jnp.where(audible_B, ratio_B, 0)), 'clips': jnp.sum(audible_B)}

    indices = model.quantizer.encode(latents)
    for levels in self._measured_levels:
      decoded = model.decode(indices[..., :levels])
      suffix = '' if levels == self.codec.levels else f'_{levels}_levels'
      distance_B = spectral.log_mel_distance(_by_channel(audio), _by_channel(decoded), self.codec.sample_rate)
      metrics[f'log_mel_distance{suffix}'] = jnp.mean(distance_B)
      ratios[f'si_sdr{suffix}'] = ratio(decoded)
    if self.codec.denoise_at:
      heard = self._noisy(batch, key, 1.0).heard_BxN
      at_encoder, at_decoder = self._conditions(True)
      denoised = model.decode(model.encode(heard, denoise=at_encoder), at_decoder)
      ratios |= {'si_sdr_noisy': ratio(heard), 'si_sdr_denoised': ratio(denoised)}
    return metrics, ratios


class _Judges(NamedTuple):
  """The discriminators with fixed parameters, and what they think of real audio as they are."""

  fixed: discriminators.Discriminators
  real: list[discriminators.Judgement]


def _by_channel(audio_BxN: jax.Array) -> jax.Array:
  """Every channel as an example of its own, [B * C, N]."""
  return audio_BxN if audio_BxN.ndim == 2 else jnp.moveaxis(audio_BxN, 2, 1).reshape(-1, audio_BxN.shape[1])


def _spectral_views(audio_BxN: jax.Array) -> jax.Array:
  """What is compared of each example, side by side: its channels, and of two also half their sum and difference."""
  if audio_BxN.ndim == 3 and audio_BxN.shape[2] == 2:
    left, right = audio_BxN[..., 0], audio_BxN[..., 1]
    audio_BxN = jnp.stack([left, right, (left + right) / 2, (left - right) / 2], axis=-1)
  return _by_channel(audio_BxN)


class TrainedSoundStream(soundstream.SoundStream):
  """The codec and its discriminators, which only training needs."""

  def __init__(
      self, config: soundstream.SoundStreamConfig, judges: discriminators.DiscriminatorsConfig, *,
      balanced: int = 0, rngs: nnx.Rngs):
    super().__init__(config, rngs=rngs)
    self.discriminators = discriminators.Discriminators(judges, config.channels, rngs=rngs)
    if balanced:
      self.gradient_sizes = balance.GradientSizes(balanced)
