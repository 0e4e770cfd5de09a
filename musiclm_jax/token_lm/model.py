"""The decoder-only language model of a stage: embedding, transformer, one output matrix a level.

Shapes: B batch, L sequence length, T new positions, D width, F target frames, Q target levels, K codes.
"""
from __future__ import annotations

from collections.abc import Sequence
import math

from flax import nnx
import jax
import jax.numpy as jnp

from musiclm_jax import axes
from musiclm_jax.nn.transformer import Block, Cache, Embedding, Transformer, TransformerConfig
from musiclm_jax.specs import Stage
from musiclm_jax.token_lm.sequence import Layout

_ROWS = 128  # those of the embedding are filled up to a multiple of it, so that they split over any usual mesh


class TokenLM(nnx.Module):
  """p(target | conditions), next token by next token.

  Inputs are embedded over the unified vocabulary and the null rows (or the row that starts a sequence); outputs are
  over the target stream only, and at each position only over the codebook that is legal there.
  """

  def __init__(self, stage: Stage, config: TransformerConfig, *, rngs: nnx.Rngs):
    self.stage, self.config = stage, config
    rows = stage.vocab_size + max(1, len(stage.conditions))
    rows = -(-rows // _ROWS) * _ROWS
    self.embedding = Embedding(rows, config.width, scale=1.0, rngs=rngs)
    self.transformer = Transformer(config, rngs=rngs)
    target = stage.target
    head = jax.random.normal(rngs.params(), (target.levels, config.width, target.codebook_size))
    self.head = nnx.Param(head * (0.1 / math.sqrt(config.width)), axes=(None, 'embed', 'vocab'))
    # Running frequencies of the target's codes: the unigram entropy is the loss at which nothing was learned.
    shape = (target.levels, target.codebook_size)
    self.frequency = nnx.Variable(jnp.full(shape, 1 / target.codebook_size), axes=(None, 'codebook'))

  def hidden(self, rows_BxL: jax.Array, positions_2xL: jax.Array, *, keys_B: jax.Array | None = None) -> jax.Array:
    """Last hidden states [B, L, D] of a sequence whose positions are the first of a layout."""
    length, parts, positions_2xL = rows_BxL.shape[1], axes.parts('length'), jnp.asarray(positions_2xL)
    if parts > 1:
      # What makes the length a multiple of the devices that share it lies after all that any of it can see.
      rows_BxL, positions_2xL = (jnp.pad(x, ((0, 0), (0, -length % parts))) for x in (rows_BxL, positions_2xL))
    return self.transformer(self.embedding(rows_BxL), positions_AxL=positions_2xL, keys_B=keys_B)[:, :length]

  def rows(self, codes: jax.Array, level: jax.Array) -> jax.Array:
    """Rows of the unified vocabulary that codes of the target have at a level."""
    target = self.stage.target
    return self.stage.offset(target) + level * target.codebook_size + codes

  def target_logits(self, rows_BxL: jax.Array, layout: Layout, *, keys_B: jax.Array | None = None) -> jax.Array:
    """Logits of every target token given all before it, float32 [B, F, Q, K]."""
    target = self.stage.target
    hidden = self.hidden(rows_BxL[:, :-1], layout.positions_2xL[:, :rows_BxL.shape[1] - 1], keys_B=keys_B)
    hidden = hidden[:, layout.condition_length - 1:]
    hidden_BxFxQxD = hidden.reshape(hidden.shape[0], -1, target.levels, hidden.shape[-1])
    head = self.head[...].astype(hidden.dtype)
    return jnp.einsum('BFQD,QDK->BFQK', hidden_BxFxQxD, head, preferred_element_type=jnp.float32)

  def init_cache(self, batch: int, length: int) -> Cache:
    return self.transformer.init_cache(batch, length, self.head[...].dtype)

  def extend(self, rows_BxT: jax.Array, cache: Cache, positions_2xL: jax.Array, level: jax.Array, *,
             layers: Sequence[Block] | None = None) -> tuple[jax.Array, Cache]:
    """Takes T more tokens; returns the logits [B, K] of the next one, a code of `level`, and the cache.

    `layers` as in `Transformer.extend`.
    """
    x, cache = self.transformer.extend(
        self.embedding(rows_BxT), cache, positions_AxL=jnp.asarray(positions_2xL), layers=layers)
    head_QxDxK = self.head[...].astype(x.dtype)
    head_DxK = head_QxDxK[0 if len(head_QxDxK) == 1 else level]
    return jnp.matmul(x[:, -1], head_DxK, preferred_element_type=jnp.float32), cache
