"""What holds for each of the six trainings: microbatches, meshes, processes and kills change nothing."""
import importlib.util
import json
import random
import signal
import socket
import subprocess
import sys
import time

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from musiclm_jax.training import checkpoint, optimizer as optimizers, state as states
from musiclm_jax.training.partition import Partitioner
from musiclm_jax.training.state import Skeleton
from tests.trainings import STAGES, TRAININGS, WAVEFORMS, experiment, for_commands, write_tokens


@pytest.fixture(scope='session')
def tokens(tmp_path_factory):
  return write_tokens(tmp_path_factory.mktemp('tokens'))


@pytest.fixture(scope='session')
def parts(tokens):
  """Objective, batches and optimizer of a training, built once."""
  built = {}

  def get(name):
    if name not in built:
      e = experiment(name, tokens)
      built[name] = tuple(e.argument(a) for a in ('objective', 'batches', 'optimizer'))
    return built[name]

  return get


def fresh(objective, optimizer, batches, partitioner):
  """A state laid out on the mesh, after the data-dependent start, and its compiled step."""
  skeleton = Skeleton.of(objective)
  transform = optimizers.by_group(objective, nnx.to_pure_dict(skeleton.params), optimizer)
  create = lambda key: states.create(objective, transform, key, keep_ema=False)
  shardings = partitioner.state_shardings(skeleton, jax.eval_shape(create, jax.random.key(0)))
  state = jax.jit(create, out_shardings=shardings)(jax.random.key(0))
  start = jax.jit(lambda s, b: states.started(objective, skeleton, s, b, jax.random.key(1)), out_shardings=shardings)
  state = start(state, partitioner.global_batch(batches(0)))
  return skeleton, transform, shardings, state


def run(objective, optimizer, batches, partitioner, steps):
  """The state after the first step, the losses of all, and how the state lies on the mesh."""
  with partitioner.active():
    skeleton, transform, shardings, state = fresh(objective, optimizer, batches, partitioner)
    step = jax.jit(states.make_step(objective, skeleton, transform), out_shardings=(shardings, None))
    losses = []
    for i in range(steps):
      state, metrics = step(state, partitioner.global_batch(batches(i)), jax.random.key(2))
      losses.append(float(metrics['loss']))
      if i == 0:
        first = jax.device_get(state)
  return first, losses, shardings


@pytest.mark.parametrize(
    'name', [pytest.param(n, marks=pytest.mark.slow if n in ('w2v_bert', 'codec') else ()) for n in TRAININGS])
def test_microbatches_change_neither_gradient_nor_statistics(name, parts):
  objective, batches, optimizer = parts(name)
  if not objective.mean_over_examples:
    pytest.skip('the trainer refuses microbatches for this loss')
  one = Partitioner(data=1)
  with jax.set_mesh(one.mesh):
    skeleton, _, _, state = fresh(objective, optimizer, batches, one)
    batch = one.global_batch(batches(0))
    results = [jax.jit(lambda s, b, m=m: states.gradients(
        objective, skeleton, s, b, jax.random.key(3), microbatches=m, compute_dtype=jnp.float32))(state, batch)
               for m in (1, 2)]
  (loss, aux, grads), (split_loss, split_aux, split_grads) = jax.device_get(results)
  assert loss == pytest.approx(split_loss, rel=1e-4)
  close = lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-3 * max(1e-3, np.abs(a).max()))
  jax.tree.map(close, grads, split_grads)
  jax.tree.map(close, aux.statistics, split_aux.statistics)
  jax.tree.map(close, aux.metrics, split_aux.metrics)


@pytest.mark.slow
@pytest.mark.parametrize('name', TRAININGS)
def test_ten_steps_on_eight_devices_equal_one_device(name, parts):
  objective, batches, optimizer = parts(name)
  one, losses, _ = run(objective, optimizer, batches, Partitioner(data=1), 10)
  many, many_losses, shardings = run(objective, optimizer, batches, Partitioner(data=2, fsdp=2, tensor=2), 10)
  np.testing.assert_allclose(losses, many_losses, rtol=1e-4)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4), one.buffers, many.buffers)
  for (path, leaf), (_, sharding) in zip(jax.tree_util.tree_leaves_with_path(one.params),
                                         jax.tree_util.tree_leaves_with_path(shardings.params), strict=True):
    matrix = leaf.ndim >= 3 or (leaf.ndim == 2 and min(leaf.shape) > 4)
    if matrix and leaf.size > 256:
      assert not sharding.is_fully_replicated, f'{jax.tree_util.keystr(path)} {leaf.shape}'


def command(name, tokens, workdir, steps, **macros):
  flags = {'NUM_STEPS': steps, 'CHECKPOINT_EVERY': 4, 'EVAL_EVERY': 0, 'LOG_EVERY': 1, **macros}
  if name in STAGES:
    flags['TOKENS'] = tokens
  return [sys.executable, '-m', 'musiclm_jax.main', 'train', '--gin_file', f'experiments/{name}.gin',
          '--gin_file', 'size/nano.gin', *(f'--gin.{k}={v}' for k, v in flags.items()), '--workdir', str(workdir)]


@pytest.fixture(scope='session')
def environment(tmp_path_factory):
  """One device, records read without TensorFlow, and compiled programs shared by all processes of the session."""
  return for_commands(tmp_path_factory.mktemp('compiled'), MUSICLM_READER='direct')


