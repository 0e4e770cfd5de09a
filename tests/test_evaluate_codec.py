"""A codec on a folder of audio: the figures are those of the clips alone, and nothing that cannot be measured is."""
from __future__ import annotations

import csv
import json
import tracemalloc
import types

from flax import nnx
import numpy as np
import pytest
import soundfile

from musiclm_jax import evaluate_codec as evaluation
from musiclm_jax import main, transcode
from musiclm_jax.data import composer
from musiclm_jax.evaluation import audio_measures, opus
from musiclm_jax.training import state as states
from tests.trainings import experiment, make_codec


@pytest.fixture(scope='module')
def run(tmp_path_factory):
  return make_codec(tmp_path_factory.mktemp('runs'))


def music(index: int, seconds: float) -> np.ndarray:
  return np.asarray(composer.Corpus(first=index, size=1, seconds=seconds)[0]['audio'], np.float64)


@pytest.fixture
def folder(tmp_path, monkeypatch):
  monkeypatch.setattr(evaluation, '_CLIP_SECONDS', 1.0)
  (tmp_path / 'music').mkdir()
  for name, seconds in (('a', 2.5), ('b', 1.3), ('c', 3.0)):
    soundfile.write(tmp_path / 'music' / f'{name}.wav', music(ord(name), seconds), 24000, subtype='FLOAT')
  return tmp_path / 'music'


def without_opus(monkeypatch):
  monkeypatch.setattr(opus, 'missing', lambda: ['opusenc'])


def test_rows_are_those_of_the_clips_alone(run, folder, tmp_path, monkeypatch):
  without_opus(monkeypatch)
  result = evaluation.evaluate_codec(run, folder, tmp_path / 'out')
  model = transcode.load(run).model
  # Ends shorter than a second are left out: a and b have two clips and one.
  clips = [audio[i:i + 24000] for audio in (soundfile.read(folder / f'{n}.wav', dtype='float32')[0] for n in 'abc')
           for i in range(0, len(audio) - 23999, 24000)]
  assert len(clips) == 6
  codes = states.compiled(model, 'encode')(np.stack(clips))
  for q in (1, model.config.levels):
    row = next(row for row in result.rows if row.levels == q)
    decoded = np.asarray(states.compiled(model, 'decode')(codes[..., :q]))
    assert row.name.startswith(f'codec, {q} level') and row.clips == 6
    assert row.bits_per_second == pytest.approx(model.token_spec.bitrate * q / model.config.levels)
    assert row.si_sdr_db == pytest.approx(np.mean(audio_measures.si_sdr(np.stack(clips), decoded)), abs=1e-3)
    assert row.mel_distance == pytest.approx(np.mean(audio_measures.mel_distance(np.stack(clips), decoded)), abs=1e-4)
    assert row.log_spectral_distance_db == pytest.approx(
        np.mean(audio_measures.log_spectral_distance(np.stack(clips), decoded)), abs=1e-3)
  counts = np.stack([np.bincount(column, minlength=model.config.codebook_size)
                     for column in np.asarray(codes).reshape(-1, model.config.levels).T])
  share = counts / counts.sum(1, keepdims=True)
  bits = -np.sum(np.where(share > 0, share * np.log2(np.maximum(share, 1e-30)), 0), axis=1)
  entropies = [row.entropy_bits_per_second for row in result.rows if row.system == 'codec']
  np.testing.assert_allclose(entropies, np.cumsum(bits) * 50, rtol=1e-6)


