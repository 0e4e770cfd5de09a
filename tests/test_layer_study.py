"""The study of layers: every layer has its tokens, and the table says what they tell."""
from __future__ import annotations

import dataclasses
import json

from flax import nnx
import jax
import numpy as np
import pytest

from musiclm_jax import layer_study, main
from musiclm_jax.data import composer, noise, prepare
from tests.trainings import experiment, save_random, write_signals

FEW = layer_study.Amounts(fit_clips=12, clips=16, seconds=3.0, codes=8)


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp('layers')
  prepare.prepare_composer('nano', folder / 'music', workers=1)
  built = experiment('w2v_bert', RECORDS=folder / 'music', NUM_STEPS=1, **{'partition.Partitioner.data': 1})
  built.build(workdir=str(folder / 'w2v_bert'), dry_run=False)
  return folder


def test_every_layer_is_what_each_layer_gives_alone():
  objective = experiment('w2v_bert').argument('objective')
  model = objective.model(nnx.Rngs(0))
  audio = jax.random.normal(jax.random.key(1), (2, 24000)) * 0.1
  every = model.every_layer(audio)
  names = objective.encoder.layer_names
  assert names == ('convolutions', 'contrastive 1', 'contrastive 2', 'masked 1', 'masked 2')
  assert every.shape == (5, 2, 25, 16)
  np.testing.assert_allclose(every[0], model.features(audio), atol=1e-5)
  for layer in range(5):
    np.testing.assert_allclose(every[layer], model.layer(audio, layer), atol=1e-4)


@pytest.mark.slow
def test_a_table_and_a_plot_of_every_layer(folder, capsys):
  with pytest.raises(SystemExit) as stopped:
    main.main(['semantic', 'layers', '--w2v', str(folder), '--records', str(folder / 'music'), '--clips', '16',
               '--fit_clips', '12', '--seconds', '3', '--codes', '8', '--per_dimension',
               '--output', str(folder / 'study')])
  assert not stopped.value.code
  printed = capsys.readouterr().out
  assert 'asked in noise at 10 dB' in printed and 'trained 4: masked 2' in printed and 'log-mel' in printed
  assert 'targets group 2' in printed
  assert (folder / 'study' / 'layers.png').read_bytes().startswith(b'\x89PNG')
  assert not json.loads((folder / 'study' / 'layers.json').read_text())['decorrelate']


@pytest.mark.slow
def test_each_probe_has_its_interval_and_what_it_gains(folder):
  found = layer_study.study(folder / 'w2v_bert', records=folder / 'music', amounts=FEW).figures
  assert found['decorrelate']
  rows = [(row['network'], row['layer']) for row in found['layers']]
  assert rows[:3] == [('log_mel', ''), ('targets', 'group 1'), ('targets', 'group 2')] and len(rows) == 13
  last = found['layers'][-1]
  assert last['network'] == 'trained' and 0 < last['perplexity'] <= 1 and 0 <= last['repeats'] < 1
  for name in ('tempo', 'meter', 'drum_style', 'timbre', 'chord', 'pitch_class', 'onset'):
    asked = last['probes']['clean'][name]
    low, high = asked['interval']
    assert low <= asked['value'] <= high
    there = next(r for r in found['layers'] if r['network'] == 'untrained' and r['layer'] == last['layer'])
    gain = asked['gains']['untrained']
    assert gain['value'] == pytest.approx(asked['value'] - there['probes']['clean'][name]['value'])
    assert gain['interval'][0] <= gain['value'] <= gain['interval'][1]
  assert set(last['probes']['other_leads']) == {'tempo', 'meter', 'drum_style', 'chord', 'pitch_class', 'onset'}


@pytest.mark.slow
def test_music_without_facts_is_measured_and_the_built_in_asked(folder, tmp_path):
  signals = write_signals(tmp_path / 'signals')
  found = layer_study.study(folder, records=signals, amounts=FEW, output=tmp_path).figures
  assert found['clips'] == 4 and found['probe_clips'] == 16


@pytest.mark.slow
def test_some_probes_can_be_asked_alone(folder, tmp_path):
  amounts = dataclasses.replace(FEW, probes=('tempo', 'onset'))
  alone = layer_study.study(folder, amounts=amounts, output=tmp_path).figures
  assert list(alone['chance']) == ['tempo', 'onset']
  assert all(set(row['probes']['other_keys']) == {'tempo', 'onset'} for row in alone['layers'])


