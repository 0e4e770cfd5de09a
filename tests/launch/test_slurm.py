"""SLURM: what is submitted, what a job step starts, and how a job ends, waits and comes back."""
import shlex
import signal
import subprocess

import pytest

from tests.launch.conftest import HARD, ROOT, TRAINING, add_jax, dry, free_port, refused, until

TIME = ('--time', '1-00:00:00')


def submitted(fakes, *arguments):
  """The words that a dry run prints, which must be those that sbatch gets."""
  fakes.add('sbatch')
  printed = shlex.split(dry('slurm', *TIME, *arguments, '--', *TRAINING))
  fakes.run('slurm', *TIME, *arguments, '--', *TRAINING)
  assert printed == ['sbatch', *fakes.calls('sbatch')[0].arguments]
  return printed


def test_a_process_for_a_node_names_its_devices(fakes):
  words = submitted(fakes, '--nodes', '4', '--partition', 'gpu', '--sbatch_flag=--qos=long')
  assert {'--nodes=4', '--ntasks-per-node=1', '--gres=gpu:8', '--cpus-per-task=64', '--time=1-00:00:00', '--requeue',
          '--signal=B:USR1@300', '--open-mode=append', '--partition=gpu', '--qos=long'} <= set(words)
  assert words[words.index('srun'):][:4] == ['srun', '--kill-on-bad-exit=1', '--label', '--cpus-per-task=64']
  assert words[words.index('env'):] == [
      'env', 'JAX_LOCAL_DEVICE_IDS=0,1,2,3,4,5,6,7', 'musiclm', 'train', '--distributed', *TRAINING]


def test_a_process_for_each_gpu_leaves_them_to_jax(fakes):
  words = submitted(fakes, '--processes', 'gpu', '--gpus_per_node', '4')
  assert {'--ntasks-per-node=4', '--gres=gpu:4', '--cpus-per-task=8'} <= set(words)
  assert words[-len(TRAINING) - 3:] == ['musiclm', 'train', '--distributed', *TRAINING]
  ours = words[:-len(TRAINING)]
  assert not [word for word in ours if 'JAX_' in word or 'gpus-per-task' in word or 'gpu-bind' in word]


@pytest.mark.parametrize('runtime, expected', [
    ('pyxis', ['--container-image=image:1', '--container-mounts=/shared:/data,/a:/b', 'env']),
    ('apptainer', ['apptainer', 'exec', '--nv', '--bind', '/shared:/data', '--bind', '/a:/b', 'image:1', 'env'])])
def test_containers(fakes, runtime, expected):
  words = submitted(fakes, '--container', 'image:1', '--container_runtime', runtime, '--mount', '/shared:/data',
                    '--mount', '/a:/b')
  first = words.index(expected[0])
  assert words[first:first + len(expected)] == expected


SRUN = '''
while [ "${1#--}" != "$1" ]; do shift; done
'''


def job(fakes, *arguments, step='exec "$@"', **variables):
  """The batch script with what sbatch would give it."""
  words = shlex.split(dry('slurm', *TIME, *arguments, '--', *TRAINING))
  script = words.index(str(ROOT / 'launch' / 'slurm_job.sh'))
  environment = {**fakes.environment, 'SLURM_JOB_ID': '77', 'MUSICLM_PAUSE': '0', **variables}
  for name in ('scancel', 'scontrol'):
    fakes.add(name, variables.get(name, ''))
  fakes.add('srun', SRUN + step)
  return subprocess.Popen(words[script:], env=environment, cwd=fakes.folder)


def test_arguments_reach_the_trainer_unchanged(fakes):
  fakes.add('musiclm')
  assert job(fakes, '--env', 'A=b c').wait(timeout=60) == 0
  (call,) = fakes.calls('musiclm')
  assert call.arguments == ['train', '--distributed', *TRAINING] and HARD[0] in call.arguments
  assert call.environment['A'] == 'b c' and call.environment['JAX_LOCAL_DEVICE_IDS'] == '0,1,2,3,4,5,6,7'
  assert not fakes.calls('scontrol')


