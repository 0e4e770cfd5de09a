"""TPU VMs: what gcloud is asked for, and what the shell of a VM makes of the command that it is sent."""
import configparser
import shlex
import shutil
import subprocess

import pytest

from tests.launch.conftest import MODULES, ROOT, TRAINING, dry, refused

WHERE = ('--name', 'coarse', '--zone', 'us-west4-a', '--project', 'mine')
GCLOUD = ['gcloud', 'compute', 'tpus', 'queued-resources']
PLACE = ['--zone=us-west4-a', '--project=mine']


def performed(fakes, action, *arguments):
  """The lines that a dry run prints, which must be what is run."""
  for name in ('gcloud', 'git'):
    fakes.add(name)
  printed = [shlex.split(line) for line in _lines(dry('tpu_vm', action, *WHERE, *arguments))]
  fakes.run('tpu_vm', action, *WHERE, *arguments)
  calls = [[name, *call.arguments] for name in ('git', 'gcloud') for call in fakes.calls(name)]
  assert printed == calls
  return printed


def _lines(text):
  """Lines of a shell: an argument may have line ends in its quotes."""
  lines, rest = [], ''
  for line in text.splitlines(keepends=True):
    rest += line
    try:
      shlex.split(rest)
    except ValueError:
      continue
    lines.append(rest)
    rest = ''
  assert not rest
  return lines


@pytest.mark.parametrize('accelerator, runtime', [
    ('v5litepod-16', 'v2-alpha-tpuv5-lite'), ('v5p-128', 'v2-alpha-tpuv5'), ('v6e-256', 'v2-alpha-tpuv6e'),
    ('v4-32', 'tpu-ubuntu2204-base')])
def test_create(fakes, accelerator, runtime):
  assert performed(fakes, 'create', '--accelerator', accelerator, '--spot', '--gcloud_flag=--network=net') == [
      [*GCLOUD, 'create', 'coarse', *PLACE, '--network=net', f'--accelerator-type={accelerator}',
       f'--runtime-version={runtime}', '--node-id=coarse', '--spot']]


def test_several_slices(fakes):
  (words,) = performed(fakes, 'create', '--accelerator', 'v5p-16', '--slices', '2')
  assert words[-2:] == ['--node-count=2', '--node-prefix=coarse']


@pytest.mark.parametrize('action, words', [
    ('status', ['describe', 'coarse', *PLACE]), ('delete', ['delete', 'coarse', *PLACE, '--force']),
    ('stop', ['ssh', 'coarse', *PLACE, '--node=all', '--worker=all', '--command=sudo systemctl stop musiclm'])])
def test_short_actions(fakes, action, words):
  assert performed(fakes, action) == [[*GCLOUD, *words]]


def test_logs_are_of_one_process(fakes):
  (words,) = performed(fakes, 'logs', '--slice', '1', '--worker', '3')
  assert words[-3:-1] == ['--node=1', '--worker=3'] and '--follow' in words[-1]


def test_install_sends_the_last_commit_and_installs_it(fakes):
  archive, copy, script = performed(fakes, 'install', '--setup', 'sudo mount "a b"')
  assert archive[:5] == ['git', '-C', str(ROOT), 'archive', '--format=tar.gz']
  assert copy[4:] == ['scp', archive[-2].removeprefix('--output='), 'coarse:musiclm_jax.tar.gz', *PLACE, '--node=all',
                      '--worker=all']
  assert script[-1].startswith('--command=sudo mount "a b" && rm -rf musiclm_jax && tar -xzf musiclm_jax.tar.gz && ')
  assert './musiclm_jax"[train,tpu]"' in script[-1]


