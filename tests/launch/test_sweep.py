"""Sweeps: a command for each line, with any launcher, and only what is left when it is started again."""
import json
import os
import shlex
import signal

import pytest

from tests.launch.conftest import ROOT, dry, refused, until

LINES = '''# learning rates
low: --gin.LEARNING_RATE=1e-4

--gin.LEARNING_RATE=3e-4 --gin.RECORDS="it's # my $data"
base:
'''
COMMON = ('--', 'musiclm', 'train', '--gin_file', 'a.gin')


@pytest.fixture
def sweep(fakes):
  (fakes.folder / 'rates.txt').write_text(LINES)
  return fakes


def runs(fakes):
  """Name and overrides of each training that was started."""
  return [(call.arguments[-1].rpartition('/')[2], call.arguments[3:-2]) for call in fakes.calls('musiclm')]


def lines(fakes, *arguments):
  return [shlex.split(line) for line in dry('sweep', str(fakes.folder / 'rates.txt'), '--workdir', '/runs/', *arguments
                                            ).splitlines()]


def test_a_command_for_each_line_with_its_own_workdir(sweep):
  sweep.add('musiclm')
  sweep.run('sweep', 'rates.txt', '--workdir', '/runs', *COMMON)
  (low, a), (derived, b), (base, c) = runs(sweep)
  assert (low, a, base, c) == ('low', ['--gin.LEARNING_RATE=1e-4'], 'base', [])
  assert derived.startswith('learning-rate-3e-4-')
  assert b == ['--gin.LEARNING_RATE=3e-4', "--gin.RECORDS=it's # my $data"]
  done = [['musiclm', *call.arguments] for call in sweep.calls('musiclm')]
  assert done == lines(sweep, '--again', *COMMON), 'a dry run prints what is run'


def test_names_stay_when_lines_come_and_go(sweep):
  before = {words[-1] for words in lines(sweep, *COMMON)}
  (sweep.folder / 'rates.txt').write_text('--gin.LEARNING_RATE=-3e-4\n--gin.LEARNING_RATE=+3e-4\n' + LINES)
  after = {words[-1] for words in lines(sweep, *COMMON)}
  assert before < after and len(after) == 5


def test_started_again_it_does_what_is_left(sweep):
  sweep.add('musiclm', 'case "$*" in */low) exit 1;; esac')
  out = sweep.start('sweep', 'rates.txt', '--workdir', '/runs', *COMMON)
  assert '1 of 3 failed: low' in out.communicate(timeout=60)[1] and out.returncode == 1
  assert [words[-1] for words in lines(sweep, *COMMON)] == ['/runs/low']
  sweep.add('musiclm')
  sweep.run('sweep', 'rates.txt', '--workdir', '/runs', *COMMON)
  assert [name for name, _ in runs(sweep)][3:] == ['low'] and not lines(sweep, *COMMON)
  assert [words[-1] for words in lines(sweep, '--only', 'base', '--again', *COMMON)] == ['/runs/base']


@pytest.mark.parametrize('code', [2, 130, 143])
def test_a_mistake_or_a_stop_ends_the_sweep(sweep, code):
  sweep.add('musiclm', f'exit {code}')
  sweep.run('sweep', 'rates.txt', '--workdir', '/runs', *COMMON, code=code)
  assert len(runs(sweep)) == 1 and len(lines(sweep, *COMMON)) == 3


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_asked_to_stop_it_waits_for_the_save(sweep, number):
  sweep.add('musiclm', '''trap 'sleep 0.1; : > "$CALLS/saved"; exit 143' TERM
trap 'sleep 0.1; : > "$CALLS/saved"; exit 130' INT
: > "$CALLS/begun"; while [ -e "$CALLS" ]; do sleep 0.05; done''')
  process = sweep.start('sweep', 'rates.txt', '--workdir', '/runs', *COMMON, start_new_session=True)
  until((sweep.folder / 'calls' / 'begun').exists)
  os.killpg(process.pid, number) if number == signal.SIGINT else process.send_signal(number)
  process.communicate(timeout=60)
  assert process.returncode == 128 + number and (sweep.folder / 'calls' / 'saved').exists() and len(runs(sweep)) == 1


