"""A story: texts that take over from one another at times of the music.

    0:00 calm piano, 0:15 add drums, 1:02.5 strings alone
"""
from __future__ import annotations

from collections.abc import Sequence
import dataclasses
import itertools
import os
import re

_TIME = re.compile(r'(?:(\d+):)?(\d+):(\d\d(?:\.\d+)?)')
# A word with a colon behind a digit or a sign at the beginning of an entry is meant as a time, well written or not.
_ENTRY = re.compile(r'(?:^|[,;\n])\s*(?=[-+]?\d[\d.]*:)(\S+)')
_LONGEST_FILE = 1 << 16


def parse_time(text: str) -> float:
  """Seconds of "M:SS", "M:SS.s", "H:MM:SS" or a plain number of seconds. Raises ValueError."""
  if match := _TIME.fullmatch(text.strip()):
    hours, minutes, seconds = (float(part or 0) for part in match.groups())
    if seconds < 60 and (minutes < 60 or not match[1]):
      return 3600 * hours + 60 * minutes + seconds
  elif re.fullmatch(r'\d+(\.\d+)?', text.strip()):
    return float(text)
  raise ValueError(f'{text.strip()!r} is no time; write minutes and seconds as 1:05, or hours too as 1:00:05')


@dataclasses.dataclass(frozen=True)
class Story:
  """Texts in turn.

  Attributes:
    entries: (seconds from which on the text holds, text), ascending, the first at 0.
    crossfade: seconds over which one text becomes the next, in MuLan's space, half of them before its time; 0: at once.
  """

  entries: tuple[tuple[float, str], ...]
  crossfade: float = 0.0

  def __post_init__(self):
    if not self.entries:
      raise ValueError('the story has no text; write for example "0:00 calm piano, 0:15 add drums"')
    if self.entries[0][0] != 0:
      raise ValueError(f'the story begins at {_shown(self.entries[0][0])}; its first text must begin at 0:00')
    for (before, _), (time, _) in itertools.pairwise(self.entries):
      if time <= before:
        raise ValueError(f'the story has {_shown(time)} after {_shown(before)}; its times must ascend')
    for time, text in self.entries:
      if not text.strip():
        raise ValueError(f'the story has no text at {_shown(time)}')
    if not 0 <= self.crossfade < float('inf'):
      raise ValueError(f'a cross-fade cannot take {self.crossfade} s')
    for (before, _), (time, _) in itertools.pairwise(self.entries):
      if time - before < self.crossfade:
        raise ValueError(f'a cross-fade of {self.crossfade:g} s does not fit between {_shown(before)} and '
                         f'{_shown(time)}; make it shorter')

  def check(self, seconds: float) -> None:
    """Raises ValueError where the music ends before the last text has begun."""
    last = self.entries[-1][0]
    if last + self.crossfade / 2 >= seconds:
      raise ValueError(f'the story goes on at {_shown(last)}, but the music has only {seconds:g} s; ask for more '
                       'seconds')


def parse(text: str, *, crossfade: float = 0.0) -> Story:
  """A story from its text: entries "TIME TEXT" with a comma, a semicolon or a new line between them.

  A text may have commas of its own. Raises ValueError with what is wrong.
  """
  found = list(_ENTRY.finditer(text))
  before = text[:found[0].start()] if found else text
  if before.strip(' ,;\n\t'):
    raise ValueError(f'the story has no time before {before.strip()[:40]!r}; write for example "0:00 calm piano, 0:15 '
                     'add drums"')
  entries = []
  for match, after in itertools.zip_longest(found, found[1:]):
    words = text[match.end():after.start() if after else len(text)].strip(' ,;\n\t')
    if inside := _TIME.search(words):
      raise ValueError(f'the story has the time {inside[0]} inside a text; write a comma before a time')
    entries.append((parse_time(match[1].rstrip(',;')), ' '.join(words.split())))
  return Story(tuple(entries), crossfade)


def read(text_or_file: str, *, crossfade: float = 0.0) -> Story:
  """As `parse`, of a text or of the file (.txt) that it names."""
  if os.path.isfile(text_or_file) or text_or_file.lower().endswith('.txt'):
    with open(text_or_file, encoding='utf-8', errors='replace') as file:
      content = file.read(_LONGEST_FILE + 1)
    if len(content) > _LONGEST_FILE:
      raise ValueError(f'{text_or_file} is too long for a story')
    return parse(content, crossfade=crossfade)
  return parse(text_or_file, crossfade=crossfade)


def _shown(seconds: float) -> str:
  minutes, rest = divmod(seconds, 60)
  return f'{int(minutes)}:{rest:02.0f}' if rest == int(rest) else f'{int(minutes)}:{rest:06.3f}'.rstrip('0')


def sections(entries: Sequence[tuple[float, str]], seconds: float) -> list[tuple[float, float]]:
  """(from, to) of each text, in seconds."""
  times = [*(time for time, _ in entries), seconds]
  return list(itertools.pairwise(times))
