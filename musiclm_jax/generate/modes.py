"""What a user can ask for, and the music for it: one request, one way to audio.

Shapes: B candidates, N samples.
"""
from __future__ import annotations

from collections.abc import Iterator
import dataclasses
import datetime
import operator
import os
from typing import Any

import numpy as np

from musiclm_jax import provenance
from musiclm_jax.generate import chain, clips, infill, pipeline, prompts as descriptions, windows
from musiclm_jax.generate.infill import Gap
from musiclm_jax.generate.networks import Networks
from musiclm_jax.generate.pipeline import Given, Settings
from musiclm_jax.generate.prompts import Description, Prompt
from musiclm_jax.generate.story import Story
from musiclm_jax.specs import TICKS_PER_SECOND

LARGEST_SEED = 2**32 - 1
# Of all candidates together: they are held until the best is known.
_MOST_SECONDS = 3600.0
_BLOCK_SECONDS = 10.0


@dataclasses.dataclass(frozen=True)
class Continuation:
  """A clip that the music goes on from.

  Attributes:
    at: seconds from its beginning from which on the music is new; None: from its end.
    keep: whether the result begins with the clip: the recording itself up to there, not what the codec makes of it.
  """

  audio: str
  at: float | None = None
  keep: bool = True


@dataclasses.dataclass(frozen=True)
class Request:
  """Everything that is asked for beside `Settings` and the seed; nothing at all is unconditional music.

  Attributes:
    prompts: texts and clips, mixed by their weights. story: texts in turn, instead of prompts.
    negative: a text to lead away from, which takes a stage that hears texts and whose guidance is not 1.
    continuation: a clip to go on from. gap: a clip and the part of it to make anew; its length replaces
      `Settings.seconds`.
    best_of: how many candidates are made, of which MuLan chooses one (of a gap: the one that joins best).
  """

  prompts: tuple[Prompt, ...] = ()
  story: Story | None = None
  negative: str = ''
  continuation: Continuation | None = None
  gap: Gap | None = None
  best_of: int = 1

  def __post_init__(self):
    if self.prompts and self.story:
      raise ValueError('music follows either prompts or a story')
    if self.gap and (self.continuation or self.story):
      raise ValueError('a gap is filled by itself: without a clip to go on from, and without a story')
    if self.best_of < 1:
      raise ValueError(f'best_of must be at least 1, found {self.best_of}')
    if self.best_of > 1 and not (self.prompts or self.story or self.gap):
      raise ValueError('the best of several is chosen by a prompt; give one')

  @property
  def mode(self) -> str:
    if self.gap:
      return 'infilling'
    if self.continuation:
      return 'continuation'
    if self.story:
      return 'story'
    if len(self.prompts) > 1:
      return 'mixture'
    if not self.prompts:
      return 'unconditional'
    return 'style of a clip' if self.prompts[0].audio else 'text'


def music(networks: Networks, request: Request, settings: Settings = Settings(), *, seed: int = 0
          ) -> Iterator[np.ndarray]:
  """One piece of music in blocks, float32 [N] in [-1, 1] at `networks.sample_rate`, each as soon as it is made.

  What is asked for is checked before the first block. Raises ValueError for what cannot be done, FileNotFoundError.
  """
  seed = check_seed(seed)
  chain.order(networks.stages)  # names what is missing
  if networks.channels != 1:
    raise ValueError(f'the codec has {networks.channels} channels, and music is generated in mono')
  if request.negative and not _leads(networks, settings):
    raise ValueError('no stage leads away from the negative prompt: leave it out, or ask for guidance above 1 and for '
                     'MuLan levels, of networks that were trained to do without')
  seconds = settings.seconds
  if request.gap:
    seconds = request.gap.end - request.gap.begin + 2 * pipeline.context_ticks(networks, settings) / TICKS_PER_SECOND
  if request.best_of * seconds > _MOST_SECONDS and request.best_of > 1:
    raise ValueError(f'the best of {request.best_of} pieces of {seconds:g} s needs more memory than is allowed for; '
                     f'ask for at most {_MOST_SECONDS:g} s in all')
  if request.gap:
    return infill.fill(networks, request.gap, request.prompts, settings, candidates=request.best_of, seed=seed,
                       negative=request.negative)
  given, lead, front = Given(0, {}), 0, None
  if request.continuation:
    given, front = _begun(networks, request.continuation, settings)
    lead = clips.FADE_TICKS if request.continuation.keep else 0
  description = descriptions.describe(networks, request.prompts, request.story, settings.seconds,
                                      negative=request.negative, offset=given.ticks)
  keys_B = pipeline.prompt_keys(seed, request.best_of)
  made = pipeline.blocks(networks, description.condition, settings, keys_B, given=clips.repeated(given, len(keys_B)),
                         lead=lead)
  audio = (block.audio_BxN for block in made)
  if request.best_of > 1:
    audio = _best(networks, description, audio, given.ticks, lead)
  new = (audio_BxN[0] for audio_BxN in audio)
  return _joined(front, new, networks.sample_rate) if front is not None and request.continuation.keep else new


