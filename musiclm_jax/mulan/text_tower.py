"""Text tower of MuLan: a BERT encoder (arXiv 1810.04805) over one text.

Norms after the residual sums, layer norm, biases, exact GELU, learned positions, a norm on the embeddings:
BERT-base at paper size. Two differences in form, none in function: the class token is a parameter of its own
instead of a row of the vocabulary, so that any tokenizer fits; and as there is only one segment, the segment
embedding is part of the positions.

B batch, L text tokens, D width.
"""
from __future__ import annotations

import dataclasses

from flax import nnx
import jax
import jax.numpy as jnp

from musiclm_jax import axes
from musiclm_jax.mulan.audio_tower import POSITION_DEVIATION, pool
from musiclm_jax.nn.transformer import Embedding, Norm, Transformer, TransformerConfig

PADDING = 0
_NORM_EPSILON = 1e-12


@dataclasses.dataclass(frozen=True)
class TextTowerConfig:
  """Sizes of the text tower.

  Attributes:
    vocab_size: rows of the embedding, as many as the tokenizer has ids at least; id 0 is padding.
    length: the most text tokens, class tokens not counted (BERT-base: 511 beside one class token).
    class_tokens: learned tokens before the text whose average is the output; 0: the mean over the text.
  """

  vocab_size: int
  length: int
  width: int
  depth: int
  heads: int
  mlp_width: int
  class_tokens: int = 1
  dropout: float = 0.0
  remat: bool = False

  @property
  def transformer(self) -> TransformerConfig:
    return TransformerConfig(
        width=self.width, depth=self.depth, heads=self.heads, mlp_width=self.mlp_width, gated=False,
        norm='layer', norm_epsilon=_NORM_EPSILON, norm_first=False, bias=True, causal=False, positions='none',
        dropout=self.dropout, remat=self.remat)


class TextTower(nnx.Module):
  """Token ids -> one vector each, before the projection into the joint space."""

  def __init__(self, config: TextTowerConfig, *, rngs: nnx.Rngs):
    self.config = config
    draw = lambda rows: POSITION_DEVIATION * jax.random.normal(rngs.params(), (rows, config.width))
    self.embedding = Embedding(config.vocab_size, config.width, rngs=rngs)
    self.class_token = nnx.Param(draw(config.class_tokens), axes=(None, 'embed'))
    self.position = nnx.Param(draw(config.class_tokens + config.length), axes=(None, 'embed'))
    self.norm = Norm(config.width, kind='layer', epsilon=_NORM_EPSILON)
    self.transformer = Transformer(config.transformer, rngs=rngs)

  def __call__(self, text_BxL: jax.Array, keys_B: jax.Array | None = None) -> jax.Array:
    """One vector [B, D] a text.

    Args:
      text_BxL: int32 ids, 0 behind the text's end; at most `config.length` of them.
      keys_B: one key an example for dropout; None: none.
    """
    config = self.config
    batch, length = text_BxL.shape
    if length > config.length:
      raise ValueError(
          f'a text of {length} tokens is longer than the {config.length} that the text tower takes')
    class_BxCxD = jnp.broadcast_to(self.class_token[...], (batch, config.class_tokens, config.width))
    x_BxLxD = jnp.concatenate([class_BxCxD, self.embedding(text_BxL)], axis=1)
    x_BxLxD = self.norm(x_BxLxD + self.position[...][:x_BxLxD.shape[1]])
    valid_BxL = jnp.pad(text_BxL != PADDING, ((0, 0), (config.class_tokens, 0)), constant_values=True)
    layer_keys_B = None
    if keys_B is not None:
      embedding_keys_B, layer_keys_B = jnp.unstack(jax.vmap(jax.random.split)(keys_B), axis=1)
      x_BxLxD = axes.dropout(x_BxLxD, config.dropout, embedding_keys_B)
    x_BxLxD = self.transformer(x_BxLxD, valid_BxL=valid_BxL, keys_B=layer_keys_B)
    return pool(x_BxLxD, valid_BxL, config.class_tokens)
