"""A gap in a recording, made anew so that it joins both sides.

The stages are causal: they go on from the left and cannot look ahead. So each stage says several candidates for the
gap, and the one after which the recording's own tokens to the right are likeliest is taken, stage by stage. What the
coarse stage says, moreover, follows the semantic tokens of the right side as far as its window reaches over them.
What sounds in the gap of the recording is not heard.

Shapes: B candidates, F frames, Q levels, N samples.
"""
from __future__ import annotations

from collections.abc import Iterator, Sequence
import dataclasses

import jax.numpy as jnp
import numpy as np

from musiclm_jax import specs
from musiclm_jax.generate import chain, clips, pipeline, prompts as descriptions, windows
from musiclm_jax.generate.chain import Condition, Drawing, Known, Sampled
from musiclm_jax.generate.networks import Networks
from musiclm_jax.generate.pipeline import Given, Settings
from musiclm_jax.generate.prompts import Prompt
from musiclm_jax.token_lm.sequence import built, Layout

MAX_SECONDS = 60.0
CANDIDATES = 4  # where nothing else is asked for


@dataclasses.dataclass(frozen=True)
class Gap:
  """A clip, and the seconds of it from which and up to which it is made anew."""

  audio: str
  begin: float
  end: float

  def __post_init__(self):
    if not 0 <= self.begin < self.end < float('inf'):
      raise ValueError(f'a gap ends after it begins, found {self.begin:g} to {self.end:g} s')
    if self.end - self.begin > MAX_SECONDS:
      raise ValueError(f'a gap may last {MAX_SECONDS:g} s, found {self.end - self.begin:g} s')


@dataclasses.dataclass(frozen=True)
class _Place:
  """Where the gap lies in the tokens, which begin `left` ticks before it and end `right` ticks behind it."""

  left: int
  gap: int
  right: int

  @property
  def end(self) -> int:
    return self.left + self.gap

  @property
  def total(self) -> int:
    return self.left + self.gap + self.right


def fill(networks: Networks, gap: Gap, prompts: Sequence[Prompt], settings: Settings, *, candidates: int, seed: int,
         negative: str = '') -> Iterator[np.ndarray]:
  """The recording, mono, with the gap filled, in blocks [N]; of as many samples as the recording has.

  Without prompts the gap follows the style of the clip. Raises ValueError where a side of the gap is too short.
  """
  rate = networks.sample_rate
  audio_N = clips.read(gap.audio, rate)
  place, first = _place(networks, gap, len(audio_N), settings)
  samples = lambda ticks: windows.samples(ticks, rate)
  behind = first + samples(place.gap)
  left = clips.tokens(networks, audio_N[:first], place.left)
  right = clips.tokens(networks, audio_N[behind:behind + samples(place.right)], place.right)
  if not prompts and networks.mulan_rate and any(stage.timeless for stage in networks.stages.values()):
    prompts = (Prompt(audio=gap.audio),)
  description = descriptions.describe(networks, prompts, None, place.gap / specs.TICKS_PER_SECOND, negative=negative,
                                      offset=place.left)
  condition = pipeline.heard(description.condition, settings)
  fade, begin, end = samples(clips.FADE_TICKS), samples(place.left), samples(place.end)

  def pieces() -> Iterator[np.ndarray]:
    yield audio_N[:first - fade]
    acoustic_BxFxQ = _tokens(networks, place, left, right, condition, settings, pipeline.prompt_keys(seed, candidates))
    made, _ = networks.decode_step(acoustic_BxFxQ[:1], networks.decode_state(1))
    new_N = np.clip(np.asarray(made)[0, begin - fade:end + fade], -1, 1)
    new_N[:fade] = clips.faded(audio_N[first - fade:first], new_N[:fade])
    new_N[-fade:] = clips.faded(new_N[-fade:], audio_N[behind:behind + fade])
    yield new_N
    yield audio_N[behind + fade:]

  return pieces()


