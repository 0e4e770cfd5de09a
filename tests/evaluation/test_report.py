"""Bars are checked mechanically; the page is one file that asks nothing of the network."""
from __future__ import annotations

import base64
import copy
import io
import json
import re

import numpy as np
import pytest
import soundfile

from musiclm_jax.evaluation import bars, pictures, report, tables

GOOD = {
    'codec': {
        'mel_distance': 0.8, 'mel_distance_clip_median': 1.18, 'mel_distance_silence': 4.1, 'si_sdr_db': 5.8,
        'si_sdr_db_by_levels': {'1': -0.4, '4': 4.7, '12': 5.8}, 'codebook_size': 256,
        'perplexity_frames': 20000,
        'mel_distance_by_levels': {'1': 1.0, '4': 0.9, '12': 0.8},
        'perplexity_share': [0.8] + [0.9] * 11, 'codes_used_share': [1.0] * 12, 'restart_share': 0.001},
    'mulan': {
        'recall_at_1': 0.6, 'recall_at_1_of_200': 0.33, 'recall_at_1_chance': 1 / 64,
        'oracle_recall_at_1': 0.98,
        'text_audio_agreement': [0.6, 0.05], 'text_audio_agreement_chance': [0.03, 0.02],
        'text_audio_agreement_so_far': [0.6, 0.04]},
    'semantic': {
        'masked_cross_entropy': 3.2, 'target_entropy': 5.3,
        'probes': {
            'tempo': {'trained': 0.68, 'untrained': 0.57, 'log_mel': 0.56, 'chance': 0.34},
            'meter': {'trained': 0.6, 'untrained': 0.6, 'log_mel': 0.55, 'chance': 0.5}}},
    'stages': {
        name: {
            'bits_per_token': bits, 'bigram_bits_per_token': bigram, 'unigram_bits_per_token': unigram,
            'uniform_bits_per_token': 8.0, 'unigram_share_of_log2_k': 0.95,
            'condition_gap': {condition: {'bits': 0.2, 'interval': [0.1, 0.3], 'bits_first_frame': 0.5}}}
        for name, condition, bits, bigram, unigram in (
            ('semantic', 'mulan', 2.9, 3.3, 7.8), ('coarse', 'semantic', 5.9, 7.0, 7.7),
            ('fine', 'coarse', 7.4, 7.6, 7.7))},
    'generation': {
        'mcc_matched': 0.4, 'mcc_mismatched': 0.1, 'mcc_p_value': 0.0002, 'judge_timbre': 0.5,
        'judge_timbre_interval': [0.3, 0.7], 'judge_chance': 0.125, 'judge_accuracy': 0.9, 'frechet': 20.0,
        'frechet_unigram': 80.0, 'realtime_factor': 0.7,
        'mcc_references': {'real': {'mcc_matched': 0.6, 'mcc_mismatched': 0.1, 'mcc_p_value': 0.0}}},
}


def with_figure(path, value):
  figures = copy.deepcopy(GOOD)
  *parents, last = path.split('.')
  place = figures
  for parent in parents:
    place = place[parent]
  place[last] = value
  return figures


def failing(figures):
  return [r.figure for r in bars.evaluate_bars(figures) if not r.passed]


def test_good_figures_pass_every_bar():
  assert failing(GOOD) == []


