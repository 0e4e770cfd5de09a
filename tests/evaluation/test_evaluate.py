"""The report as a whole: what stands in the way of one section leaves the others."""
import dataclasses
import json
import types

import numpy as np
import pytest

from musiclm_jax import evaluate
from musiclm_jax.data import records
from musiclm_jax.training import checkpoint, goodput
from tests.trainings import random_cascade, save_random, write_signals


def write_music(folder, seconds, *, texts=None, sample_rate=24000, channels=1):
  """Records of noise, as long as `seconds` says of each held-out clip, with the text of each where there is one."""
  def clip(i, length):
    shape = (int(sample_rate * length), channels)[:1 if channels == 1 else 2]
    said = [{'kind': 'description', 'text': texts[i]}] if texts and texts[i] else []
    return {'audio': np.random.default_rng(i).normal(0, 0.1, shape).astype(np.float32), 'sample_rate': sample_rate,
            'recording': f'recording {i // 2}', 'artist': '', 'start': 0.0, 'texts': said,
            'source': {'licence': 'CC0-1.0'}}

  header = records.Header('audio', records.audio_streams(sample_rate, channels))
  records.write_records(folder, {split: [clip(i, s) for i, s in enumerate(seconds)] for split in ('train', 'test')},
                        header)


def measure(root, **amounts):
  return evaluate._Measure(root, 0, evaluate.Amounts(**amounts))


@pytest.fixture(scope='module')
def networks(tmp_path_factory):
  return random_cascade(tmp_path_factory.mktemp('networks'))


def with_networks(networks, root):
  for part in networks.iterdir():
    (root / part.name).symlink_to(part)
  return root


def test_a_section_that_cannot_be_measured_leaves_the_others_and_is_an_error(tmp_path, monkeypatch):
  write_signals(tmp_path / evaluate.RECORDS)
  evaluate.evaluate(tmp_path)  # nothing is trained: nothing is measured, which is no error
  before = json.loads((tmp_path / 'report.json').read_text())
  assert all('was not measured' in note for note in before['notes'])

  def refused(measure):
    raise ValueError('stages were trained on tokens of other networks')

  monkeypatch.setattr(evaluate._Measure, 'stages', refused)
  monkeypatch.setattr(evaluate._Measure, 'codec', lambda measure: ({'mel_distance': 0.5}, []))
  with pytest.raises(ValueError, match='stages was not measured: .* other networks .the report has the other sections'):
    evaluate.evaluate(tmp_path)
  assert json.loads((tmp_path / 'report.json').read_text())['codec'] == {'mel_distance': 0.5}


def test_without_texts_what_concerns_them_is_left_out_and_says_so(networks, tmp_path, monkeypatch):
  write_music(with_networks(networks, tmp_path) / evaluate.RECORDS, [1.0] * 4)
  monkeypatch.setattr(evaluate._Measure, 'codec', lambda measure: ({'mel_distance': 0.5}, []))
  monkeypatch.setattr(evaluate._Measure, 'stages', lambda measure: ({}, []))
  with pytest.raises(ValueError, match='no held-out clip of .*records has a text'):
    evaluate.evaluate(tmp_path)
  report = json.loads((tmp_path / 'report.json').read_text())
  assert report['codec'] == {'mel_distance': 0.5}
  for section in ('mulan', 'generation'):
    assert any(note.startswith(f'Section {section} ') and note.endswith('has a text') for note in report['notes'])


def test_prompts_that_are_all_the_same_are_refused(networks, tmp_path):
  write_music(with_networks(networks, tmp_path) / evaluate.RECORDS, [1.0] * 4, texts=['a fugue'] * 4)
  with pytest.raises(ValueError, match='have the same text'):
    measure(tmp_path).generation()


@pytest.mark.parametrize('sound, words', [({'sample_rate': 16000}, '16000 Hz with 1 channel,'),
                                          ({'channels': 2}, '24000 Hz with 2 channels,')])
def test_music_of_another_sound_than_the_networks_is_refused(networks, tmp_path, sound, words):
  write_music(with_networks(networks, tmp_path) / evaluate.RECORDS, [1.0] * 4, texts=list('abcd'), **sound)
  for name, network in (('codec', 'codec'), ('mulan', 'MuLan'), ('generation', 'MuLan')):
    with pytest.raises(ValueError, match=f'records is audio of {words} and the {network} is one for 24000 Hz with 1'):
      getattr(measure(tmp_path), name)()


