"""Plans: what fits, what does not, what is sent; on simulated devices, and for TPUs where libtpu is installed."""
import dataclasses
import importlib.util
import json
import os
import re
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import pytest

from musiclm_jax import chips, config, plan
from musiclm_jax.chips import topology
from musiclm_jax.nn import attention, distance_kernel
from musiclm_jax.plan import nearest_batch, TooLarge, Training
from musiclm_jax.training.hlo import Program
from musiclm_jax.training.partition import Partitioner
from tests.benchmarks import pod_plans
from tests.trainings import experiment

needs_libtpu = pytest.mark.skipif(importlib.util.find_spec('libtpu') is None, reason='plans of TPUs need libtpu')


def training(name='coarse_lm', **macros):
  return Training.of(experiment(name, **macros))


def on(training, **mesh):
  return dataclasses.replace(training, partitioner=Partitioner(**mesh))


def command(*arguments, timeout=900):
  environment = {**os.environ, 'XLA_FLAGS': ''}
  return subprocess.run([sys.executable, '-m', 'musiclm_jax.main', 'plan', *arguments], env=environment,
                        capture_output=True, text=True, timeout=timeout)


def test_a_plan_of_simulated_devices():
  found = plan.plan(on(training(LM_POSITIONS='t5'), data=2, fsdp=2, tensor=2), topology('cpu:8'))
  f = found.figures
  assert (f['chips'], f['batch_size'], f['batch_parts'], f['fits']) == (8, 8, 4, True)
  assert f['mesh'] == {'data': 2, 'fsdp': 2, 'tensor': 2, 'sequence': 1}
  assert 0 < f['memory']['arguments'] < f['memory']['peak'] and not f['memory']['by_its_compiler']
  assert 0 < f['flops'] <= f['computed_flops'] * 1.01
  assert {'all-gather', 'all-reduce'} <= {row['kind'] for row in f['collectives']}
  assert f['step_seconds'] == 0  # nobody knows how fast CPUs are
  text = found.text()
  assert 'cpu:8' in text and 'along' in text and '(estimate)' in text
  assert json.loads(json.dumps(f)) == f


def test_recomputation_is_computed_and_not_part_of_the_work():
  plain, again = (plan.plan(on(training(LM_REMAT=remat), data=1), topology('cpu:1')).figures for remat in (False, True))
  assert plain['flops'] == again['flops']
  assert 0.98 < plain['computed_flops'] / plain['flops'] < 1.1  # attention computes its logits again in any case
  assert 1.1 < again['computed_flops'] / plain['computed_flops'] < 4 / 3


def with_speed(monkeypatch, **changes):
  monkeypatch.setitem(chips.CHIPS, 'cpu', dataclasses.replace(chips.CHIPS['cpu'], **changes))


def test_times_follow_the_chip(monkeypatch):
  with_speed(monkeypatch, peak=1e9, memory=2 ** 30, link=1e6, network=1e3)
  f = plan.plan(on(training(), data=2, fsdp=4), topology('cpu:8')).figures
  assert f['compute_seconds'] == pytest.approx(f['computed_flops'] / 8 / (1e9 * plan.ATTAINABLE))
  moved = sum(row['moved'] for row in f['collectives'])
  assert f['collective_seconds'] == pytest.approx(moved / 1e6)
  assert f['step_seconds'] == f['compute_seconds'] + f['collective_seconds'] > f['hidden_seconds']
  assert f['chip_hours'] == pytest.approx(8 * f['num_steps'] * f['step_seconds'] / 3600)


def test_between_nodes_only_parts_of_a_sum_are_sent():
  program = Program.parse('''HloModule m, num_partitions=8
ENTRY %main (x: f32[16,4]) -> f32[16,4] {
  %x = f32[16,4]{1,0} parameter(0)
  ROOT %r = f32[16,4]{1,0} all-reduce(%x), replica_groups={}, to_apply=%sum
}
''')
  machine = chips.Topology('h100:4x2', 'h100', (4,), 2)
  mesh = Partitioner(data=2, fsdp=4).mesh
  row, = plan.rows_of(program, machine, mesh)
  inside, between = 2 * 3 / 4 * 256, 2 * 1 / 2 * 256 / 4
  assert (row.axes, row.moved) == (('data', 'fsdp'), inside + between)
  assert row.seconds == pytest.approx(inside / machine.chip.link + between / machine.chip.network)


@pytest.mark.parametrize('mesh', ['data', *(pytest.param(m, marks=pytest.mark.slow) for m in
                                            ('fsdp', 'tensor', 'sequence'))])
