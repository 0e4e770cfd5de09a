"""Processes over loopback: one that is killed or hangs is missed within a bound and named, one with a memory fault is
named, one that fails does not leave the others waiting, asking one to stop stops all, and as many or fewer go on.
"""
import json
import re
import signal
import socket
import subprocess
import time

import numpy as np
import pytest

from musiclm_jax import provenance
from musiclm_jax.training import checkpoint
from tests.test_every_training import (  # noqa: F401 (fixtures)
    _steps_logged, assert_same_end, command, environment, tokens)

# ruff: noqa: F811


def cluster(environment, count=2, **more):
  """The environment of one of `count` processes that will meet at a free port."""
  with socket.socket() as probe:
    probe.bind(('127.0.0.1', 0))
    port = probe.getsockname()[1]
  return {**environment, 'JAX_COORDINATOR_ADDRESS': f'127.0.0.1:{port}', 'JAX_NUM_PROCESSES': str(count), **more}


def group(arguments, environment, own=(), count=2, **more):
  """Processes with these arguments, and each with its own."""
  all_of_them = cluster(environment, count, **more)
  return [subprocess.Popen([*arguments, '--distributed', *(own[i] if own else ())],
                           env={**all_of_them, 'JAX_PROCESS_ID': str(i)}, stderr=subprocess.PIPE, text=True)
          for i in range(count)]


def finish_all(processes):
  errors = [p.communicate(timeout=900)[1] for p in processes]
  assert [p.returncode for p in processes] == [0] * len(processes), errors[0][-3000:]


def await_step(processes, folder, step):
  deadline = time.monotonic() + 900
  while _steps_logged(folder) < step and time.monotonic() < deadline:
    assert all(p.poll() is None for p in processes), processes[0].stderr.read()[-3000:]
    time.sleep(0.05)
  assert _steps_logged(folder) >= step


@pytest.mark.slow
@pytest.mark.parametrize('asked', [1, 0])
def test_one_of_two_asked_to_stop_both_save_the_same_step(environment, tokens, tmp_path, asked):
  """Drill 3, with two processes."""
  folder = tmp_path / 'run'
  processes = group(command('fine_lm', tokens, folder, 100_000, CHECKPOINT_EVERY=0), environment)
  await_step(processes, folder, 5)
  processes[asked].send_signal(signal.SIGTERM)
  errors = [p.communicate(timeout=900)[1] for p in processes]
  assert [p.returncode for p in processes] == [128 + signal.SIGTERM] * 2, errors[0][-2000:] + errors[1][-2000:]
  step = checkpoint.latest_step(folder)
  assert step >= 5 and _steps_logged(folder) == step
  for name, steps in (('run', step + 3), ('whole', step + 3)):
    finish_all(group(command('fine_lm', tokens, tmp_path / name, steps, CHECKPOINT_EVERY=0), environment))
  assert_same_end(tmp_path / 'whole', folder)


@pytest.fixture(scope='module')
def unbroken(environment, tokens, tmp_path_factory):
  """A run of two processes that nothing happens to."""
  folder = tmp_path_factory.mktemp('unbroken') / 'run'
  finish_all(group(command('fine_lm', tokens, folder, 20), environment))
  return folder


