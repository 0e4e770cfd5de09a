"""The decoder-only language model of a stage: embedding, transformer, one output matrix a level.

Shapes: B batch, L sequence length, T new positions, D width, F target frames, Q target levels, K codes.
"""
from __future__ import annotations

import math

from flax import nnx
import jax
import jax.numpy as jnp

from musiclm_jax import axes, specs
from musiclm_jax.nn.transformer import Cache, Embedding, Transformer, TransformerConfig
from musiclm_jax.specs import Stage
from musiclm_jax.token_lm.sequence import Layout


class TokenLM(nnx.Module):
  """p(target | conditions), next token by next token.

  Inputs are embedded over the unified vocabulary and the null rows; outputs are over the target stream only, and
  at each position only over the codebook that is legal there.
  """

  def __init__(self, stage: Stage, config: TransformerConfig, *, rngs: nnx.Rngs):
    self.stage, self.config = stage, config
    rows = stage.vocab_size + len(stage.conditions)
    # Rows are padded so that the table splits over any usual mesh.
    rows = -(-rows // specs.LENGTH_MULTIPLE) * specs.LENGTH_MULTIPLE
    self.embedding = Embedding(rows, config.width, scale=1.0, rngs=rngs)
    self.transformer = Transformer(config, rngs=rngs)
    target = stage.target
    head = jax.random.normal(rngs.params(), (target.levels, config.width, target.codebook_size))
    self.head = nnx.Param(head * (0.1 / math.sqrt(config.width)), axes=(None, 'embed', 'vocab'))
    # Running frequencies of the target's codes: the unigram entropy is the loss at which nothing was learned.
    shape = (target.levels, target.codebook_size)
    self.frequency = nnx.Variable(jnp.full(shape, 1 / target.codebook_size), axes=(None, 'codebook'))

  def hidden(self, rows_BxL: jax.Array, layout: Layout, *, keys_B: jax.Array | None = None) -> jax.Array:
    """Last hidden states [B, L, D] of a whole sequence."""
    length = rows_BxL.shape[1]
    positions = jnp.asarray(layout.positions_2xL[:, :length])
    # What makes the length a multiple of the devices that share it lies after all that any of it can see.
    more = -length % axes.parts('length')
    rows_BxL, positions = (jnp.pad(x, ((0, 0), (0, more))) for x in (rows_BxL, positions))
    return self.transformer(self.embedding(rows_BxL), positions_AxL=positions, keys_B=keys_B)[:, :length]

  def target_logits(self, rows_BxL: jax.Array, layout: Layout, *, keys_B: jax.Array | None = None) -> jax.Array:
    """Logits of every target token given all before it, float32 [B, F, Q, K]."""
    target = self.stage.target
    hidden = self.hidden(rows_BxL[:, :-1], layout, keys_B=keys_B)[:, layout.condition_length - 1:]
    hidden_BxFxQxD = hidden.reshape(hidden.shape[0], -1, target.levels, hidden.shape[-1])
    head = self.head[...].astype(hidden.dtype)
    return jnp.einsum('BFQD,QDK->BFQK', hidden_BxFxQxD, head, preferred_element_type=jnp.float32)

  def init_cache(self, batch: int, layout: Layout) -> Cache:
    return self.transformer.init_cache(batch, layout.length, self.head[...].dtype)

  def extend(self, rows_BxT: jax.Array, cache: Cache, layout: Layout, level: jax.Array) -> tuple[jax.Array, Cache]:
    """Takes T more tokens; returns the logits [B, K] of the next one, a code of `level`, and the cache."""
    x, cache = self.transformer.extend(self.embedding(rows_BxT), cache,
                                       positions_AxL=jnp.asarray(layout.positions_2xL))
    head_DxK = self.head[...][level].astype(x.dtype)
    return jnp.matmul(x[:, -1], head_DxK, preferred_element_type=jnp.float32), cache