def test_what_is_sent_grows_with_the_mesh_as_rings_do(mesh):
  """A device sends (n - 1) / n of what is summed or gathered.

  That is of the parameters along data and fsdp, whatever the batch, and of the activations of one batch along tensor
  and sequence.
  """
  sent = {}
  for devices in (2, 4, 8):
    batch = devices if mesh in ('data', 'fsdp') else 8
    made = on(training(BATCH_SIZE=batch, LM_HEADS=8), **{'data': 1, mesh: devices})
    f = plan.plan(made, topology(f'cpu:{devices}')).figures
    assert all(row['axes'] == [mesh] for row in f['collectives'])
    sent[devices] = sum(row['moved'] for row in f['collectives'])
  for devices in (4, 8):
    share = (devices - 1) / devices / (1 / 2)
    assert sent[devices] / sent[2] == pytest.approx(share, rel=0.1)


def fake(limit, row, fixed, tried):
  def compile_batch(size):
    tried.append(size)
    if (needed := fixed + row(size)) > limit:
      raise TooLarge('no', needed, limit)
    return needed
  return compile_batch


@pytest.mark.parametrize('limit, expected', [(100, 80), (60, 40), (31, 8), (26, 0)])
def test_the_nearest_batch_where_memory_is_a_line(limit, expected):
  tried = []
  found, over = nearest_batch(fake(limit, lambda b: b, 20, tried), too_large=1024, needed=20 + 1024, limit=limit,
                              fixed=20, multiple=8)
  assert (found, over) == (expected, expected + 8) and len(tried) <= 5


def test_the_nearest_batch_where_memory_is_no_line_and_tries_are_few():
  tried = []
  found, over = nearest_batch(fake(100, lambda b: b ** 1.5, 0, tried), too_large=640, needed=640 ** 1.5, limit=100,
                              fixed=0, multiple=1)
  assert len(tried) <= 5 and found ** 1.5 <= 100 < over ** 1.5


@pytest.mark.slow
def test_a_batch_that_is_too_large_is_refused_with_the_nearest_that_fits(monkeypatch):
  made = on(training(BATCH_SIZE=64), data=2)
  fitting = plan.plan(on(training(BATCH_SIZE=20), data=2), topology('cpu:2')).figures['memory']['peak']
  with_speed(monkeypatch, memory=fitting)
  words = r'batch 64 needs .* a device, CPU has .*; the nearest batch that fits is \d+'
  with pytest.raises(ValueError, match=words) as e:
    plan.plan(made, topology('cpu:2'))
  nearest = int(str(e.value).partition('fits is ')[2].split()[0])
  assert 16 <= nearest <= 24 and nearest % 2 == 0
  plan.plan(on(training(BATCH_SIZE=nearest), data=2), topology('cpu:2'))
  with_speed(monkeypatch, memory=1000)
  with pytest.raises(ValueError, match='no batch that was tried fits, down to 2: split parameters'):
    plan.plan(made, topology('cpu:2'))


def test_what_cannot_be_planned_is_told():
  with pytest.raises(ValueError, match='mesh data 1 uses 1 of the 8 devices of cpu:8'):
    plan.plan(on(training(), data=1), topology('cpu:8'))
  with pytest.raises(ValueError, match='batch 6 is not a multiple of data x fsdp = 4'):
    plan.plan(on(training(BATCH_SIZE=6), data=4), topology('cpu:4'))
  with pytest.raises(ValueError, match='needs 16 simulated devices, but this process has 8'):
    plan.plan(on(training(), data=16), topology('cpu:16'))
  from musiclm_jax import config
  fit = config.load_experiment(['experiments/mulan_tokens.gin', 'size/nano.gin'], [('MULAN_WORKDIR', 'x')],
                               provided=('workdir', 'dry_run'))
  with pytest.raises(ValueError, match='has no training step'):
    Training.of(fit)


def test_the_command(tmp_path):
  nano = ('--gin_file', 'experiments/coarse_lm.gin', '--gin_file', 'size/nano.gin', '--gin_file', 'mesh/cpu8.gin')
  done = command(*nano, '--topology', 'cpu:8', '--output', str(tmp_path / 'plan.json'))  # TOKENS is not asked for
  assert done.returncode == 0, done.stderr[-2000:]
  assert 'all-reduce' in done.stdout and json.loads((tmp_path / 'plan.json').read_text())['chips'] == 8
  refused = command(*nano, '--topology', 'cpu:8', '--gin.LM_WIDTH=33', '--gin.LM_HEADS=3')
  assert refused.returncode == 1 and refused.stderr.count('\n') == 1
  assert "axis 'embed' has 33 entries, which fsdp = 2 does not divide" in refused.stderr
  wrong = command(*nano, '--topology', 'v5e:4x5')
  assert (wrong.returncode, wrong.stdout) == (2, '') and 'the nearest is v5e:4x4' in wrong.stderr
  assert wrong.stderr.count('\n') == 1


