"""What the composer's pieces are called in English: word tables, templates and their inverse.

The four kinds are those of MuLan (arXiv 2208.12415): short tags, long descriptions, playlist titles and
labels. Each fact has words that training texts use and words that they never use. The three splits:

  'train'     training words in training templates
  'test'      training words in templates that training never uses
  'synonyms'  words that training never uses, in training templates
"""
from __future__ import annotations

import functools
import re

from musiclm_jax.data.composer_score import Dice, KEYS, Score, facts

SPLITS = ('train', 'test', 'synonyms')
KINDS = ('tags', 'description', 'title', 'label')

# attribute -> value -> (words of training, words held out). No phrase stands for two facts.
WORDS: dict[str, dict[str, tuple[tuple[str, ...], tuple[str, ...]]]] = {
    'tempo': {
        'slow': (('slow', 'unhurried', 'leisurely', 'calm'), ('sluggish', 'languid')),
        'medium': (('mid-tempo', 'moderate', 'medium-tempo'), ('andante', 'jogging')),
        'fast': (('fast', 'quick', 'brisk', 'rapid'), ('speedy', 'racing', 'breakneck')),
    },
    'mode': {
        'major': (('happy', 'cheerful', 'sunny', 'major-key'), ('joyful', 'merry', 'jolly')),
        'minor': (('sad', 'melancholy', 'dark', 'minor-key'), ('sorrowful', 'gloomy', 'mournful')),
    },
    'meter': {
        '4/4': (('4/4 time', 'four-four time', 'four-beat time'), ('common metre', 'quadruple metre')),
        '3/4': (('3/4 time', 'three-four time', 'waltz time'), ('triple metre', 'ternary metre')),
    },
    'lead': {
        'guitar': (('a guitar', 'an acoustic guitar', 'plucked strings'), ('a lute', 'a mandolin')),
        'piano': (('a piano', 'a grand piano', 'piano keys'), ('a pianoforte', 'an upright clavier')),
        'marimba': (('a marimba', 'a xylophone', 'wooden mallets'), ('a balafon', 'a timber idiophone')),
        'bell': (('bells', 'a music box', 'a glockenspiel'), ('chimes', 'a celesta')),
        'flute': (('a flute', 'a recorder', 'woodwind'), ('a piccolo', 'panpipes')),
        'violin': (('a violin', 'a fiddle', 'bowed strings'), ('a viola', 'a cello')),
        'organ': (('an organ', 'a church organ', 'a pipe organ'), ('a harmonium', 'a hammond')),
        'trumpet': (('a trumpet', 'brass', 'a horn'), ('a cornet', 'a bugle')),
        'synth': (('a synthesizer', 'a synth', 'an electronic lead'), ('a keytar', 'an oscillator')),
        'voice': (('a voice', 'a singer', 'wordless vocals'), ('a soprano', 'humming')),
    },
    'chord_style': {
        'pad': (('sustained chords', 'long held chords', 'a warm pad'),
                ('lingering harmonies', 'a blanketing backdrop')),
        'stab': (('choppy chords', 'short chord stabs', 'staccato chords'),
                 ('clipped harmonies', 'punchy jabs')),
        'arpeggio': (('arpeggios', 'broken chords', 'rolling arpeggios'),
                     ('rippling harmonies', 'cascading figures')),
    },
    'bass': {
        'none': (('no bass', 'no bass line', 'no bass at all'), ('zero bottom end', 'an absent bottom end')),
        'held': (('a held bass', 'long bass notes', 'a droning bass'),
                 ('an unmoving bottom end', 'a stationary sub')),
        'walking': (('a walking bass', 'a stepping bass line', 'a strolling bass'),
                    ('a wandering bottom end', 'an ambling sub')),
        'pulsing': (('a pulsing bass', 'a driving bass line', 'a throbbing bass'),
                    ('a hammering bottom end', 'a chugging sub')),
    },
    'drums': {
        'none': (('no drums', 'no percussion', 'no drums at all'),
                 ('zero battery', 'an absent rhythm section')),
        'rock': (('rock drums', 'a drum backbeat', 'a rock drum kit'),
                 ('an arena groove', 'a stadium groove')),
        'dance': (('dance drums', 'a club beat', 'a thumping kick drum'),
                  ('a techno groove', 'a house groove')),
        'light': (('light percussion', 'a shaker', 'brushed percussion'), ('maracas', 'a tambourine')),
    },
    'density': {
        'sparse': (('sparse', 'spacious', 'minimal'), ('airy', 'uncluttered')),
        'busy': (('busy', 'dense', 'restless'), ('frantic', 'hectic')),
    },
    'register': {
        'low': (('low', 'low-pitched', 'deep'), ('baritone', 'rumbling')),
        'high': (('high', 'high-pitched', 'soaring'), ('treble', 'piercing')),
    },
    'dynamics': {
        'soft': (('quiet', 'soft', 'gentle'), ('hushed', 'subdued')),
        'loud': (('loud', 'powerful', 'forceful'), ('booming', 'thunderous')),
    },
}

