"""From a description to audio: the stages in turn, window by window, and the codec's streaming decoder.

There is one way: audio is made in blocks while later ones are still to come, and what is asked for as a whole is the
blocks one after another. Nothing that grows with the length of the music is kept.

Shapes: B examples, F frames, Q levels, N samples.
"""
from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
import dataclasses
import math
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from musiclm_jax import specs
from musiclm_jax.generate import chain, windows
from musiclm_jax.generate.chain import Condition, Drawing, Piece, Sampled
from musiclm_jax.generate.networks import Networks
from musiclm_jax.generate.windows import Windows
from musiclm_jax.token_lm.draw import Sampling

MIN_SECONDS, MAX_SECONDS = 0.01, 6 * 3600.0


@dataclasses.dataclass(frozen=True)
class Settings:
  """Everything that decides a result beside the networks, the description and the seed.

  Attributes:
    seconds: length of the new audio.
    sampling: by stage; a stage that is not named is sampled as its networks say (`Networks.sampling`).
    mulan_levels: how many first levels of the MuLan tokens condition the stages; None: as many as the networks say
      (`Networks.mulan_levels`); 0 is unconditional.
    overlap: share of a window that continues the one before, by stage, half of it for a stage that is not named;
      windows of the fine stage stand alone and are sampled side by side.
    story_context: seconds of what came before that the semantic stage hears where a new text begins. Music goes on as
      it was, more than it follows a text: a stage that hears the old music keeps to it. The acoustic stages hear as
      much as ever, so that there is no seam.
    block_seconds: audio is made in blocks of this length; 0: as much as one window of the first stage adds. Smaller
      ones come earlier, larger ones take less time in all.
  """

  seconds: float = 10.0
  sampling: Mapping[str, Sampling] = dataclasses.field(default_factory=dict)
  mulan_levels: int | None = None
  overlap: Mapping[str, float] = dataclasses.field(
      default_factory=lambda: {'semantic': 0.5, 'coarse': 0.5, 'fine': 0.0})
  story_context: float = 0.0
  block_seconds: float = 0.0

  def __post_init__(self):
    if not MIN_SECONDS <= self.seconds <= MAX_SECONDS:
      raise ValueError(f'seconds must lie between {MIN_SECONDS:g} and {MAX_SECONDS:.0f}, found {self.seconds}')
    for name in ('block_seconds', 'story_context'):
      if not 0 <= getattr(self, name) < math.inf:
        raise ValueError(f'{name} must not be negative, found {getattr(self, name)}')
    if self.mulan_levels is not None and not 0 <= self.mulan_levels < 1000:
      raise ValueError(f'mulan_levels must lie between 0 and 999, found {self.mulan_levels}')
    if any(not 0 <= share < 1 for share in self.overlap.values()):
      raise ValueError(f'the overlap of windows must lie between 0 and 1, found {dict(self.overlap)}')

  def overlap_of(self, stage: str) -> float:
    return self.overlap.get(stage, 0.5)


@dataclasses.dataclass(frozen=True)
class Given:
  """Tokens that the music begins with.

  Attributes:
    ticks: how long they are, on the grid of all stages (`Plan.grid`).
    tokens: int32 [B, F, Q] by feature ("semantic", "acoustic").
  """

  ticks: int
  tokens: Mapping[str, np.ndarray]


class Block(NamedTuple):
  """What is made at a time.

  Attributes:
    audio_BxN: float32 [B, N] in [-1, 1].
    tokens: of its frames, int32 [B, F, Q] by stage that makes audio ("coarse", "fine").
  """

  audio_BxN: np.ndarray
  tokens: dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Plan:
  """Which stages run, in which windows.

  Attributes:
    windows: by stage, in the order in which they depend on one another.
    grid: ticks between times at which all of their streams have a frame boundary.
    given, total: ticks that are known at the beginning, and ticks in all.
    block: ticks a block.
  """

  windows: Mapping[str, Windows]
  grid: int
  given: int
  total: int
  block: int