@pytest.mark.slow
def test_every_experiment_of_the_papers_size_divides_over_every_mesh_of_a_machine():
  """Parameters and batches, by the shapes alone."""
  code = '''
from musiclm_jax import chips, config, train
import dataclasses, jax
machines = {'gpu_1': 1, 'gpu_8': 32, 'v5e_16': 16, 'v5e_256': 256, 'v5p_128': 64, 'v6e_64': 64, 'v6e_256': 256,
            'multislice': 256}
for name in ('semantic_lm', 'coarse_lm', 'fine_lm', 'codec', 'w2v_bert', 'mulan'):
  for mesh, devices in machines.items():
    e = config.load_experiment([f'experiments/{name}.gin', 'size/paper.gin', f'mesh/{mesh}.gin'],
                               [('TOKENS', 'x')] * name.endswith('_lm'), provided=('workdir', 'dry_run'))
    partitioner = dataclasses.replace(e.argument('partitioner'), devices=tuple(jax.devices()[:devices]))
    arguments = {n: e.argument(n) for n in ('objective', 'optimizer', 'precision')}
    run = train.described(partitioner=partitioner, **arguments)
    assert partitioner.mesh.size == devices, (mesh, partitioner.mesh.shape)
    try:
      run.check_batch(e.macro('BATCH_SIZE'))
    except ValueError as error:
      print(name, mesh, error)
'''
  environment = {**os.environ, 'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': '--xla_force_host_platform_device_count=256'}
  done = subprocess.run([sys.executable, '-c', code], env=environment, capture_output=True, text=True, timeout=900)
  assert done.returncode == 0, done.stderr[-2000:]
  # The codec's batch is smaller than 256: mesh/multislice.gin, which is among these, is for that.
  assert {line[:14].split()[0] for line in done.stdout.splitlines()} <= {'codec'}
  assert sorted(line.split()[1] for line in done.stdout.splitlines()) == ['v5e_256', 'v6e_256']


@needs_libtpu
@pytest.mark.slow
def test_a_small_plan_by_the_compiler_of_tpus():
  made = on(training(LM_POSITIONS='t5', COMPUTE_DTYPE='bfloat16'), data=2, fsdp=2, tensor=2)
  f = plan.plan(made, topology('v5e:2x4')).figures
  assert f['memory']['by_its_compiler'] and f['step_seconds'] > 0 and f['libtpu']
  with pytest.raises(ValueError, match='data 2 x fsdp 2 x tensor 2 uses 8 of the 16 devices of v5p:2x2x4'):
    plan.plan(made, topology('v5p:2x2x4'))


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize('machine', [f'{chip}:{shape}' for chip in ('v5e', 'v6e') for shape in chips.FLAT] + [
    'v4:2x2x1', 'v5p:2x2x1', 'v5p:4x4x4', 'v5e:16x16*4'])
def test_slices_are_described_by_their_compiler(machine):
  assert len(plan.devices(topology(machine))) == topology(machine).chips


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize('machine', ['v4:2x2x1', 'v5e:2x2', 'v5p:2x2x1', 'v6e:2x2'])
def test_the_kernel_for_a_bias_compiles_for_every_tpu(machine):
  """With its gradient, at the length of the paper's coarse stage and at the longest; it fits on the chip of each."""
  device = plan.devices(topology(machine))[0]
  for length, width, dtype in ((2261, 64, jnp.bfloat16), (2261, 64, jnp.float32), (4096, 64, jnp.bfloat16)):
    spec = lambda *shape, dtype=dtype: jax.ShapeDtypeStruct(shape, dtype, sharding=jax.sharding.SingleDeviceSharding(
        device))
    q = spec(2, length, 2, width)
    loss = lambda q, k, v, bias: jnp.sum(attention._tiled(q, k, v, bias).astype(jnp.float32))
    jax.jit(jax.grad(loss, (0, 1, 2, 3))).lower(q, q, q, spec(1, 2, 2 * length - 1, dtype=jnp.float32)).compile()


