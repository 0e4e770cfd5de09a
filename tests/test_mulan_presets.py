"""MuLan's overlays: every line is read, sizes are what is said of them, and a small one trains and embeds."""
from __future__ import annotations

import json

from flax import nnx
import jax
import numpy as np
import pytest

from musiclm_jax import config
from musiclm_jax.mulan.resnet import ResNetTowerConfig
from musiclm_jax.text.tokenizer import Tokenizer
from tests import trainings
from tests.mulan import configs
from tests.test_gin_files import _unused

SMALL = {'resnet.ResNetTowerConfig.channels': '4', 'resnet.ResNetTowerConfig.blocks': '(1, 1)',
         'resnet.ResNetTowerConfig.groups': '2', 'MULAN_BATCH': '8', 'MULAN_CHUNKS': '2', 'MULAN_MEL_BANDS': '16',
         'MULAN_MEL_FFT': '0', 'MULAN_BAND_MASK_BANDS': '4', 'MULAN_STEPS': '2', 'MULAN_DECAY_STEPS': '1000'}


def experiment(name: str, size: str = 'paper', **macros) -> config.Experiment:
  files = [f'experiments/{name}.gin', f'size/{size}.gin', 'mulan/resnet50.gin']
  given = list(macros.items())
  try:
    return config.load_experiment(files, given, provided=('workdir', 'dry_run'))
  except config.MissingValues as missing:
    return config.load_experiment(
        files, [*given, *((m, 'somewhere') for m in missing.names)], provided=('workdir', 'dry_run'))


@pytest.mark.parametrize('name', ['mulan', 'mulan_tokens'])
def test_resnet_50_is_read_by_training_and_tokens(name):
  objective = experiment(name).argument('objective')
  assert isinstance(objective.mulan.audio, ResNetTowerConfig) and objective.mulan.audio.mel.bands == 64
  model = nnx.eval_shape(lambda: objective.model(nnx.Rngs(0)))
  audio = model.audio if name == 'mulan' else model.encoder.audio
  assert configs.parameters(audio) == 23_501_760


def test_every_line_is_used():
  assert not _unused('mulan/resnet50', [experiment('mulan'), experiment('mulan_tokens')])


def test_tokens_of_music_without_texts():
  files = ['experiments/mulan_tokens.gin', 'size/tiny.gin', 'mulan/tokens_of_audio.gin']
  loaded = config.load_experiment(files, [('MULAN_WORKDIR', 'somewhere'), ('RECORDS', 'builtin')],
                                  provided=('workdir', 'dry_run'))
  assert not _unused('mulan/tokens_of_audio', [loaded])
  assert 'text' not in loaded.argument('objective').batch_spec(4) and 'text' not in loaded.argument('batches').spec()


@pytest.mark.slow
def test_a_small_one_trains(tmp_path):
  loaded = experiment('mulan', 'nano', LOG_EVERY='1', **{'partition.Partitioner.data': '1'}, **SMALL)
  loaded.build(workdir=str(tmp_path), dry_run=False)
  rows = [json.loads(line) for line in (tmp_path / 'metrics.jsonl').read_text().splitlines()]
  assert rows and all(np.isfinite(row['loss']) for row in rows)
  from musiclm_jax.training import checkpoint
  model = checkpoint.load(tmp_path).model
  window = model.config.audio.window_samples
  clips = np.random.default_rng(0).normal(0, 0.1, (2, 2 * window)).astype(np.float32)
  np.testing.assert_allclose(np.linalg.norm(jax.jit(model.embed_audio)(clips), axis=1), 1, rtol=1e-4)


def test_another_vocabulary_than_the_one_of_the_checkpoint_is_refused(tmp_path):
  """Ids would mean other words; the sizes of all arrays agree."""
  own, other = tmp_path / 'own.model', tmp_path / 'other.model'
  for path, word in ((own, 'strings'), (other, 'brass')):
    path.write_bytes(Tokenizer.train([f'slow {word} in a minor key', f'{word} and drums'] * 3, 300).model_bytes)
  one = {'partition.Partitioner.data': '1', 'MULAN_VOCABULARY': str(own)}

  def run(name, workdir, **more):
    built = trainings.experiment(name, **{**one, **more})
    built.build(workdir=str(tmp_path / workdir), dry_run=False)

  run('mulan', 'mulan', NUM_STEPS=0)
  with pytest.raises(ValueError, match='mulan has another vocabulary.model than .*MULAN_VOCABULARY'):
    run('mulan_tokens', 'tokens', MULAN_WORKDIR=tmp_path / 'mulan', MULAN_VOCABULARY=str(other))
  own.write_bytes(other.read_bytes())
  with pytest.raises(ValueError, match='0 has another vocabulary.model than this experiment .*trained with'):
    run('mulan', 'mulan', NUM_STEPS=1)
