"""A vocabulary for the text tower, trained on the texts of a corpus."""
from __future__ import annotations

from collections.abc import Iterator, Sequence
import os
import pathlib

from musiclm_jax.data import captions, records
from musiclm_jax.text.tokenizer import Tokenizer


def train(sources: Sequence[str | os.PathLike], output: str | os.PathLike, *, size: int = 8000,
          caption_column: str | None = None) -> str:
  """Writes a SentencePiece model of at most `size` pieces to `output`; returns a line about it.

  Args:
    sources: record sets (their split "train"), caption files, or .txt files with a text a line.
    caption_column: of caption files, where it is another one than usual.

  Raises ValueError where a source has no texts, or they do not give such a vocabulary.
  """
  texts = []
  for source in sources:
    found = list(_texts(pathlib.Path(source), caption_column))
    if not found:
      raise ValueError(f'{os.fspath(source)} has no texts')
    texts += found
  tokenizer = Tokenizer.train(texts, size)
  with records.replacing(output) as file:
    file.write(tokenizer.model_bytes)
  pieces = sum(tokenizer.length_of(text) for text in texts)
  words = sum(len(text.split()) for text in texts)
  rows = -(-tokenizer.vocab_size // 128) * 128
  return (f'{os.fspath(output)}: {tokenizer.vocab_size} pieces from {len(texts):,} texts, {pieces / words:.2f} pieces '
          f'a word; set MULAN_VOCABULARY to it, and MULAN_TEXT_VOCAB to {rows} or more')


def _texts(source: pathlib.Path, caption_column: str | None) -> Iterator[str]:
  if source.is_dir():
    corpus = records.RecordSet(source, 'train')
    for i in range(len(corpus)):
      yield from (text['text'] for text in corpus[i].get('texts', ()))
  elif source.suffix.lower() == '.txt':
    try:
      lines = source.read_text(encoding='utf-8-sig').splitlines()
    except UnicodeDecodeError as error:
      raise ValueError(f'{source} is not UTF-8 text: {error}') from None
    yield from (line for line in lines if line.strip())
  else:
    for row in captions.read_table(source):
      yield from (text['text'] for text in captions.row_texts(row, caption_column))