@pytest.mark.slow
@pytest.mark.parametrize('arguments, devices', [
    ((), ['0,1,2,3,4,5,6,7'] * 2), (('--processes', 'gpu', '--gpus_per_node', '2'), ['0', '1'])])
def test_jax_finds_its_place_and_all_of_its_devices(fakes, arguments, devices):
  """What JAX makes of the variables of a step: a process for a node would have GPU 0 alone, were they not named."""
  add_jax(fakes)
  per_node = 1 if devices[0] == devices[1] else 2
  process = job(fakes, *arguments, step=f'''
for i in 0 1; do SLURM_PROCID=$i SLURM_LOCALID=$((i % {per_node})) SLURM_NTASKS=2 \\
  SLURM_STEP_NODELIST=127.0.0.1 JAX_COORDINATOR_PORT={free_port()} "$@" > $CALLS/out.$i & done; wait''')
  assert process.wait(timeout=120) == 0
  out = [(fakes.folder / 'calls' / f'out.{i}').read_text().split() for i in range(2)]
  assert out == [['found', '2', str(i), devices[i]] for i in range(2)]


@pytest.mark.parametrize('code, starts', [(0, 1), (1, 3), (2, 1), (143, 1), (137, 3)])
def test_what_failed_is_tried_again_but_not_mistakes_or_what_was_asked_to_end(fakes, code, starts):
  fakes.add('musiclm', f'exit {code}')
  assert job(fakes, '--retries', '2').wait(timeout=60) == code
  assert len(fakes.calls('musiclm')) == starts and not fakes.calls('scontrol')


@pytest.mark.parametrize('saving, code', [('exit 143', 143), ('exit 0', 0), ('exit 1', 1)])
def test_before_the_time_limit_it_saves_and_goes_back_into_the_queue(fakes, saving, code):
  fakes.add('musiclm', f'''
trap 'sleep 0.1; : > "$CALLS/saved"; {saving}' TERM
echo $$ > "$CALLS/process.partial"; mv "$CALLS/process.partial" "$CALLS/process"
while [ -e "$CALLS" ]; do sleep 0.05; done
''')
  process = job(fakes, '--retries', '2', scancel='kill -TERM $(cat "$CALLS/process")')
  until((fakes.folder / 'calls' / 'process').exists)
  process.send_signal(signal.SIGUSR1)
  assert process.wait(timeout=60) == code
  assert (fakes.folder / 'calls' / 'saved').exists(), 'it waits for the save'
  assert [call.arguments for call in fakes.calls('scancel')] == [['--signal=TERM', '77']]
  assert [call.arguments for call in fakes.calls('scontrol')] == ([['requeue', '77']] if code else [])
  assert len(fakes.calls('musiclm')) == 1


@pytest.mark.parametrize('arguments, message', [
    ((), 'the following arguments are required: --time'),
    (('--time',), '--time: expected one argument'),
    (('--time', 'noon'), "'noon' is not D-HH:MM:SS"),
    (('--time', '5'), 'leaves nothing to train before the last 300 s'),
    (('--time', '4:59'), 'leaves nothing to train'),
    ((*TIME, '--nods', '2'), 'unknown flag --nods; did you mean --nodes?'),
    ((*TIME, '--nodes', '0'), "'0' is not a whole number above 0"),
    ((*TIME, '--mount', '/a:/b'), '--mount belongs to --container'),
    ((*TIME, '--container', 'x', '--mount', '/a'), "'/a' is not /FROM:/TO"),
    ((*TIME, '--container', 'x', '--mount', '/a:/b'), 'would vanish with the container'),
])
def test_mistakes_are_told(arguments, message):
  assert message in refused('slurm', *arguments, '--', *TRAINING)
