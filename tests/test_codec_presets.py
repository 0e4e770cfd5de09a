"""The codec's presets and overlays: what each says of itself holds, every line of it is read, and it trains."""
from __future__ import annotations

import functools
import json
import math

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from musiclm_jax import config
from musiclm_jax.data import records
from tests.test_gin_files import _unused

FOLDER = config.gin_folder() / 'codec'
OVERLAYS = sorted(path.stem for path in FOLDER.glob('*.gin'))
# Parameters of encoder and decoder, channels, samples a second, samples a frame, frames a second, bits a second.
PRESETS = {
    '': (10_502_401, 1, 24000, 480, 50, 6000),
    'soundstream': (10_494_209, 1, 24000, 320, 75, 6000),
    'soundstream_16': (2_625_665, 1, 24000, 320, 75, 6000),
    'audiolm': (10_494_209, 1, 16000, 320, 50, 6000),
    'stereo_44khz': (10_306_242, 2, 44100, 882, 50, 12000),
    'stereo_48khz': (10_674_882, 2, 48000, 960, 50, 12000),
}


@functools.cache
def experiment(name: str, overlay: str, size: str = 'paper', **macros) -> config.Experiment:
  files = [f'experiments/{name}.gin', f'size/{size}.gin', *([f'codec/{overlay}.gin'] if overlay else [])]
  given = [(k, str(v)) for k, v in macros.items()]
  try:
    return config.load_experiment(files, given, provided=('workdir', 'dry_run'))
  except config.MissingValues as missing:
    return config.load_experiment(
        files, [*given, *((m, 'somewhere') for m in missing.names)], provided=('workdir', 'dry_run'))


def parameters(module) -> int:
  return sum(math.prod(p.shape) for p in jax.tree.leaves(nnx.state(module, nnx.Param)))


def shapes_of(objective):
  return nnx.eval_shape(lambda: objective.model(nnx.Rngs(0)))


def test_every_preset_is_tested():
  assert set(OVERLAYS) == {*PRESETS, 'balanced', 'denoising'} - {''}


@pytest.mark.parametrize('name', PRESETS)
def test_what_a_preset_says_of_itself(name):
  objective = experiment('codec', name).argument('objective')
  model, spec = shapes_of(objective), objective.token_spec
  found = (parameters(model.encoder) + parameters(model.decoder), objective.codec.channels, objective.codec.sample_rate,
           objective.codec.stride, spec.frame_rate, spec.bitrate)
  assert found == PRESETS[name]
  assert experiment('codec', name).macro('ACOUSTIC_RATE') == spec.frame_rate
  assert sum(experiment('codec', name).macro(f'{part}_LEVELS') for part in ('COARSE', 'FINE')) == spec.levels
  batches = experiment('codec', name).macro('CODEC_SECONDS')
  assert objective.samples == batches * objective.codec.sample_rate
  text = (FOLDER / f'{name}.gin').read_text() if name else (config.gin_folder() / 'size/paper/codec.gin').read_text()
  if name != 'soundstream_16':  # it includes the file that says so
    assert f'{spec.frame_rate:g} frames' in text and f'{spec.bitrate / 1000:g} kbit/s' in text


@pytest.mark.parametrize('name', [*OVERLAYS])
def test_every_line_of_an_overlay_is_used(name):
  users = [experiment(e, name) for e in ('codec', 'coarse_lm', 'fine_lm')] if name in PRESETS else [
      experiment('codec', name)]
  assert not _unused(f'codec/{name}', users)


def test_overlays_may_be_combined():
  files = ['experiments/codec.gin', 'size/paper.gin', 'codec/soundstream_16.gin', 'codec/denoising.gin',
           'codec/balanced.gin']
  loaded = config.load_experiment(files, provided=('workdir', 'dry_run'))
  objective = loaded.argument('objective')
  assert (objective.codec.widths[0], objective.codec.denoise_at, objective.gradients) == (16, 'encoder', 'balanced')
  batch = loaded.argument('batches')
  assert batch.noise is not None and batch.noise.sample_rate == 24000
  assert loaded.argument('eval_batches').noise.first != batch.noise.first


