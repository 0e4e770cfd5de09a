"""The stages one after another, window by window: each is asked for what the next one needs, and keeps no more.

Shapes: B batch, G windows side by side, F frames, Q levels, L sequence length, T given positions.
"""
from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
import dataclasses
from typing import NamedTuple, Protocol, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from musiclm_jax import specs
from musiclm_jax.generate import windows
from musiclm_jax.generate.networks import Networks
from musiclm_jax.generate.windows import Window, Windows
from musiclm_jax.specs import Stage, TokenSpec
from musiclm_jax.token_lm.draw import Sampling
from musiclm_jax.token_lm.sequence import built, Layout


class Piece(NamedTuple):
  """MuLan tokens that hold from a tick on, until the next piece; those of one example hold for all.

  Where they are another text's and no step of a cross-fade, they begin something new.
  """

  tick: int
  tokens_Bx1xQ: np.ndarray
  new: bool = True


@dataclasses.dataclass(frozen=True)
class Condition:
  """What describes the music.

  Attributes:
    pieces: in ascending order, the first at tick 0; none: unconditional.
    levels: how many first levels of the tokens are shown; None: as many as the networks say.
    negative_Bx1xQ: tokens from which guidance leads away, instead of from no description at all.
  """

  pieces: tuple[Piece, ...] = ()
  levels: int | None = None
  negative_Bx1xQ: np.ndarray | None = None

  def at(self, tick: int) -> np.ndarray | None:
    return next((piece.tokens_Bx1xQ for piece in reversed(self.pieces) if piece.tick <= tick), None)


class Frames:
  """A stream of which the last frames are kept. Frames are counted from the beginning of the stream."""

  def __init__(self, codes_BxFxQ: np.ndarray):
    self._first, self._codes = 0, np.asarray(codes_BxFxQ, np.int32)

  @property
  def end(self) -> int:
    return self._first + self._codes.shape[1]

  def between(self, first: int, last: int) -> np.ndarray:
    if first == last:  # no frames are there at any time
      return self._codes[:, :0]
    if not self._first <= first <= last <= self.end:
      raise ValueError(f'frames {first} to {last} of a stream that holds {self._first} to {self.end}')
    return self._codes[:, first - self._first:last - self._first]

  def append(self, codes_BxFxQ: np.ndarray) -> None:
    self._codes = np.concatenate([self._codes, codes_BxFxQ], axis=1)

  def forget(self, first: int) -> None:
    """Frames before `first` are not needed any more."""
    if first > self._first:
      self._codes, self._first = self._codes[:, first - self._first:].copy(), first


class Source(Protocol):
  """Where a stage finds one of its conditions."""

  spec: TokenSpec
  frames: Frames
  needs: list[Callable[[], int]]  # each reader says from which tick on it will still read

  def advance(self, tick: int) -> None:
    """Makes the frames before `tick` available."""


AnySource = TypeVar('AnySource', bound=Source)


class Known:
  """Tokens that are there already, as a source."""

  def __init__(self, spec: TokenSpec, codes_BxFxQ: np.ndarray):
    self.spec, self.frames = spec, Frames(codes_BxFxQ)
    self.needs: list[Callable[[], int]] = []

  def advance(self, tick: int) -> None:
    del tick


@dataclasses.dataclass(frozen=True)
class Drawing:
  """What decides a stage's draws beside its conditions.

  Attributes:
    keys_B: of this stage, one an example.
    side_by_side: windows that are sampled at once where they stand alone.
  """

  sampling: Sampling
  keys_B: jax.Array
  side_by_side: int = 1


