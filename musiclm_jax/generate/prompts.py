"""What describes the music, in MuLan's space: texts and clips, mixed, and changing over time.

Shapes: P prompts, B examples, Q levels, N samples, E dimensions.
"""
from __future__ import annotations

from collections.abc import Sequence
import dataclasses

import numpy as np

from musiclm_jax.generate import chain, clips, story as stories, windows
from musiclm_jax.generate.chain import Condition, Piece
from musiclm_jax.generate.networks import Networks
from musiclm_jax.generate.story import Story

MAX_WEIGHT = 1e6
# Mixtures on the way from one text to the next: each costs a window of its own.
_STEPS = 4


@dataclasses.dataclass(frozen=True)
class Prompt:
  """A text, or a clip that the music is to be like, and how much of the mixture it is.

  Attributes:
    text: words; or audio: the name of a file. weight: relative to those of the others.
  """

  text: str = ''
  audio: str = ''
  weight: float = 1.0

  def __post_init__(self):
    if self.text and self.audio:
      raise ValueError(f'a prompt is a text or a clip, not both: {self.text!r} and {self.audio!r}')
    if not 0 <= self.weight <= MAX_WEIGHT:
      raise ValueError(f'the weight of a prompt must lie between 0 and {MAX_WEIGHT:.0f}, found {self.weight}')


@dataclasses.dataclass(frozen=True)
class Section:
  """A part of the music, in ticks, and the sum of MuLan's embeddings [E] of its prompts by their weights, unscaled."""

  first: int
  last: int
  embedding_E: np.ndarray


@dataclasses.dataclass(frozen=True)
class Description:
  """What the stages are told, and by what the result is scored."""

  condition: Condition = Condition()
  sections: tuple[Section, ...] = ()


def mixed(embeddings_PxE: np.ndarray, weights_P: Sequence[float]) -> np.ndarray:
  """The embeddings' weighted mean, [E] scaled back to length 1; ValueError where they leave nothing.

  One that has all the weight is returned as it is.
  """
  weights = np.asarray(weights_P, np.float32)
  if not weights.sum() > 0:
    raise ValueError(f'the weights of the prompts sum to nothing: {[float(w) for w in weights]}')
  if np.count_nonzero(weights) == 1:
    return np.asarray(embeddings_PxE[int(np.argmax(weights))], np.float32)
  total_E = weights @ np.asarray(embeddings_PxE, np.float32)
  length = float(np.linalg.norm(total_E))
  if length < 1e-6 * weights.sum():
    raise ValueError('the prompts cancel one another; change their weights')
  return total_E / length


def describe(networks: Networks, prompts: Sequence[Prompt], story: Story | None, seconds: float, *,
             negative: str = '', offset: int = 0) -> Description:
  """The description of music of `seconds` that begins at tick `offset` of its token streams.

  Texts are mixed with clips where MuLan's tokenizer expects the clips of those texts, so both are of one kind. Raises
  ValueError for prompts that cannot be understood, and where the networks have no MuLan or no stage hears it.
  """
  if not (prompts or story or negative):
    return Description()
  if not networks.mulan_rate or not any(networks.stages[name].timeless for name in chain.order(networks.stages)):
    raise ValueError('these networks were trained without descriptions (no MuLan): generate without a prompt')
  away = _tokens(networks, _texts(networks, [negative], 'negative prompt')[1]) if negative else None
  end = offset + windows.ticks(seconds)
  if story:
    story.check(seconds)
    heard_PxE, expected_PxE = _texts(networks, [text for _, text in story.entries], 'text of the story')
    sections = tuple(Section(offset + windows.ticks(a), min(end, offset + windows.ticks(b)), e)
                     for (a, b), e in zip(stories.sections(story.entries, seconds), heard_PxE))
    pieces = _pieces(networks, story, expected_PxE, offset)
    return Description(Condition(pieces, negative_Bx1xQ=away), sections)
  if not prompts:
    return Description(Condition(negative_Bx1xQ=away))
  heard_PxE, expected_PxE = _embeddings(networks, prompts)
  weights = [prompt.weight for prompt in prompts]
  tokens = _tokens(networks, mixed(expected_PxE, weights)[None])
  heard_E = np.asarray(weights, np.float32) @ heard_PxE / np.sum(weights)
  return Description(Condition((Piece(0, tokens),), negative_Bx1xQ=away), (Section(offset, end, heard_E),))


def score(networks: Networks, description: Description, audio_N: np.ndarray, offset: int = 0) -> float:
  """MuLan's cosine between audio and what was asked for, averaged over its sections by their length."""
  rate, total, ticks = networks.sample_rate, 0.0, 0
  for section in description.sections:
    first, last = (windows.samples(tick - offset, rate) for tick in (section.first, section.last))
    embedding_E = clips.embed(networks, audio_N[first:last], rate)
    total += float(embedding_E @ section.embedding_E) * (section.last - section.first)
    ticks += section.last - section.first
  return total / ticks


def _texts(networks: Networks, texts: Sequence[str], name: str) -> tuple[np.ndarray, np.ndarray]:
  """Embeddings of texts, and where their clips are expected, [P, E] each."""
  heard_PxE = networks.embed_text(networks.text_ids(texts, name))
  return np.asarray(heard_PxE), np.asarray(networks.expected_audio(heard_PxE))


def _embeddings(networks: Networks, prompts: Sequence[Prompt]) -> tuple[np.ndarray, np.ndarray]:
  heard, expected = {}, {}
  texts = [i for i, prompt in enumerate(prompts) if not prompt.audio]
  if texts:
    for i, *pair in zip(texts, *_texts(networks, [prompts[i].text for i in texts], 'prompt')):
      heard[i], expected[i] = pair
  for i, prompt in enumerate(prompts):
    if prompt.audio:
      audio_N = clips.read(prompt.audio, networks.mulan_rate)
      heard[i] = expected[i] = clips.embed(networks, audio_N, networks.mulan_rate)
  return tuple(np.stack([found[i] for i in range(len(prompts))]) for found in (heard, expected))


def _pieces(networks: Networks, story: Story, expected_PxE: np.ndarray, offset: int) -> tuple[Piece, ...]:
  names = chain.order(networks.stages)
  grid = chain.grid(networks.stages, names)
  at = lambda seconds: round(windows.ticks(seconds) / grid) * grid
  found = [(0, expected_PxE[0])]
  for (time, _), before_E, after_E in zip(story.entries[1:], expected_PxE, expected_PxE[1:]):
    if story.crossfade:
      for step in range(1, _STEPS + 1):
        share = step / (_STEPS + 1)
        moment = time - story.crossfade / 2 + (step - 1) / _STEPS * story.crossfade
        found.append((offset + at(moment), mixed(np.stack([before_E, after_E]), [1 - share, share])))
    found.append((offset + at(time + story.crossfade / 2), after_E))
  tokens_Px1xQ = _tokens(networks, np.stack([embedding_E for _, embedding_E in found]))
  # Where two fall on one tick of the grid, the later one holds.
  latest = {tick: tokens_1xQ[None] for (tick, _), tokens_1xQ in zip(found, tokens_Px1xQ)}
  return tuple(Piece(tick, tokens, new=not story.crossfade) for tick, tokens in sorted(latest.items()))


def _tokens(networks: Networks, embedding_PxE: np.ndarray) -> np.ndarray:
  return np.asarray(networks.mulan_tokens(embedding_PxE))