@pytest.mark.parametrize('name', ['', 'stereo_48khz', 'denoising', 'balanced'])
def test_the_loss_of_a_recipe_traces(name):
  objective = experiment('codec', name).argument('objective')
  given = objective.batch_spec(2)
  loss = lambda key, batch: objective.loss(objective.model(nnx.Rngs(0)), batch, key, training=True)
  total, aux = jax.eval_shape(loss, jax.eval_shape(lambda: jax.random.key(0)), given)
  assert total.shape == ()
  assert ('gradient_feature' in aux.metrics) == (name == 'balanced')


def trained(name, workdir, **macros):
  """The metrics of two steps of a small network."""
  loaded = experiment('codec', name, 'nano', NUM_STEPS=2, LOG_EVERY=1, EVAL_EVERY=2, CODEC_BATCH=2,
                      **{'partition.Partitioner.data': 1, 'train.Cadence.eval_batches': 1}, **macros)
  loaded.build(workdir=str(workdir), dry_run=False)
  rows = [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]
  assert sorted(row['part'] for row in rows) == ['eval', 'train', 'train']
  assert all(np.isfinite(row['loss']) for row in rows)
  return sorted(rows, key=lambda row: row['part'] == 'eval')


@pytest.mark.parametrize('name, rate', [
    pytest.param('stereo_44khz', 44100, marks=pytest.mark.slow), ('stereo_48khz', 48000)])
def test_stereo_is_prepared_served_and_trained(tmp_path, name, rate):
  header = records.Header('audio', records.audio_streams(rate, 2))
  clip = lambda i: {'audio': np.random.default_rng(i).normal(0, 0.1, (rate // 2, 2)).astype(np.float32),
                    'sample_rate': rate, 'recording': f'clip {i}'}
  records.write_records(
      tmp_path / 'music', {'train': [clip(i) for i in range(4)], 'test': [clip(i) for i in (4, 5)]}, header)
  small = {'CODEC_WIDTHS': (4, 4, 4, 4, 8), 'CODEC_LATENT': 4, 'CODEC_DILATIONS': (1,), 'ACOUSTIC_LEVELS': 2,
           'ACOUSTIC_CODES': 8, 'CODEC_LOSS_WINDOWS': (512,)}
  rows = trained(name, tmp_path / 'run', RECORDS=tmp_path / 'music', **small)
  assert np.isfinite(rows[-1]['si_sdr']) and rows[0]['judged_real'] >= 0


@pytest.mark.slow
def test_denoising_is_trained(tmp_path):
  rows = trained('denoising', tmp_path / 'run')
  assert np.isfinite(rows[-1]['si_sdr_denoised']) and np.isfinite(rows[-1]['si_sdr_noisy'])
  # A run that resumes has the condition's parameters, and a codec that is loaded denoises.
  from musiclm_jax import transcode
  codec = transcode.load(tmp_path / 'run').model
  audio = jnp.asarray(np.random.default_rng(0).normal(0, 0.1, (1, 4800)), jnp.float32)
  assert codec.decode(codec.encode(audio, denoise=True)).shape == audio.shape
  assert np.abs(codec.film.scale[...] - 1).max() > 0 and np.abs(codec.film.bias[...]).max() > 0


@pytest.mark.slow
def test_balanced_training_reports_what_each_loss_pulls(tmp_path):
  rows = trained('balanced', tmp_path / 'run')
  names = ('reconstruction', 'waveform', 'adversarial', 'feature')
  assert all(rows[1][f'gradient_{name}'] > 0 for name in names)
  # The first step has no average to go by.
  assert all(rows[0][f'balance_{name}'] == pytest.approx(1) for name in names)
  after = [rows[1][f'balance_{name}'] for name in names]
  assert min(after) < 0.9 or max(after) > 1.1