@pytest.mark.slow
@pytest.mark.parametrize('count, then, devices, mesh', [(2, 2, 1, 'data'), (4, 2, 4, 'cpu8')])
def test_a_killed_process_is_named_and_as_many_or_fewer_go_on(count, then, devices, mesh, environment, tokens, unbroken,
                                                              tmp_path):
  """The others end within the heartbeat's bound. From the last checkpoint the run goes on to the same losses, also on
  fewer processes and another mesh, and with as many processes to the same bits."""
  folder = tmp_path / 'run'
  finish_all(group(command('fine_lm', tokens, folder, 4), environment, count=count))
  # Without a save, in which a process that is gone may show first as a save that failed.
  processes = group(command('fine_lm', tokens, folder, 100_000, CHECKPOINT_EVERY=0), environment, count=count,
                    MUSICLM_HEARTBEAT_SECONDS='10')
  try:
    await_step(processes, folder, 6)
    processes[-1].kill()
    begun = time.monotonic()
    errors = [p.communicate(timeout=900)[1] for p in processes[:-1]]
    print(f'{count} processes: the others ended {time.monotonic() - begun:.1f} s after one was killed')
    assert time.monotonic() - begun < 60 and all(p.returncode for p in processes[:-1])
    # In the words of the service that counts heartbeats, or of the barrier at which the others wait for one another.
    named = re.compile(rf'heartbeats\):\n{count - 1}\n|Task {count - 1} heartbeat timeout')
    assert all(named.search(e) for e in errors), [e[-3000:] for e in errors]
  finally:
    for process in processes:
      process.kill()
      process.communicate()
  assert checkpoint.latest_step(folder) == 4
  flags = f'{environment["XLA_FLAGS"]} --xla_force_host_platform_device_count={devices}'
  finish_all(group([*command('fine_lm', tokens, folder, 20), '--gin_file', f'mesh/{mesh}.gin'], environment, count=then,
                   XLA_FLAGS=flags))
  if count == then:
    assert_same_end(unbroken, folder)
  losses = [[json.loads(line)['loss'] for line in (run / 'metrics.jsonl').read_text().splitlines()
             if json.loads(line)['part'] == 'train'] for run in (unbroken, folder)]
  assert len(losses[0]) == len(losses[1]) == 20
  np.testing.assert_allclose(losses[1], losses[0], rtol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize('victim', [1, 0])
def test_where_one_process_fails_the_other_ends_too(environment, tokens, tmp_path, victim):
  """A fault of one machine (its disk, its memory) must not leave the others in a collective for hours."""
  code = f'''
import os, sys
from musiclm_jax import main
from musiclm_jax.data import batches
call = batches.TokenBatches.__call__
def faulty(self, step, *args):
  if step == 6 and os.environ['JAX_PROCESS_ID'] == '{victim}':
    raise OSError('this disk is broken')
  return call(self, step, *args)
batches.TokenBatches.__call__ = faulty
main.main(sys.argv[1:])
'''
  arguments = command('fine_lm', tokens, tmp_path / 'run', 100_000)
  processes = group([arguments[0], '-c', code, *arguments[3:]], environment, MUSICLM_HEARTBEAT_SECONDS='10')
  try:
    _, errors = processes[victim].communicate(timeout=900)
    begun = time.monotonic()
    assert processes[victim].returncode not in (0, None) and 'this disk is broken' in errors, errors[-3000:]
    _, errors = processes[1 - victim].communicate(timeout=900)
    assert processes[1 - victim].returncode not in (0, None) and time.monotonic() - begun < 90, errors[-3000:]
    assert checkpoint.latest_step(tmp_path / 'run') == 4
  finally:
    for process in processes:
      process.kill()
      process.communicate()


@pytest.mark.slow
@pytest.mark.parametrize('victim', [1, 0])
def test_a_process_that_hangs_is_named_within_a_bound(environment, tokens, tmp_path, victim):
  """Drill 10."""
  processes = group(command('fine_lm', tokens, tmp_path / 'run', 100_000), environment, MUSICLM_HEARTBEAT_SECONDS='10')
  try:
    await_step(processes, tmp_path / 'run', 3)
    processes[victim].send_signal(signal.SIGSTOP)
    begun = time.monotonic()
    _, errors = processes[1 - victim].communicate(timeout=900)
    assert processes[1 - victim].returncode not in (0, None) and time.monotonic() - begun < 90
    # Process 0 is the one that counts heartbeats; without it the other can only say that it is gone.
    expected = 'stopped sending heartbeats):\n1\n' if victim == 1 else 'coordinat'
    assert expected in errors, errors[-6000:]
  finally:
    for process in processes:
      process.kill()
      process.communicate()


@pytest.mark.slow
def test_a_bit_flip_on_one_process_is_found_before_the_next_checkpoint(environment, tokens, tmp_path):
  """Drill 15: after step 8 process 1 changes a bit of its copy; the run stops at the save of that step, is started
  again from step 4, and names the process that had been wrong."""
  folder = tmp_path / 'run'
  code = '''
import os, sys
import jax
import numpy as np
from musiclm_jax import main, train
step = train._Run.__init__
def init(self, *args, **kwargs):
  step(self, *args, **kwargs)
  inner = self.step
  def faulty(state, batch, key):
    state, values = inner(state, batch, key)
    if os.environ.get('FLIP') and int(state.step) == 8 and jax.process_index() == 1:
      leaves, tree = jax.tree.flatten(state.params)
      words = [(s.device, np.asarray(s.data).view(np.uint32) ^ 1) for s in leaves[0].addressable_shards]
      flipped = [jax.device_put(w.view(np.float32), device) for device, w in words]
      leaves[0] = jax.make_array_from_single_device_arrays(leaves[0].shape, leaves[0].sharding, flipped)
      state.params.update(jax.tree.unflatten(tree, leaves))
    return state, values
  self.step = faulty
train._Run.__init__ = init
main.main(sys.argv[1:])
'''
  arguments = command('fine_lm', tokens, folder, 12)
  wrapped = [arguments[0], '-c', code, *arguments[3:]]
  processes = group(wrapped, environment, FLIP='1')
  errors = [p.communicate(timeout=900)[1] for p in processes]
  assert all(p.returncode != 0 for p in processes)
  assert 'are no longer the same after step 8' in errors[0] and 'process 1' in errors[0], errors[0][-3000:]
  assert json.loads((folder / 'replicas_differ.json').read_text())['step'] == 8
  processes = group(wrapped, environment)
  errors = [p.communicate(timeout=900)[1] for p in processes]
  assert [p.returncode for p in processes] == [0, 0], errors[0][-2000:]
  assert 'step 8 was taken again: process 1 had wrong values' in errors[0]
  assert not (folder / 'replicas_differ.json').exists()
  finish_all(group(command('fine_lm', tokens, tmp_path / 'clean', 12), environment))
  assert_same_end(folder, tmp_path / 'clean')


@pytest.mark.slow
def test_a_mesh_without_a_device_of_one_process_is_refused_by_both(environment, tokens, tmp_path):
  arguments = command('fine_lm', tokens, tmp_path / 'run', 4, **{'partition.Partitioner.data': 1})
  for process in group(arguments, environment):
    _, errors = process.communicate(timeout=900)
    assert process.returncode == 1 and 'Traceback' not in errors
    assert 'uses 1 of the 2 devices, none of process 1: choose another mesh file' in errors, errors[-3000:]


@pytest.mark.slow
def test_processes_with_another_configuration_are_refused(environment, tokens, tmp_path):
  arguments = command('fine_lm', tokens, tmp_path / 'run', 4)
  for process in group(arguments, environment, (['--gin.SEED=1'], ['--gin.SEED=2'])):
    _, errors = process.communicate(timeout=900)
    assert process.returncode == 1
    assert 'process 1 runs with another configuration (' in errors and 'than process 0 (' in errors
  assert not (tmp_path / 'run' / 'checkpoints').exists()


@pytest.mark.slow
def test_processes_with_other_code_are_refused(environment, tokens, tmp_path):
  code = '''
import os, sys
from musiclm_jax import main, provenance
if os.environ['JAX_PROCESS_ID'] == '1':
  provenance.code_digest = lambda: '0' * 16
main.main(sys.argv[1:])
'''
  arguments = command('fine_lm', tokens, tmp_path / 'run', 4)
  for process in group([arguments[0], '-c', code, *arguments[3:]], environment):
    _, errors = process.communicate(timeout=900)
    assert process.returncode == 1
    assert f'runs with another code ({"0" * 16}) than process 0 ({provenance.code_digest()})' in errors
  assert not (tmp_path / 'run' / 'checkpoints').exists()


@pytest.mark.slow
def test_a_coordinator_that_is_not_there_is_waited_for_within_a_bound(environment, tokens, tmp_path):
  alone = cluster(environment, JAX_PROCESS_ID='1', MUSICLM_START_SECONDS='5')
  begun = time.monotonic()
  process = subprocess.run([*command('fine_lm', tokens, tmp_path / 'run', 4), '--distributed'], env=alone,
                           capture_output=True, text=True, timeout=900)
  assert process.returncode == 1 and time.monotonic() - begun < 120
  (line,) = process.stderr.splitlines()
  assert line.startswith('musiclm: error: no coordinator at 127.0.0.1:')
