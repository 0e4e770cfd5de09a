"""Streams to the sequence of a stage, the one way of training, sampling and export, and back.

A stage's sequence is its conditions one after another, then its target, each stream flattened frame by frame and
level by level (arXiv 2301.11325, section 3.2; arXiv 2209.03143, section III-C). Everything about it that does not
depend on the tokens is a NumPy constant of the layout. A stage without conditions has one row that starts it in their
place.

Shapes: B batch, L sequence length, F frames, Q levels.
"""
from __future__ import annotations

from collections.abc import Mapping
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from musiclm_jax import specs
from musiclm_jax.specs import Stage, TokenSpec


@dataclasses.dataclass(frozen=True)
class Layout:
  """Where each token of a stage sits, for clips of `seconds` (the stage's own crop by default)."""

  stage: Stage
  seconds: float = 0.0

  @property
  def duration(self) -> float:
    return self.seconds or self.stage.seconds

  def frames(self, spec: TokenSpec) -> int:
    return spec.frames(self.duration)

  @property
  def condition_length(self) -> int:
    return self.stage.condition_tokens(self.duration)

  @property
  def length(self) -> int:
    return self.condition_length + self.stage.target.tokens(self.duration)

  @functools.cached_property
  def first_row_L(self) -> np.ndarray:
    """Unified-vocabulary row of code 0 at each position: stream offset + level * K. int32 [L]."""
    parts = [] if self.stage.conditions else [[self.stage.start_row]]
    for spec in self.stage.streams:
      rows = self.stage.offset(spec) + spec.codebook_size * np.arange(spec.levels)
      parts.append(np.tile(rows, self.frames(spec)))
    return np.concatenate(parts).astype(np.int32)

  @functools.cached_property
  def positions_2xL(self) -> np.ndarray:
    """Place in the sequence, and moment in the music in frames of the fastest stream. float32 [2, L].

    The second lets tokens of streams with different rates find what sounds at the same time.
    """
    fastest = max(s.frame_rate for s in self.stage.streams)
    moments = [] if self.stage.conditions else [[0]]
    for spec in self.stage.streams:
      step = specs.TICKS_PER_SECOND / spec.frame_rate if spec.frame_rate else 0
      ticks = np.repeat(step * np.arange(self.frames(spec)), spec.levels)
      moments.append(ticks * fastest / specs.TICKS_PER_SECOND)
    return np.stack([np.arange(self.length), np.concatenate(moments)]).astype(np.float32)


def codes(streams: Mapping[str, jax.Array], spec: TokenSpec) -> jax.Array:
  """The levels of a raw stream [B, F, all levels] that `spec` names."""
  return streams[spec.feature][..., spec.level_slice]


def build(layout: Layout, streams: Mapping[str, jax.Array], target_BxFxQ: jax.Array, *,
          keep: Mapping[str, jax.Array] | None = None) -> jax.Array:
  """Rows of the unified vocabulary, int32 [B, L], or fewer positions where the target is given in part.

  Args:
    streams: raw streams of the conditions by feature name, int32 [B, F, levels].
    target_BxFxQ: codes of the target, from its first frame on; with fewer frames than the layout (or none) the
      sequence ends there, which is how sampling starts.
    keep: by condition name, how many first levels of each example are shown, int32 [B]; the others become that
      condition's null row. 0 drops the condition. Absent names are shown whole.
  """
  stage = layout.stage
  parts, place = [], 0
  if not stage.conditions:
    parts, place = [jnp.full((len(target_BxFxQ), 1), stage.start_row, jnp.int32)], 1
  for spec in stage.streams:
    code_BxFxQ = target_BxFxQ if spec is stage.target else codes(streams, spec)
    B, F, Q = code_BxFxQ.shape
    wanted = layout.frames(spec)
    if Q != spec.levels or F > wanted or (F < wanted and spec is not stage.target):
      raise ValueError(f'stage {stage.name!r} needs {wanted} frames of {spec.levels} levels of {spec.name!r}, '
                       f'found {F} of {Q}')
    size = F * Q
    rows_BxL = code_BxFxQ.reshape(B, size).astype(jnp.int32) + layout.first_row_L[place:place + size]
    if keep is not None and spec.name in keep:
      level_L = np.tile(np.arange(Q), F)
      rows_BxL = jnp.where(level_L < keep[spec.name][:, None], rows_BxL, stage.null_row(spec))
    parts.append(rows_BxL)
    place += size
  return jnp.concatenate(parts, axis=1)


@functools.partial(jax.jit, static_argnums=0)
def built(layout: Layout, streams: Mapping[str, jax.Array], target_BxFxQ: jax.Array, keep: Mapping[str, jax.Array]
          ) -> jax.Array:
  """`build`, compiled: it is called once a window in sampling."""
  return build(layout, streams, target_BxFxQ, keep=keep)


def revert(layout: Layout, rows_BxL: jax.Array) -> dict[str, jax.Array]:
  """The codes of each stream by its name, int32 [B, F, Q]; inverse of `build` where nothing was dropped."""
  found, place = {}, 0 if layout.stage.conditions else 1
  for spec in layout.stage.streams:
    size = spec.tokens(layout.duration)
    code_BxL = rows_BxL[:, place:place + size] - layout.first_row_L[place:place + size]
    found[spec.name] = code_BxL.reshape(-1, layout.frames(spec), spec.levels)
    place += size
  return found
