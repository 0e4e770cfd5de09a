"""Contrastive training of MuLan (arXiv 2208.12415, section 3).

The loss compares every clip with every text of the global batch, so it is no mean over examples: the batch is
never split into microbatches. Memory is saved inside instead: the towers run over `chunks` parts of the batch
one after another, each recomputed in the backward pass, and the one loss sees all embeddings. The gradient is
that of the direct computation.

B batch, C chunks, N samples, L text tokens, E dimensions of the joint space.
"""
from __future__ import annotations

import dataclasses
import math

from flax import nnx
import jax
import jax.numpy as jnp

from musiclm_jax import axes
from musiclm_jax.mulan.model import MuLan, MuLanConfig
from musiclm_jax.objective import Aux, Batch, Objective


def contrastive_loss(
    audio_BxE: jax.Array, text_BxE: jax.Array, temperature: jax.Array, *, decoupled: bool = False,
) -> jax.Array:
  """Loss of each pair, float32 [B]; the objective is its mean.

  With s_ij = audio_i . text_j / temperature, the symmetric form is the mean of both cross-entropies,
  -s_ii + (logsumexp_j s_ij + logsumexp_j s_ji) / 2: ln B at chance. The decoupled form leaves the pair itself
  out (arXiv 2110.06848) and puts both directions into one sum, -s_ii + logsumexp over j != i of s_ij and
  s_ji: ln(2 (B - 1)) at chance. MuLan's own formula is commonly read as this one.
  """
  if decoupled and audio_BxE.shape[0] < 2:
    raise ValueError('the decoupled contrastive loss needs a batch of at least 2 pairs, found 1')
  audio_BxE, text_BxE = audio_BxE.astype(jnp.float32), text_BxE.astype(jnp.float32)
  # Each device holds the rows of its own examples and gathers all columns: two small gathers of embeddings,
  # and no [B, B] matrix ever crosses devices.
  all_audio_BxE = axes.constrain(audio_BxE, None, None)
  all_text_BxE = axes.constrain(text_BxE, None, None)
  audio_rows_BxB = axes.constrain(_similarity(audio_BxE, all_text_BxE) / temperature, 'batch', None)
  text_rows_BxB = axes.constrain(_similarity(text_BxE, all_audio_BxE) / temperature, 'batch', None)
  own_B = jnp.sum(audio_BxE * text_BxE, axis=-1) / temperature
  if not decoupled:
    total_B = (jax.nn.logsumexp(audio_rows_BxB, axis=-1) + jax.nn.logsumexp(text_rows_BxB, axis=-1)) / 2
    return total_B - own_B
  itself_BxB = jnp.eye(audio_BxE.shape[0], dtype=bool)
  others_Bx2B = jnp.concatenate(
      [jnp.where(itself_BxB, -jnp.inf, rows) for rows in (audio_rows_BxB, text_rows_BxB)], axis=-1)
  return jax.nn.logsumexp(others_Bx2B, axis=-1) - own_B


def _similarity(a_BxE: jax.Array, b_BxE: jax.Array) -> jax.Array:
  """As exact as the sums that a pair's own similarity is, on every device."""
  return jnp.matmul(a_BxE, b_BxE.T, precision=jax.lax.Precision.HIGHEST)


def recall_at_1(query_BxE: jax.Array, candidate_BxE: jax.Array) -> jax.Array:
  """Share of queries whose own candidate is the nearest of all, float32 scalar; a tie counts as a miss.

  Ties are misses so that a collapsed model, whose embeddings are all alike, scores 0.
  """
  score_BxB = axes.constrain(_similarity(query_BxE, axes.constrain(candidate_BxE, None, None)), 'batch', None)
  own_Bx1 = jnp.sum(query_BxE * candidate_BxE, axis=-1, keepdims=True)
  others_BxB = jnp.where(jnp.eye(score_BxB.shape[0], dtype=bool), -jnp.inf, score_BxB)
  return jnp.mean(jnp.max(others_BxB, axis=-1, keepdims=True) < own_Bx1, dtype=jnp.float32)