@pytest.mark.parametrize('path, value, expected', [
    ('codec.mel_distance', 1.01, 'codec.mel_distance'),
    ('codec.si_sdr_db', 2.99, 'codec.si_sdr_db'),
    ('codec.si_sdr_db_by_levels', {'1': 5.0, '4': 4.7, '12': 5.8}, 'codec.si_sdr_db_by_levels.4'),
    ('codec.perplexity_share', [0.49, 0.9], 'codec.perplexity_share[0]'),
    ('codec.perplexity_frames', 5000, 'codec.perplexity_frames'),
    ('mulan.text_audio_agreement', [], 'mulan.text_audio_agreement[0]'),
    ('semantic.target_entropy', 4.2, 'semantic.masked_cross_entropy'),
    ('stages.coarse.bits_per_token', 6.6, 'stages.coarse.bits_per_token'),
    ('stages.fine.unigram_share_of_log2_k', 0.5, 'stages.fine.unigram_share_of_log2_k'),
    ('stages.semantic.condition_gap', {'mulan': {'bits': 0.1, 'interval': [-0.01, 0.2]}},
     'stages.semantic.condition_gap.mulan.interval[0]'),
    ('generation.mcc_p_value', 0.01, 'generation.mcc_p_value'),
    ('generation.frechet', float('nan'), 'generation.frechet'),
])
def test_each_bar_can_be_missed(path, value, expected):
  assert failing(with_figure(path, value)) == [expected]


def test_one_of_two_alternatives_is_enough():
  meter = {'trained': 0.66, 'untrained': 0.6}
  tempo = {'trained': 0.6, 'untrained': 0.57}
  probe = 'semantic.probes.tempo.trained'
  assert failing(with_figure('semantic.probes', {'tempo': tempo, 'meter': meter})) == []
  assert failing(with_figure('semantic.probes', {'meter': meter})) == []
  assert failing(with_figure('semantic.probes', {'tempo': tempo})) == [probe]
  assert failing(with_figure('semantic.probes', {})) == [probe]


def test_missing_figures_have_not_passed_and_say_so():
  results = bars.evaluate_bars({})
  assert not any(r.passed for r in results)
  assert all('was not measured' in r.reason and not r.measured for r in results)
  result = next(r for r in bars.evaluate_bars(with_figure('codec.mel_distance_clip_median', None))
                if r.figure == 'codec.mel_distance')
  assert not result.passed and 'codec.mel_distance_clip_median' in result.reason


def test_every_missed_bar_says_what_it_takes():
  assert all(r.takes and r.words for r in bars.evaluate_bars({}))


def test_a_relation_that_does_not_exist_is_refused():
  with pytest.raises(ValueError, match='relation'):
    bars.Bar('x', '==', 1.0, '')


@pytest.fixture(scope='module')
def written(tmp_path_factory):
  directory = tmp_path_factory.mktemp('report')
  metrics = directory / 'metrics.jsonl'
  lines = [json.dumps({'step': s, 'part': 'train', 'loss': 5 / (1 + s), 'lr': 1.0}) for s in range(100)]
  lines += [json.dumps({'step': 99, 'part': 'eval', 'loss': 0.3}), '{"step": 100, "lo']
  metrics.write_text('\n'.join(lines))
  tone = 0.2 * np.sin(np.arange(12000) / 10).astype(np.float32)
  content = report.write_report(
      directory / 'out', with_figure('codec.si_sdr_db', np.float32(1.5)),
      [report.Run('codec', 0, 100, 75.0, 'abc123', 10000, metrics), report.Run('mulan', None, 50, 10.0, 'def')],
      [report.Players('<b>prompt & "quotes"</b>', (report.Clip('sample', tone),)),
       report.Players('Round trip', (report.Clip('clip', tone), report.Clip('12 levels', tone)), 'codec')],
      notes=['MuLan was trained on the built-in pairs.'], environment={'jax': '0.10.2'})
  return directory / 'out', content, tone


def test_report_json_holds_figures_bars_and_runs(written):
  directory, content, _ = written
  loaded = json.loads((directory / 'report.json').read_text())
  assert loaded == content
  assert loaded['codec']['si_sdr_db'] == 1.5
  assert loaded['stages']['fine']['condition_gap']['coarse']['interval'] == [0.1, 0.3]
  missed = [b for b in loaded['bars'] if not b['passed']]
  assert [b['figure'] for b in missed] == ['codec.si_sdr_db']
  assert missed[0]['value'] == 1.5 and missed[0]['limit'] == 3 and missed[0]['takes']
  assert loaded['passed'] is False
  assert loaded['runs']['codec'] == {
      'name': 'codec', 'seed': 0, 'steps': 100, 'wall_seconds': 75.0, 'configuration_hash': 'abc123',
      'parameters': 10000}


