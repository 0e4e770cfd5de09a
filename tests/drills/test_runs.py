"""What a run does when it is stopped, doubled, misconfigured, or starved."""
import json
import os
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

from musiclm_jax import reproduce
from musiclm_jax.data import records
from musiclm_jax.training import checkpoint, integrity, workdir
from tests.test_every_training import (  # noqa: F401 (fixtures)
    _steps_logged, assert_same_end, command, environment, finish, tokens)
from tests.trainings import write_tokens

# ruff: noqa: F811

STAGE = 'fine_lm'  # what is compiled soonest; that all trainings resume alike is `test_every_training.py`'s matter


def started(arguments, environment, folder, step):
  """The process, once it has logged this step."""
  process = subprocess.Popen(arguments, env=environment, stderr=subprocess.PIPE, text=True)
  deadline = time.monotonic() + 900
  while _steps_logged(folder) < step and process.poll() is None and time.monotonic() < deadline:
    time.sleep(0.01)
  assert process.poll() is None, process.stderr.read()[-2000:]
  return process


def refused(arguments, environment, code=1):
  done = subprocess.run(arguments, env=environment, capture_output=True, text=True, timeout=600)
  assert done.returncode == code, done.stderr[-2000:]
  last = done.stderr.strip().splitlines()[-1]
  assert last.startswith('musiclm: error:')
  return last


@pytest.mark.slow
@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_asked_to_stop_it_saves_the_step_and_goes_on_from_there(environment, tokens, tmp_path, number):
  """Drill 3."""
  folder = tmp_path / 'run'
  process = started(command(STAGE, tokens, folder, 4000, CHECKPOINT_EVERY=0), environment, folder, 5)
  process.send_signal(number)
  _, errors = process.communicate(timeout=900)
  assert process.returncode == 128 + number
  step = checkpoint.latest_step(tmp_path / 'run')
  assert step >= 5 and f'stopped by {number.name} after step {step}, which is saved' in errors.splitlines()[-1]
  assert _steps_logged(tmp_path / 'run') == step  # nothing will be computed twice
  finish(command(STAGE, tokens, tmp_path / 'run', step + 3), environment)
  finish(command(STAGE, tokens, tmp_path / 'whole', step + 3), environment)
  assert_same_end(tmp_path / 'whole', tmp_path / 'run')


@pytest.mark.slow
def test_two_runs_in_one_workdir(environment, tokens, tmp_path):
  """Drill 14: the second is refused and names the owner; a killed owner leaves no lock."""
  folder = tmp_path / 'run'
  owner = started(command(STAGE, tokens, folder, 4000), environment, folder, 1)
  before = (folder / 'config.gin').read_text()
  line = refused(command(STAGE, tokens, folder, 9), environment)
  assert f'belongs to another run, process {owner.pid} on {socket.gethostname()}' in line
  assert (folder / 'config.gin').read_text() == before
  owner.send_signal(signal.SIGKILL)
  owner.wait()
  finish(command(STAGE, tokens, folder, _steps_logged(folder) + 2), environment)


def test_the_lock_is_given_back_and_names_its_owner(tmp_path):
  with workdir.owned(tmp_path):
    with pytest.raises(ValueError, match=f'belongs to another run, process {os.getpid()} on '):
      with workdir.owned(tmp_path):
        pass
  with workdir.owned(tmp_path):
    pass


@pytest.mark.slow
def test_the_same_run_twice_is_the_same_and_reproduce_says_so(environment, tokens, tmp_path):
  """Drill 14, and the manifest of a run: `musiclm reproduce` repeats it from what its checkpoint says."""
  finish(command(STAGE, tokens, tmp_path / 'one', 6), environment)
  again = [sys.executable, '-m', 'musiclm_jax.main', 'reproduce', str(tmp_path / 'one'), '--workdir']
  done = finish([*again, str(tmp_path / 'two')], environment)
  assert 'lines of metrics and all parameters: equal, bit for bit' in done.stdout
  assert_same_end(tmp_path / 'one', tmp_path / 'two')
  part = finish([*again, str(tmp_path / 'three'), '--steps', '3'], environment)
  assert 'compared: 3 lines of metrics: equal, bit for bit' in part.stdout
  assert 'already holds a run' in refused([*again, str(tmp_path / 'two')], environment)
  finish(command(STAGE, tokens, tmp_path / 'other', 6, SEED=1), environment)
  found = reproduce.compare(tmp_path / 'one', tmp_path / 'other')
  assert not found.same and found.first_difference == 'seed: 0, now 1'