def test_a_clip_that_ends_early_is_measured_without_its_padding(run, folder, tmp_path, monkeypatch):
  without_opus(monkeypatch)
  monkeypatch.setattr(evaluation, '_CLIP_SECONDS', 10.0)
  result = evaluation.evaluate_codec(run, folder, tmp_path / 'out')
  model, found = transcode.load(run).model, []
  for name in 'abc':
    audio, _ = soundfile.read(folder / f'{name}.wav', dtype='float32')
    whole = audio_measures.fit_length(audio, -(-len(audio) // 480) * 480)[None]
    decoded = np.asarray(model.decode(model.encode(whole)))[:, :len(audio)]
    found.append([audio_measures.si_sdr(audio[None], decoded)[0], audio_measures.mel_distance(audio[None], decoded)[0],
                  audio_measures.log_spectral_distance(audio[None], decoded)[0]])
  row = [row for row in result.rows if row.system == 'codec'][-1]
  np.testing.assert_allclose([row.si_sdr_db, row.mel_distance, row.log_spectral_distance_db], np.mean(found, axis=0),
                             atol=2e-3)


def test_a_channel_without_sound_is_left_out(tmp_path, monkeypatch):
  without_opus(monkeypatch)
  objective = experiment('codec', CODEC_CHANNELS=2).argument('objective')
  loaded = types.SimpleNamespace(objective=objective, model=objective.model(nnx.Rngs(0)), content_hash='x', step=0)
  monkeypatch.setattr(transcode, 'load', lambda _: loaded)
  folder = tmp_path / 'music'
  folder.mkdir()
  for name in 'ab':
    left = music(ord(name), 2.0)
    soundfile.write(folder / f'{name}.wav', np.stack([left, 0 * left], axis=1), 24000, subtype='FLOAT')
  rows = evaluation.evaluate_codec('stereo', folder, tmp_path / 'out').rows
  assert all(np.isfinite([row.si_sdr_db, row.mel_distance, row.log_spectral_distance_db]).all() for row in rows)
  assert next(row for row in rows if row.system == 'identity').si_sdr_db > 60


def test_what_stands_beside_the_codec(run, folder, tmp_path):
  result = evaluation.evaluate_codec(run, folder, tmp_path / 'out')
  rows = {row.name: row for row in result.rows}
  assert rows['identity'].si_sdr_db == 300
  assert rows['identity'].mel_distance == rows['identity'].log_spectral_distance_db == 0
  assert rows['mismatched'].si_sdr_db < -10 and rows['mismatched'].mel_distance > 0.5
  assert rows['untrained'].levels == transcode.load(run).model.config.levels
  kinds = [row.system for row in result.rows]
  if opus.missing():
    assert 'opus' not in kinds and 'apt-get install opus-tools' in ' '.join(result.notes)
  else:
    assert kinds.count('opus') == 3
    assert rows['opus at 24 kbit/s'].si_sdr_db > rows['opus at 6 kbit/s'].si_sdr_db
    assert rows['opus at 12 kbit/s'].bits_per_second == pytest.approx(12000, rel=0.06)
  assert rows['mismatched'].mel_distance_interval == (None, None)  # of three recordings
  text = result.text()
  assert all(name in text for name in rows) and 'entropy:' in text


def test_files_hold_what_is_returned(run, folder, tmp_path, monkeypatch):
  without_opus(monkeypatch)
  result = evaluation.evaluate_codec(run, folder, tmp_path / 'out')
  content = json.loads((tmp_path / 'out' / 'codec.json').read_text())
  assert content['codec'] == transcode.load(run).content_hash
  assert (content['recordings'], content['clips'], content['seconds']) == (3, 6, pytest.approx(6.0))
  assert len(content['perplexity']) == max(row['levels'] or 0 for row in content['rows'])
  with open(tmp_path / 'out' / 'codec.csv', newline='') as file:
    table = list(csv.DictReader(file))
  assert len(table) == len(content['rows']) == len(result.rows)
  for row, line in zip(result.rows, table):
    assert line['system'] == row.system and float(line['mel_distance']) == row.mel_distance
    assert line['si_sdr_db_low'] == '' and row.si_sdr_db_interval[0] is None
  assert (tmp_path / 'out' / 'codec.png').read_bytes().startswith(b'\x89PNG')
  assert sorted(p.name for p in (tmp_path / 'out').iterdir()) == ['codec.csv', 'codec.json', 'codec.png']


def test_what_cannot_be_measured_is_left_out_and_named(run, folder, tmp_path, monkeypatch):
  without_opus(monkeypatch)
  for path in folder.iterdir():
    path.unlink()
  noise = 0.1 * np.random.default_rng(0).standard_normal(30000)
  with_nan = noise.astype(np.float32)
  with_nan[29000] = np.nan
  for name, audio in (('nan', with_nan), ('silence', np.zeros(30000)), ('constant', np.full(30000, 0.5)),
                      ('one', noise[:1]), ('none', noise[:0]), ('loud', np.clip(50 * noise, -1, 1))):
    soundfile.write(folder / f'{name}.wav', audio, 24000, subtype='FLOAT')
  soundfile.write(folder / 'six.wav', np.stack([music(i, 2.0) for i in range(6)], axis=1), 24000)
  soundfile.write(folder / 'fast.wav', music(7, 2.0).repeat(2), 48000)
  (folder / 'text.wav').write_text('no music')
  (folder / 'song.m4a').write_bytes(b'anything')
  (folder / 'notes.txt').write_text('not audio')
  result = evaluation.evaluate_codec(run, folder, tmp_path / 'out')
  assert result.about['skipped'] == {
      'format not supported': ['song.m4a'], 'non-finite': ['nan.wav'], 'empty': ['none.wav'],
      'too short': ['one.wav'], 'unreadable': ['text.wav'], 'silent': ['silence.wav', 'constant.wav']}
  assert result.about['recordings'] == 3 and result.about['clips'] == 5
  assert 'left out (non-finite): nan.wav' in result.notes
  assert all(np.isfinite([r.si_sdr_db, r.mel_distance, r.log_spectral_distance_db]).all() for r in result.rows)


def test_a_folder_without_anything_to_measure(run, folder, tmp_path):
  for path in folder.iterdir():
    path.unlink()
  with pytest.raises(ValueError, match='no usable audio in .*music: it has no audio files'):
    evaluation.evaluate_codec(run, folder, tmp_path / 'out')
  soundfile.write(folder / 'silence.wav', np.zeros(30000), 24000)
  soundfile.write(folder / 'constant.wav', np.full(30000, 0.5), 24000)
  with pytest.raises(ValueError, match='no usable audio in .*: 2 silent'):
    evaluation.evaluate_codec(run, folder, tmp_path / 'out')
  with pytest.raises(ValueError, match='0.5 s of each recording are too few'):
    evaluation.evaluate_codec(run, folder, tmp_path / 'out', max_seconds=0.5)
  with pytest.raises(FileNotFoundError):
    evaluation.evaluate_codec(run, folder / 'nowhere', tmp_path / 'out')
  assert not (tmp_path / 'out').exists()


def test_one_recording_has_no_mismatched_row_and_max_seconds_limits_each(run, folder, tmp_path, monkeypatch):
  without_opus(monkeypatch)
  (folder / 'a.wav').unlink()
  (folder / 'b.wav').unlink()
  result = evaluation.evaluate_codec(run, folder, tmp_path / 'out', max_seconds=2.0)
  assert result.about['seconds'] == 2.0 and 'mismatched' not in {row.system for row in result.rows}
  assert any('second recording' in note for note in result.notes)


@pytest.mark.slow
def test_memory_does_not_grow_with_the_length(run, folder, tmp_path, monkeypatch):
  without_opus(monkeypatch)
  peaks = []
  for seconds in (20, 60):
    soundfile.write(folder / 'long.wav', np.random.default_rng(0).normal(0, 0.1, seconds * 24000), 24000)
    tracemalloc.start()
    evaluation.evaluate_codec(run, folder, tmp_path / 'out')
    peaks.append(tracemalloc.get_traced_memory()[1])
    tracemalloc.stop()
  assert peaks[1] < peaks[0] + 2e6


@pytest.mark.parametrize('arguments', [
    [], ['--codec', 'x'], ['--audio_dir', 'x'], ['--workdir', 'x', '--codec', 'x', '--audio_dir', 'x'],
    ['--workdir', '.', '--max_seconds', '3']])
def test_the_command_line_wants_one_of_two(arguments, capsys):
  with pytest.raises(SystemExit) as stopped:
    main.main(['evaluate', *arguments])
  lines = capsys.readouterr().err.splitlines()
  assert stopped.value.code == 2 and len(lines) == 1


def test_the_command(run, folder, tmp_path, capsys, monkeypatch):
  without_opus(monkeypatch)
  with pytest.raises(SystemExit) as stopped:
    main.main(['evaluate', '--codec', str(run), '--audio_dir', str(folder), '--output', str(tmp_path / 'out')])
  assert stopped.value.code == 0
  assert 'codec, 1 level' in capsys.readouterr().out
  with pytest.raises(SystemExit) as stopped:
    main.main(['evaluate', '--codec', str(run), '--audio_dir', str(tmp_path / 'out')])
  assert stopped.value.code == 1
  assert capsys.readouterr().err.splitlines()[-1] == (
      f'musiclm: error: no usable audio in {tmp_path / "out"}: it has no audio files')
