"""Machines by ssh: two processes over loopback, with an ssh that runs the command here."""
import os
import shlex
import signal

import pytest

from tests.launch.conftest import TRAINING, add_jax, dry, free_port, refused, until

# As sshd: the arguments after the host, joined by spaces, go to a shell, in the home folder.
SSH = '''
while [ "${1#-}" != "$1" ]; do [ "$1" = -o ] && shift; shift; done
shift
cd "$HOME"; exec sh -c "$*"
'''
# A trainer that runs until it is asked to end, takes a moment to save, and says so.
TRAINER = '''
trap 'sleep 0.1; : > "$CALLS/saved.$JAX_PROCESS_ID"; exit 143' TERM
echo $$ > "$CALLS/process.$JAX_PROCESS_ID"
while [ -e "$CALLS" ]; do sleep 0.05; done
'''


@pytest.fixture
def cluster(fakes):
  fakes.add('ssh', SSH)
  (fakes.folder / 'hosts.txt').write_text('# two machines\nme@node1\n\nnode2   # the other\n')
  return fakes


def started(cluster, script, *arguments):
  cluster.add('musiclm', script)
  process = cluster.start('hosts', '--hosts', 'hosts.txt', *arguments, '--', *TRAINING)
  return process


def both_run(cluster):
  until(lambda: all((cluster.folder / 'calls' / f'process.{i}').exists() for i in range(2)))


def _await(name):
  """Lines of sh that wait for a file: a process that ends before the other has begun would have it ended at once."""
  return f'while [ ! -e "$CALLS/{name}" ]; do sleep 0.02; done'


def saved(cluster):
  return sorted(path.name for path in (cluster.folder / 'calls').glob('saved.*'))


def test_each_process_finds_its_place_and_its_arguments(cluster):
  out, error = started(cluster, 'pwd; echo "to stderr" >&2', '--env', "A=it's $HOME").communicate(timeout=60)
  calls = {call.environment['JAX_PROCESS_ID']: call for call in cluster.calls('musiclm')}
  assert sorted(calls) == ['0', '1'], error
  for call in calls.values():
    assert call.arguments == ['train', '--distributed', *TRAINING]
    assert call.environment['JAX_COORDINATOR_ADDRESS'] == 'node1:8476'
    assert call.environment['JAX_NUM_PROCESSES'] == '2' and call.environment['A'] == "it's $HOME"
    assert 'JAX_LOCAL_DEVICE_IDS' not in call.environment
  folder = str(cluster.folder)
  assert sorted(out.splitlines()) == [f'0: {folder}', '0: to stderr', f'1: {folder}', '1: to stderr']


def test_a_dry_run_prints_what_is_run(cluster, monkeypatch):
  monkeypatch.chdir(cluster.folder)
  printed = shlex.split(dry('hosts', '--hosts', 'hosts.txt', '--', *TRAINING))
  assert started(cluster, '').wait(timeout=60) == 0
  run = [['ssh', *call.arguments] for call in cluster.calls('ssh')]
  run.sort(key=lambda words: 'node2' in words)
  assert printed == [word for words in run for word in words]


def test_devices_of_two_processes_on_one_machine(cluster):
  (cluster.folder / 'hosts.txt').write_text('node1 0,1\nnode1 2,3\n')
  assert started(cluster, '', '--coordinator', '10.0.0.1', '--port', '99').wait(timeout=60) == 0
  assert {(call.environment['JAX_PROCESS_ID'], call.environment['JAX_LOCAL_DEVICE_IDS'],
           call.environment['JAX_COORDINATOR_ADDRESS']) for call in cluster.calls('musiclm')} == {
               ('0', '0,1', '10.0.0.1:99'), ('1', '2,3', '10.0.0.1:99')}


@pytest.mark.slow
def test_jax_processes_find_one_another(cluster):
  (cluster.folder / 'hosts.txt').write_text('127.0.0.1\n127.0.0.1\n')
  add_jax(cluster)
  process = cluster.start('hosts', '--hosts', 'hosts.txt', '--port', str(free_port()), '--', *TRAINING)
  out, error = process.communicate(timeout=120)
  assert {'0: found 2 0 all', '1: found 2 1 all'} <= set(out.splitlines()) and process.returncode == 0, out + error


