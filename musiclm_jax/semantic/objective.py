"""The training of w2v-BERT: contrastive loss, code diversity, masked prediction (arXiv 2108.06209, 2.2).

Every term is a mean of terms of single examples, and all randomness comes from an example's key: the loss is
the same for any number of microbatches. Where a batch has 'length' int32 [B], what follows so many samples of a clip is
padding: it is not heard, never masked, and counts in no mean.

Shapes: B batch, N samples, T frames, E width of the contrastive space, G code groups, V codes a group.
"""
from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp

from musiclm_jax import axes
from musiclm_jax.objective import Aux, Batch, Objective
from musiclm_jax.semantic.model import W2vBert, W2vBertConfig, mel_statistics

# As many as the k-means of the start asks for; with 6, most codes are empty and few tell a pitch (docs/semantic.md).
_ROWS_PER_CODE = 192


@dataclasses.dataclass(frozen=True)
class W2vBertTraining(Objective):
  """L = contrastive + 0.1 diversity + masked prediction + heard_weight * prediction where nothing is masked.

  Attributes:
    encoder: sizes of the network.
    seconds: length of the crops.
    mask_share: share of the frames at which a masked span begins; spans may overlap.
    mask_span: frames a span; 10 at 25 Hz are 400 ms, too long to be filled in from the neighbours.
    mask_scale: standard deviation of the random vectors that stand in masked places.
    negatives: distractors of each masked frame, from the other masked frames of its own clip.
    temperature: of the contrastive loss.
    contrastive_weight, diversity_weight, masked_weight: of the three terms.
    heard_weight: of the same cross-entropy of the frames that are not masked, as in HuBERT (arXiv 2106.07447, section
      II-B). 0 in w2v-BERT, whose blocks need to keep of a frame no more than tells of others.
    gumbel_first, gumbel_last, gumbel_steps: temperature of the Gumbel softmax, annealed geometrically over
      that many steps (arXiv 2006.11477, section 4.2: from 2 to 0.5).
    usage_decay: of the moving average of code usage, a step.
  """

  encoder: W2vBertConfig
  seconds: float
  mask_share: float = 0.065
  mask_span: int = 10
  mask_scale: float = 0.1
  negatives: int = 100
  temperature: float = 0.1
  contrastive_weight: float = 1.0
  diversity_weight: float = 0.1
  masked_weight: float = 1.0
  heard_weight: float = 0.0
  gumbel_first: float = 2.0
  gumbel_last: float = 0.5
  gumbel_steps: int = 100_000
  usage_decay: float = 0.99

  def __post_init__(self):
    if self.frames <= self.mask_span or self.mask_span < 2:
      raise ValueError(
          f'{self.seconds} seconds are {self.frames} frames, too few for masked spans of {self.mask_span} '
          'frames (at least 2)')

  @property
  def samples(self) -> int:
    return round(self.seconds * self.encoder.mel.sample_rate)

  @property
  def frames(self) -> int:
    return self.samples // self.encoder.samples_per_frame

  def model(self, rngs: nnx.Rngs) -> W2vBert:
    return W2vBert(self.encoder, rngs=rngs)

  def batch_spec(self, batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
    return {'audio': jax.ShapeDtypeStruct((batch_size, self.samples), jnp.float32),
            'slot': jax.ShapeDtypeStruct((batch_size,), jnp.int32)}

  def start_batches(self, batch_size: int) -> int:
    return -(-_ROWS_PER_CODE * self.encoder.codes // (batch_size * self.frames))

  def start(self, model: W2vBert, batch: Batch, key: jax.Array) -> Any:
    """Normalises the mel bands by the first batches, and starts the quantizer as a k-means of what is to be predicted.

    Our choice: the cells of a random partition cut through what belongs together. At size tiny drum styles can be
    read from the first codes of a k-means with an accuracy of 0.64 and from those of a random partition with 0.46.
    """
    valid_BxT = self._valid(batch)
    mean, deviation = mel_statistics(batch['audio'], self.encoder.mel, valid_BxT)
    model.mel_mean[...], model.mel_deviation[...] = mean, deviation
    mel_BxFxM = model.spectrogram(batch['audio'], valid_BxT)
    features = model.subsampling(mel_BxFxM, valid_BxT)
    rows_NxD = model.target_rows(mel_BxFxM, features).reshape(-1, self.encoder.target_width)
    step = max(1, len(rows_NxD) // (_ROWS_PER_CODE * self.encoder.codes))
    if valid_BxT is not None:  # those that count, again and again where padding has taken the place of others
      order_N = jnp.argsort(~valid_BxT.reshape(-1), stable=True)
      rows_NxD = rows_NxD[order_N[jnp.arange(len(rows_NxD)) % jnp.maximum(jnp.sum(valid_BxT), 1)]]
    rows_NxD = rows_NxD[::step]
    w, b = model.quantizer.kmeans_start(rows_NxD, key)
    return {'mel_mean': mean, 'mel_deviation': deviation, 'quantizer': {'logits': {'w': w, 'b': b}}}

  def gumbel_temperature(self, steps: jax.Array) -> jax.Array:
    done = jnp.minimum(steps.astype(jnp.float32) / self.gumbel_steps, 1.0)
    return self.gumbel_first * (self.gumbel_last / self.gumbel_first)**done

  def _valid(self, batch: Batch) -> jax.Array | None:
    return self.encoder.valid(batch['audio'].shape[1], batch.get('length'))

  def masked(self, x_BxTxD: jax.Array, keys_B: jax.Array, valid_BxT: jax.Array | None = None
             ) -> tuple[jax.Array, jax.Array]:
    """Features with random vectors in their masked frames, and which frames those are, bool [B, T]."""
    frames = x_BxTxD.shape[1]
    starts = max(1, round(self.mask_share * frames))
    length_B = jnp.full(len(x_BxTxD), frames) if valid_BxT is None else jnp.sum(valid_BxT, axis=1)
    masked_BxT = jax.vmap(lambda k, length: span_mask(k, frames, starts, self.mask_span, length))(
        _folded(keys_B, 0), length_B)
    noise = jax.vmap(lambda k: jax.random.normal(k, x_BxTxD.shape[1:], x_BxTxD.dtype))(_folded(keys_B, 1))
    return jnp.where(masked_BxT[..., None], self.mask_scale * noise, x_BxTxD), masked_BxT

  def loss(self, model: W2vBert, batch: Batch, key: jax.Array, *, training: bool) -> tuple[jax.Array, Aux]:
    keys_B, valid_BxT = axes.example_keys(key, batch['slot']), self._valid(batch)
    mask_B, negatives_B, gumbel_B, first_B, second_B = (_folded(keys_B, i) for i in range(5))
    mel_BxFxM = model.spectrogram(batch['audio'], valid_BxT)
    features = model.subsampling(mel_BxFxM, valid_BxT)
    inputs, masked_BxT = self.masked(features, mask_B, valid_BxT)

    temperature = self.gumbel_temperature(model.steps[...])
    codes = model.quantizer(model.target_rows(mel_BxFxM, features), temperature=temperature,
                            keys_B=gumbel_B if training else None)
    context = model.contrastive(model.input(inputs), valid_BxT=valid_BxT, keys_B=first_B if training else None)
    count_BxTxT = jax.vmap(lambda k, m: negative_counts(k, m, self.negatives))(negatives_B, masked_BxT)
    contrastive_B, found_B = contrastive_loss(
        model.context(context), codes.vectors_BxTxE, masked_BxT, count_BxTxT,
        temperature=self.temperature)

    hidden = model.masked(context, valid_BxT=valid_BxT, keys_B=second_B if training else None)
    logits = model.prediction(hidden).astype(jnp.float32).reshape(codes.probabilities_BxTxGxV.shape)
    masked_B, right_B = prediction_loss(logits, codes.ids_BxTxG, masked_BxT)
    diversity_B = diversity_loss(codes.probabilities_BxTxGxV, model.soft_usage[...], valid_BxT)

    loss_B = (self.contrastive_weight * (contrastive_B + self.diversity_weight * diversity_B)
              + self.masked_weight * masked_B)
    entropy = jnp.mean(_entropy(model.hard_usage[...]))
    metrics = {
        'contrastive': jnp.mean(contrastive_B),
        'contrastive_chance': jnp.float32(math.log(1 + self.negatives)),
        'contrastive_accuracy': jnp.mean(found_B),
        'diversity': jnp.mean(diversity_B),
        'masked_cross_entropy': jnp.mean(masked_B),
        'masked_cross_entropy_chance': entropy,
        'masked_accuracy': jnp.mean(right_B),
        'target_entropy': entropy,
        'target_perplexity': jnp.exp(entropy),
        'gumbel_temperature': temperature,
    }
    if self.heard_weight:
      heard_BxT = ~masked_BxT if valid_BxT is None else valid_BxT & ~masked_BxT
      heard_B, told_B = prediction_loss(logits, codes.ids_BxTxG, heard_BxT)
      loss_B += self.heard_weight * heard_B
      metrics['heard_accuracy'] = jnp.mean(told_B)
    hard = jax.nn.one_hot(codes.ids_BxTxG, self.encoder.codes)
    statistics = {
        'examples': jnp.float32(features.shape[0]),
        'soft': jnp.sum(_mean(codes.probabilities_BxTxGxV, valid_BxT), axis=0),
        'hard': jnp.sum(_mean(hard, valid_BxT), axis=0),
    }
    return jnp.mean(loss_B), Aux(metrics, jax.lax.stop_gradient(statistics))

  def update(self, buffers: Any, statistics: Any, key: jax.Array) -> tuple[Any, dict[str, jax.Array]]:
    """Moves the averages of code usage and counts the step."""
    del key
    updated = {'steps': buffers['steps'] + 1}
    # A plain mean while there are few steps, so that the uniform usage at the start leaves no trace.
    taken = buffers['steps'].astype(jnp.float32)
    decay = jnp.minimum(self.usage_decay, taken / (taken + 1))
    for name in ('soft', 'hard'):
      usage = statistics[name] / statistics['examples']
      updated[f'{name}_usage'] = decay * buffers[f'{name}_usage'] + (1 - decay) * usage
    return {**buffers, **updated}, {}

  def evaluated(self, statistics: Any) -> dict[str, jax.Array]:
    """Entropy and chance from the held-out targets themselves; the metrics of the loss have those of training.

    Averaged over the groups, as the cross-entropy is: what a predictor pays that knows only how frequent each target
    is.
    """
    share_GxV = statistics['hard'] / jnp.sum(statistics['hard'], axis=-1, keepdims=True)
    entropy_G = _entropy(share_GxV)
    entropy = jnp.mean(entropy_G)
    return {'target_entropy': entropy, 'target_perplexity': jnp.mean(jnp.exp(entropy_G)),
            'masked_cross_entropy_chance': entropy, 'masked_accuracy_chance': jnp.mean(jnp.max(share_GxV, axis=-1))}


def _folded(keys_B: jax.Array, value: int) -> jax.Array:
  return jax.vmap(lambda key: jax.random.fold_in(key, value))(keys_B)


def _entropy(p_xV: jax.Array) -> jax.Array:
  """Entropy in nats over the last axis."""
  return -jnp.sum(p_xV * jnp.log(jnp.maximum(p_xV, 1e-30)), axis=-1)


def _mean(x_BxTx_: jax.Array, where_BxT: jax.Array | None) -> jax.Array:
  """Mean over those of an example's frames, [B, ...]; None: over all. A clip of a frame or more has some."""
  if where_BxT is None:
    return jnp.mean(x_BxTx_, axis=1)
  where_BxTx_ = where_BxT.reshape(*where_BxT.shape, *(1,) * (x_BxTx_.ndim - 2))
  return jnp.sum(jnp.where(where_BxTx_, x_BxTx_, 0), axis=1) / jnp.maximum(jnp.sum(where_BxTx_, axis=1), 1)


def span_mask(key: jax.Array, frames: int, starts: int, span: int, length: jax.Array | None = None) -> jax.Array:
  """bool [T]: `starts` distinct frames, uniform among those where a span fits, begin a masked span each.

  Of a clip of fewer frames, `length`, those where it fits into the clip, at least one (cut where the clip is shorter).
  """
  first = jax.random.permutation(key, frames - span + 1)[:starts]
  place = jnp.arange(frames)
  if length is None:
    length = frames
  last = jnp.maximum(length - span, 0)
  first = first.at[0].set(first[0] % (last + 1))
  begun = (place >= first[:, None]) & (place < first[:, None] + span) & (first <= last)[:, None]
  return jnp.any(begun, axis=0) & (place < length)


def negative_counts(key: jax.Array, masked_T: jax.Array, negatives: int) -> jax.Array:
  """float32 [T, T]: how often frame s is among the distractors of frame t.

  They are drawn with replacement from the masked frames other than t itself; rows of frames that are not
  masked mean nothing.
  """
  frames = masked_T.shape[0]
  total = jnp.sum(masked_T)
  place_of_rank = jnp.argsort(~masked_T)  # stable: the masked frames come first, in order
  rank_of_place = jnp.cumsum(masked_T) - 1
  draw = jax.random.randint(key, (frames, negatives), 0, jnp.maximum(total - 1, 1))
  draw = draw + (draw >= rank_of_place[:, None])  # skips the frame itself
  rows = jnp.arange(frames)[:, None]
  return jnp.zeros((frames, frames)).at[rows, place_of_rank[jnp.minimum(draw, total - 1)]].add(1.0)


def contrastive_loss(context_BxTxE: jax.Array, target_BxTxE: jax.Array, masked_BxT: jax.Array,
                     count_BxTxT: jax.Array, *, temperature: float) -> tuple[jax.Array, jax.Array]:
  """-log of the target's share among its distractors (arXiv 2006.11477, equation 3), in float32.

  Distractors that happen to have the target's own code stay in, as in the equation. The published code of
  wav2vec 2.0 leaves them out; then the loss is zero once all frames share one code, and only the diversity
  term stands against that. Kept, they make collapse cost log(1 + distractors).

  The distractors of a clip are columns of one matrix of similarities, weighted by how often they were drawn;
  this gives the same value as a gathered list of them.

  Returns the mean over each example's masked frames [B], and the share of them [B] whose target comes before all
  distractors with another code.
  """
  unit = [x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-8)
          for x in (context_BxTxE.astype(jnp.float32), target_BxTxE.astype(jnp.float32))]
  similarity = functools.partial(jnp.einsum, 'BTE,BSE->BTS', precision=jax.lax.Precision.HIGHEST)
  logits_BxTxT = similarity(*unit) / temperature
  positive_BxT = jnp.diagonal(logits_BxTxT, axis1=1, axis2=2)
  drawn = count_BxTxT > 0
  negative = jnp.where(drawn, logits_BxTxT + jnp.log(jnp.maximum(count_BxTxT, 1.0)), -jnp.inf)
  every = jnp.concatenate([positive_BxT[..., None], negative], axis=-1)
  loss_BxT = jax.nn.logsumexp(every, axis=-1) - positive_BxT
  # Another frame with the target's own code is no wrong answer; where all have it, nothing was found.
  differ = drawn & (similarity(unit[1], unit[1]) < 1 - 1e-4)
  best_BxT = jnp.max(jnp.where(differ, logits_BxTxT, -jnp.inf), axis=-1)
  found_BxT = (positive_BxT > best_BxT) & jnp.any(differ, axis=-1)
  return _mean(loss_BxT, masked_BxT), _mean(found_BxT.astype(jnp.float32), masked_BxT)


def prediction_loss(logits_BxTxGxV: jax.Array, ids_BxTxG: jax.Array, where_BxT: jax.Array
                    ) -> tuple[jax.Array, jax.Array]:
  """Cross-entropy in nats and accuracy [B] over some frames, averaged over the groups."""
  log_p = jax.nn.log_softmax(logits_BxTxGxV, axis=-1)
  loss = -jnp.take_along_axis(log_p, ids_BxTxG[..., None], axis=-1)[..., 0]
  right = jnp.argmax(logits_BxTxGxV, axis=-1) == ids_BxTxG
  return (_mean(jnp.mean(loss, axis=-1), where_BxT),
          _mean(jnp.mean(right.astype(jnp.float32), axis=-1), where_BxT))


def diversity_loss(probabilities_BxTxGxV: jax.Array, usage_GxV: jax.Array, valid_BxT: jax.Array | None = None
                   ) -> jax.Array:
  """1 - perplexity / V of the code usage (arXiv 2006.11477, equation 4), as a mean over examples [B].

  The entropy of a batch's own usage is no mean over examples: it would change with the number of
  microbatches, and ask each small batch to use all codes. This is its first-order expansion around the moving
  average of the usage: where the two agree, so do the value and the gradient.
  """
  usage = jax.lax.stop_gradient(usage_GxV.astype(jnp.float32))
  share_G = jnp.exp(_entropy(usage)) / usage.shape[-1]
  p_BxGxV = _mean(probabilities_BxTxGxV, valid_BxT)
  slope = jnp.log(jnp.maximum(usage, 1e-7)) + 1
  return jnp.mean(1 - share_G + share_G * jnp.sum((p_BxGxV - usage) * slope, axis=-1), axis=-1)