class Sampled:
  """The target of one stage, sampled as far as it is asked for; a source for the next stage.

  The windows are a function of the plan alone, so how far it is asked for at a time changes nothing.
  """

  def __init__(self, networks: Networks, name: str, plan: Windows, sources: Sequence[Source], condition: Condition,
               drawing: Drawing, given_BxFxQ: np.ndarray):
    self.networks, self.name, self.plan, self.sources = networks, name, plan, sources
    self.condition, self.drawing = condition, drawing
    self.stage: Stage = networks.stages[name]
    self.spec = self.stage.target
    self.layout = Layout(self.stage, plan.window / specs.TICKS_PER_SECOND)
    self.frames = Frames(given_BxFxQ)
    self.needs: list[Callable[[], int]] = []
    self._next = 0  # index of a window
    self._group = min(drawing.side_by_side, len(plan.windows)) if plan.stand_alone else 1
    for source in sources:
      source.needs.append(self._reads_from)

  def _reads_from(self) -> int:
    windows_left = self.plan.windows[self._next:self._next + 1]
    return windows_left[0].start if windows_left else self.plan.total

  def advance(self, tick: int) -> None:
    while self.frames.end < windows.frame(tick, self.spec) and self._next < len(self.plan.windows):
      self._sample(self.plan.windows[self._next:self._next + self._group])

  def _sample(self, group: Sequence[Window]) -> None:
    for source in self.sources:
      source.advance(group[-1].start + self.plan.window)
    # Always as many windows: one program serves all groups.
    filled = [*group, *[group[-1]] * (self._group - len(group))]
    numbers = np.arange(self._next, self._next + self._group)
    keys_GxB = jax.vmap(lambda n: folded(self.drawing.keys_B, n))(jnp.asarray(numbers))
    codes_GxBxFxQ = self._codes(filled, keys_GxB.reshape(-1))
    for window, codes_BxFxQ in zip(group, codes_GxBxFxQ):
      kept = windows.frame(window.last - window.start, self.spec)
      self.frames.append(codes_BxFxQ[:, windows.frame(window.first - window.start, self.spec):kept])
    self._next += len(group)
    earliest = min([self._reads_from(), *(reads_from() for reads_from in self.needs)])
    self.frames.forget(min(windows.frame(earliest, self.spec), self.frames.end))

  def _codes(self, group: Sequence[Window], keys_N: jax.Array) -> np.ndarray:
    """The target over the whole of each window, int32 [G, B, F, Q]."""
    batch = len(self.drawing.keys_B)
    prefix_NxFxQ = np.concatenate([between(self.frames, self.spec, w.start, w.first) for w in group])
    timed = {s.spec.feature: np.concatenate(
        [between(s.frames, s.spec, w.start, w.start + self.plan.window) for w in group]) for s in self.sources}
    asked, negative = [self.condition.at(w.first) for w in group], self.condition.negative_Bx1xQ
    hear = lambda tokens: described(self.networks, self.name, self.condition, tokens, batch)
    shown, levels = hear(asked)
    rows = built(self.layout, {**timed, **shown}, prefix_NxFxQ, levels)
    null, sampling = None, self.drawing.sampling
    # Of nothing there is nothing to lead to: unconditional music takes one pass.
    if shown and sampling.guidance != 1.0 and any(tokens is not None for tokens in (negative, *asked)):
      away, levels = hear([negative] * len(group))
      null = built(self.layout, {**timed, **away}, prefix_NxFxQ, levels)
    codes_NxM = np.asarray(self.networks.sample_rows(
        self.name, rows, null, self.layout.positions_2xL, self.layout.condition_length, keys_N, sampling.numbers))
    codes_NxFxQ = np.concatenate([prefix_NxFxQ, codes_NxM.reshape(len(keys_N), -1, self.spec.levels)], axis=1)
    return codes_NxFxQ.reshape(len(group), -1, *codes_NxFxQ.shape[1:])


def shown_levels(networks: Networks, name: str, asked: int | None) -> int:
  """How many first levels of the MuLan tokens a stage is shown: as many as are asked for, or as it says."""
  return networks.mulan_levels.get(name, 1) if asked is None else asked


def described(networks: Networks, name: str, condition: Condition, tokens: Sequence[np.ndarray | None], batch: int
              ) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
  """A stage's conditions without a frame rate for windows of `batch` examples each, and how many levels are shown."""
  shown, levels = {}, {}
  for spec in networks.stages[name].conditions:
    if not spec.frame_rate:
      nothing = np.zeros((batch, 1, spec.levels), np.int32)
      shown[spec.feature] = np.concatenate(
          [nothing if t is None else np.broadcast_to(t, nothing.shape) for t in tokens]).astype(np.int32)
      wanted = shown_levels(networks, name, condition.levels)
      levels[spec.name] = np.repeat([0 if t is None else wanted for t in tokens], batch).astype(np.int32)
  return shown, levels


def between(frames: Frames, spec: TokenSpec, first: int, last: int) -> np.ndarray:
  """The frames of the ticks [first, last)."""
  begin = windows.frame(first, spec)
  return frames.between(begin, begin + windows.frame(last - first, spec))


@jax.jit
def folded(keys_B: jax.Array, number: jax.Array) -> jax.Array:
  """Each key folded with the number."""
  return jax.vmap(lambda key: jax.random.fold_in(key, number))(keys_B)


def order(stages: Mapping[str, Stage]) -> list[str]:
  """Names of the stages that are needed for audio, each after those that its conditions come from.

  The stages themselves say which: a coarse stage without semantic tokens does without the semantic stage. Raises
  ValueError where a stage is missing.
  """
  acoustic = [s for s in stages.values() if s.target.feature == 'acoustic']
  if not any(s.target.first_level == 0 for s in acoustic):
    raise ValueError('there is no trained stage for the first acoustic levels (coarse); train it first')
  made_by = {stage.target.name: name for name, stage in stages.items()}
  found: list[str] = []

  def add(name: str) -> None:
    for spec in stages[name].conditions:
      if spec.frame_rate and spec.name not in made_by:
        raise ValueError(f'the {name} stage needs {spec.name} tokens, but there is no trained stage that makes them; '
                         'train it first')
      if spec.frame_rate:
        add(made_by[spec.name])
    if name not in found:
      found.append(name)

  for stage in sorted(acoustic, key=lambda s: s.target.first_level):
    add(made_by[stage.target.name])
  return found


def acoustic(sources: Iterable[AnySource]) -> list[AnySource]:
  """Those of acoustic tokens, the first levels first."""
  return sorted((s for s in sources if s.spec.feature == 'acoustic'), key=lambda s: s.spec.first_level)


def grid(stages: Mapping[str, Stage], names: Sequence[str]) -> int:
  """Ticks between times at which every stream of these stages has a frame boundary."""
  return int(np.lcm.reduce([windows.grid(stages[name]) for name in names]))
