"""All launchers: their shell scripts are clean, they need nothing installed, where they refuse they say one line."""
import os
import subprocess
import sys

import pytest

from tests.launch.conftest import LAUNCHERS, ROOT, TRAINING, refused

# A full command line of each.
COMPLETE = {
    'slurm': ['--time', '60', '--', *TRAINING],
    'gke': ['--name', 'a', '--image', 'i', '--tpu', 'v5e', '--topology', '4x4', '--claim', 'disk', '--', *TRAINING],
    'tpu_vm': ['start', '--name', 'a', '--zone', 'z', '--', *TRAINING],
    'hosts': ['--hosts', 'hosts.txt', '--', *TRAINING],
    'sweep': ['sweep.txt', '--workdir', '/runs', '--', 'musiclm', 'train'],
}
NEEDED = {'slurm': 'sbatch', 'gke': 'kubectl', 'tpu_vm': 'gcloud', 'hosts': 'ssh', 'sweep': 'musiclm'}


@pytest.fixture
def bare(tmp_path):
  """A launcher where there is no other command at all."""
  (tmp_path / 'hosts.txt').write_text('node1\nnode2\n')
  (tmp_path / 'sweep.txt').write_text('--gin.X=1\n')
  return lambda launcher, *arguments: subprocess.run(
      [sys.executable, ROOT / 'launch' / f'{launcher}.py', *arguments], text=True, cwd=tmp_path, capture_output=True,
      env={'PATH': str(tmp_path), 'PYTHONDONTWRITEBYTECODE': '1'}, timeout=60)


def test_shell_scripts_are_clean():
  scripts = sorted((ROOT / 'launch').glob('*.sh'))
  checker = os.path.join(os.path.dirname(sys.executable), 'shellcheck')
  done = subprocess.run([checker, '--external-sources', '--source-path', ROOT, *scripts], capture_output=True,
                        text=True)
  assert scripts and done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize('launcher', LAUNCHERS)
def test_with_nothing_installed_a_dry_run_works_and_a_real_one_says_what_is_missing(bare, launcher):
  assert os.access(ROOT / 'launch' / f'{launcher}.py', os.X_OK)
  done = bare(launcher, '--dry_run', *COMPLETE[launcher]) if launcher != 'tpu_vm' else bare(
      launcher, 'start', '--dry_run', *COMPLETE[launcher][1:])
  assert done.returncode == 0 and not done.stderr and NEEDED[launcher] in done.stdout, done
  done = bare(launcher, *COMPLETE[launcher])
  assert done.returncode == 2 and not done.stdout, done
  assert done.stderr.splitlines()[-1] == (
      f'{launcher}.py: error: {NEEDED[launcher]} is not installed here; --dry_run prints what would be run')
  assert 'Traceback' not in done.stderr


@pytest.mark.parametrize('launcher', LAUNCHERS)
def test_help_names_the_document(bare, launcher):
  done = bare(launcher, '--help')
  assert done.returncode == 0 and 'docs/launching.md' in done.stdout
  text = (ROOT / 'docs' / 'launching.md').read_text()
  assert f'launch/{launcher}.py' in text


@pytest.mark.parametrize('launcher', [name for name in LAUNCHERS if name != 'sweep'])
@pytest.mark.parametrize('training, message', [
    ([], 'what to train is missing'),
    (['--', 'musiclm', 'train', '--gin_file', 'a'], "without 'musiclm'"),
    (['--', '--gin_file', 'a.gin'], '--workdir is missing'),
    (['--', '--workdir', '/data/x'], 'required: --gin_file'),
    (['--', '--gin_file', 'a.gin', '--workdir', '/data/x', '--gin.NAME'], 'write --gin.NAME=VALUE'),
    (['--', '--gin_file', 'a.gin', '--workdir', '/data/x', '--steps', '3'], 'unrecognized arguments: --steps'),
    (['--gin.NAME=3', '--', '--gin_file', 'a.gin', '--workdir', '/data/x'], '--gin.NAME belongs to `musiclm train`'),
])
def test_what_the_trainer_would_refuse_is_refused(tmp_path, launcher, training, message):
  (tmp_path / 'hosts.txt').write_text('node1\n')
  own = COMPLETE[launcher][:COMPLETE[launcher].index('--')]
  own = [str(tmp_path / word) if word == 'hosts.txt' else word for word in own]
  assert message in refused(launcher, *own, *training)


@pytest.mark.parametrize('launcher', [name for name in LAUNCHERS if name != 'sweep'])
def test_a_variable_needs_a_name(launcher):
  own = COMPLETE[launcher][:COMPLETE[launcher].index('--')]
  assert "'3=4' is not NAME=VALUE" in refused(launcher, *own, '--env', '3=4', '--', *TRAINING)