def _leads(networks: Networks, settings: Settings) -> bool:
  """Whether a stage that hears descriptions is guided."""
  return settings.mulan_levels != 0 and any(
      stage.timeless and pipeline.sampling_of(networks, settings, name).guidance != 1.0
      for name, stage in networks.stages.items())


def check_seed(seed: Any) -> int:
  """ValueError where it is no whole number from 0 to `LARGEST_SEED`."""
  try:
    number = operator.index(seed)
  except TypeError:
    raise ValueError(f'the seed must be a whole number, found {seed!r}') from None
  if not 0 <= number <= LARGEST_SEED:
    raise ValueError(f'the seed must lie between 0 and {LARGEST_SEED}, found {number}')
  return number


def _begun(networks: Networks, continuation: Continuation, settings: Settings) -> tuple[Given, np.ndarray]:
  """The tokens that the music goes on from, and the clip up to there."""
  rate = networks.sample_rate
  audio_N = clips.read(continuation.audio, rate)
  seconds = len(audio_N) / rate
  if continuation.at is not None:
    if not clips.MIN_SECONDS <= continuation.at <= seconds:
      raise ValueError(f'{continuation.audio} has {seconds:.2f} s and cannot be continued from {continuation.at:g} s '
                       f'on; name a time between {clips.MIN_SECONDS:g} and {seconds:.2f}')
    audio_N = audio_N[:round(continuation.at * rate)]
  grid = chain.grid(networks.stages, chain.order(networks.stages))
  # At least what is blended with the clip, whatever the stages hear of it.
  heard = max(pipeline.context_ticks(networks, settings), -(-clips.FADE_TICKS // grid) * grid)
  ticks = min(windows.whole(len(audio_N), rate, grid), heard)
  return clips.tokens(networks, audio_N, ticks), audio_N


def _best(networks: Networks, description: Description, audio: Iterator[np.ndarray], offset: int, lead: int
          ) -> Iterator[np.ndarray]:
  """The candidate with the highest MuLan score, as one block [1, N]."""
  audio_BxN = np.concatenate(list(audio), axis=1)
  new = windows.samples(lead, networks.sample_rate)
  scores = [descriptions.score(networks, description, audio_N[new:], offset) for audio_N in audio_BxN]
  best = int(np.argmax(scores))
  yield audio_BxN[best:best + 1]


def _joined(front_N: np.ndarray, new: Iterator[np.ndarray], rate: int) -> Iterator[np.ndarray]:
  """The recording, and behind it what is new, which begins with the codec's version of its last moment."""
  fade = windows.samples(clips.FADE_TICKS, rate)
  yield from np.array_split(front_N[:-fade], max(1, round(len(front_N) / rate / _BLOCK_SECONDS)))
  first = next(new)
  yield np.concatenate([clips.faded(front_N[-fade:], first[:fade]), first[fade:]])
  yield from new


def about(networks: Networks, request: Request, settings: Settings, seed: int) -> dict[str, Any]:
  """Where a result comes from, as plain values for JSON: what made it, of what, and that a model did."""
  now = datetime.datetime.now(datetime.UTC)
  if request.gap:
    settings = dataclasses.replace(settings, seconds=request.gap.end - request.gap.begin)
  found = {
      'generated_by_a_model': True,
      'notice': 'This audio was generated by a model.',
      'mode': request.mode,
      'prompts': [_shown(prompt) for prompt in request.prompts],
      'negative_prompt': request.negative,
      'seed': seed,
      'best_of': request.best_of,
      'networks': networks.identity,
      'lineage': dict(networks.lineage),
      'settings': {**dataclasses.asdict(settings), 'mulan_levels': pipeline.mulan_levels_of(networks, settings),
                   'sampling': {name: dataclasses.asdict(pipeline.sampling_of(networks, settings, name))
                                for name in networks.stages}},
      'date': now.isoformat(timespec='seconds'),
      'made_with': provenance.made_with(),
  }
  if request.story:
    found['story'] = dataclasses.asdict(request.story)
  for name, clip in (('continuation', request.continuation), ('gap', request.gap)):
    if clip:
      found[name] = {**dataclasses.asdict(clip), **_file(clip.audio)}
  return found


def _shown(prompt: Prompt) -> dict[str, Any]:
  return {'weight': prompt.weight, **(_file(prompt.audio) if prompt.audio else {'text': prompt.text})}


def _file(path: str) -> dict[str, str]:
  """The name of a file and what is in it; not where it lies."""
  return {'audio': os.path.basename(path), 'sha256': provenance.hash_file(path)}
