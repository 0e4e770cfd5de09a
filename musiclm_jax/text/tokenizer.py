"""Text tokenizer without TensorFlow: a SentencePiece model (arXiv 1808.06226) or BERT's WordPiece, with one padding id.

Legend: B batch, L length.
"""
from __future__ import annotations

from collections.abc import Iterable
import functools
import hashlib
import io
import os
import pathlib

import numpy as np
import sentencepiece

from musiclm_jax.text import wordpiece

PAD_ID = 0
_BUILTIN = pathlib.Path(__file__).with_name('english.model')


class Tokenizer:
  """Ids of a SentencePiece model or of a WordPiece vocabulary; id 0 is padding and never stands for text.

  Normalisation is part of the model: NFKC and lower case for those that `train` made, in which unknown characters
  become bytes, so no text is lost. Of a WordPiece vocabulary every text ends with the piece [SEP], as BERT has learned
  it. Two tokenizers are equal when their models are the same bytes.

  Attributes:
    model_bytes: the serialised model, or the vocabulary's lines; `Tokenizer(model_bytes)` gives the same one back.
  """

  def __init__(self, model_bytes: bytes):
    """Raises ValueError where the bytes are neither, or the padding id is not 0."""
    self.model_bytes = bytes(model_bytes)
    of_lines = self.model_bytes.startswith(wordpiece.PAD.encode())
    self._model = wordpiece.WordPiece(self.model_bytes) if of_lines else _SentencePiece(self.model_bytes)

  @classmethod
  def load(cls, vocabulary: str | os.PathLike = 'builtin') -> Tokenizer:
    """Reads a SentencePiece model or the `vocab.txt` of a BERT.

    "builtin" is the vocabulary that comes with the package: English words of music.

    Raises FileNotFoundError, or ValueError for a file of another kind.
    """
    if vocabulary == 'builtin':
      return cls(_builtin_bytes())
    path = pathlib.Path(vocabulary)
    if not path.is_file():
      raise FileNotFoundError(f'no vocabulary file {path}')
    try:
      return cls(path.read_bytes())
    except ValueError as error:
      raise ValueError(f'{path}: {error}') from None

  @classmethod
  def train(cls, sentences: Iterable[str], vocab_size: int) -> Tokenizer:
    """A unigram model of at most `vocab_size` pieces, 258 of which are padding, unknown and the bytes.

    The same sentences in the same order give the same bytes. Raises ValueError where there are no sentences
    or `vocab_size` has no room for the bytes and the characters of the text.
    """
    sentences = [sentence for sentence in sentences if sentence.strip()]
    if not sentences:
      raise ValueError('a vocabulary needs at least one sentence to train on')
    model = io.BytesIO()
    try:
      sentencepiece.SentencePieceTrainer.train(
          sentence_iterator=iter(sentences), model_writer=model, vocab_size=vocab_size, model_type='unigram',
          byte_fallback=True, hard_vocab_limit=False, character_coverage=1.0, num_threads=1,
          split_digits=True, max_sentence_length=1 + max(len(s.encode()) for s in sentences),
          shuffle_input_sentence=False, normalization_rule_name='nmt_nfkc_cf',
          pad_id=PAD_ID, unk_id=1, bos_id=-1, eos_id=-1, minloglevel=2)
    except RuntimeError as error:
      reason = str(error).rpartition('] ')[2] or str(error)
      raise ValueError(
          f'no vocabulary of {vocab_size} pieces from {len(sentences)} sentences: {reason}') from None
    return cls(model.getvalue())

  @property
  def vocab_size(self) -> int:
    """Ids lie in [0, vocab_size), padding included."""
    return self._model.size

  @property
  def content_hash(self) -> str:
    """SHA-256 of the model, in hexadecimal."""
    return hashlib.sha256(self.model_bytes).hexdigest()

  def encode(self, text: str, length: int) -> np.ndarray:
    """Ids of `text` as int32 [length]: its first tokens, then zeros.

    A longer text is cut, its end piece is not; `length_of` tells by how much. Raises ValueError for a length below 1.
    """
    if length < 1:
      raise ValueError(f'encode needs length >= 1, found {length}')
    return _padded(self._with_end(self._model.encode(text), length), length)

  def encode_batch(self, texts: Iterable[str], length: int) -> np.ndarray:
    """`encode` of each text, int32 [B, length]."""
    rows = [self.encode(text, length) for text in texts]
    return np.stack(rows) if rows else np.zeros((0, length), np.int32)

  def encode_prompt(self, text: str, length: int, name: str = 'prompt') -> np.ndarray:
    """As `encode`, for what a user asks for.

    Raises ValueError, with the `name` of the text, for one that is empty, that is longer than `length`, or in which the
    vocabulary knows nothing: the answer would be the same to any other such text.
    """
    ids = self._with_end(self._model.encode(text))
    if not ids:
      raise ValueError(f'the {name} is empty; describe the music in words')
    if len(ids) > length:
      raise ValueError(f'the {name} has {len(ids)} tokens, the text tower reads {length}; shorten it')
    known = [i for i in ids if i not in (self._model.unknown, self._model.end)]
    if not any(c.isalnum() for c in self._model.decode(known)):
      raise ValueError(f'the vocabulary knows nothing of the {name} {text!r}; say it in other words')
    return _padded(ids, length)

  def decode(self, ids_L: Iterable[int]) -> str:
    """The text of ids, normalised as the model does (lower case); padding is left out."""
    return self._model.decode([int(i) for i in ids_L if i != PAD_ID])

  def length_of(self, text: str) -> int:
    """Number of tokens of the whole text; 0 for one in which there is nothing."""
    return len(self._with_end(self._model.encode(text)))

  def _with_end(self, ids: list[int], length: int | None = None) -> list[int]:
    if not ids or self._model.end is None:
      return ids[:length]
    return [*(ids if length is None else ids[:length - 1]), self._model.end]

  def __eq__(self, other: object) -> bool:
    return isinstance(other, Tokenizer) and self.model_bytes == other.model_bytes

  def __hash__(self) -> int:
    return hash(self.model_bytes)

  def __reduce__(self):
    return Tokenizer, (self.model_bytes,)

  def __repr__(self) -> str:
    return f'Tokenizer(vocab_size={self.vocab_size}, content_hash={self.content_hash[:12]})'


def _padded(ids: list[int], length: int) -> np.ndarray:
  """Ids int32 [length], filled up with the padding id."""
  return np.array(ids + [PAD_ID] * (length - len(ids)), np.int32)


class _SentencePiece:
  """A SentencePiece model, as `WordPiece` is one of WordPiece."""

  end = None

  def __init__(self, model: bytes):
    try:
      processor = sentencepiece.SentencePieceProcessor(model_proto=model)
      pad, self.unknown, self.size = processor.pad_id(), processor.unk_id(), processor.vocab_size()
    except RuntimeError:
      pad, self.size = None, 0
    if not self.size:
      raise ValueError(f'{len(model)} bytes are no SentencePiece model and no WordPiece vocabulary')
    if pad != PAD_ID:
      raise ValueError(
          f'this SentencePiece model has padding id {pad}, not {PAD_ID}: train it with pad_id={PAD_ID}')
    self.encode, self.decode = processor.encode, processor.decode


@functools.cache
def _builtin_bytes() -> bytes:
  return _BUILTIN.read_bytes()
