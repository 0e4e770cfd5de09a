"""Sampling a stage: prefill, then one compiled loop of cached steps with static shapes.

Shapes: B batch, F frames, Q levels, K codes.
"""
from __future__ import annotations

from collections.abc import Mapping
import dataclasses
import functools

from flax import nnx
import jax
import jax.numpy as jnp

from musiclm_jax.token_lm.model import TokenLM
from musiclm_jax.token_lm.sequence import Layout, build


@dataclasses.dataclass(frozen=True)
class Sampling:
  """How the next token is drawn. Numbers are arguments of the compiled loop, so changing them costs nothing.

  Attributes:
    temperature: 0 is greedy. MusicLM: 1.0 semantic, 0.95 coarse, 0.4 fine (arXiv 2301.11325, section 4.1).
    top_k: only the k likeliest codes; 0 is all. top_p: only the likeliest codes that hold this probability.
    guidance: logits are null + guidance * (conditioned - null); 1 is plain conditioning. Null hides what describes the
      music as a whole (conditions without a frame rate: the text, or a clip) and keeps what follows it in time. A
      stage that has no such condition is sampled plainly.
  """

  temperature: float = 1.0
  top_k: int = 0
  top_p: float = 1.0
  guidance: float = 1.0

  def __post_init__(self):
    if not (self.temperature >= 0 and self.top_k >= 0 and 0 < self.top_p <= 1):
      raise ValueError(f'sampling needs temperature >= 0, top_k >= 0 and 0 < top_p <= 1, found {self}')


def draw(logits_BxK: jax.Array, keys_B: jax.Array, temperature: jax.Array, top_k: jax.Array, top_p: jax.Array
         ) -> jax.Array:
  """One code an example, int32 [B]; each example has its own key, so its draw is the same in any batch."""
  K = logits_BxK.shape[-1]
  scaled = logits_BxK.astype(jnp.float32) / jnp.maximum(temperature, 1e-6)
  order = -jnp.sort(-scaled, axis=-1)
  kept = jnp.where(top_k > 0, jnp.minimum(top_k, K), K)
  kth = jnp.take(order, kept - 1, axis=-1)[:, None]
  probability = jax.nn.softmax(order, axis=-1)
  # The first code past the threshold is still kept: `before` is what the likelier ones hold together.
  before = jnp.cumsum(probability, axis=-1) - probability
  nucleus = jnp.min(jnp.where(before < top_p, order, jnp.inf), axis=-1, keepdims=True)
  allowed = scaled >= jnp.maximum(kth, nucleus)
  sampled = jax.vmap(jax.random.categorical)(keys_B, jnp.where(allowed, scaled, -jnp.inf))
  return jnp.where(temperature == 0, jnp.argmax(logits_BxK, axis=-1), sampled).astype(jnp.int32)


def sample(model: TokenLM, layout: Layout, streams: Mapping[str, jax.Array], keys_B: jax.Array, sampling: Sampling, *,
           keep: Mapping[str, jax.Array] | None = None, prefix_BxFxQ: jax.Array | None = None) -> jax.Array:
  """The stage's target for each example, int32 [B, F, Q].

  Args:
    streams: raw streams of the conditions.
    keys_B: one key an example.
    keep: levels of each condition to show, as in `sequence.build`.
    prefix_BxFxQ: first frames of the target, to be continued; they are returned as they are.
  """
  graphdef, state = nnx.split(model)
  numbers = tuple(jnp.float32(v) for v in (sampling.temperature, sampling.top_p, sampling.guidance))
  guided = tuple(s.name for s in layout.stage.conditions if not s.frame_rate) if sampling.guidance != 1.0 else ()
  if prefix_BxFxQ is None:
    prefix_BxFxQ = jnp.zeros((keys_B.shape[0], 0, layout.stage.target.levels), jnp.int32)
  conditions = {s.feature: streams[s.feature] for s in layout.stage.conditions}
  return _sample(graphdef, layout, guided, state, conditions, prefix_BxFxQ, dict(keep or {}), keys_B, numbers,
                 jnp.int32(sampling.top_k))


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _sample(graphdef, layout: Layout, guided: tuple[str, ...], state, streams, prefix_BxFxQ, keep, keys_B, numbers,
            top_k):
  model: TokenLM = nnx.merge(graphdef, state)
  target, offset = layout.stage.target, layout.stage.offset(layout.stage.target)
  temperature, top_p, guidance = numbers
  rows_BxT = build(layout, streams, prefix_BxFxQ, keep=keep)
  B, given = rows_BxT.shape
  if guided:
    nothing = {**keep, **{name: jnp.zeros((B,), jnp.int32) for name in guided}}
    rows_BxT = jnp.concatenate([rows_BxT, build(layout, streams, prefix_BxFxQ, keep=nothing)])

  def logits_of(logits):
    if not guided:
      return logits
    shown, null = jnp.split(logits, 2)
    return null + guidance * (shown - null)

  def step(carry, place):
    logits, cache = carry
    level = place % target.levels
    code_B = draw(logits_of(logits), jax.vmap(lambda key: jax.random.fold_in(key, place))(keys_B),
                  temperature, top_k, top_p)
    row = (offset + level * target.codebook_size + code_B)[:, None]
    row = jnp.concatenate([row, row]) if guided else row
    return model.extend(row, cache, layout, (place + 1) % target.levels), code_B

  done = given - layout.condition_length
  cache = model.init_cache(rows_BxT.shape[0], layout)
  first = model.extend(rows_BxT, cache, layout, jnp.int32(done % target.levels))
  total = target.tokens(layout.duration)
  _, codes_TxB = jax.lax.scan(step, first, jnp.arange(done, total))
  new_BxFxQ = codes_TxB.T.reshape(B, -1, target.levels)
  return jnp.concatenate([prefix_BxFxQ.astype(jnp.int32), new_BxFxQ], axis=1)