def test_a_short_last_piece_is_left_out_and_cuts_no_other(tmp_path):
  write_music(tmp_path / evaluate.RECORDS, [3.5] * 5 + [1.0] + [3.5] * 14)
  clips, examples = measure(tmp_path).held_out
  assert clips.shape == (19, 72000) and len(examples) == 19
  assert (np.abs(clips[:, -100:]).max(axis=1) > 0).all()
  assert measure(tmp_path, clips=7).held_out[0].shape == (7, 72000)


def test_crumbs_of_less_than_a_second_do_not_count(tmp_path):
  write_music(tmp_path / 'some' / evaluate.RECORDS, [0.4, 2.5, 2.5])
  assert measure(tmp_path / 'some').held_out[0].shape == (2, 48000)
  write_music(tmp_path / 'all' / evaluate.RECORDS, [0.4, 0.4])
  with pytest.raises(ValueError, match='all clips of split .test. of .* are shorter than a second'):
    _ = measure(tmp_path / 'all').held_out


def test_texts_are_measured_on_clips_as_long_as_those_that_have_them(tmp_path):
  write_music(tmp_path / evaluate.RECORDS, [6.0] * 3)
  write_music(tmp_path / evaluate.PAIRS, [2.0] * 3, texts=list('abc'))
  found = measure(tmp_path)
  assert found.held_out[0].shape == (3, 144000)
  clips, _ = found.held_out_pairs
  assert clips.shape == (3, 48000) and (np.abs(clips[:, -100:]).max(axis=1) > 0).all()


def test_captions_are_counted_and_not_the_pieces_that_share_one(tmp_path):
  write_music(tmp_path / evaluate.RECORDS, [1.0] * 4, texts=['one', 'one', 'another', 'another'])
  write_music(tmp_path / evaluate.MORE_PAIRS, [1.0] * 4, texts=list('abcd'))
  few, enough = measure(tmp_path, prompts=3), measure(tmp_path, prompts=2)
  assert few.pairs is not few.audio and 'only 2 different captions' in few.notes[0]
  assert enough.pairs is enough.audio


def test_prompts_are_different_texts_and_each_lead_as_often():
  known = [{'attributes': {'lead': lead}} for lead in ('flute', 'flute', 'flute', 'organ', 'organ')]
  texts = ['high', 'high', 'low', 'low', 'loud']
  assert evaluate._prompts(known, texts, 5) == [0, 4, 2]
  assert evaluate._prompts([{}] * 5, texts, 2) == [0, 2]


def test_runs_have_their_own_seed_and_the_time_of_all_starts(tmp_path):
  save_random(tmp_path / 'codec', 'codec', {}, RECORDS='nowhere')
  (tmp_path / 'codec' / 'metrics.jsonl').touch()
  [unknown] = evaluate._runs(tmp_path)
  assert unknown.seed is None and unknown.wall_seconds == 0
  (tmp_path / 'steps').mkdir()
  (tmp_path / 'steps' / 'codec.json').write_text('{"seed": 5, "wall_seconds": 7.5}')
  [marked] = evaluate._runs(tmp_path)
  assert marked.seed == 5 and marked.wall_seconds == 7.5
  for seconds in (20.0, 10.0):
    goodput.write(tmp_path / 'codec', {'wall_seconds': seconds})
  [resumed] = evaluate._runs(tmp_path)
  assert resumed.wall_seconds == 30


def test_the_seed_of_a_run_is_the_one_it_was_started_with(tmp_path, monkeypatch):
  save_random(tmp_path / 'codec', 'codec', {}, RECORDS='nowhere')
  (tmp_path / 'codec' / 'metrics.jsonl').touch()
  load = checkpoint.load
  monkeypatch.setattr(checkpoint, 'load', lambda run: dataclasses.replace(load(run), made_with={'seed': 3}))
  assert [run.seed for run in evaluate._runs(tmp_path)] == [3]


@pytest.mark.parametrize('levels, decoded', [(12, (1, 4, 12)), (4, (1, 4)), (2, (1, 2)), (1, (1,))])
def test_a_codec_is_asked_for_no_more_levels_than_it_has(levels, decoded):
  codec = types.SimpleNamespace(objective=types.SimpleNamespace(token_spec=types.SimpleNamespace(levels=levels)))
  assert evaluate._levels(codec) == decoded