def test_a_run_that_began_with_other_overrides_is_refused(sweep):
  sweep.add('musiclm', 'exit 143')
  sweep.run('sweep', 'rates.txt', '--workdir', '/runs', *COMMON, code=143)
  (sweep.folder / 'rates.txt').write_text('low: --gin.LEARNING_RATE=1e-5\n')
  assert 'low was begun with --gin.LEARNING_RATE=1e-4' in refused(
      'sweep', str(sweep.folder / 'rates.txt'), '--workdir', '/runs', *COMMON)


def _stdin(call):
  return (call.folder / 'stdin').read_text() if (call.folder / 'stdin').exists() else ''


@pytest.mark.parametrize('launcher', [
    ('slurm.py', '--name', '{name}', '--time', '60'),
    ('gke.py', '--name', 'x-{name}', '--image', 'i', '--tpu', 'v5e', '--topology', '4x4', '--claim', 'disk'),
    ('hosts.py', '--hosts', 'hosts.txt'), ('tpu_vm.py', 'start', '--name', 'a', '--zone', 'z')])
def test_with_each_launcher(sweep, launcher):
  (sweep.folder / 'hosts.txt').write_text('node1\n')
  for name in ('sbatch', 'kubectl', 'ssh', 'gcloud'):
    sweep.add(name, 'cat > "$call/stdin"' if name == 'kubectl' else '')
  path = str(ROOT / 'launch' / launcher[0])
  sweep.run('sweep', 'rates.txt', '--workdir', '/data/runs', '--', path, *launcher[1:], '--', '--gin_file', 'a.gin')
  calls = [call for name in ('sbatch', 'kubectl', 'ssh', 'gcloud') for call in sweep.calls(name)]
  said = [' '.join(call.arguments) + _stdin(call) for call in calls]
  assert len(said) == 3
  for name in ('low', 'learning-rate-3e-4', 'base'):
    assert sum(f'/data/runs/{name}' in text for text in said) == 1


def test_a_damaged_record_is_named(sweep):
  (sweep.folder / 'rates.txt.started.jsonl').write_text(json.dumps({'workdir': 1})[:-1])
  assert 'rates.txt.started.jsonl is damaged' in refused(
      'sweep', str(sweep.folder / 'rates.txt'), '--workdir', '/runs', *COMMON)


@pytest.mark.parametrize('text, message', [
    (None, 'rates.txt: No such file or directory'), ('# none\n', 'there is no run in it'),
    ('a: --gin.X="1\n', 'rates.txt:1: no closing quotation'),
    ('LEARNING_RATE=3\n', "rates.txt:1: 'LEARNING_RATE=3' is no argument of `musiclm train`"),
    ('--gin.X=1 # one\n', 'rates.txt:1: comments have lines of their own'),
    ('--gin.X=1 --workdir a\n', 'has its own --workdir already'),
    ('a: --gin.X=1\na: --gin.X=2\n', 'rates.txt:2: a is in'), ('--gin.X=1\n--gin.X=1\n', 'is in'),
    ('A_b: --gin.X=1\n', "the name 'A_b' has more than lower case letters"),
])
def test_files_that_are_wrong(tmp_path, text, message):
  if text is not None:
    (tmp_path / 'rates.txt').write_text(text)
  assert message in refused('sweep', str(tmp_path / 'rates.txt'), '--workdir', '/runs', *COMMON)


@pytest.mark.parametrize('arguments, message', [
    ((), 'required: FILE, --workdir'), (('rates.txt', '--workdir'), 'expected one argument'),
    (('rates.txt', '--workdir', '/r'), 'what to start is missing'),
    (('rates.txt', '--workdir', '/r', '--agian', *COMMON), 'unknown flag --agian; did you mean --again?'),
    (('rates.txt', '--workdir', '/r', '--', 'launch/slurm.py', '--time', '9'), 'after a -- of its own'),
    (('rates.txt', '--workdir', '/r', *COMMON, '--workdir', 'a'), '--workdir belongs before --'),
])
def test_mistakes_are_told(arguments, message):
  assert message in refused('sweep', *arguments)


def test_a_name_that_is_not_there(sweep):
  assert "has no run 'lo'; did you mean low?" in refused(
      'sweep', str(sweep.folder / 'rates.txt'), '--workdir', '/r', '--only', 'lo', *COMMON)
