"""Windows over time: how stages with a bounded crop cover audio of any length.

Times are whole ticks (`specs.TICKS_PER_SECOND`), so windows of all streams meet frame boundaries exactly.
"""
from __future__ import annotations

from collections.abc import Mapping
import dataclasses
import math
import types
from typing import NamedTuple

from musiclm_jax import specs
from musiclm_jax.specs import Stage, TokenSpec


def ticks(seconds: float) -> int:
  return round(seconds * specs.TICKS_PER_SECOND)


def frame(tick: int, spec: TokenSpec) -> int:
  """Index of the frame of `spec` that starts at `tick`."""
  return round(tick * spec.frame_rate / specs.TICKS_PER_SECOND)


def samples(tick: int, sample_rate: int) -> int:
  """Index of the sample at `tick`."""
  return round(tick * sample_rate / specs.TICKS_PER_SECOND)


def whole(count: int, sample_rate: int, step: int) -> int:
  """Ticks, a multiple of `step`, that lie within so many samples."""
  return count * specs.TICKS_PER_SECOND // sample_rate // step * step


def grid(stage: Stage) -> int:
  """Ticks between times at which every stream of the stage has a frame boundary."""
  return math.lcm(*(round(specs.TICKS_PER_SECOND / s.frame_rate) for s in stage.streams if s.frame_rate))


class Window(NamedTuple):
  """One pass of a stage, in ticks: it lies at [start, start + window), goes on from what is known before `first`, and
  what it says of [first, last) is kept."""

  start: int
  first: int
  last: int


@dataclasses.dataclass(frozen=True)
class Windows:
  """Windows of one length, in the order in which they are sampled.

  Attributes:
    window: their length in ticks. overlap: how much of the one before a window sees, at most.
  """

  window: int
  overlap: int
  windows: tuple[Window, ...]

  @property
  def total(self) -> int:
    """Ticks that the windows reach over: what the conditions of the stage must cover."""
    return max((w.start + self.window for w in self.windows), default=0)

  @property
  def stand_alone(self) -> bool:
    """Whether no window needs another one, so that they can be sampled side by side."""
    return all(w.start == w.first for w in self.windows)


def cover(stage: Stage, needed: int, *, overlap: float, given: int = 0,
          changes: Mapping[int, int | None] = types.MappingProxyType({}), limit: int | None = None) -> Windows:
  """The fewest windows of the stage's crop that cover `needed` ticks; one shorter window where that is enough.

  Args:
    overlap: share of a window that repeats the end of the one before. MusicLM advances the semantic stage by half of
      its 30 s (arXiv 2301.11325, section 5); AudioLM's fine stage has none (arXiv 2209.03143, section III-C).
    given: ticks at the beginning that are known and not sampled.
    changes: ticks at which a new window begins whatever is left of the one before, because there is another text from
      there on, and how many ticks before it that window sees at most (None: as any other).
    limit: a tick that no window may cross, because the conditions end there; at least `needed`.
  """
  step = grid(stage)
  window = ticks(stage.seconds) // step * step
  if needed <= window:
    window = -(-needed // step) * step
  shared = int(window * overlap) // step * step
  found, first = [], given
  while first < needed:
    most = changes.get(first)
    start = max(0, first - (shared if most is None else min(shared, most // step * step)))
    if limit is not None:
      start = max(0, min(start, limit - window))
    last = min([start + window, *(change for change in changes if change > first)])
    found.append(Window(start, first, last))
    first = last
  return Windows(window, shared, tuple(found))