def test_the_page_is_self_contained(written):
  page = (written[0] / 'report.html').read_text()
  assert 'http' not in re.sub(r'data:[^"]*', '', page)
  assert not re.search(r'<(script|link(?! rel="icon" href="data:)|iframe)', page)
  sources = re.findall(r'src="([^"]*)"', page)
  assert len(sources) == 2 * 3 + 1 and all(s.startswith('data:') for s in sources)
  assert '<b>prompt' not in page and '&lt;b&gt;prompt' in page
  for words in ('viewport', 'MuLan was trained on the built-in pairs.', 'What it would take', 'missed',
                'abc123', 'Mel distance', 'Unigram', 'Tempo class'):
    assert words in page
  assert '<td>50</td><td>–</td>' in page  # a seed that is not known is not 0


def test_players_are_lossless(written):
  directory, _, tone = written
  content = re.search(r'data:audio/flac;base64,([^"]*)', (directory / 'report.html').read_text()).group(1)
  audio, rate = soundfile.read(io.BytesIO(base64.b64decode(content)))
  assert rate == 24000
  np.testing.assert_allclose(audio, tone, atol=1 / 32768)


def test_metrics_are_joined_by_step_and_torn_lines_skipped(tmp_path):
  path = tmp_path / 'metrics.jsonl'
  path.write_text('{"step": 2, "part": "train", "loss": 1.0}\n{"step": 1, "loss": 2.0}\n'
                  '{"step": 2, "part": "eval", "loss": 3.0}\n{"step": 2, "part": "train", "loss": 1.5}\n{"st')
  assert pictures.read_metrics(path) == [
      {'step': 1, 'loss': 2.0}, {'step': 2, 'loss': 1.5, 'eval/loss': 3.0}]
  assert pictures.read_metrics(tmp_path / 'none') == []
  assert pictures.loss_curves_uri([]) is None


def test_an_empty_report_can_be_written(tmp_path):
  content = report.write_report(tmp_path, {}, [])
  assert content['bars_passed'] == 0
  assert 'not measured' in (tmp_path / 'report.html').read_text()


def test_unknown_sections_and_values_are_refused():
  with pytest.raises(ValueError, match="unknown section 'codecs'"):
    report.report_dict({'codecs': {}}, [])
  with pytest.raises(TypeError, match='cannot be written'):
    report.report_dict({'codec': {'x': object()}}, [])


def test_every_explained_figure_has_words_and_known_sections():
  for section in tables.sections(GOOD):
    assert section.words and section.tables
    for table in section.tables:
      assert all(len(row) == len(table.headers) for row in table.rows)
  assert [s.name for s in tables.sections(GOOD)] == ['generation', 'stages', 'codec', 'mulan', 'semantic']


def test_spectrograms_of_sounds_are_one_picture():
  t = np.arange(4800) / 24000
  tone = 0.3 * np.sin(2 * np.pi * 1000 * t)
  one = pictures.spectrograms({'tone': tone}, 24000)
  three = pictures.spectrograms({'tone': tone, 'silence': 0 * tone, 'nothing': np.full_like(tone, np.nan)}, 24000)
  assert one.dtype == three.dtype == np.uint8
  assert three.shape == (3 * one.shape[0], one.shape[1], 3)
  tone_mean, silence_mean, _ = (panel.mean() for panel in np.split(three, 3))
  assert tone_mean > silence_mean + 1
  stereo = pictures.spectrograms({'tone': np.stack([2 * tone, 0 * tone], axis=1)}, 24000)
  np.testing.assert_array_equal(stereo, one)


def test_spectrogram_of_a_tone_is_bright_at_its_pitch():
  t = np.arange(24000) / 24000
  low, high = (pictures.spectrogram(0.3 * np.sin(2 * np.pi * hz * t)).mean(0).argmax() for hz in (200, 4000))
  assert low < high
