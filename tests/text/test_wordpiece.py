"""WordPiece: BERT's rules by hand on a small vocabulary, and a published implementation."""
from __future__ import annotations

import numpy as np
import pytest

from musiclm_jax.text.tokenizer import Tokenizer

PIECES = ['[PAD]', '[UNK]', '[CLS]', '[SEP]', 'slow', 'strings', 'string', '##s', 'in', 'a', 'minor', 'key', ',', '.',
          'drum', '##ming', '日', '本', 'cafe', "'", 'rock', 'n', '$', '5', '##5', '+']
VOCABULARY = ('\n'.join(PIECES) + '\n').encode()


@pytest.fixture(scope='module')
def tokenizer():
  return Tokenizer(VOCABULARY)


@pytest.mark.parametrize('text, pieces', [
    ('Slow strings, in a minor key.', ['slow', 'strings', ',', 'in', 'a', 'minor', 'key', '.']),
    ('drumming', ['drum', '##ming']),
    ('drums drummer', ['drum', '##s', '[UNK]']),
    ('CAFÉ\u0301', ['cafe']),
    ('日本', ['日', '本']),
    ("rock'n'rock", ['rock', "'", 'n', "'", 'rock']),
    ('$55+', ['$', '5', '##5', '+']),
    ('a\u00a0\tkey\x00\ufffd\u200b', ['a', 'key']),
    ('a' * 101, ['[UNK]']),
    ('🎸 slow', ['[UNK]', 'slow']),
])
def test_words_and_their_longest_pieces(tokenizer, text, pieces):
  expected = [PIECES.index(p) for p in pieces] + [PIECES.index('[SEP]')]
  assert tokenizer.length_of(text) == len(expected)
  np.testing.assert_array_equal(tokenizer.encode(text, 12), expected + [0] * (12 - len(expected)))


def test_prompts_of_which_nothing_is_known_are_refused(tokenizer):
  expected = [PIECES.index(p) for p in ('slow', '[UNK]', '[SEP]', '[PAD]')]
  assert tokenizer.encode_prompt('slow dubstep', 4).tolist() == expected
  for text in ('dubstep trance', '🎸, 🎹!', 'Ελληνικά'):
    with pytest.raises(ValueError, match=f"knows nothing of the query '{text}'"):
      tokenizer.encode_prompt(text, 8, 'query')


def test_a_text_that_is_cut_keeps_its_end(tokenizer):
  assert tokenizer.encode('slow strings in a minor key', 3).tolist() == [4, 5, 3]
  assert tokenizer.length_of('') == tokenizer.length_of(' \n') == 0
  assert not tokenizer.encode('', 4).any()
  assert tokenizer.length_of('key ' * 10000) == 10001


def test_what_it_reads_comes_back(tokenizer):
  assert tokenizer.vocab_size == len(PIECES)
  assert tokenizer.decode(tokenizer.encode('Slow drumming, in a key.', 20)) == 'slow drumming , in a key .'
  assert Tokenizer(tokenizer.model_bytes) == tokenizer


def test_a_vocabulary_with_case_keeps_it():
  cased = Tokenizer('\n'.join([*PIECES, 'Slow', 'É']).encode())
  assert cased.encode('Slow slow É', 4).tolist() == [len(PIECES), 4, len(PIECES) + 1, 3]


def test_ends_of_lines_and_marks_are_those_of_published_files():
  """Pieces that other programs take for ends of lines, files of Windows, and marks that are no words."""
  made = Tokenizer('\r\n'.join([*PIECES, '\u2028', '\x85', '<S>']).encode())
  assert made.vocab_size == len(PIECES) + 3
  assert made.encode('Slow key', 3).tolist() == [4, 11, 3]  # <S> does not mean that it knows case


@pytest.mark.parametrize('pieces, message', [
    (['[PAD]', 'a'], r'it must have \[UNK\] and \[SEP\]'),
    (['[PAD]', '[UNK]', '[SEP]', 'a', 'a'], "'a' is there twice"),
])
def test_other_files_are_refused(tmp_path, pieces, message):
  path = tmp_path / 'vocab.txt'
  path.write_text('\n'.join(pieces))
  with pytest.raises(ValueError, match=f'vocab.txt: no WordPiece vocabulary: .*{message}'):
    Tokenizer.load(path)


def test_it_reads_as_the_published_implementation(tmp_path):
  transformers = pytest.importorskip('transformers')
  (tmp_path / 'vocab.txt').write_bytes(VOCABULARY)
  theirs = transformers.BertTokenizer(str(tmp_path / 'vocab.txt'))
  for text in ("Slow strings, in a minor key.", 'drumming drums DRUMMER', 'Café CAFÉ\u0301 naïve', '日本 slow日',
               "rock'n'rock $55+ a_b", 'a\u00a0\tkey\x00\u200b', 'a' * 101, '🎸slow', 'İstanbul ß ﬁ', '...', ''):
    ids = theirs(text)['input_ids'][1:]
    ours = Tokenizer(VOCABULARY).encode(text, 40)
    np.testing.assert_array_equal(ours[ours > 0], ids if len(ids) > 1 else [])