@pytest.mark.slow
def test_a_checkpoint_of_another_network_is_refused_before_any_step(environment, tokens, tmp_path):
  """Drill 8."""
  finish(command(STAGE, tokens, tmp_path / 'run', 2), environment)
  before = (tmp_path / 'run' / 'config.gin').read_text()
  line = refused(command(STAGE, tokens, tmp_path / 'run', 4, LM_MLP_WIDTH=48), environment)
  assert 'is a checkpoint of another architecture: ' in line and 'mlp_width' in line and '48' in line
  line = refused(command(STAGE, tokens, tmp_path / 'run', 4, EMA_DECAY=0.9), environment)
  assert 'has another moving average of the parameters than this experiment' in line
  assert _steps_logged(tmp_path / 'run') == checkpoint.latest_step(tmp_path / 'run') == 2
  assert (tmp_path / 'run' / 'config.gin').read_text() == before


@pytest.mark.slow
def test_a_codebook_of_another_size_is_another_network(environment, tmp_path):
  """Drill 8, for what no gradient trains."""
  finish(command('codec', None, tmp_path / 'run', 1), environment)
  line = refused(command('codec', None, tmp_path / 'run', 2, ACOUSTIC_CODES=8), environment)
  assert 'is a checkpoint of another architecture: ' in line and 'codebook_size' in line
  finish(command('codec', None, tmp_path / 'run', 2), environment)


@pytest.mark.slow
def test_a_loss_that_is_no_number_stops_the_run_at_its_step(environment, tokens, tmp_path):
  """Drill 9: the step and its examples are named, and the run resumes from before."""
  folder = tmp_path / 'run'
  finish(command(STAGE, tokens, folder, 4), environment)
  line = refused(command(STAGE, tokens, folder, 12, LM_LEARNING_RATE='1e30', LM_WARMUP_STEPS=0), environment)
  step = int(line.partition('the loss of step ')[2].split()[0])
  assert 5 <= step <= 8 and f'batch_of_step_{step}.json' in line
  examples = json.loads((folder / f'batch_of_step_{step}.json').read_text())
  assert len(examples) == 8 and all(e['recording'] for e in examples)
  assert checkpoint.latest_step(folder) == 4
  finish(command(STAGE, tokens, folder, 6), environment)


@pytest.mark.slow
def test_fewer_clips_than_a_batch_and_an_empty_split(environment, tmp_path):
  """Drill 12."""
  few = write_tokens(tmp_path / 'few', clips=3)
  assert '3 usable clips, batch 8' in refused(command('coarse_lm', few, tmp_path / 'a', 2), environment)
  header = records.read_manifest(few).header
  records.write_records(tmp_path / 'none', {'train': [], 'test': []}, header)
  assert 'has no records' in refused(command('coarse_lm', tmp_path / 'none', tmp_path / 'b', 2), environment)
  assert not (tmp_path / 'a' / 'metrics.jsonl').exists()


@pytest.mark.slow
def test_a_clock_that_goes_backwards_changes_nothing(environment, tokens, tmp_path):
  """Time is measured with a clock that only goes forward; the calendar is never asked."""
  code = ('import time, sys; now = time.time(); count = iter(range(10 ** 9)); '
          'time.time = lambda: now - 3600 * next(count); '
          'from musiclm_jax import main; main.main(sys.argv[1:])')
  arguments = command('coarse_lm', tokens, tmp_path / 'back', 9)
  finish([sys.executable, '-c', code, *arguments[3:]], environment)
  finish(command('coarse_lm', tokens, tmp_path / 'whole', 9), environment)
  assert_same_end(tmp_path / 'whole', tmp_path / 'back')