_KEY_NAMES = dict(zip(KEYS, ('C', 'C sharp', 'D', 'D sharp', 'E', 'F', 'F sharp', 'G', 'G sharp', 'A',
                             'A sharp', 'B')))

# Sentences of a description: the piece, then the lead and the accompaniment in either order.
_PIECE = (
    ('A {dynamics}, {tempo} and {mode} piece in {meter}.',
     'This {mode} track is {tempo} and {dynamics}, and it is played in {meter}.',
     'A {tempo}, {mode} instrumental in {meter} with a {dynamics} sound.',
     'The music is {mode} and {tempo}, in {meter}, and the mood is {dynamics}.',
     '{Tempo} {mode} music in {meter}, played in a {dynamics} way.',
     'A {mode} song in {meter}, {dynamics} in tone and {tempo} in pace.',
     'You can hear a {tempo} tune in {meter} that sounds {mode} and {dynamics}.',
     'It is a {dynamics} recording of a {mode}, {tempo} piece in {meter}.'),
    ('In {meter}, this is a {mode} tune with a {tempo} pace and a {dynamics} tone.',
     'The piece sounds {dynamics} and {mode}; it is {tempo} and in {meter}.',
     'A {mode} and {dynamics} track, {tempo}, played in {meter}.',
     'The pace is {tempo}, the mood is {mode}, the sound is {dynamics}, in {meter}.'),
)
_LEAD = (
    ('{Lead} with a {density}, {register} melody is in front.',
     'The {register} melody is {density} and played on {lead}.',
     'A {density} melody on {lead} sits in a {register} register.',
     'The lead is {lead}, with {density} and {register} phrases.',
     'There is a {register} tune from {lead}, {density} in its notes.',
     'It features {lead} with a {density} line in the {register} range.',
     'The main instrument is {lead}; its line is {register} and {density}.',
     'On top there is {lead}, {register} and {density}.'),
    ('In front there is {lead}, in a {register} range and with a {density} line.',
     'The melody, {density} and {register}, is from {lead}.',
     'The {density} lead in the {register} register is played on {lead}.',
     'It features a {register} and {density} melody on {lead}.'),
)
_BACKING = (
    ('It is backed by {chords}, {bass} and {drums}.',
     'There is {drums}, {bass} and {chords}.',
     'The backing has {chords} with {bass}, and {drums}.',
     'Behind it there is {bass} together with {chords} and {drums}.',
     'The band plays {chords} over {bass}, and the beat has {drums}.',
     'With {chords} in the background, it has {drums} and {bass}.',
     'The accompaniment is {chords}; below there is {bass}, and {drums}.',
     'The track has {drums} and {bass} under {chords}.'),
    ('In the background there is {drums}; the backing is {chords} with {bass}.',
     'Below the melody there is {bass}, with {drums} and with {chords}.',
     'The background has {drums}, {chords} and {bass}.',
     'It has {bass} and {drums} behind {chords}.'),
)
_KEY_SENTENCE = (('It is in {key} {scale}.', 'The key: it is in {key} {scale}.'),
                 ('The piece is in {key} {scale}.', 'The music is in {key} {scale}.'))
