"""The composer's score: what is played, as integers from a counter hash, and the facts read back from it.

Nothing here is floating point, so a score is bit-identical on every platform. Each decision is a hash of
(seed, index, field, counters); a longer clip therefore starts with exactly the notes of a shorter one.
"""
from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

SAMPLE_RATE = 24000
TICKS_PER_BEAT = 24

KEYS = ('C', 'C#', 'D', 'D#', 'E', 'F', 'F#', 'G', 'G#', 'A', 'A#', 'B')
MODES = ('major', 'minor')
METERS = ('3/4', '4/4')
LEADS = ('guitar', 'piano', 'marimba', 'bell', 'flute', 'violin', 'organ', 'trumpet', 'synth', 'voice')
CHORD_STYLES = ('pad', 'stab', 'arpeggio')
BASSES = ('none', 'held', 'walking', 'pulsing')
DRUMS = ('none', 'rock', 'dance', 'light')
DENSITIES = ('sparse', 'busy')
REGISTERS = ('low', 'high')
DYNAMICS = ('soft', 'loud')
TEMPI = ('slow', 'medium', 'fast')
# Beats a minute, first and last: the classes are far apart so that none is a matter of opinion.
TEMPO_BPM = {'slow': (60, 70), 'medium': (98, 110), 'fast': (152, 168)}
# The categorical facts, in the order in which reports list them.
ATTRIBUTES = {
    'lead': LEADS, 'tempo': TEMPI, 'mode': MODES, 'meter': METERS, 'drums': DRUMS, 'bass': BASSES,
    'chord_style': CHORD_STYLES, 'density': DENSITIES, 'register': REGISTERS, 'dynamics': DYNAMICS,
    'key': KEYS,
}

# Drum notes carry the numbers of General MIDI percussion.
KICK, RIM, SNARE, CLAP, HAT, OPEN_HAT, SHAKER = 36, 37, 38, 39, 42, 46, 70

_SCALES = {'major': (0, 2, 4, 5, 7, 9, 11), 'minor': (0, 2, 3, 5, 7, 8, 10)}
# Degrees of the scale, one a bar. Major pieces use mostly major triads and minor ones minor triads, so that
# the mode is heard in every bar and not only where the tonic returns.
_PROGRESSIONS = {
    'major': ((0, 3, 4, 0), (0, 4, 3, 0), (0, 3, 0, 4), (0, 0, 3, 4), (0, 4, 5, 3)),
    'minor': ((0, 3, 4, 0), (0, 4, 3, 0), (0, 3, 0, 4), (0, 0, 3, 4), (0, 3, 5, 4)),
}
# Lengths in half beats; the sum is the bar.
_RHYTHMS = {
    ('sparse', '4/4'): ((4, 4), (6, 2), (4, 2, 2), (2, 2, 4)),
    ('sparse', '3/4'): ((4, 2), (6,), (2, 4), (3, 3)),
    ('busy', '4/4'): ((1,) * 8, (2, 1, 1, 1, 1, 1, 1), (1, 1, 2, 1, 1, 1, 1), (1, 1, 1, 1, 2, 1, 1)),
    ('busy', '3/4'): ((1,) * 6, (2, 1, 1, 1, 1), (1, 1, 1, 1, 2), (1, 1, 2, 1, 1)),
}
_FORM = 'AABA'  # the melody's bars: repetition with the harmony moving underneath
_LEAD_RANGE = {'low': (52, 66), 'high': (71, 85)}
_VELOCITY = {'soft': (40, 52), 'loud': (92, 112)}


class Note(NamedTuple):
  """One note. `start` and `duration` are in ticks; `part` is 'lead', 'chords', 'bass' or 'drums'."""

  part: str
  start: int
  duration: int
  pitch: int
  velocity: int


class Chord(NamedTuple):
  """One bar's chord: start and duration in ticks, root as a pitch class, 'maj', 'min' or 'dim'."""

  start: int
  duration: int
  root: int
  quality: str

  @property
  def name(self) -> str:
    return f'{KEYS[self.root]}:{self.quality}'


