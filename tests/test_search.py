"""Search by words: the ranking is that of the embeddings, and the index follows the folder."""
from __future__ import annotations

import os
import shutil

import jax
import numpy as np
import pytest
import soundfile

from musiclm_jax import main, search as searching
from musiclm_jax.data import composer
from musiclm_jax.mulan.model import VOCABULARY_ASSET
from musiclm_jax.text.tokenizer import Tokenizer
from tests.trainings import experiment

QUERY = 'a slow flute, no drums'


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
  """Two MuLans at size nano with random weights."""
  folder = tmp_path_factory.mktemp('runs')
  for name, seed in (('mulan', 0), ('other', 1)):
    built = experiment('mulan', NUM_STEPS=0, SEED=seed, **{'partition.Partitioner.data': 1})
    built.build(workdir=str(folder / name), dry_run=False)
  return folder


def music(index: int, seconds: float) -> np.ndarray:
  return np.asarray(composer.Corpus(first=index, size=1, seconds=seconds)[0]['audio'], np.float64)


@pytest.fixture
def folder(tmp_path):
  (tmp_path / 'music' / 'below').mkdir(parents=True)
  for i, (name, seconds) in enumerate((('a', 2.5), ('b', 1.0), ('below/c', 12.0))):
    soundfile.write(tmp_path / 'music' / f'{name}.wav', music(i, seconds), 24000, subtype='FLOAT')
  soundfile.write(tmp_path / 'music' / 'silent.wav', np.zeros(24000), 24000)
  (tmp_path / 'music' / 'broken.flac').write_bytes(b'no music')
  return tmp_path / 'music'


def find(runs, folder, tmp_path, **options):
  return searching.search(runs / 'mulan', folder, QUERY, index=tmp_path / 'index', **options)


def test_recordings_are_ranked_by_their_best_clip(runs, folder, tmp_path):
  found = find(runs, folder, tmp_path)
  loaded = searching.load(runs)
  model, tokenizer = loaded.model, Tokenizer(loaded.assets[VOCABULARY_ASSET])
  text = np.asarray(model.embed_text(tokenizer.encode(QUERY, model.config.text.length)[None]))[0]
  window, embed = model.config.audio.window_samples, jax.jit(model.embed_window)
  expected = {}
  for name in ('a.wav', 'b.wav', 'below/c.wav'):
    audio = soundfile.read(folder / name, dtype='float32')[0]
    clips = [audio[i:i + window] for i in range(0, len(audio), window)]
    clips = [c for i, c in enumerate(clips) if not i or len(c) >= 24000]
    scores = [float(np.asarray(embed(clip[None]))[0] @ text) for clip in clips]
    best = int(np.argmax(scores))
    expected[name] = (best * window / 24000, scores[best])
  assert [hit.name for hit in found.hits] == sorted(expected, key=lambda n: -expected[n][1])
  for hit in found.hits:
    assert (hit.start, hit.score) == pytest.approx(expected[hit.name], abs=1e-5)
  assert found.recordings == 3 and found.left_out == {'silent': ('silent.wav',), 'unreadable': ('broken.flac',)}
  assert len(find(runs, folder, tmp_path, top=1).hits) == 1


def test_the_index_follows_the_folder(runs, folder, tmp_path):
  first = find(runs, folder, tmp_path)
  assert first.read == 3
  again = find(runs, folder, tmp_path)
  assert again.read == 0 and again.hits == first.hits
  soundfile.write(folder / 'b.wav', music(7, 1.5), 24000, subtype='FLOAT')
  os.remove(folder / 'a.wav')
  shutil.copy(folder / 'below' / 'c.wav', folder / 'd.wav')
  changed = find(runs, folder, tmp_path)
  assert (changed.read, changed.forgotten, changed.recordings) == (2, 1, 3)
  os.remove(tmp_path / 'index')
  fresh = find(runs, folder, tmp_path)
  score = lambda found: {hit.name: pytest.approx(hit.score, abs=1e-6) for hit in found.hits}
  assert score(changed) == {hit.name: hit.score for hit in fresh.hits}


def test_what_was_read_before_a_stop_is_not_read_again(runs, folder, tmp_path, monkeypatch):
  monkeypatch.setattr(searching, '_SAVE_EVERY', 1)
  read = searching._Engine.embed_file

  def stops(self, path):
    if path.endswith(b'c.wav'):
      raise KeyboardInterrupt
    return read(self, path)

  monkeypatch.setattr(searching._Engine, 'embed_file', stops)
  with pytest.raises(KeyboardInterrupt):
    find(runs, folder, tmp_path)
  monkeypatch.setattr(searching._Engine, 'embed_file', read)
  assert find(runs, folder, tmp_path).read == 1


def test_other_networks_and_damaged_indices_are_refused(runs, folder, tmp_path):
  find(runs, folder, tmp_path)
  before = (tmp_path / 'index').read_bytes()
  with pytest.raises(ValueError, match='was made by MuLan .*, this is .*: name another --index, or delete it'):
    searching.search(runs / 'other', folder, QUERY, index=tmp_path / 'index')
  assert (tmp_path / 'index').read_bytes() == before
  (tmp_path / 'index').write_bytes(before[:100])
  with pytest.raises(ValueError, match='is no search index, or a damaged one'):
    find(runs, folder, tmp_path)


def test_a_folder_without_music_leaves_the_index_as_it_was(runs, folder, tmp_path):
  find(runs, folder, tmp_path)
  before = (tmp_path / 'index').read_bytes()
  (tmp_path / 'none').mkdir()  # a disk that is not there
  with pytest.raises(ValueError, match='no usable audio'):
    find(runs, tmp_path / 'none', tmp_path)
  assert (tmp_path / 'index').read_bytes() == before


@pytest.mark.parametrize('query, message', [
    ('', 'the query is empty'), (' \n', 'the query is empty'), ('loud drums ' * 5000, 'the text tower reads 48')])
def test_queries_without_words_or_too_long_are_refused(runs, folder, tmp_path, query, message):
  with pytest.raises(ValueError, match=message):
    searching.search(runs, folder, query, index=tmp_path / 'index')


def test_the_command(runs, folder, tmp_path, capsys):
  with pytest.raises(SystemExit) as stopped:
    main.main(['mulan', 'search', '日本 🎸', '--mulan', str(runs / 'mulan'), '--audio_dir', str(folder)])
  said = capsys.readouterr().out
  assert stopped.value.code == 0 and '3 recordings' in said and 'left out (silent): silent.wav' in said
  assert len(list((runs / 'mulan' / 'search').iterdir())) == 1
  with pytest.raises(SystemExit) as stopped:
    main.main(['mulan', 'search', QUERY, '--mulan', str(runs / 'mulan'), '--audio_dir', str(folder / 'nowhere')])
  assert stopped.value.code == 1 and len(capsys.readouterr().err.splitlines()) == 1