@needs_libtpu
@pytest.mark.slow
def test_slices_of_tpus_are_joined_by_data():
  f = plan.plan(on(training(), data=4, fsdp=2), topology('v5e:2x2*2')).figures
  assert f['chips'] == 8 and f['mesh']['data'] == 4
  between = [row for row in f['collectives'] if 'data' in row['axes']]
  assert between and any('Between slices' in line for line in f['assumptions'])


def test_libtpu_that_is_missing_is_told(monkeypatch):
  def missing(*args, **kwargs):
    raise RuntimeError('Unable to initialize backend')
  monkeypatch.setattr(jax.experimental.topologies, 'get_topology_desc', missing)
  with pytest.raises(ValueError, match=r'cannot describe v5e:4x4: .*musiclm_jax\[tpu\]'):
    plan.devices(topology('v5e:4x4'))


@pytest.mark.parametrize('words, needed, limit', [
    ('Ran out of memory in memory space hbm. Used 51.91G of 15.75G hbm. Exceeded', 51.91, 15.75),
    ('the total memory required for HLO temporaries (1.50T) exceeds available HBM (15.75G).', 1536, 15.75)])
def test_how_the_compiler_of_tpus_refuses_is_understood(words, needed, limit):
  """First in a hurry, and then with its usual effort."""
  efforts = []

  def refuse():
    efforts.append(jax.config.jax_exec_time_optimization_effort)
    raise jax.errors.JaxRuntimeError(f'RESOURCE_EXHAUSTED: {words}')

  traced = types.SimpleNamespace(lower=lambda: types.SimpleNamespace(compile=refuse))
  with pytest.raises(TooLarge) as refused:
    plan.compile_step(traced, topology('v5e:2x2'))
  assert (refused.value.needed, refused.value.limit) == pytest.approx((needed * 2 ** 30, limit * 2 ** 30))
  assert efforts == [-1.0, jax.config.jax_exec_time_optimization_effort] and efforts[1] != -1.0


@needs_libtpu
@pytest.mark.soak
def test_tpus_refuse_a_batch_that_is_too_large_and_take_the_nearest():
  made = on(training(BATCH_SIZE=400_000), data=4)
  words = 'batch 400000 needs .* TPU v5e has 15.75 GiB; the nearest batch that fits is'
  with pytest.raises(ValueError, match=words) as e:
    plan.plan(made, topology('v5e:2x2'))
  fits = int(str(e.value).partition('fits is ')[2].split()[0])
  assert 10_000 < fits < 100_000


SLOW = {'semantic_lm': 'v6e:8x8', 'coarse_lm': 'v5e:4x4', 'fine_lm': 'v5p:4x4x4', 'codec': 'v5e:4x4',
        'w2v_bert': 'v6e:8x8', 'mulan': 'v5e:16x16'}


@needs_libtpu
@pytest.mark.parametrize('cell', [
    pytest.param(cell, id=f'{cell.experiment}-{cell.topology}',
                 marks=pytest.mark.slow if SLOW[cell.experiment] == cell.topology else pytest.mark.soak)
    for cell in pod_plans.grid() if topology(cell.topology).is_tpu])
def test_every_experiment_of_the_paper_fits_on_tpus(cell, tmp_path):
  """Each on one of the machines in the slow suite, and on all of them in the longest."""
  name, (_, *flags) = cell.experiment, cell.command
  done = command(*flags, '--output', str(tmp_path / 'plan.json'), timeout=6000)
  assert done.returncode == 0, done.stderr[-2000:]
  f = json.loads((tmp_path / 'plan.json').read_text())
  assert f['fits'] and f['memory']['peak'] < f['memory']['limit'] and not f['unknown_loops']
  assert f['scattered_share'] > (0.5 if name.endswith('_lm') else 0.4)
  if name.endswith('_lm'):  # positions are T5's: its bias is summed into buckets before devices are
    experiment = config.load_experiment([f'experiments/{name}.gin', 'size/paper.gin'], [('TOKENS', 'x')],
                                        provided=('workdir', 'dry_run'))
    objective = experiment.argument('objective')
    assert objective.transformer.positions == 't5'
    length = objective.stage.length - 1
    sent = [[int(d) for d in re.findall(r'\d+', row['of'].partition('[')[2])] for row in f['collectives']]
    tile = distance_kernel.fitting_block(length, objective.transformer.head_width, jnp.bfloat16)
    assert not any(sum(abs(d - length) < 4 for d in dims) > 1 or dims[-2:] == [tile, tile] for dims in sent)
