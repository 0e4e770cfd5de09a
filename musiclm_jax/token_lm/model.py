"""The decoder-only language model of a stage: embedding, transformer, one output matrix a level.

Shapes: B batch, L sequence length, T new positions, D width, F target frames, Q target levels, K codes.
"""
from __future__ import annotations

from collections.abc import Sequence
import dataclasses
import math

from flax import nnx
import jax
import jax.numpy as jnp

from musiclm_jax import axes
from musiclm_jax.nn.quantize import ResidualQuantizer
from musiclm_jax.nn.transformer import Block, Cache, Embedding, Linear, Transformer, TransformerConfig
from musiclm_jax.specs import Stage
from musiclm_jax.token_lm.sequence import Layout

_ROWS = 128  # those of the embedding are filled up to a multiple of it, so that they split over any usual mesh


@dataclasses.dataclass(frozen=True)
class Points:
  """What MuLan tokens, a stage's first condition, stand for: points of its space, nearer to a clip's level by level.

  Attributes:
    width: E, of the space.
    noise: length (root mean square) of the random vector that is added to each point in training, before it is scaled
      back to length 1 and quantised anew: as far as texts lie off their clips, say.
    continuous: whether the network hears where the points lie, through one linear map, instead of learning for each
      code by itself what it means.
  """

  width: int
  noise: float = 0.0
  continuous: bool = False


class TokenLM(nnx.Module):
  """p(target | conditions), next token by next token.

  Inputs are embedded over the unified vocabulary and the null rows (or the row that starts a sequence); outputs are
  over the target stream only, and at each position only over the codebook that is legal there.
  """

  def __init__(self, stage: Stage, config: TransformerConfig, points: Points | None = None, *, rngs: nnx.Rngs):
    self.stage, self.config, self.points = stage, config, points
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
    if points:
      described = stage.conditions[0]
      # `train.InitFrom` brings the codes of the run that made the tokens.
      self.mulan = ResidualQuantizer(described.levels, described.codebook_size, points.width, rngs=rngs)
      if points.continuous:
        # Of a point of length 1 it makes what is as large as a row of the embedding.
        self.point = Linear(points.width, config.width, scale=math.sqrt(points.width), bias=True, rngs=rngs)

  def embed(self, rows_BxT: jax.Array) -> jax.Array:
    """[B, T, D] of the first positions of a sequence, with those of the MuLan tokens among them."""
    x_BxTxD = self.embedding(rows_BxT)
    if not (self.points and self.points.continuous):
      return x_BxTxD
    described = self.stage.conditions[0]
    first_BxQ = rows_BxT[:, :described.levels]
    shown_BxQ = first_BxQ < described.vocab_size
    codebook_NxE = self.mulan.codebook[...].astype(jnp.float32).reshape(described.vocab_size, -1)
    codes_BxQxE = jnp.where(shown_BxQ[..., None], codebook_NxE[jnp.minimum(first_BxQ, described.vocab_size - 1)], 0)
    heard = self.point(jnp.cumsum(codes_BxQxE, axis=1).astype(x_BxTxD.dtype))
    heard = jnp.where(shown_BxQ[..., None], heard, x_BxTxD[:, :described.levels])
    return jnp.concatenate([heard, x_BxTxD[:, described.levels:]], axis=1)

  def beside(self, codes_Bx1xQ: jax.Array, keys_B: jax.Array) -> jax.Array:
    """MuLan tokens of a random point near that of each example."""
    point_Bx1xE = self.mulan.decode(codes_Bx1xQ)
    shape = point_Bx1xE.shape[1:]
    noise = jax.vmap(lambda key: jax.random.normal(key, shape))(keys_B) * (self.points.noise / math.sqrt(shape[-1]))
    moved = point_Bx1xE + noise
    return self.mulan.encode(moved / jnp.linalg.norm(moved, axis=-1, keepdims=True))

  def hidden(self, rows_BxL: jax.Array, positions_2xL: jax.Array, *, keys_B: jax.Array | None = None) -> jax.Array:
    """Last hidden states [B, L, D] of a sequence whose positions are the first of a layout."""
    length, parts, positions_2xL = rows_BxL.shape[1], axes.parts('length'), jnp.asarray(positions_2xL)
    if parts > 1:
      # What makes the length a multiple of the devices that share it lies after all that any of it can see.
      rows_BxL, positions_2xL = (jnp.pad(x, ((0, 0), (0, -length % parts))) for x in (rows_BxL, positions_2xL))
    return self.transformer(self.embed(rows_BxL), positions_AxL=positions_2xL, keys_B=keys_B)[:, :length]

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
             layers: Sequence[Block] | None = None, first: bool = False) -> tuple[jax.Array, Cache]:
    """Takes T more tokens; returns the logits [B, K] of the next one, a code of `level`, and the cache.

    `layers` as in `Transformer.extend`. `first`: these begin the sequence, with all its conditions among them.
    """
    x_BxTxD = self.embed(rows_BxT) if first else self.embedding(rows_BxT)
    x, cache = self.transformer.extend(x_BxTxD, cache, positions_AxL=jnp.asarray(positions_2xL), layers=layers)
    head_QxDxK = self.head[...].astype(x.dtype)
    head_DxK = head_QxDxK[0 if len(head_QxDxK) == 1 else level]
    return jnp.matmul(x[:, -1], head_DxK, preferred_element_type=jnp.float32), cache
