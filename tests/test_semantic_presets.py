"""Overlays of the semantic network: every line is read, and a small one trains, and makes tokens, at 16 kHz."""
from __future__ import annotations

import numpy as np
import pytest

from musiclm_jax import config
from musiclm_jax.data import composer, records
from musiclm_jax.training import checkpoint
from tests.test_gin_files import _unused

OVERLAY = 'w2v_bert/speech.gin'


def experiment(name: str, size: str, **macros) -> config.Experiment:
  return config.load_experiment([f'experiments/{name}.gin', f'size/{size}.gin', OVERLAY],
                                [(k, str(v)) for k, v in macros.items()], provided=('workdir', 'dry_run'))


@pytest.mark.parametrize('size', ['nano', 'paper'])
def test_every_line_is_used_and_tokens_stay_25_a_second(size):
  loaded = [experiment('w2v_bert', size), experiment('semantic_tokens', size, W2V_WORKDIR='somewhere')]
  assert not _unused('w2v_bert/speech', loaded)
  tokenizer = loaded[1].argument('objective')
  assert tokenizer.encoder.mel.sample_rate == 16000 and tokenizer.token_spec.frame_rate == 25


@pytest.fixture(scope='module')
def speech(tmp_path_factory):
  """Records at 16 kHz: tones of changing pitch, as far from the built-in music as anything."""
  rng = np.random.default_rng(0)

  def clip(i):
    hz = np.repeat(rng.uniform(100, 4000, 16), 2000)
    audio = (0.3 * np.sin(2 * np.pi * np.cumsum(hz) / 16000)).astype(np.float32)
    return {'audio': audio, 'sample_rate': 16000, 'recording': f'speech {i}', 'artist': '', 'start': 0.0, 'texts': []}

  folder = tmp_path_factory.mktemp('speech')
  header = records.Header('audio', records.audio_streams(16000))
  records.write_records(folder, {'train': [clip(i) for i in range(8)], 'test': [clip(8)]}, header, num_shards=1)
  return folder


@pytest.mark.slow
def test_a_small_one_makes_tokens_of_speech(speech, tmp_path):
  one = {'RECORDS': speech, 'partition.Partitioner.data': 1}
  experiment('w2v_bert', 'nano', NUM_STEPS=2, **one).build(workdir=str(tmp_path / 'w2v_bert'), dry_run=False)
  experiment('semantic_tokens', 'nano', W2V_WORKDIR=tmp_path / 'w2v_bert', **one).build(
      workdir=str(tmp_path / 'tokens'), dry_run=False)
  model = checkpoint.load(tmp_path / 'tokens').model
  tokens = model.tokens(np.zeros((1, 32000), np.float32))
  assert tokens.shape == (1, 50, 1)
  again = lambda **more: experiment('semantic_tokens', 'nano', W2V_WORKDIR=tmp_path / 'w2v_bert', **one, **more).build(
      workdir=str(tmp_path / 'tokens'), dry_run=False)
  again(SEMANTIC_TOKENS_ITERATIONS=5)  # goes on
  with pytest.raises(ValueError, match='was fitted otherwise: layer: 3 != 1'):
    again(SEMANTIC_TOKENS_LAYER=1)
  about = next((tmp_path / 'w2v_bert' / 'checkpoints').glob('*/about/specs.json'))
  about.write_text(about.read_text().replace('spectrogram', 'features'))
  with pytest.raises(ValueError, match='made by another version of musiclm_jax. Then train it again'):
    checkpoint.load(tmp_path / 'w2v_bert')


def test_music_at_24_khz_is_refused(tmp_path):
  corpus = composer.Corpus(size=8, seconds=2.0)
  header = records.Header('audio', records.audio_streams(24000))
  records.write_records(tmp_path / 'music', {'train': list(corpus), 'test': [corpus[0]]}, header, num_shards=1)
  with pytest.raises(ValueError, match='24000 samples a second, the network takes 16000'):
    experiment('w2v_bert', 'nano', RECORDS=tmp_path / 'music', NUM_STEPS=1).build(
        workdir=str(tmp_path / 'run'), dry_run=False)
