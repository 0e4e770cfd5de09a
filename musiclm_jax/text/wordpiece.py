"""BERT's text tokenizer: words by rules, then the longest pieces of a vocabulary (arXiv 1810.04805; the rules are those
of the code that was released with it).

It reads the `vocab.txt` of published BERT models, so that their weights can be used for the text tower.
"""
from __future__ import annotations

from collections.abc import Iterator
import re
import unicodedata

PAD, UNKNOWN, END = '[PAD]', '[UNK]', '[SEP]'
_CONTINUES = '##'  # of a piece within a word
_LONGEST_WORD = 100  # characters; longer ones are unknown
# Ideographs, which are words of their own.
_IDEOGRAPHS = ((0x4E00, 0x9FFF), (0x3400, 0x4DBF), (0x20000, 0x2A6DF), (0x2A700, 0x2B73F), (0x2B740, 0x2B81F),
               (0x2B820, 0x2CEAF), (0xF900, 0xFAFF), (0x2F800, 0x2FA1F))


class WordPiece:
  """Ids of a vocabulary with one piece a line; the line is the id, and the first is padding.

  A vocabulary with upper-case pieces is of a model that knows case; for others text is lower-cased, and accents are
  left out.
  """

  def __init__(self, vocabulary: bytes):
    """Raises ValueError where these bytes are no such vocabulary."""
    try:
      # Other ends of lines than these are pieces: bert-base-chinese has U+2028.
      pieces = [line.removesuffix('\r') for line in vocabulary.decode('utf-8').split('\n')]
    except UnicodeDecodeError:
      pieces = []
    while pieces and not pieces[-1]:
      pieces.pop()
    if not pieces or pieces[0] != PAD or UNKNOWN not in pieces or END not in pieces:
      raise ValueError(f'no WordPiece vocabulary: its first line must be {PAD}, and it must have {UNKNOWN} and {END}')
    if len(set(pieces)) < len(pieces):
      twice = next(p for i, p in enumerate(pieces) if p in pieces[:i])
      raise ValueError(f'no WordPiece vocabulary: {twice!r} is there twice')
    self._pieces, self._ids = pieces, {piece: i for i, piece in enumerate(pieces)}
    self.end, self.unknown = self._ids[END], self._ids[UNKNOWN]
    marks = re.compile(r'\[.*\]|<.*>', re.DOTALL)  # [CLS], <S>
    self._knows_case = any(p != p.lower() for p in pieces if not marks.fullmatch(p))

  @property
  def size(self) -> int:
    return len(self._pieces)

  def id_of(self, piece: str) -> int:
    if piece not in self._ids:
      raise ValueError(f'this WordPiece vocabulary has no {piece}')
    return self._ids[piece]

  def encode(self, text: str) -> list[int]:
    return [i for word in self._words(text) for i in self._of_word(word)]

  def decode(self, ids: list[int]) -> str:
    pieces = [self._pieces[i] for i in ids if i != self.end]
    return ' '.join(pieces).replace(f' {_CONTINUES}', '')

  def _words(self, text: str) -> Iterator[str]:
    """Words and single signs of punctuation."""
    if not self._knows_case:
      text = unicodedata.normalize('NFD', text.lower())
      text = ''.join(c for c in text if unicodedata.category(c) != 'Mn')
    word = ''
    for c in text:
      kind = unicodedata.category(c)
      if c in '\t\n\r' or kind == 'Zs':
        apart, c = True, ''
      elif kind.startswith('C') or c == '\ufffd':
        continue
      else:
        apart = _is_punctuation(c, kind) or any(low <= ord(c) <= high for low, high in _IDEOGRAPHS)
      if not apart:
        word += c
        continue
      if word:
        yield word
      if c:
        yield c
      word = ''
    if word:
      yield word

  def _of_word(self, word: str) -> list[int]:
    """The longest piece that begins it, then the longest of the rest; unknown where there is none."""
    if len(word) > _LONGEST_WORD:
      return [self.unknown]
    ids, first = [], 0
    while first < len(word):
      for last in range(len(word), first, -1):
        piece = word[first:last] if not first else _CONTINUES + word[first:last]
        if piece in self._ids:
          break
      else:
        return [self.unknown]
      ids.append(self._ids[piece])
      first = last
    return ids


def _is_punctuation(c: str, kind: str) -> bool:
  """Also the signs of ASCII that Unicode counts as symbols, such as $ and +."""
  return kind.startswith('P') or (c.isascii() and not c.isalnum())