# Whole short prompts, as people type them.
_PROMPT = (
    ('{tempo} {mode} music with {lead}, {chords}, {bass} and {drums}, in {meter}',
     '{mode} tune on {lead}, {tempo} and {dynamics}, with {drums}, {bass} and {chords}',
     'a {dynamics} {tempo} {mode} piece for {lead} with {drums}, {chords} and {bass}'),
    ('{lead} with {drums}, {bass} and {chords}, {tempo} and {mode}',
     '{dynamics} and {mode} music in {meter}, {tempo}, with {lead}, {drums} and {bass}'),
)
_TITLE = (
    ('{Mode} {lead_name} for {tempo} days', '{Tempo} and {mode} {lead_name}', 'The {mode} {lead_name} mix',
     '{Dynamics} {lead_name} in {meter}', 'My {tempo} {lead_name} songs with {drums}',
     '{Mode} evening: {lead_name} and {chords}', '{Tempo} {mode} music to study to',
     '{Lead_name} and {drums} for the road', 'Best of {dynamics} {lead_name}'),
    ('{Mode} {lead_name} to study to', 'Evening mix: {tempo} {lead_name}', '{Tempo} songs for {mode} days',
     'My {dynamics} and {mode} {lead_name}', 'The best {lead_name} with {drums}'),
)
_LABEL = (
    ('{lead_name}', '{mode} music', '{lead_name}, {mode} music', '{lead_name}; {tempo}', '{tempo} music',
     'Music: {lead_name}', '{drums_name}, {lead_name}'),
    ('{mode} music, {lead_name}', '{tempo} music; {lead_name}', 'Music: {mode}'),
)
_CHATTER = (
    'Follow us for more and leave a comment below', 'Recorded live, all rights reserved',
    'Link to the full album in the bio', 'Download the free sample pack today',
    'Thanks to everyone who came to the show last night', 'Official upload, please subscribe',
    'New merch is available in our store', 'This one goes out to my sister', 'Part two is coming next week',
)


def _bare(phrase: str) -> str:
  """A phrase without its article: 'a grand piano' -> 'grand piano'."""
  return re.sub(r'^an? ', '', phrase)


def _upper(text: str) -> str:
  return text[:1].upper() + text[1:]


def _fill(template: str, values: dict[str, str]) -> str:
  """Fills a template; `{Tempo}` is `{tempo}` with a capital. Then 'a' before a vowel becomes 'an'."""
  def slot(match: re.Match) -> str:
    name = match.group(1)
    return values[name] if name in values else _upper(values[name.lower()])
  return re.sub(r'\b([Aa]) (?=[aeiou])', r'\1n ', re.sub(r'\{(\w+)\}', slot, template))


def _slots(found: dict[str, str], split: str, dice: Dice, count: int) -> dict[str, str]:
  """One phrase a fact, for the `count`-th text of a piece."""
  held_out = int(split == 'synonyms')
  values = {name: dice.choose(WORDS[name][value][held_out], f'word {name} {split}', count)
            for name, value in found.items() if name in WORDS}
  values['chords'] = values.pop('chord_style', '')
  for name in ('lead', 'drums', 'bass', 'chords'):
    values[f'{name}_name'] = _bare(values.get(name, ''))
  values['key'], values['scale'] = _KEY_NAMES[found['key']], found['mode']
  return values


def _description(values: dict[str, str], part: int, dice: Dice, split: str, count: int) -> str:
  def draw(sentences, name):
    return _upper(_fill(dice.choose(sentences[part], f'{name} {split}', count), values))
  piece, lead, backing = draw(_PIECE, 'piece'), draw(_LEAD, 'lead'), draw(_BACKING, 'backing')
  rest = [lead, backing] if dice.below(2, f'order {split}', count) else [backing, lead]
  # Key names have no synonyms, so that split does not tell the key.
  if split != 'synonyms' and dice.below(2, f'tell key {split}', count):
    rest.append(draw(_KEY_SENTENCE, 'key sentence'))
  return ' '.join([piece, *rest])