@pytest.mark.slow
def test_a_shard_deleted_under_a_run_is_named(environment, tmp_path):
  """Drill 13."""
  data = write_tokens(tmp_path / 'tokens')
  finish(command('coarse_lm', data, tmp_path / 'run', 2), environment)
  victim = next(data.glob('train-00001*.arrayrecord'))
  whole = victim.read_bytes()
  victim.unlink()
  assert f'the shard {victim} is missing' in refused(command('coarse_lm', data, tmp_path / 'run', 4), environment)
  victim.write_bytes(whole[:-100])
  assert f'the shard {victim} has ' in refused(command('coarse_lm', data, tmp_path / 'run', 4), environment)
  victim.write_bytes(whole)
  finish(command('coarse_lm', data, tmp_path / 'run', 4), environment)


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16', 'int32', 'uint8', 'bool'])
@pytest.mark.parametrize('shape', [(), (0,), (7,), (300, 5), (3, 1, 4, 2)])
@pytest.mark.parametrize('version', [1, 2])
def test_a_checksum_is_the_same_on_the_device_and_on_the_host(monkeypatch, dtype, shape, version):
  import jax
  monkeypatch.setattr(integrity, '_AT_A_TIME', 1000)
  x = jax.numpy.asarray(np.random.default_rng(0).normal(0, 50, shape)).astype(dtype)
  there = integrity.checksums({'x': x}, version)
  monkeypatch.setattr(integrity, '_in_memory', lambda leaves: False)
  assert integrity.checksums({'x': x}, version) == there


@pytest.mark.parametrize('dtype', [np.float32, np.float16, np.int32, np.int8, bool])
def test_a_checksum_sees_any_single_change_and_no_layout(dtype):
  import jax
  from jax.sharding import Mesh, NamedSharding, PartitionSpec
  generator = np.random.default_rng(0)
  array = generator.integers(0, 100, (8, 6, 4)).astype(dtype)
  value = integrity.checksums({'a': jax.numpy.asarray(array)})['a']
  mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ('x', 'y'))
  split = jax.device_put(array, NamedSharding(mesh, PartitionSpec('x', 'y')))
  assert integrity.checksums({'a': split})['a'] == value
  raw = array.view(np.uint8).reshape(-1)
  for place in range(0, raw.size, 7):
    changed = raw.copy()
    changed[place] ^= 1
    other = changed.view(array.dtype).reshape(array.shape)
    assert integrity.checksums({'a': jax.numpy.asarray(other)})['a'] != value
  swapped = array.copy()
  swapped[0], swapped[1] = array[1], array[0]
  assert integrity.checksums({'a': jax.numpy.asarray(swapped)})['a'] != value


def test_changes_of_several_words_do_not_cancel_in_a_checksum():
  import jax
  generator = np.random.default_rng(0)
  array = generator.normal(size=4096).astype(np.float32)
  value_of = lambda x: integrity.checksums({'a': jax.numpy.asarray(x)})['a']
  value = value_of(array)
  assert value_of(-array) != value and value_of(array[::-1]) != value
  for _ in range(300):
    changed = array.copy()
    places = generator.choice(array.size, 2 * generator.integers(1, 9), replace=False)
    changed.view(np.uint32)[places] ^= np.uint32(1) << np.uint32(generator.integers(22, 32))  # the sign and large parts
    assert value_of(changed) != value
    exchanged = array.copy()
    exchanged[places] = array[np.roll(places, 1)]
    assert value_of(exchanged) != value


def test_a_copy_that_differs_is_named_and_confirmed_when_the_step_is_taken_again(tmp_path, caplog):
  """Drill 15, on eight devices of one process."""
  import jax
  from jax.sharding import Mesh, NamedSharding, PartitionSpec
  mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ('data', 'fsdp'))
  whole = np.arange(32, dtype=np.float32).reshape(8, 4)
  placed = lambda copies: {'w': jax.make_array_from_single_device_arrays(
      whole.shape, NamedSharding(mesh, PartitionSpec('fsdp')),
      [jax.device_put(copies(d.id, whole[index]), d)
       for d, index in NamedSharding(mesh, PartitionSpec('fsdp')).devices_indices_map(whole.shape).items()])}
  good = placed(lambda device, part: part)
  bad = placed(lambda device, part: np.where((part == part[1, 2]) & (device == 5), -part, part))
  integrity.check_replicas(good, 7, tmp_path)
  with pytest.raises(integrity.ReplicasDiffer, match=r'copies of w .* after step 7: process 0 \(device 5\) differs'):
    integrity.check_replicas(bad, 7, tmp_path)
  assert (tmp_path / 'replicas_differ.json').exists()
  integrity.check_replicas(good, 6, tmp_path)
  with caplog.at_level('WARNING', logger='absl'):
    integrity.check_replicas(good, 7, tmp_path)
  assert not (tmp_path / 'replicas_differ.json').exists()
  # The other part of w has other values, and none of its copies was suspected.
  assert len([r for r in caplog.records if 'step 7 was taken again' in r.message]) == 1
