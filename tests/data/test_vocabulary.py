"""A vocabulary from the texts of a corpus."""
from __future__ import annotations

import pytest

from musiclm_jax import main
from musiclm_jax.data import prepare
from musiclm_jax.text.tokenizer import Tokenizer


@pytest.fixture(scope='module')
def music(tmp_path_factory):
  path = tmp_path_factory.mktemp('music') / 'built_in'
  prepare.prepare_composer(12, path, workers=1)
  return path


def run(*arguments):
  with pytest.raises(SystemExit) as stopped:
    main.main(['vocabulary', *map(str, arguments)])
  return stopped.value.code


def test_records_captions_and_lines_make_one_vocabulary(music, tmp_path, capsys):
  (tmp_path / 'captions.csv').write_text('file,caption\na.wav,gamelan gamelan orchestra\nb.wav,gamelan orchestra\n')
  (tmp_path / 'more.txt').write_text('zither zither\n\nzither music\n')
  sources = [music, tmp_path / 'captions.csv', tmp_path / 'more.txt']
  assert run(*sources, '--size', 600, '--output', tmp_path / 'mine.model') == 0
  said = capsys.readouterr().out
  made = Tokenizer.load(tmp_path / 'mine.model')
  assert f'{made.vocab_size} pieces' in said and 258 < made.vocab_size <= 600
  assert f'MULAN_TEXT_VOCAB to {-(-made.vocab_size // 128) * 128}' in said
  alone = tmp_path / 'alone.model'
  assert run(music, '--size', 600, '--output', alone) == 0
  for word in ('gamelan', 'zither'):
    assert made.length_of(word) < Tokenizer.load(alone).length_of(word)


@pytest.mark.parametrize('name, content, message', [
    ('empty.txt', '\n \n', 'empty.txt has no texts'),
    ('names.csv', 'file,title\na.wav,b\n', 'names.csv has no texts'),
    ('latin.txt', 'caf\xe9'.encode('latin-1'), 'latin.txt is not UTF-8 text'),
    ('few.txt', 'slow music', 'no vocabulary of 100 pieces'),
])
def test_what_gives_no_vocabulary_says_why_and_writes_nothing(tmp_path, capsys, name, content, message):
  (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
  output = tmp_path / 'made.model'
  assert run(tmp_path / name, '--size', 100, '--output', output) == 1
  error = capsys.readouterr().err.strip()
  assert message in error and len(error.splitlines()) == 1
  assert not output.exists()