def test_the_study_and_the_tokens_that_ship_are_fitted_in_one_way(monkeypatch, tmp_path):
  save_random(tmp_path / 'w2v_bert', 'w2v_bert', {}, RECORDS='nowhere')
  fits = []
  monkeypatch.setattr(layer_study, '_tokenizers', lambda loaded, clusters, *_: fits.append(clusters) or ())
  monkeypatch.setattr(layer_study, '_picture', lambda *_: b'')
  found = layer_study.study(tmp_path, amounts=dataclasses.replace(FEW, seconds=2.0), output=tmp_path).figures
  shipped = experiment('semantic_tokens', W2V_WORKDIR='nowhere').argument('objective')
  assert found['decorrelate'] is fits[0].decorrelate is shipped.decorrelate is True


def test_an_unknown_probe_is_refused(tmp_path):
  with pytest.raises(ValueError, match="no probe 'bar', only tempo, meter"):
    layer_study.study(tmp_path, amounts=layer_study.Amounts(probes=('tempo', 'bar')))


@pytest.mark.slow
def test_another_network_is_refused(folder, tmp_path):
  built = experiment('mulan', RECORDS=folder / 'music', NUM_STEPS=0, **{'partition.Partitioner.data': 1})
  built.build(workdir=str(tmp_path / 'mulan'), dry_run=False)
  with pytest.raises(ValueError, match='holds a MuLanTraining, not a w2v-BERT'):
    layer_study.study(tmp_path / 'mulan')


def test_a_network_of_another_rate_hears_the_built_in_music_at_its_own(tmp_path):
  encoder = experiment('w2v_bert', **{'w2v/spectral.MelConfig.sample_rate': 16000, 'w2v/spectral.MelConfig.hop': 160,
                                      'W2V_MEL_WINDOW': 400, 'W2V_MEL_FFT': 512}).argument('objective').encoder
  corpus = composer.Corpus(size=3, seconds=2.0)
  clips, examples = layer_study._clips(corpus, 3, 10.0, encoder)
  assert clips.shape == (3, 32000)
  spectrum = lambda x, rate: np.abs(np.fft.rfft(x[:rate], rate))[50:4000]  # a second: a bin is 1 Hz
  there, here = spectrum(corpus[0]['audio'], 24000), spectrum(clips[0], 16000)
  assert np.corrcoef(there, here)[0, 1] > 0.99


def test_a_short_clip_is_left_out_and_cuts_no_other():
  encoder = experiment('w2v_bert').argument('objective').encoder
  clip = lambda seconds: {'audio': np.ones(int(24000 * seconds), np.float32), 'sample_rate': 24000}
  clips, examples = layer_study._clips([clip(1.0), *(clip(4.0) for _ in range(19))], 20, 3.0, encoder)
  assert clips.shape == (19, 72000) and len(examples) == 19


def test_clips_hear_their_own_noise_however_many_are_heard_at_a_time(monkeypatch):
  rng = np.random.default_rng(0)
  clips = rng.normal(size=(5, 24000)).astype(np.float32)
  noises = noise.Corpus(seed=3, size=5, seconds=1.0)
  noisy = lambda clips, index: layer_study._with_noise(clips, index, noises)
  tokens_of = lambda audio: np.abs(audio[:, None, ::6000])
  monkeypatch.setattr(layer_study, '_BATCH', 2)
  tokenizers = [('one', ('',), tokens_of)]
  told = layer_study._told(tokenizers, clips, noisy)['one']
  np.testing.assert_array_equal(told[0], tokens_of(noisy(clips, range(5)))[:, 0])
  assert len(np.unique(told - layer_study._told(tokenizers, clips)['one'])) > 5


def test_targets_are_the_codes_that_training_counts():
  objective = experiment('w2v_bert').argument('objective')
  model = objective.model(nnx.Rngs(0))
  audio = jax.random.normal(jax.random.key(2), (2, objective.samples)) * 0.1
  _, aux = objective.loss(model, {'audio': audio, 'slot': np.arange(2)}, jax.random.key(0), training=False)
  found = np.asarray(layer_study._targets(model, audio))
  assert found.shape == (2, objective.encoder.groups, objective.frames)
  share = np.stack([np.bincount(group.ravel(), minlength=objective.encoder.codes) for group in found.swapaxes(0, 1)])
  np.testing.assert_allclose(aux.statistics['hard'], share / objective.frames, atol=1e-5)