def _tags(values: dict[str, str], part: int, dice: Dice, count: int) -> str:
  names = ('tempo', 'mode', 'dynamics', 'meter', 'chords_name', 'bass_name', 'drums_name')
  chosen = [values[name] for name in dice.sample(names, 3 + dice.below(3, 'tags', count), 'tag', count)]
  lead = values['lead_name']
  # The order tells the splits apart: training tags begin with the lead, test tags end with it.
  return ', '.join([*chosen, lead] if part else [lead, *chosen])


def _check_split(split: str) -> None:
  if split not in SPLITS:
    raise ValueError(f'split {split!r} is none of {", ".join(SPLITS)}')


def texts(score: Score, split: str = 'train') -> list[dict[str, str]]:
  """Ten texts on a piece, as {'kind', 'text'}: what the notes say, in the words of `split`.

  Raises:
    ValueError: for an unknown split.
  """
  _check_split(split)
  dice, found, part = Dice(score.seed, score.index), facts(score), int(split == 'test')
  out = []
  for count in range(3):
    values = _slots(found, split, dice, count)
    out.append(('description', _description(values, part, dice, split, count)))
  for count in range(3, 10):
    values = _slots(found, split, dice, count)
    if count < 5:
      out.append(('tags', _tags(values, part, dice, count)))
    elif count == 5:
      out.append(('tags', _fill(dice.choose(_PROMPT[part], f'prompt {split}'), values)))
    else:
      kind, templates = ('title', _TITLE) if count < 8 else ('label', _LABEL)
      out.append((kind, _upper(_fill(dice.choose(templates[part], f'{kind} {split}', count), values))))
  return [{'kind': kind, 'text': text} for kind, text in out]


def chatter(score: Score) -> dict[str, str]:
  """A text of the kind 'chatter': it says nothing about the music, as most text on the web."""
  return {'kind': 'chatter', 'text': Dice(score.seed, score.index).choose(_CHATTER, 'chatter')}


def templates(split: str) -> tuple[str, ...]:
  """Every template of a split."""
  _check_split(split)
  part = int(split == 'test')
  return sum((table[part] for table in (_PIECE, _LEAD, _BACKING, _KEY_SENTENCE, _PROMPT, _TITLE, _LABEL)), ())


def phrases(split: str) -> tuple[str, ...]:
  """Every phrase that a split may put into a template, key names aside."""
  _check_split(split)
  held_out = int(split == 'synonyms')
  return tuple(p for values in WORDS.values() for words in values.values() for p in words[held_out])


def words(attribute: str) -> dict[str, tuple[str, ...]]:
  """The phrases that training texts have for each value of an attribute, without their articles, as tags have them."""
  return {value: tuple(map(_bare, phrases_of[0])) for value, phrases_of in WORDS[attribute].items()}


@functools.cache
def _reader() -> tuple[re.Pattern, dict[str, tuple[str, str]]]:
  meaning = {}
  for name, values in WORDS.items():
    for value, words in values.items():
      for phrase in (*words[0], *words[1]):
        meaning[_bare(phrase)] = (name, value)
  longest_first = sorted(meaning, key=lambda phrase: (-len(phrase), phrase))
  return re.compile(rf'(?<![\w/-])({"|".join(map(re.escape, longest_first))})(?![\w/-])'), meaning


def read_attributes(text: str) -> dict[str, str]:
  """The facts that a text tells, by inverting the word tables: the oracle of retrieval measurements."""
  found, text = {}, text.lower()
  key = re.search(r'\bin ([a-g](?: sharp)?) (major|minor)(?![\w-])', text)
  if key:
    names = {name.lower(): value for value, name in _KEY_NAMES.items()}
    found['key'], found['mode'] = names[key.group(1)], key.group(2)
  pattern, meaning = _reader()
  for phrase in pattern.findall(text):
    name, value = meaning[phrase]
    found[name] = value
  return found