@dataclasses.dataclass(frozen=True)
class Score:
  """A piece: the plan (classes) and what is played (notes, chords). `facts` reads the classes back."""

  seed: int
  index: int
  seconds: float
  tempo_bpm: int
  tempo: str
  key: str
  mode: str
  meter: str
  lead: str
  chord_style: str
  bass: str
  drums: str
  density: str
  register: str
  dynamics: str
  notes: tuple[Note, ...] = ()
  chords: tuple[Chord, ...] = ()

  @property
  def samples(self) -> int:
    return round(self.seconds * SAMPLE_RATE)

  @property
  def bar_ticks(self) -> int:
    return int(self.meter[0]) * TICKS_PER_BEAT

  def sample_of(self, ticks: int) -> int:
    """The sample at which a tick falls, in integer arithmetic."""
    return ticks * 60 * SAMPLE_RATE // (self.tempo_bpm * TICKS_PER_BEAT)

  def time_of(self, ticks: int) -> float:
    """The second at which a tick falls."""
    return self.sample_of(ticks) / SAMPLE_RATE


_MASK = (1 << 64) - 1


def mix(x: int) -> int:
  """The finalizer of splitmix64: a bijection of 64-bit integers in which every bit depends on every bit."""
  x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
  x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
  return x ^ (x >> 31)


@functools.lru_cache(maxsize=512)
def _field_hash(field: str) -> int:
  value = 0xCBF29CE484222325  # FNV-1a
  for byte in field.encode():
    value = ((value ^ byte) * 0x100000001B3) & _MASK
  return value


class Dice:
  """Random integers that are a pure function of (seed, index, field, counters)."""

  def __init__(self, seed: int, index: int):
    self._state = mix((mix((seed + 0x9E3779B97F4A7C15) & _MASK) + index * 0xD1342543DE82EF95) & _MASK)

  def bits(self, field: str, *counters: int) -> int:
    value = mix(self._state ^ _field_hash(field))
    for counter in counters:
      value = mix((value + (counter + 1) * 0x9E3779B97F4A7C15) & _MASK)
    return value

  def below(self, limit: int, field: str, *counters: int) -> int:
    return (self.bits(field, *counters) >> 16) % limit

  def between(self, low: int, high: int, field: str, *counters: int) -> int:
    """An integer of [low, high], both ends included."""
    return low + self.below(high - low + 1, field, *counters)

  def choose(self, options: tuple, field: str, *counters: int) -> Any:
    return options[self.below(len(options), field, *counters)]

  def sample(self, options: tuple, count: int, field: str, *counters: int) -> list:
    """`count` different options in random order."""
    left = list(options)
    return [left.pop(self.below(len(left), field, *counters, n)) for n in range(min(count, len(left)))]


