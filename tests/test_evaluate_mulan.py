"""A MuLan on a folder with tags, playlists or captions: figures are those of the embeddings."""
from __future__ import annotations

import json

import jax
import numpy as np
import pytest
import soundfile

from musiclm_jax import evaluate_mulan as evaluation, main, search
from musiclm_jax.data import composer
from musiclm_jax.evaluation import language
from musiclm_jax.mulan.model import VOCABULARY_ASSET
from musiclm_jax.text.tokenizer import Tokenizer
from tests.trainings import experiment


@pytest.fixture(scope='module')
def run(tmp_path_factory):
  folder = tmp_path_factory.mktemp('runs') / 'mulan'
  experiment('mulan', NUM_STEPS=0, **{'partition.Partitioner.data': 1}).build(workdir=str(folder), dry_run=False)
  return folder


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  music = tmp_path_factory.mktemp('music')
  for i in range(6):
    audio = np.asarray(composer.Corpus(first=i, size=1, seconds=1.0 + 0.4 * i)[0]['audio'])
    soundfile.write(music / f'{i}.wav', audio, 24000, subtype='FLOAT')
  soundfile.write(music / 'silent.wav', np.zeros(48000), 24000)
  return music


TAGS = {'0': ['slow', 'flute'], '1': ['slow'], '2': ['flute'], '3': [], '4': ['slow', 'never heard'], '5': ['flute']}


def embeddings(run, folder, texts):
  """Of the six clips and of texts, each for itself."""
  loaded = search.load(run)
  model, tokenizer = loaded.model, Tokenizer(loaded.assets[VOCABULARY_ASSET])
  embed = jax.jit(model.embed_audio)
  audio = np.concatenate([embed(soundfile.read(folder / f'{i}.wav', dtype='float32')[0][None]) for i in range(6)])
  return audio, np.asarray(model.embed_text(tokenizer.encode_batch(texts, model.config.text.length)))


def test_zero_shot_tags_by_hand(run, folder, tmp_path):
  table = tmp_path / 'tags.csv'
  table.write_text('file,tags\n' + ''.join(f'{name}.wav,"{",".join(tags)}"\n' for name, tags in TAGS.items()))
  result = evaluation.evaluate_mulan(run, folder, tmp_path / 'out', tags=[table])
  tags = ('slow', 'flute', 'never heard')
  audio, text = embeddings(run, folder, tags)
  labels = np.array([[tag in TAGS[str(i)] for tag in tags] for i in range(6)])
  expected = language.zero_shot_figures(audio, text, labels, tags)
  found = json.loads((tmp_path / 'out' / 'mulan.json').read_text())
  assert found['zero_shot']['macro_auc'] == pytest.approx(expected['macro_auc'])
  assert found['zero_shot']['tags'] == expected['tags']
  assert 'linear_probe' not in found and any('no linear probe' in note for note in found['notes'])
  assert found['skipped'] == {'silent': ['silent.wav']}
  assert f'{expected["macro_auc"]:.3f}' in result.text()


def test_a_collection_with_a_split_is_fitted_and_measured_on_it(run, folder, tmp_path, monkeypatch):
  monkeypatch.setattr(evaluation, '_LEAST_TO_FIT', 2)
  for i, name in enumerate(('0', '1', 'a', 'd', 'e', 'f')):
    (tmp_path / 'mtat' / name).mkdir(parents=True)
    (tmp_path / 'mtat' / name / 'x.wav').write_bytes((folder / f'{i}.wav').read_bytes())
  rows = '\n'.join(f'"{i}"\t"{i % 2}"\t"{name}/x.wav"' for i, name in enumerate(('0', '1', 'a', 'd', 'e', 'f')))
  (tmp_path / 'annotations_final.csv').write_text('"clip_id"\t"flute"\t"mp3_path"\n' + rows + '\n')
  figures = evaluation.evaluate_mulan(
      run, tmp_path / 'mtat', tmp_path / 'out', tags=[tmp_path / 'annotations_final.csv']).figures
  assert figures['layout'] == 'magnatagatune' and figures['recordings'] == 6
  audio, text = embeddings(run, folder, ['flute'])
  labels = np.array([[i % 2] for i in range(6)])  # d, e and f are measured; the others are fitted on
  expected = language.zero_shot_figures(audio[3:], text, labels[3:], ['flute'])
  assert figures['zero_shot']['tags'] == expected['tags']
  assert figures['zero_shot']['top_50']['macro_auc'] == pytest.approx(expected['macro_auc'])
  probed = language.linear_probe_figures(audio[:3], labels[:3], audio[3:], labels[3:], ['flute'])
  assert figures['linear_probe']['tags'] == probed['tags']


