"""Next-token prediction over the target stream of a stage; the one objective of all three stages.

Shapes: B batch, F target frames, Q target levels, K codes.
"""
from __future__ import annotations

import dataclasses
import math

from flax import nnx
import jax
import jax.numpy as jnp

from musiclm_jax import axes
from musiclm_jax.nn.transformer import TransformerConfig
from musiclm_jax.objective import Aux, Batch, Objective
from musiclm_jax.specs import Stage
from musiclm_jax.token_lm.model import Points, TokenLM
from musiclm_jax.token_lm.sequence import Layout, build, codes

_FREQUENCY_DECAY = 0.99


@dataclasses.dataclass(frozen=True)
class NextToken(Objective):
  """Cross-entropy of the target's codes, averaged over all target tokens; conditions are never predicted.

  Attributes:
    stage: which streams, in which crop.
    transformer: the network.
    condition_dropout: probability of hiding each condition of an example, whole: trains the null rows that
      guidance and unconditional generation need.
    truncate: conditions of which only the first n levels are shown, n with a probability of about 1 / n. A text's
      tokens agree with those of its audio at the first levels only, so the model must do with those. Music is generated
      from the first level alone then, else from all.
    points: what MuLan tokens stand for, where that is used; None: each of their codes is learned by itself.
  """

  stage: Stage
  transformer: TransformerConfig
  condition_dropout: float = 0.1
  truncate: tuple[str, ...] = ('mulan',)
  points: Points | None = None

  def __post_init__(self):
    first = [(s.name, s.frame_rate, s.first_level) for s in self.stage.conditions[:1]]
    if self.points and first != [('mulan', 0, 0)]:
      raise ValueError(f'the {self.stage.name} stage has no MuLan tokens as its first condition, and so no points')

  @property
  def layout(self) -> Layout:
    return Layout(self.stage)

  def model(self, rngs: nnx.Rngs) -> TokenLM:
    return TokenLM(self.stage, self.transformer, self.points, rngs=rngs)

  def batch_spec(self, batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
    spec = {'slot': jax.ShapeDtypeStruct((batch_size,), jnp.int32)}
    for stream in self.stage.streams:
      levels = max(s.first_level + s.levels for s in self.stage.streams if s.feature == stream.feature)
      shape = (batch_size, stream.frames(self.stage.seconds), levels)
      spec[stream.feature] = jax.ShapeDtypeStruct(shape, jnp.int32)
    return spec

  def _shown_levels(self, keys_B: jax.Array) -> dict[str, jax.Array]:
    """How many levels of each condition each example shows in this step, int32 [B] by name."""
    shown = {}
    for i, spec in enumerate(self.stage.conditions):
      def draw(key, spec=spec, i=i):
        drop_key, level_key = jax.random.split(jax.random.fold_in(key, i))
        levels = spec.levels
        if spec.name in self.truncate:
          levels = 1 + jax.random.categorical(level_key, -jnp.log(jnp.arange(1.0, spec.levels + 1)))
        return jnp.where(jax.random.bernoulli(drop_key, self.condition_dropout), 0, levels)
      shown[spec.name] = jax.vmap(draw)(keys_B)
    return shown

  def token_nats(self, model: TokenLM, batch: Batch, *, keep: dict[str, jax.Array] | None = None,
                 keys_B: jax.Array | None = None) -> jax.Array:
    """Cross-entropy of each target token in nats, float32 [B, F, Q]."""
    target_BxFxQ = codes(batch, self.stage.target)
    rows = build(self.layout, batch, target_BxFxQ, keep=keep)
    logits_BxFxQxK = model.target_logits(rows, self.layout, keys_B=keys_B)
    picked = jnp.take_along_axis(logits_BxFxQxK, target_BxFxQ[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits_BxFxQxK, axis=-1) - picked

  def loss(self, model: TokenLM, batch: Batch, key: jax.Array, *, training: bool) -> tuple[jax.Array, Aux]:
    keys_B = axes.example_keys(key, batch['slot'])
    keep = self._shown_levels(keys_B) if training else None
    if training and self.points and self.points.noise:
      mulan = self.stage.conditions[0]
      noise_B = axes.example_keys(jax.random.fold_in(key, 1), batch['slot'])
      batch = {**batch, mulan.feature: model.beside(codes(batch, mulan), noise_B)}
    nats_BxFxQ = self.token_nats(model, batch, keep=keep, keys_B=keys_B if training else None)
    loss = jnp.mean(nats_BxFxQ)
    frequency_QxK = model.frequency[...].astype(jnp.float32)
    unigram = -jnp.sum(frequency_QxK * jnp.log(jnp.maximum(frequency_QxK, 1e-9)), axis=-1)
    metrics = {'bits_per_token': loss / math.log(2), 'level_bits': jnp.mean(nats_BxFxQ, axis=(0, 1)) / math.log(2),
               'loss_chance': jnp.mean(unigram)}
    one_hot = jax.nn.one_hot(codes(batch, self.stage.target), self.stage.target.codebook_size)
    return loss, Aux(metrics, {'count': jnp.sum(one_hot, axis=(0, 1))})

  def update(self, buffers, statistics, key):
    del key
    count_QxK = statistics['count']
    share = count_QxK / jnp.sum(count_QxK, axis=-1, keepdims=True)
    frequency = _FREQUENCY_DECAY * buffers['frequency'] + (1 - _FREQUENCY_DECAY) * share
    return {**buffers, 'frequency': frequency}, {}