def test_arguments_reach_the_trainer_of_each_vm_unchanged(fakes):
  (words,) = performed(fakes, 'start', '--env', "A=it's", '--', *TRAINING)
  assert words[:-1] == [*GCLOUD, 'ssh', 'coarse', *PLACE, '--node=all', '--worker=all']
  _a_vm(fakes, 'exit 3')
  fakes.run('tpu_vm', 'start', *WHERE, '--env', "A=it's", '--', *TRAINING)
  (call,) = fakes.calls('musiclm')
  assert call.arguments == ['train', '--distributed', *TRAINING] and call.environment['A'] == "it's"
  assert fakes.calls('tee')[0].arguments == ['/etc/systemd/system/musiclm.service']
  unit = configparser.ConfigParser(interpolation=None)
  unit.optionxform = str
  unit.read(fakes.folder / 'musiclm.service')
  service = dict(unit['Service'])
  assert service['WorkingDirectory'] == str(fakes.folder) and service['ExecStart'] == '/bin/sh musiclm_train.sh'
  assert service['RestartPreventExitStatus'] == '2 130 143' and service['TimeoutStopSec'] == '600'
  assert service['LimitMEMLOCK'] == 'infinity' and unit['Unit']['StartLimitBurst'] == '21'
  if shutil.which('systemd-analyze'):
    checked = subprocess.run(['systemd-analyze', 'verify', fakes.folder / 'musiclm.service'], capture_output=True)
    assert b'musiclm.service:' not in checked.stderr, checked.stderr


def _a_vm(fakes, is_active):
  """gcloud takes --command apart at spaces; ssh joins that with spaces and hands it to the login shell."""
  fakes.add('gcloud', 'for last; do :; done; cd "$HOME"; exec sh -c "${last#--command=}"')
  fakes.add('sudo', 'exec "$@"')
  fakes.add('tee', 'exec cat > "$HOME/musiclm.service"')
  fakes.add('systemctl', f'''case $1 in
  is-active) {is_active};;
  start) exec $(sed -n s/^ExecStart=//p "$HOME/musiclm.service");;
esac''')
  environment = fakes.folder / 'musiclm_environment' / 'bin'
  environment.mkdir(parents=True)
  fakes.add('musiclm')
  (fakes.folder / 'bin' / 'musiclm').rename(environment / 'musiclm')


def test_a_training_that_runs_is_left_alone(fakes):
  _a_vm(fakes, 'exit 0')
  fakes.run('tpu_vm', 'start', *WHERE, '--', *TRAINING, code=1)
  assert not fakes.calls('musiclm') and not fakes.calls('tee') and not (fakes.folder / 'musiclm_train.sh').exists()


@pytest.mark.parametrize('accelerator, hosts', [
    ('v5litepod-1', 1), ('v5litepod-8', 1), ('v5litepod-16', 4), ('v5litepod-256', 64), ('v6e-8', 1), ('v6e-256', 64),
    ('v5p-8', 1), ('v5p-16', 2), ('v5p-128', 16), ('v4-32', 4)])
def test_vms_of_an_accelerator(accelerator, hosts):
  assert MODULES['tpus'].of_accelerator(accelerator)[1] == hosts


@pytest.mark.parametrize('arguments, message', [
    ((), 'required: ACTION'),
    (('strt', *WHERE), "invalid choice: 'strt'"),
    (('create', '--name', 'a'), 'required: --zone'),
    (('create', *WHERE), 'required: --accelerator'),
    (('create', *WHERE, '--accelerator', 'v5litepod-17'), "type 'v5litepod-17'; the nearest one is v5litepod-16"),
    (('create', *WHERE, '--accelerator', 'v5p-100'), 'the nearest one is v5p-128'),
    (('create', *WHERE, '--accelerator', 'v5e-16'), 'accelerator types of v5e begin with v5litepod: v5litepod-16'),
    (('create', *WHERE, '--accelerator', 'v6e-16', '--slices', '0'), "'0' is not a whole number above 0"),
    (('create', *WHERE, '--acelerator', 'v6e-16'), 'required: --accelerator'),
    (('start', *WHERE, '--acelerator', 'v6e-16', '--', *TRAINING), 'unknown flag --acelerator'),
    (('status', *WHERE, '--name', 'A_b'), "'A_b' is no name of a queued resource"),
    (('stop', *WHERE, '--', *TRAINING), 'stop takes nothing after --'),
    (('start', *WHERE, '--', '--gin_file', 'a.gin', '--workdir', 'runs'), '--workdir must begin with /'),
])
def test_mistakes_are_told(arguments, message):
  assert message in refused('tpu_vm', *arguments)
