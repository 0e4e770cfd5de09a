"""A codec that trains with TensorBoard: what there is to see and to hear, on a mesh, and after a restart."""
import io
import sys

import numpy as np
import pytest

from musiclm_jax.training import metrics
from tests.trainings import experiment, write_signals

CLIPS = 3  # fewer than what the mesh deals out


def codec(audio, steps, **macros):
  given = {'TENSORBOARD': True, 'EVAL_EVERY': 1, 'LOG_EVERY': 1, 'train.Cadence.clips': CLIPS,
           'train.Cadence.eval_batches': 2, 'partition.Partitioner.data': 2}
  return experiment('codec', RECORDS=audio, NUM_STEPS=steps, **given, **macros)


@pytest.fixture(scope='module')
def workdir(tmp_path_factory):
  pytest.importorskip('tensorboardX')
  folder = tmp_path_factory.mktemp('tensorboard')
  audio = write_signals(folder / 'audio', clips=8, shards=1)
  codec(audio, 2).build(workdir=str(folder / 'run'), dry_run=False)
  return folder / 'run'


def check_scalars(workdir, steps):
  """Each line of the metrics file is in TensorBoard once; returns the last evaluation."""
  from tests.training import event_files
  found = event_files.values(workdir / 'tensorboard')
  lines = {(line['part'], line['step']): line for line in metrics.read(workdir / 'metrics.jsonl')}
  assert set(lines) == {(part, step) for part in ('train', 'eval') for step in steps}
  scalars = {key: v for key, v in found.items() if v[0].HasField('simple_value')}
  names = {(f'{part}/{name}', step) for (part, step), line in lines.items() for name in line.keys() - {'part', 'step'}}
  assert set(scalars) == names and all(len(v) == 1 for v in scalars.values())
  for (part, step), line in lines.items():
    np.testing.assert_allclose(scalars[f'{part}/loss', step][0].simple_value, line['loss'], rtol=1e-6)
  return lines['eval', steps[-1]]


def test_each_line_is_in_tensorboard(workdir):
  evaluation = check_scalars(workdir, (1, 2))
  assert evaluation['perplexity_frames'] == 2 * 4 * 10  # batches, clips, frames
  for level in range(1, 5):
    assert 1 <= evaluation[f'perplexity_{level}'] <= 16 and 0 < evaluation[f'codes_used_share_{level}'] <= 1


def test_held_out_clips_are_there_to_hear_and_to_see(workdir):
  from tests.training import event_files
  soundfile = pytest.importorskip('soundfile')
  found = {key: v for key, v in event_files.values(workdir / 'tensorboard').items() if 'clip' in key[0]}
  names = ('original', 'levels_01', 'levels_04', 'pictures')
  assert set(found) == {(f'clip_{i + 1}/{name}', step) for i in range(CLIPS) for name in names for step in (1, 2)}
  heard = {}
  for (tag, step), (value,) in found.items():
    if tag.endswith('pictures'):
      assert value.image.width > 300 and value.image.encoded_image_string.startswith(b'\x89PNG')
    else:
      heard[tag, step], rate = soundfile.read(io.BytesIO(value.audio.encoded_audio_string))
      assert rate == 24000 and len(heard[tag, step]) == 4800
  # The same clips each time, and of a network that learns.
  batch = codec(workdir.parent / 'audio', 1).argument('eval_batches')(0)
  for i in range(CLIPS):
    for step in (1, 2):
      np.testing.assert_allclose(heard[f'clip_{i + 1}/original', step], batch['audio'][i], atol=1e-4)
    assert (heard[f'clip_{i + 1}/levels_04', 1] != heard[f'clip_{i + 1}/levels_04', 2]).any()


@pytest.mark.slow
def test_a_run_that_goes_on_takes_no_step_twice(workdir):
  """Its newest checkpoint is of step 2; step 3 was taken and logged before it was killed."""
  metrics.MetricsWriter(workdir, 2, tensorboard=True).write(3, {'loss': -1.0})
  audio = workdir.parent / 'audio'
  codec(audio, 2).build(workdir=str(workdir), dry_run=False)  # nothing to do, nothing to write
  assert len(list((workdir / 'tensorboard').iterdir())) == 2
  codec(audio, 3).build(workdir=str(workdir), dry_run=False)
  check_scalars(workdir, (1, 2, 3))


def test_a_run_without_the_package_is_refused_before_it_writes_anything(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, 'tensorboardX', None)
  audio = write_signals(tmp_path / 'audio', clips=8, shards=1)
  with pytest.raises(ValueError, match='needs the package tensorboardX'):
    codec(audio, 1).build(workdir=str(tmp_path / 'run'), dry_run=False)
  assert not (tmp_path / 'run').exists()


def test_evaluations_of_nothing_are_refused():
  with pytest.raises(ValueError, match='eval_batches and clips must be at least 1, found 0'):
    experiment('codec', **{'train.Cadence.eval_batches': 0}).argument('cadence')
