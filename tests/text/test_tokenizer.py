"""The tokenizer: padding, truncation, nothing unknown, the pinned vocabulary."""
from __future__ import annotations

import hashlib
import io
import pathlib
import pickle
import subprocess
import sys

import numpy as np
import pytest
import sentencepiece

from musiclm_jax.data import composer
from musiclm_jax.text import tokenizer
from musiclm_jax.text.tokenizer import Tokenizer

# Trained models depend on this file byte by byte: change it only together with them.
BUILTIN_SHA256 = 'c50ec3db84914728155c67f410bac88559bec326425774d8a9243fec52b7c45f'


@pytest.fixture(scope='module')
def builtin() -> Tokenizer:
  return Tokenizer.load()


def test_the_built_in_vocabulary_is_the_pinned_file(builtin):
  file = pathlib.Path(tokenizer.__file__).with_name('english.model')
  assert hashlib.sha256(file.read_bytes()).hexdigest() == builtin.content_hash == BUILTIN_SHA256
  assert 258 < builtin.vocab_size <= 2000
  assert builtin.encode('A calm piano piece, 120 bpm', 12).tolist() == [
      259, 348, 303, 293, 258, 274, 1159, 1160, 1158, 555, 0, 0]


def test_encoding_pads_with_zeros_and_truncates(builtin):
  text = 'a sad violin over a walking bass'
  whole = builtin.encode(text, 40)
  count = builtin.length_of(text)
  assert whole.dtype == np.int32 and whole.shape == (40,)
  assert np.all(whole[:count] > 0) and np.all(whole[count:] == 0)
  np.testing.assert_array_equal(builtin.encode(text, 3), whole[:3])
  batch = builtin.encode_batch([text, ''], 40)
  np.testing.assert_array_equal(batch, np.stack([whole, np.zeros(40, np.int32)]))
  assert builtin.encode_batch([], 5).shape == (0, 5)


@pytest.mark.parametrize('text', [
    'très étrange — 日本 🎸', 'zzyzx qwrtp', "rock'n'roll & R&B #1 (live)", 'ß ﬁ Ⅳ'])
def test_nothing_is_unknown(builtin, text):
  ids = builtin.encode(text, 100)
  assert 1 not in ids  # the unknown id
  again = builtin.decode(ids)
  assert again and builtin.decode(builtin.encode(again, 100)) == again


def test_case_does_not_matter(builtin):
  mixed, lower = builtin.encode('Happy JAZZ Flute', 12), builtin.encode('happy jazz flute', 12)
  np.testing.assert_array_equal(mixed, lower)


def test_composer_texts_survive_and_stay_short(builtin):
  lengths = []
  for split in composer.SPLITS:
    for i in range(30):
      for said in composer.texts(composer.compose(20, i, 3.0), split):
        assert builtin.decode(builtin.encode(said['text'], 128)) == said['text'].lower()
        lengths.append(builtin.length_of(said['text']) / len(said['text'].split()))
  assert np.mean(lengths) < 1.8  # tokens a word


def test_empty_and_very_long_prompts(builtin):
  assert builtin.length_of('') == builtin.length_of('  \n') == 0
  assert not builtin.encode('', 8).any()
  assert builtin.length_of('loud drums ' * 5000) == 10000
  assert builtin.encode('loud drums ' * 5000, 64).all()
  with pytest.raises(ValueError, match='length >= 1, found 0'):
    builtin.encode('a', 0)


def test_training_is_deterministic_and_limited():
  sentences = [f'{tempo} {mood} music with {what}' for tempo in ('slow', 'fast') for mood in ('happy', 'sad')
               for what in ('Drums', 'bells')]
  first, second = Tokenizer.train(sentences, 320), Tokenizer.train(iter(sentences), 320)
  assert first == second and first.content_hash == second.content_hash
  assert first != Tokenizer.train(sentences[:4], 320)
  assert 258 < first.vocab_size <= 320
  assert first.decode(first.encode('SLOW drums', 30)) == 'slow drums'
  assert first.encode('slow drums', 1)[0] > 0


def test_models_travel_as_bytes_files_and_pickles(builtin, tmp_path):
  path = tmp_path / 'some.model'
  path.write_bytes(builtin.model_bytes)
  copied = pickle.loads(pickle.dumps(builtin))
  for other in (Tokenizer(builtin.model_bytes), Tokenizer.load(path), copied):
    assert other == builtin and hash(other) == hash(builtin)
    np.testing.assert_array_equal(other.encode('soft organ', 6), builtin.encode('soft organ', 6))


def test_errors_name_the_cause(tmp_path):
  with pytest.raises(FileNotFoundError, match='no vocabulary file .*missing.model'):
    Tokenizer.load(tmp_path / 'missing.model')
  (tmp_path / 'broken.model').write_bytes(b'not a model')
  with pytest.raises(ValueError, match='broken.model: 11 bytes are no SentencePiece model and no WordPiece vocabulary'):
    Tokenizer.load(tmp_path / 'broken.model')
  with pytest.raises(ValueError, match='no SentencePiece model'):
    Tokenizer(b'')
  with pytest.raises(ValueError, match='at least one sentence'):
    Tokenizer.train([' '], 300)
  with pytest.raises(ValueError, match='no vocabulary of 100 pieces'):
    Tokenizer.train(['slow music'], 100)


def test_a_model_with_another_padding_id_is_refused():
  model = io.BytesIO()
  sentencepiece.SentencePieceTrainer.train(
      sentence_iterator=iter(['slow music']), model_writer=model, vocab_size=20, hard_vocab_limit=False,
      minloglevel=2)
  with pytest.raises(ValueError, match='padding id -1, not 0'):
    Tokenizer(model.getvalue())


def test_no_tensorflow_is_needed():
  code = ('import sys, musiclm_jax.data.composer, musiclm_jax.text.tokenizer as t; t.Tokenizer.load(); '
          'assert not {"tensorflow", "jax", "seqio"} & set(sys.modules)')
  subprocess.run([sys.executable, '-c', code], check=True, timeout=900,
                 cwd=pathlib.Path(tokenizer.__file__).parents[2])
