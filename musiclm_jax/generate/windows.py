"""Windows over time: how stages with a bounded crop cover audio of any length.

Times are whole ticks (`specs.TICKS_PER_SECOND`), so windows of all streams meet frame boundaries exactly.
"""
from __future__ import annotations

import dataclasses
import math

from musiclm_jax import specs
from musiclm_jax.specs import Stage, TokenSpec


def ticks(seconds: float) -> int:
  return round(seconds * specs.TICKS_PER_SECOND)


def frame(tick: int, spec: TokenSpec) -> int:
  """Index of the frame of `spec` that starts at `tick`."""
  return round(tick * spec.frame_rate / specs.TICKS_PER_SECOND)


def grid(stage: Stage) -> int:
  """Ticks between times at which every stream of the stage has a frame boundary."""
  return math.lcm(*(round(specs.TICKS_PER_SECOND / s.frame_rate) for s in stage.streams if s.frame_rate))


@dataclasses.dataclass(frozen=True)
class Windows:
  """Equal windows, each starting `stride` after the one before; neighbours share `window - stride`.

  Attributes:
    window, stride: in ticks. count: how many.
  """

  window: int
  stride: int
  count: int

  @property
  def total(self) -> int:
    return self.window + (self.count - 1) * self.stride

  @property
  def starts(self) -> tuple[int, ...]:
    return tuple(i * self.stride for i in range(self.count))


def cover(stage: Stage, needed: int, *, overlap: float) -> Windows:
  """The fewest windows of the stage's crop that cover `needed` ticks; one shorter window where that is enough.

  Args:
    overlap: share of a window that repeats the end of the one before. MusicLM advances the semantic stage by half of
      its 30 s (arXiv 2301.11325, section 5); AudioLM's fine stage has none (arXiv 2209.03143, section III-C).
  """
  step = grid(stage)
  window = ticks(stage.seconds) // step * step
  if needed <= window:
    return Windows(-(-needed // step) * step, window, 1)
  stride = window - int(window * overlap) // step * step
  return Windows(window, stride, 1 + -(-(needed - window) // stride))