def compose(seed: int, index: int, seconds: float) -> Score:
  """The piece number `index` of `seed`, long enough for `seconds` of audio.

  Raises:
    ValueError: where `seconds` is not positive or `index` is negative.
  """
  if seconds <= 0 or index < 0:
    raise ValueError(f'compose needs seconds > 0 and index >= 0, found seconds={seconds}, index={index}')
  dice = Dice(seed, index)
  plan = {name: dice.choose(values, name) for name, values in ATTRIBUTES.items()}
  if plan['bass'] == 'none' and plan['drums'] == 'none':
    # Without both, nothing but the harmony would mark the bar.
    plan['bass'] = dice.choose(BASSES[1:], 'bass with no drums')
  bpm = dice.between(*TEMPO_BPM[plan['tempo']], 'bpm')
  empty = Score(seed, index, float(seconds), bpm, **plan)
  ticks = -(-empty.samples * bpm * TICKS_PER_BEAT // (60 * SAMPLE_RATE))
  bars = -(-ticks // empty.bar_ticks)
  chords = _chords(empty, dice, bars)
  base = dice.between(*_VELOCITY[plan['dynamics']], 'velocity')
  notes = [
      note for chord in chords for part in (_lead_bar, _chord_bar, _bass_bar, _drum_bar)
      for note in part(empty, dice, chord, base) if note.start < ticks]
  notes.sort(key=lambda n: (n.start, n.part, n.pitch))
  return dataclasses.replace(empty, notes=tuple(notes), chords=chords)


def _chords(score: Score, dice: Dice, bars: int) -> tuple[Chord, ...]:
  progression = dice.choose(_PROGRESSIONS[score.mode], 'progression')
  tonic, scale = KEYS.index(score.key), _SCALES[score.mode]
  chords = []
  for bar in range(bars):
    degree = progression[bar % len(progression)]
    root, third, fifth = (scale[(degree + step) % 7] for step in (0, 2, 4))
    quality = {(3, 7): 'min', (4, 7): 'maj'}.get(((third - root) % 12, (fifth - root) % 12), 'dim')
    chords.append(Chord(bar * score.bar_ticks, score.bar_ticks, (tonic + root) % 12, quality))
  return tuple(chords)


def _tones(chord: Chord) -> tuple[int, int, int]:
  return (0, 3 if chord.quality != 'maj' else 4, 6 if chord.quality == 'dim' else 7)


def _voicing(chord: Chord) -> list[int]:
  """The triad in the inversion that lies in [50, 62): close position below the lead."""
  return sorted(50 + (chord.root + tone - 50) % 12 for tone in _tones(chord))


def _lead_bar(score: Score, dice: Dice, chord: Chord, base: int) -> list[Note]:
  """A bar of melody: a walk on the scale that comes to rest on chord tones where a beat begins."""
  bar = chord.start // score.bar_ticks
  letter = ord(_FORM[bar % len(_FORM)])
  rhythm = dice.choose(_RHYTHMS[score.density, score.meter], 'rhythm', letter)
  unit = TICKS_PER_BEAT // 2
  if score.density == 'busy' and score.tempo == 'slow':
    rhythm, unit = rhythm + rhythm, unit // 2  # else a busy slow melody is as slow as a sparse fast one
  low, high = _LEAD_RANGE[score.register]
  scale = {(KEYS.index(score.key) + step) % 12 for step in _SCALES[score.mode]}
  ladder = [pitch for pitch in range(low, high + 1) if pitch % 12 in scale]
  inside = [n for n, pitch in enumerate(ladder) if (pitch - chord.root) % 12 in _tones(chord)]
  place = inside[dice.below(len(inside), 'lead start', letter)]
  notes, start = [], chord.start
  for n, length in enumerate(rhythm):
    if n:
      place += dice.choose((-3, -2, -1, -1, 1, 1, 2, 3), 'lead step', letter, n)
      place = abs(place) if place < len(ladder) else 2 * (len(ladder) - 1) - place
    on_beat = (start - chord.start) % TICKS_PER_BEAT == 0
    if on_beat:
      place = min(inside, key=lambda k: (abs(k - place), k))
    accent = (10 if start == chord.start else 4 if on_beat else 0) - dice.below(7, 'lead accent', bar, n)
    duration = length * unit * (15 if score.density == 'sparse' else 14) // 16
    notes.append(Note('lead', start, duration, ladder[place], base + accent))
    start += length * unit
  return notes


def _chord_bar(score: Score, dice: Dice, chord: Chord, base: int) -> list[Note]:
  del dice
  voicing, beats = _voicing(chord), score.bar_ticks // TICKS_PER_BEAT
  if score.chord_style == 'pad':
    return [Note('chords', chord.start, score.bar_ticks, pitch, base) for pitch in voicing]
  if score.chord_style == 'stab':  # after the bass: beats 2 and 4 of four, 2 and 3 of three
    places = (1, 3) if beats == 4 else (1, 2)
    return [Note('chords', chord.start + TICKS_PER_BEAT * beat, TICKS_PER_BEAT // 3, pitch, base)
            for beat in places for pitch in voicing]
  ladder = [*voicing, voicing[0] + 12]
  pattern = (0, 1, 2, 3, 2, 1, 2, 1) if beats == 4 else (0, 1, 2, 3, 2, 1)
  half = TICKS_PER_BEAT // 2
  return [Note('chords', chord.start + n * half, half, ladder[step], base + (12 if n == 0 else 0))
          for n, step in enumerate(pattern)]


def _bass_bar(score: Score, dice: Dice, chord: Chord, base: int) -> list[Note]:
  root, beats = 33 + (chord.root - 33) % 12, score.bar_ticks // TICKS_PER_BEAT
  if score.bass == 'held':
    return [Note('bass', chord.start, score.bar_ticks * 15 // 16, root, base + 4)]
  if score.bass == 'walking':
    bar = chord.start // score.bar_ticks
    _, third, fifth = _tones(chord)
    steps = (0, third, fifth, dice.choose((third, 12, 9 if third == 4 else 10), 'bass last', bar))[:beats]
    return [Note('bass', chord.start + TICKS_PER_BEAT * n, TICKS_PER_BEAT * 7 // 8, root + step,
                 base + (15 if n == 0 else -6)) for n, step in enumerate(steps)]
  if score.bass == 'pulsing':
    half = TICKS_PER_BEAT // 2
    return [Note('bass', chord.start + half * n, half * 3 // 4, root + (12 if n == 2 * beats - 1 else 0),
                 base + (15 if n == 0 else -8)) for n in range(2 * beats)]
  return []


def _drum_bar(score: Score, dice: Dice, chord: Chord, base: int) -> list[Note]:
  del dice
  beats, half = score.bar_ticks // TICKS_PER_BEAT, TICKS_PER_BEAT // 2
  back = (1, 3) if beats == 4 else (1, 2)
  hits: list[tuple[int, int, int]] = []  # place in half beats, drum, velocity added
  if score.drums == 'rock':
    hits += [(2 * beat, KICK, 15 if beat == 0 else -10) for beat in ((0, 2) if beats == 4 else (0,))]
    hits += [(2 * beat, SNARE, 0) for beat in back]
    hits += [(n, HAT, 0 if n % 2 == 0 else -12) for n in range(2 * beats)]
  elif score.drums == 'dance':
    hits += [(2 * beat, KICK, 15 if beat == 0 else -10) for beat in range(beats)]
    hits += [(2 * beat + 1, OPEN_HAT, 0) for beat in range(beats)]
    hits += [(2 * beat, CLAP, 0) for beat in back]
  elif score.drums == 'light':
    hits += [(n, SHAKER, 15 if n == 0 else -16 if n % 2 else -6) for n in range(2 * beats)]
    hits += [(0, RIM, 15)]
  return [Note('drums', chord.start + half * place, half, drum, base + more) for place, drum, more in hits]


def facts(score: Score) -> dict[str, str]:
  """The classes of `ATTRIBUTES` as heard, read from the notes; a part that does not play is 'none'.

  Texts are written from these, never from the plan, so that a text cannot name drums that are not there.
  `lead`, `density`, `register` and `chord_style` are absent where their part has no note.
  """
  parts: dict[str, list[Note]] = {'lead': [], 'chords': [], 'bass': [], 'drums': []}
  for note in score.notes:
    parts[note.part].append(note)
  lead, chords, bass, drums = parts.values()
  beats_per_minute = score.tempo_bpm
  found = {
      'tempo': next((name for name, (_, high) in TEMPO_BPM.items() if beats_per_minute <= high), 'fast'),
      'key': score.key, 'mode': score.mode, 'meter': score.meter}
  if lead:
    mean_pitch = sum(n.pitch for n in lead) / len(lead)
    mean_length = sum(n.duration for n in lead) / len(lead)
    found['lead'] = score.lead
    found['density'] = 'busy' if mean_length < TICKS_PER_BEAT * 0.75 else 'sparse'
    found['register'] = 'low' if mean_pitch < 68.5 else 'high'
  if chords:
    together = sum(n.start == chords[0].start for n in chords)
    found['chord_style'] = ('arpeggio' if together == 1 else
                            'pad' if chords[0].duration == score.bar_ticks else 'stab')
  found['bass'] = 'none'
  if bass:
    found['bass'] = ('held' if bass[0].duration > TICKS_PER_BEAT else
                     'walking' if bass[0].duration > TICKS_PER_BEAT // 2 else 'pulsing')
  used = {n.pitch for n in drums}
  found['drums'] = ('none' if not used else 'light' if used & {SHAKER, RIM} else
                    'dance' if used & {OPEN_HAT, CLAP} else 'rock')
  velocities = [n.velocity for n in lead or score.notes]
  mean_velocity = sum(velocities) / max(len(velocities), 1)
  found['dynamics'] = 'soft' if mean_velocity < 72 else 'loud'
  return found