def plan(networks: Networks, settings: Settings, condition: Condition = Condition(), *, given: int = 0) -> Plan:
  """Planned backwards: each stage covers all that the next one needs. Raises ValueError where a stage is missing."""
  stages = networks.stages
  names = chain.order(stages)
  total = given + windows.ticks(settings.seconds)
  needed, found = dict.fromkeys(names, total), {}
  made_by = {stages[name].target.name: name for name in names}
  for name in reversed(names):
    stage = stages[name]
    # What the acoustic stages continue is the sound; what the semantic stage continues is what is played.
    context = None if stage.target.feature == 'acoustic' else windows.ticks(settings.story_context)
    changes = {piece.tick: context if piece.new else None for piece in condition.pieces[1:] if stage.timeless}
    found[name] = windows.cover(stage, needed[name], overlap=settings.overlap_of(name), given=given, changes=changes)
    for spec in stage.conditions:
      if spec.frame_rate:
        source = made_by[spec.name]
        needed[source] = max(needed[source], found[name].total)
  grid = chain.grid(stages, names)
  first = found[names[0]]
  block = windows.ticks(settings.block_seconds) or first.window - first.overlap
  return Plan({name: found[name] for name in names}, grid, given, total, max(1, block // grid) * grid)


def context_ticks(networks: Networks, settings: Settings) -> int:
  """Ticks of a given clip that new music can take into account: as much as its longest window overlaps."""
  stages = networks.stages
  names = chain.order(stages)
  share = lambda name: windows.cover(stages[name], specs.TICKS_PER_SECOND * 3600,
                                     overlap=settings.overlap_of(name)).overlap
  grid = chain.grid(stages, names)
  return max(share(name) for name in names) // grid * grid


def blocks(networks: Networks, condition: Condition, settings: Settings, keys_B: jax.Array, *,
           given: Given | None = None, lead: int = 0) -> Iterator[Block]:
  """The music, block by block, after the given tokens; one key an example.

  With `lead`, the first block begins that many ticks earlier, with what the codec makes of the end of what is given.
  """
  given = given or Given(0, {})
  planned = plan(networks, settings, condition, given=given.ticks)
  runners = _runners(networks, planned, condition, settings, keys_B, given)
  decoder = _Decoder(networks, chain.acoustic(runners), len(keys_B))
  before = decoder.audio(0, given.ticks, given.ticks).audio_BxN if given.ticks else None
  samples_left = specs.frames_in(settings.seconds, networks.sample_rate)
  for first in range(given.ticks, planned.total, planned.block):
    last = min(first + planned.block, planned.total)
    block = decoder.audio(first, last, planned.block if planned.total - given.ticks > planned.block else 0)
    block = block._replace(audio_BxN=block.audio_BxN[:, :samples_left])
    samples_left -= block.audio_BxN.shape[1]
    if before is not None and lead:
      lead_samples = windows.samples(lead, networks.sample_rate)
      block = block._replace(audio_BxN=np.concatenate([before[:, -lead_samples:], block.audio_BxN], axis=1))
    before = None
    yield block


def heard(condition: Condition, settings: Settings) -> Condition:
  """What the stages hear of a condition: as many levels as the settings say, and nothing at all of none."""
  return dataclasses.replace(Condition() if settings.mulan_levels == 0 else condition, levels=settings.mulan_levels)


def adjusted(networks: Networks, temperature: float = 1.0, guidance: float | None = None) -> dict[str, Sampling]:
  """The networks' own sampling of each stage, its temperature multiplied; guidance None: theirs.

  A stage whose own guidance is 1 keeps it: it knows no music without its conditions to be led away from.
  """
  led = lambda usual: usual.guidance if guidance is None or usual.guidance == 1.0 else guidance
  return {name: dataclasses.replace(usual, temperature=usual.temperature * temperature, guidance=led(usual))
          for name, usual in networks.sampling.items()}


def sampling_of(networks: Networks, settings: Settings, stage: str) -> Sampling:
  return settings.sampling.get(stage) or networks.sampling[stage]


def mulan_levels_of(networks: Networks, settings: Settings) -> dict[str, int]:
  """How many first levels each stage that hears MuLan tokens is shown."""
  return {name: chain.shown_levels(networks, name, settings.mulan_levels)
          for name, stage in networks.stages.items() if stage.timeless}


def _runners(networks: Networks, planned: Plan, condition: Condition, settings: Settings, keys_B: jax.Array,
             given: Given) -> list[Sampled]:
  found: dict[str, Sampled] = {}
  condition = heard(condition, settings)
  for number, (name, windows_of_stage) in enumerate(planned.windows.items()):
    stage = networks.stages[name]
    shape = (len(keys_B), 0, stage.target.levels)
    known = given.tokens[stage.target.feature][..., stage.target.level_slice] if given.ticks else np.zeros(shape)
    sources = [found[spec.name] for spec in stage.conditions if spec.frame_rate]
    side_by_side = -(-planned.block // max(1, windows_of_stage.window))
    drawing = Drawing(sampling_of(networks, settings, name), chain.folded(keys_B, jnp.int32(number)), side_by_side)
    found[stage.target.name] = Sampled(networks, name, windows_of_stage, sources, condition, drawing, known)
  return list(found.values())


class _Decoder:
  """The codec's decoder behind the stages that make acoustic tokens; its state is carried from block to block."""

  def __init__(self, networks: Networks, runners: Sequence[Sampled], batch: int):
    self.networks, self.runners = networks, runners
    self._state = networks.decode_state(batch)
    self._tick = 0
    for runner in runners:
      runner.needs.append(lambda: self._tick)

  def audio(self, first: int, last: int, padded: int) -> Block:
    """The ticks [first, last), decoded as a block of `padded` ticks so that one program serves all blocks."""
    spec = self.networks.codec_spec
    begin, end = (math.ceil(tick * spec.frame_rate / specs.TICKS_PER_SECOND - 1e-6) for tick in (first, last))
    for runner in reversed(self.runners):
      runner.advance(math.ceil(end * specs.TICKS_PER_SECOND / spec.frame_rate - 1e-6))
    tokens = {runner.name: runner.frames.between(begin, end) for runner in self.runners}
    self._tick = last
    codes_BxFxQ = np.concatenate(list(tokens.values()), axis=-1)
    missing = max(0, windows.frame(padded, spec) - codes_BxFxQ.shape[1])
    codes_BxFxQ = np.pad(codes_BxFxQ, ((0, 0), (0, missing), (0, 0)))
    audio, self._state = self.networks.decode_step(codes_BxFxQ, self._state)
    samples = round((end - begin) * self.networks.sample_rate / spec.frame_rate)
    return Block(np.clip(np.asarray(audio)[:, :samples], -1, 1), tokens)


@dataclasses.dataclass(frozen=True)
class Generated:
  """Audio float32 [B, N] in [-1, 1], the tokens that it was decoded from, and how long it took.

  Attributes:
    tokens: "mulan" int32 [B, 1, Q] where there was a description, and "acoustic" [B, F, Q].
    wall_seconds, first_seconds: time until the last and until the first block was there.
  """

  audio_BxN: np.ndarray
  sample_rate: int
  tokens: dict[str, np.ndarray]
  wall_seconds: float
  first_seconds: float


def text_tokens(networks: Networks, prompts: Sequence[str], name: str = 'prompt') -> np.ndarray:
  """MuLan tokens of texts, int32 [B, 1, Q]. Raises ValueError for a text that `Tokenizer.encode_prompt` refuses."""
  return tokens_of_texts(networks, networks.embed_text(networks.text_ids(prompts, name)))


def tokens_of_texts(networks: Networks, text_BxE: jax.Array) -> np.ndarray:
  """MuLan tokens int32 [B, 1, Q] of the embeddings of texts."""
  return np.asarray(networks.mulan_tokens(networks.expected_audio(text_BxE)))


def generate(networks: Networks, prompts: Sequence[str], settings: Settings = Settings(), *, seed: int = 0
             ) -> Generated:
  """Music for each prompt. The same seed, prompt and settings give the same audio in any batch of that prompt's
  place."""
  return from_mulan_tokens(networks, text_tokens(networks, prompts), settings, prompt_keys(seed, len(prompts)))


def prompt_keys(seed: int, count: int) -> jax.Array:
  """One key a prompt, from the seed and its place."""
  return jax.vmap(lambda i: jax.random.fold_in(jax.random.key(seed), i))(jnp.arange(count))


def from_mulan_tokens(networks: Networks, mulan_Bx1xQ: np.ndarray, settings: Settings, keys_B: jax.Array) -> Generated:
  """The cascade from MuLan tokens on, one key an example."""
  mulan_Bx1xQ = np.asarray(mulan_Bx1xQ)
  made = collect(networks, blocks(networks, Condition((Piece(0, mulan_Bx1xQ),)), settings, keys_B))
  return dataclasses.replace(made, tokens={'mulan': mulan_Bx1xQ, **made.tokens})


def collect(networks: Networks, made: Iterator[Block]) -> Generated:
  """All blocks as one."""
  begun, first, found = time.monotonic(), 0.0, []
  for block in made:
    first = first or time.monotonic() - begun
    found.append(block)
  levels = [np.concatenate([block.tokens[name] for block in found], axis=1) for name in found[0].tokens]
  audio_BxN = np.concatenate([block.audio_BxN for block in found], axis=1)
  return Generated(audio_BxN, networks.sample_rate, {'acoustic': np.concatenate(levels, axis=-1)},
                   time.monotonic() - begun, first)