def _place(networks: Networks, gap: Gap, length: int, settings: Settings) -> tuple[_Place, int]:
  """The gap on the stages' grid, and its first sample."""
  rate = networks.sample_rate
  seconds = length / rate
  if gap.begin < clips.MIN_SECONDS or gap.end > seconds - clips.MIN_SECONDS:
    raise ValueError(f'{gap.audio} has {seconds:.2f} s, and a gap from {gap.begin:g} to {gap.end:g} s leaves less than '
                     f'{clips.MIN_SECONDS:g} s on a side; behind the end, go on from the clip instead')
  grid = chain.grid(networks.stages, chain.order(networks.stages))
  first = round(gap.begin * rate)
  ticks = -(-windows.ticks(gap.end - gap.begin) // grid) * grid
  longest = pipeline.context_ticks(networks, settings)
  known = lambda samples: min(longest, windows.whole(samples, rate, grid))
  behind = length - first - windows.samples(ticks, rate)
  return _Place(known(first), ticks, known(behind)), first


def _tokens(networks: Networks, place: _Place, left: Given, right: Given, condition: Condition, settings: Settings,
            keys_B) -> np.ndarray:
  """Acoustic tokens of all of the place, [B, F, Q], the same for all candidates."""
  batch = len(keys_B)
  found: dict[str, Known] = {}
  for number, name in enumerate(chain.order(networks.stages)):
    stage = networks.stages[name]
    target = stage.target
    sides = [np.repeat(given.tokens[target.feature][..., target.level_slice], batch, axis=0) for given in (left, right)]
    plan = windows.cover(stage, place.end, overlap=settings.overlap_of(name), given=place.left, limit=place.total)
    sources = [found[spec.name] for spec in stage.conditions if spec.frame_rate]
    drawing = Drawing(pipeline.sampling_of(networks, settings, name), chain.folded(keys_B, jnp.int32(number)))
    runner = Sampled(networks, name, plan, sources, condition, drawing, sides[0])
    runner.needs.append(lambda: 0)  # all of it is needed in the end
    runner.advance(place.end)
    ends = windows.frame(place.end, target)
    codes_BxFxQ = np.concatenate([runner.frames.between(0, ends), sides[1]], axis=1)
    if batch > 1:
      nats_B = _nats_behind(networks, name, place, sources, condition, codes_BxFxQ)
      codes_BxFxQ = np.repeat(codes_BxFxQ[int(np.argmin(nats_B))][None], batch, axis=0)
    found[target.name] = Known(target, codes_BxFxQ)
  acoustic = chain.acoustic(found.values())
  frames = windows.frame(place.total, acoustic[0].spec)
  return np.concatenate([known.frames.between(0, frames) for known in acoustic], axis=-1)


def _nats_behind(networks: Networks, name: str, place: _Place, sources: Sequence[Known], condition: Condition,
                 codes_BxFxQ: np.ndarray) -> np.ndarray:
  """How unlikely the stage finds the tokens behind the gap after each candidate, nats [B].

  Heard in one window of the stage, half of it in the gap where there is as much on both sides.
  """
  stage, target = networks.stages[name], networks.stages[name].target
  step = windows.grid(stage)
  window = min(windows.ticks(stage.seconds), place.total) // step * step
  start = max(0, min(place.end - window // 2, place.total - window)) // step * step
  layout = Layout(stage, window / specs.TICKS_PER_SECOND)
  piece = lambda codes, spec: codes[:, windows.frame(start, spec):][:, :windows.frame(window, spec)]
  timed = {source.spec.feature: chain.between(source.frames, source.spec, start, start + window) for source in sources}
  shown, levels = chain.described(networks, name, condition, [condition.at(start)], len(codes_BxFxQ))
  rows = built(layout, {**timed, **shown}, piece(codes_BxFxQ, target), levels)
  nats_BxL = np.asarray(networks.row_nats(name, rows, layout.positions_2xL, layout.condition_length))
  behind = layout.condition_length + windows.frame(place.end - start, target) * target.levels
  return nats_BxL[:, behind:].sum(axis=1)