def test_the_frequent_tags_are_those_of_all_that_is_there():
  row = lambda auc, share: {'auc': auc, 'ap': auc / 2, 'share': share}
  figures = {'tags': {'flute': row(0.8, 0.1), 'choir': row(0.4, 0.9), 'harp': row(0.6, 0.2)}}
  top = evaluation._with_top(figures, ['harp', 'flute', 'never measured'])['top_50']  # choir is frequent here alone
  assert top == pytest.approx({'macro_auc': 0.7, 'macro_ap': 0.35})
  assert evaluation._with_top(figures, []) == figures


def test_playlists_are_found_by_their_titles(run, folder, tmp_path):
  (tmp_path / 'slow.m3u').write_text('0.wav\n1.wav\n')
  (tmp_path / 'fast.m3u').write_text('#PLAYLIST:fast ones\n3.wav\n4.wav\n')
  figures = evaluation.evaluate_mulan(
      run, folder, tmp_path, tags=[tmp_path / 'slow.m3u', tmp_path / 'fast.m3u']).figures
  audio, text = embeddings(run, folder, ['slow', 'fast ones'])
  labels = np.array([[1, 0], [1, 0], [0, 0], [0, 1], [0, 1], [0, 0]])
  assert figures['zero_shot']['tags'] == language.zero_shot_figures(audio, text, labels, ['slow', 'fast ones'])['tags']
  assert figures['by_title'] == pytest.approx(language.ranking_figures(text @ audio.T, labels.T))
  # One list is told apart from the rest of the folder.
  one = evaluation.evaluate_mulan(run, folder, tmp_path, tags=[tmp_path / 'slow.m3u']).figures
  assert one['zero_shot']['tags'] == {'slow': figures['zero_shot']['tags']['slow']}


def test_captions_find_their_recordings(run, folder, tmp_path):
  (tmp_path / 'captions.csv').write_text('file,caption\n0.wav,a slow flute\n1.wav,loud drums\n2.wav,loud drums\n')
  figures = evaluation.evaluate_mulan(run, folder, tmp_path, captions=tmp_path / 'captions.csv').figures
  audio, text = embeddings(run, folder, ['a slow flute', 'loud drums', 'loud drums'])
  relevant = np.array([[1, 0, 0], [0, 1, 1], [0, 1, 1]])
  assert figures['captions'] == pytest.approx({
      'recordings': 3, 'recall_at_1_chance': 5 / 9, **language.ranking_figures(text @ audio[:3].T, relevant)})
  with pytest.raises(ValueError, match='has no captions: give --tags or --captions'):
    evaluation.evaluate_mulan(run, folder, tmp_path)


@pytest.mark.parametrize('flags, code, message', [
    (['--mulan', 'RUN', '--codec', 'RUN', '--audio_dir', 'MUSIC'], 2, 'give either --workdir'),
    (['--mulan', 'RUN'], 2, 'give either --workdir'),
    (['--mulan', 'RUN', '--audio_dir', 'MUSIC', '--seed', '1'], 2, '--seed does not concern --mulan'),
    (['--mulan', 'RUN', '--audio_dir', 'MUSIC', '--tag_names', 'MUSIC'], 2, '--tag_names belongs to --tags'),
    (['--codec', 'RUN', '--audio_dir', 'MUSIC', '--tags', 'MUSIC'], 2, '--tags belongs to --mulan'),
    (['--mulan', 'RUN', '--audio_dir', 'MUSIC', '--tags', 'nowhere.csv'], 1, "there is nothing at 'nowhere.csv'"),
])
def test_the_command_says_what_is_wrong(run, folder, capsys, flags, code, message):
  given = [{'RUN': str(run), 'MUSIC': str(folder)}.get(f, f) for f in flags]
  with pytest.raises(SystemExit) as stopped:
    main.main(['evaluate', *given])
  error = capsys.readouterr().err
  assert stopped.value.code == code and message in error and len(error.splitlines()) == 1