def finish(arguments, environment, timeout=600):
  done = subprocess.run(arguments, env=environment, capture_output=True, text=True, timeout=timeout)
  assert done.returncode == 0, done.stderr[-2000:]
  return done


def assert_same_end(a, b):
  first, second = checkpoint.load(a), checkpoint.load(b)
  assert first.step == second.step
  jax.tree.map(np.testing.assert_array_equal, first.params, second.params)
  jax.tree.map(np.testing.assert_array_equal, first.buffers, second.buffers)
  assert first.content_hash == second.content_hash


@pytest.mark.slow
@pytest.mark.parametrize('name', WAVEFORMS)
def test_a_run_takes_over_another_and_starts_nothing_anew(name, environment, tmp_path):
  """A data-dependent start must not replace codebooks that were taken over."""
  finish(command(name, None, tmp_path / 'first', 2), environment)
  finish(command(name, None, tmp_path / 'second', 0, SEED=1, INIT_FROM=tmp_path / 'first'), environment)
  first, second = (checkpoint.load(tmp_path / run) for run in ('first', 'second'))
  jax.tree.map(np.testing.assert_array_equal, (first.params, first.buffers), (second.params, second.buffers))
  assert (first.step, second.step) == (2, 0)


@pytest.mark.slow
@pytest.mark.parametrize('name', TRAININGS)
def test_a_run_killed_at_random_steps_ends_bit_for_bit_like_an_unbroken_one(name, tokens, environment, tmp_path):
  finish(command(name, tokens, tmp_path / 'whole', 20), environment)
  generator = random.Random(name)
  kills = 0
  for _ in range(2):
    process = subprocess.Popen(command(name, tokens, tmp_path / 'broken', 20), env=environment,
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    target = generator.randint(2, 15) + 3 * kills
    deadline = time.monotonic() + 900
    while process.poll() is None and time.monotonic() < deadline:
      if _steps_logged(tmp_path / 'broken') >= target:
        process.send_signal(signal.SIGKILL)
        kills += 1
        break
      time.sleep(0.005)
    process.wait()
  finish(command(name, tokens, tmp_path / 'broken', 20), environment)
  assert kills, 'the run ended before it could be killed'
  assert_same_end(tmp_path / 'whole', tmp_path / 'broken')


def _steps_logged(workdir):
  path = workdir / 'metrics.jsonl'
  lines = path.read_text().splitlines() if path.exists() else []
  try:
    return json.loads(lines[-1])['step'] if lines else 0
  except ValueError:
    return 0


@pytest.mark.slow
@pytest.mark.parametrize('name', TRAININGS)
def test_a_run_killed_inside_a_checkpoint_write_ends_bit_for_bit_like_an_unbroken_one(
    name, tokens, environment, tmp_path):
  finish(command(name, tokens, tmp_path / 'whole', 12), environment)
  folder = tmp_path / 'broken' / 'checkpoints'
  process = subprocess.Popen(command(name, tokens, tmp_path / 'broken', 12), env=environment,
                             stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
  torn = False
  while process.poll() is None:
    # A step directory in the making has a temporary name; the kill falls while it has one.
    if folder.is_dir() and any('tmp' in p.name for p in folder.iterdir()):
      process.send_signal(signal.SIGKILL)
      torn = True
      break
  process.wait()
  assert torn, 'no checkpoint was seen in the making'
  finish(command(name, tokens, tmp_path / 'broken', 12), environment)
  assert not any('tmp' in p.name for p in folder.iterdir())
  assert_same_end(tmp_path / 'whole', tmp_path / 'broken')


@pytest.mark.slow
@pytest.mark.parametrize('name', TRAININGS)
def test_two_processes_of_four_devices_equal_one_device(name, tokens, environment, tmp_path):
  # Sounds and pictures too: one process alone with a computation of the mesh would wait for the other for ever.
  macros = {'TENSORBOARD': importlib.util.find_spec('tensorboardX') is not None}
  finish(command(name, tokens, tmp_path / 'one', 4, **macros), environment)
  with socket.socket() as probe:
    probe.bind(('127.0.0.1', 0))
    port = probe.getsockname()[1]
  processes = []
  for index in range(2):
    cluster = {'JAX_COORDINATOR_ADDRESS': f'127.0.0.1:{port}', 'JAX_NUM_PROCESSES': '2', 'JAX_PROCESS_ID': str(index)}
    cluster['XLA_FLAGS'] = f'{environment["XLA_FLAGS"]} --xla_force_host_platform_device_count=4'
    mesh = ['--gin_file', 'mesh/cpu8.gin', '--distributed']
    processes.append(subprocess.Popen([*command(name, tokens, tmp_path / 'two', 4, **macros), *mesh],
                                      env={**environment, **cluster}, stderr=subprocess.PIPE, text=True))
  for process in processes:
    _, errors = process.communicate(timeout=900)
    assert process.returncode == 0, errors[-2000:]
  lines = [[json.loads(line)['loss'] for line in (tmp_path / w / 'metrics.jsonl').read_text().splitlines()
            if json.loads(line)['part'] == 'train'] for w in ('one', 'two')]
  assert len(lines[0]) == len(lines[1]) == 4
  np.testing.assert_allclose(lines[0], lines[1], rtol=1e-4)
  assert len(list((tmp_path / 'two').glob('tensorboard/*'))) == macros['TENSORBOARD']
