"""The built-in music: pieces composed and synthesised from (seed, index), with ground truth and texts.

No data set is needed to train, test or measure: every figure has a truth to compare with. `composer_score`
decides the notes, `composer_synth` plays them, `composer_texts` says in words what is played.
"""
from __future__ import annotations

import dataclasses
import hashlib
from typing import Any

from musiclm_jax import specs
from musiclm_jax.data.composer_score import (
    ATTRIBUTES, BASSES, Chord, CHORD_STYLES, compose, DENSITIES, DRUMS, DYNAMICS, facts, KEYS, LEADS, METERS,
    MODES, Note, REGISTERS, SAMPLE_RATE, Score, TEMPI, TICKS_PER_BEAT)
from musiclm_jax.data.composer_synth import render
from musiclm_jax.data.composer_texts import (
    chatter, KINDS, phrases, read_attributes, SPLITS, templates, texts, words)

__all__ = [
    'ATTRIBUTES', 'BASSES', 'CHORD_STYLES', 'Chord', 'Corpus', 'DENSITIES', 'DRUMS', 'DYNAMICS', 'KEYS',
    'KINDS', 'LEADS', 'METERS', 'MODES', 'Note', 'REGISTERS', 'SAMPLE_RATE', 'SPLITS', 'Score', 'TEMPI',
    'TICKS_PER_BEAT', 'attributes', 'chatter', 'compose', 'facts', 'phrases', 'read_attributes', 'render',
    'templates', 'texts', 'words']

# Raise whenever a score, a sound or a text changes: it is part of every corpus fingerprint.
VERSION = 1


def attributes(score: Score) -> dict[str, Any]:
  """The truth about a piece: `facts`, `tempo_bpm`, and what happens when, in seconds.

  `chord_times` and `chord_names` ('C:maj') are the beginnings of the bars; `beat_times` all beats;
  `melody_times` and `melody_pitches` (MIDI numbers) the notes of the lead. All lists, so JSON can hold them.
  """
  lead = [note for note in score.notes if note.part == 'lead']
  chords = [chord for chord in score.chords if score.sample_of(chord.start) < score.samples]
  beats = range(0, len(score.chords) * score.bar_ticks, TICKS_PER_BEAT)
  return {
      **facts(score), 'tempo_bpm': score.tempo_bpm,
      'chord_times': [score.time_of(chord.start) for chord in chords],
      'chord_names': [chord.name for chord in chords],
      'beat_times': [score.time_of(tick) for tick in beats if score.sample_of(tick) < score.samples],
      'melody_times': [score.time_of(note.start) for note in lead],
      'melody_pitches': [note.pitch for note in lead],
  }


@dataclasses.dataclass(frozen=True)
class Corpus:
  """Pieces `first` to `first + size - 1` of `seed`, composed when asked for; nothing is stored.

  Two corpora with different seeds, or with ranges that do not overlap, share no piece: this is how clips are
  held out.

  Attributes:
    seed: which music.
    first: index of the first piece.
    size: number of pieces.
    seconds: length of each clip.
    split: words and templates of the texts, one of `SPLITS`.
    chatter: whether each example also has one unrelated text, of the kind 'chatter'.
  """

  seed: int = 0
  first: int = 0
  size: int = 1000
  seconds: float = 10.0
  split: str = 'train'
  chatter: bool = False

  def __post_init__(self):
    if self.size < 1 or self.first < 0 or self.seconds <= 0:
      raise ValueError(
          f'composer corpus needs size >= 1, first >= 0 and seconds > 0, found size={self.size}, '
          f'first={self.first}, seconds={self.seconds}')
    if self.split not in SPLITS:
      raise ValueError(f'composer corpus: split {self.split!r} is none of {", ".join(SPLITS)}')

  def __len__(self) -> int:
    return self.size

  def __getitem__(self, i: int) -> dict[str, Any]:
    """Example `i`: float32 audio [N] at 24 kHz with its texts and attributes."""
    score = self.score(i)
    said = texts(score, self.split)
    return {
        'audio': render(score), 'sample_rate': SAMPLE_RATE,
        'recording': f'composer-{score.seed}-{score.index}', 'artist': 'composer', 'start': 0.0,
        'texts': [*said, chatter(score)] if self.chatter else said,
        'attributes': attributes(score)}

  def score(self, i: int) -> Score:
    """The score of example `i`, which costs far less than its audio."""
    if not 0 <= i < self.size:
      raise IndexError(f'example {i} of a composer corpus of {self.size}')
    return compose(self.seed, self.first + i, self.seconds)

  @property
  def fingerprint(self) -> str:
    """Changes with any field and with the composer itself."""
    return hashlib.sha256(f'composer {VERSION} {specs.fingerprint(self)}'.encode()).hexdigest()[:16]