@dataclasses.dataclass(frozen=True)
class MuLanTraining(Objective):
  """MuLan with its contrastive loss.

  Attributes:
    chunks: parts of the batch that the towers see one after another, a divisor of the batch; 1: all at once,
      without recomputation.
    decoupled: the form of the loss, see `contrastive_loss`.
    gap_weight: of the mean squared distance between a clip and its own text, which is added to the contrastive loss and
      pulls the two kinds together; that loss asks only that others be further away.
    minimum_temperature: the trained temperature acts as if it never fell below this, as in arXiv 2103.00020.
  """

  mulan: MuLanConfig
  chunks: int = 1
  decoupled: bool = False
  gap_weight: float = 0.0
  minimum_temperature: float = 0.01

  mean_over_examples = False
  asset_part = 'text'

  def model(self, rngs: nnx.Rngs) -> MuLan:
    return MuLan(self.mulan, rngs=rngs)

  def assets(self) -> dict[str, bytes]:
    return self.mulan.assets()

  def batch_spec(self, batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
    return {
        'audio': jax.ShapeDtypeStruct((batch_size, self.mulan.audio.window_samples), jnp.float32),
        'text': jax.ShapeDtypeStruct((batch_size, self.mulan.text.length), jnp.int32),
        'slot': jax.ShapeDtypeStruct((batch_size,), jnp.int32),
    }

  def embeddings(
      self, model: MuLan, batch: Batch, key: jax.Array, *, training: bool) -> tuple[jax.Array, jax.Array]:
    """Audio and text embeddings [B, E] of the whole batch, computed in `chunks` parts.

    `batch` may hold 'length' int32 [B], the valid samples of each clip; without it all are.
    """
    inputs = {name: batch[name] for name in ('audio', 'text', 'length') if name in batch}
    if training:
      inputs['key'] = axes.example_keys(key, batch['slot'])

    def towers(part):
      audio_keys_B = text_keys_B = None
      if 'key' in part:
        audio_keys_B, text_keys_B = jnp.unstack(jax.vmap(jax.random.split)(part['key']), axis=1)
      audio_BxE = model.embed_window(part['audio'], part.get('length'), audio_keys_B)
      return audio_BxE, model.embed_text(part['text'], text_keys_B)

    if self.chunks == 1:
      return towers(inputs)
    batch_size = batch['audio'].shape[0]
    if batch_size % self.chunks:
      raise ValueError(f'MuLan: a batch of {batch_size} cannot be computed in {self.chunks} equal chunks')

    def split(x):
      # Every `chunks`-th example, so that each device finds a part of its own examples in every chunk.
      return x.reshape(batch_size // self.chunks, self.chunks, *x.shape[1:]).swapaxes(0, 1)

    outputs = jax.lax.map(jax.checkpoint(towers), jax.tree.map(split, inputs))
    return jax.tree.map(lambda y: y.swapaxes(0, 1).reshape(batch_size, *y.shape[2:]), outputs)

  def loss(self, model: MuLan, batch: Batch, key: jax.Array, *, training: bool) -> tuple[jax.Array, Aux]:
    audio_BxE, text_BxE = self.embeddings(model, batch, key, training=training)
    audio_BxE = axes.constrain(audio_BxE, 'batch', None)
    text_BxE = axes.constrain(text_BxE, 'batch', None)
    temperature = jnp.maximum(model.temperature, self.minimum_temperature)
    loss = jnp.mean(contrastive_loss(audio_BxE, text_BxE, temperature, decoupled=self.decoupled))
    gap = jnp.mean(jnp.sum(jnp.square((audio_BxE - text_BxE).astype(jnp.float32)), axis=-1))
    chance = jnp.float32(self.chance(audio_BxE.shape[0]))
    metrics = {'loss': loss, 'loss_chance': chance, 'recall@1': recall_at_1(text_BxE, audio_BxE), 'gap': gap,
               'temperature': temperature}
    return loss + self.gap_weight * gap, Aux(metrics)

  def chance(self, batch_size: int) -> float:
    """The loss where all embeddings are alike."""
    return math.log(max(1, 2 * (batch_size - 1) if self.decoupled else batch_size))