@pytest.mark.parametrize('number, code', [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_asked_to_stop_all_save(cluster, number, code):
  process = started(cluster, TRAINER)
  both_run(cluster)
  process.send_signal(number)
  process.communicate(timeout=60)
  assert process.returncode == code and saved(cluster) == ['saved.0', 'saved.1']


@pytest.mark.parametrize('victim', ['0', '1'])
def test_where_one_fails_the_others_are_ended_and_its_code_is_the_result(cluster, victim):
  other = '1' if victim == '0' else '0'
  script = f'[ $JAX_PROCESS_ID = {victim} ] && {{ {_await("process." + other)}; exit 7; }}\n{TRAINER}'
  process = started(cluster, script)
  _, error = process.communicate(timeout=60)
  assert process.returncode == 7 and saved(cluster) == [f'saved.{other}']
  assert f'{victim}: 7' in error and f'{other}: 143' in error


def test_a_process_that_does_not_end_is_killed(cluster):
  script = 'trap "" TERM; echo $$ > "$CALLS/process.$JAX_PROCESS_ID"; while [ -e "$CALLS" ]; do sleep 0.05; done'
  process = started(cluster, script, '--save_seconds', '1')
  both_run(cluster)
  process.send_signal(signal.SIGTERM)
  process.communicate(timeout=60)
  for index in range(2):
    pid = int((cluster.folder / 'calls' / f'process.{index}').read_text())
    until(lambda pid=pid: not os.path.exists(f'/proc/{pid}'))


def test_where_the_launcher_is_killed_all_save(cluster):
  process = started(cluster, TRAINER)
  both_run(cluster)
  process.kill()
  process.communicate(timeout=60)
  until(lambda: saved(cluster) == ['saved.0', 'saved.1'])


@pytest.mark.parametrize('failure', ['full disk', 'closed pipe'])
def test_where_its_own_output_fails_the_machines_go_on(cluster, failure):
  """Lines are dropped: with nobody to read them the processes would wait for ever, with pipes that are full."""
  cluster.add('musiclm', 'head -c 100000 /dev/zero | tr "\\0" "\\n"; exit 7')
  read, write = os.pipe()
  os.close(read)
  with open('/dev/full', 'wb') if failure == 'full disk' else open(write, 'wb') as out:
    process = cluster.start('hosts', '--hosts', 'hosts.txt', '--retries', '1', '--', *TRAINING, stdout=out, stderr=out)
  try:
    assert process.wait(timeout=60) == 7 and len(cluster.calls('musiclm')) == 4
  finally:
    process.kill()


def test_all_are_started_again_after_a_failure(cluster):
  script = f'''[ -e "$CALLS/second.$JAX_PROCESS_ID" ] && exit 0
: > "$CALLS/second.$JAX_PROCESS_ID"; {_await('second.0')}; {_await('second.1')}; exit 1'''
  cluster.environment['MUSICLM_PAUSE'] = '0'
  process = started(cluster, script, '--retries', '3')
  _, error = process.communicate(timeout=60)
  assert process.returncode == 0 and len(cluster.calls('musiclm')) == 4 and 'once more, 1 of 3' in error


@pytest.mark.parametrize('code', [2, 143])
def test_not_after_a_mistake_or_where_somebody_asked_it_to_end(cluster, code):
  script = f': > "$CALLS/here.$JAX_PROCESS_ID"; {_await("here.0")}; {_await("here.1")}; exit {code}'
  process = started(cluster, script, '--retries', '3')
  process.communicate(timeout=60)
  assert process.returncode == code and len(cluster.calls('musiclm')) == 2


@pytest.mark.parametrize('text, message', [
    (None, 'hosts.txt: No such file or directory'),
    ('# nobody\n', 'names no host'),
    ('node1\nnode2 all\n', "hosts.txt:2: 'node2 all' is not [USER@]HOST"),
    ('node1 0 1\n', "hosts.txt:1: 'node1 0 1' is not"),
    ('-oProxyCommand=x\n', 'is not [USER@]HOST'),
    ('node1\nnode1 0\n', 'node1 has a process for all of its devices, and others'),
])
def test_hosts_files_that_are_wrong(tmp_path, text, message):
  if text is not None:
    (tmp_path / 'hosts.txt').write_text(text)
  assert message in refused('hosts', '--hosts', str(tmp_path / 'hosts.txt'), '--', *TRAINING)


@pytest.mark.parametrize('arguments, message', [
    ((), 'required: --hosts'), (('--hosts',), 'expected one argument'), (('--host', 'a'), 'required: --hosts'),
    (('--hosts', 'a', '--retry', '1'), 'unknown flag --retry; did you mean --retries?')])
def test_mistakes_are_told(arguments, message):
  assert message in refused('hosts', *arguments, '--', *TRAINING)
