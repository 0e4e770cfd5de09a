"""Sampling a stage: prefill, then one compiled loop of cached steps with static shapes.

Shapes: B batch, L sequence length, T given positions, F frames, Q levels, K codes.
"""
from __future__ import annotations

from collections.abc import Mapping
import functools

from flax import nnx
import jax
import jax.numpy as jnp

from musiclm_jax.token_lm.draw import draw, Numbers, Sampling
from musiclm_jax.token_lm.model import TokenLM
from musiclm_jax.token_lm.sequence import built, Layout


def sample_rows(model: TokenLM, rows_BxT: jax.Array, null_rows_BxT: jax.Array | None, positions_2xL: jax.Array,
                condition_length: jax.Array, keys_B: jax.Array, numbers: Numbers) -> jax.Array:
  """Goes on from the rows of a sequence to position L: the codes drawn, int32 [B, L - T]; L must be above T.

  A pure function of arrays, in which B, T and L may be symbolic: what is compiled here is what is exported.

  Args:
    rows_BxT: conditions and the first tokens of the target, as `sequence.build` makes them.
    null_rows_BxT: the rows from which guidance leads away, or None for plain sampling.
    positions_2xL: `Layout.positions_2xL`, or its first L columns to stop before the layout ends.
    condition_length: int32 scalar, positions before the target's first token: they tell a position's level.
    keys_B: one key an example; the draw at a place of the target depends on the key and on that place alone.
  """
  levels, length = model.stage.target.levels, positions_2xL.shape[1]
  B, given = rows_BxT.shape
  guided = null_rows_BxT is not None
  twice = lambda x, y: jnp.concatenate([x, y]) if guided else x
  first = jnp.asarray(given, jnp.int32) - condition_length

  def choose(logits, place):
    if guided:
      shown, null = logits[:B], logits[B:]
      logits = null + numbers.guidance * (shown - null)
    return draw(logits, jax.vmap(lambda key: jax.random.fold_in(key, place))(keys_B), numbers)

  def step(i, carry):
    code_B, cache, codes_BxN = carry
    place = first + i
    row_Bx1 = model.rows(code_B, (place - 1) % levels)[:, None]
    logits, cache = model.extend(twice(row_Bx1, row_Bx1), cache, positions_2xL, place % levels, layers=layers)
    code_B = choose(logits, place)
    return code_B, cache, jax.lax.dynamic_update_slice_in_dim(codes_BxN, code_B[:, None], i, axis=1)

  # Each step looks at the whole cache: the first half of them has a cache of its own, which is shorter.
  half = (length - given + 1) // 2
  rows, layers = twice(rows_BxT, null_rows_BxT), model.transformer.layers.apart()
  logits, cache = model.extend(rows, model.init_cache(rows.shape[0], given + half), positions_2xL, first % levels,
                               layers=layers, first=True)
  code_B = choose(logits, first)
  codes_BxN = jnp.zeros((B, length - given), jnp.int32)
  codes_BxN = jax.lax.dynamic_update_slice_in_dim(codes_BxN, code_B[:, None], 0, axis=1)
  code_B, cache, codes_BxN = jax.lax.fori_loop(1, half, step, (code_B, cache, codes_BxN))
  return jax.lax.fori_loop(half, length - given, step, (code_B, cache.longer(length), codes_BxN))[2]


def row_nats(model: TokenLM, rows_BxL: jax.Array, positions_2xL: jax.Array, condition_length: jax.Array) -> jax.Array:
  """Cross-entropy in nats of the row at each position given all before it, float32 [B, L].

  It means something where the target is: from `condition_length` on; what comes before is 0. Pure, as `sample_rows`.
  """
  target, length = model.stage.target, rows_BxL.shape[1]
  hidden_BxLxD = model.hidden(rows_BxL[:, :-1], positions_2xL[:, :length - 1])
  head_QxDxK = model.head[...].astype(hidden_BxLxD.dtype)
  logits = jnp.einsum('BLD,QDK->BLQK', hidden_BxLxD, head_QxDxK, preferred_element_type=jnp.float32)
  place_L = jnp.arange(1, length) - condition_length
  level_L = place_L % target.levels
  logits_BxLxK = jnp.take_along_axis(logits, level_L[None, :, None, None], axis=2)[:, :, 0]
  code_BxL = jnp.clip(rows_BxL[:, 1:] - model.rows(0, level_L), 0, target.codebook_size - 1)
  picked = jnp.take_along_axis(logits_BxLxK, code_BxL[..., None], axis=-1)[..., 0]
  nats_BxL = jnp.where(place_L >= 0, jax.nn.logsumexp(logits_BxLxK, axis=-1) - picked, 0)
  return jnp.pad(nats_BxL, ((0, 0), (1, 0)))


def sample(model: TokenLM, layout: Layout, streams: Mapping[str, jax.Array], keys_B: jax.Array, sampling: Sampling, *,
           keep: Mapping[str, jax.Array] | None = None, prefix_BxFxQ: jax.Array | None = None) -> jax.Array:
  """The stage's target for each example, int32 [B, F, Q].

  Args:
    streams: raw streams of the conditions.
    keys_B: one key an example.
    keep: levels of each condition to show, as in `sequence.build`.
    prefix_BxFxQ: first frames of the target, to be continued; they are returned as they are.
  """
  stage, B, keep = layout.stage, keys_B.shape[0], dict(keep or {})
  if prefix_BxFxQ is None:
    prefix_BxFxQ = jnp.zeros((B, 0, stage.target.levels), jnp.int32)
  if prefix_BxFxQ.shape[1] == layout.frames(stage.target):
    return prefix_BxFxQ
  conditions = {s.feature: streams[s.feature] for s in stage.conditions}
  rows = built(layout, conditions, prefix_BxFxQ, keep)
  null, hidden = None, stage.timeless
  if hidden and sampling.guidance != 1.0:
    null = built(layout, conditions, prefix_BxFxQ, {**keep, **dict.fromkeys(hidden, jnp.zeros((B,), jnp.int32))})
  graphdef, state = nnx.split(model)
  codes_BxN = _sample_rows(graphdef, state, rows, null, layout.positions_2xL, layout.condition_length, keys_B,
                           sampling.numbers)
  return jnp.concatenate([prefix_BxFxQ, codes_BxN.reshape(B, -1, stage.target.levels)], axis=1)


@functools.partial(jax.jit, static_argnums=0)
def _sample_rows(graphdef, state, *arrays):
  return sample_rows(nnx.merge(graphdef, state), *arrays)
