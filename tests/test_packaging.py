"""The wheel: all files in it, and the command works in an empty folder where only the wheel is installed."""
from __future__ import annotations

import importlib.metadata
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from tests import environments

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ('gin', 'tasks', 'musiclm_jax', 'setup.cfg', 'pyproject.toml', 'LICENSE', 'README.md')
pytestmark = pytest.mark.slow


@pytest.fixture(scope='module')
def wheel(tmp_path_factory) -> Path:
  folder = tmp_path_factory.mktemp('source')  # a copy: building leaves files behind
  for name in SOURCES:
    if (ROOT / name).is_dir():
      shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns('__pycache__'))
    elif (ROOT / name).exists():
      shutil.copy(ROOT / name, folder / name)
  _pip('wheel', '--no-deps', '--no-build-isolation', '--wheel-dir', folder / 'dist', folder)
  return next((folder / 'dist').glob('*.whl'))


@pytest.fixture(scope='module')
def musiclm(wheel, tmp_path_factory) -> Path:
  """The command of a fresh environment: the wheel, and this environment's third-party packages."""
  folder = tmp_path_factory.mktemp('environment')
  subprocess.run([sys.executable, '-m', 'venv', '--without-pip', folder], check=True)
  site = next((folder / 'lib').glob('python*')) / 'site-packages'
  # Behind the wheel on the path, so that an editable install of this tree cannot be what is tested.
  (site / 'others.pth').write_text(sysconfig.get_paths()['purelib'] + '\n')
  _pip('--python', folder / 'bin' / 'python', 'install', '--no-deps', wheel)
  return folder / 'bin' / 'musiclm'


@pytest.fixture(scope='module')
def base(wheel, tmp_path_factory) -> Path:
  """Python of an environment with the wheel and what it declares as its base install, and nothing else."""
  about = next(path for path in zipfile.Path(wheel).iterdir() if path.name.endswith('.dist-info'))
  python = environments.linked(tmp_path_factory.mktemp('base'), importlib.metadata.PathDistribution(about).requires)
  _pip('--python', python, 'install', '--no-deps', wheel)
  return python


def _pip(*arguments) -> None:
  done = subprocess.run([sys.executable, '-m', 'pip', *map(str, arguments)], capture_output=True, text=True)
  assert done.returncode == 0, done.stderr + done.stdout


def test_every_file_is_in_the_wheel(wheel):
  inside = set(zipfile.ZipFile(wheel).namelist())
  for folder, target in (('musiclm_jax', 'musiclm_jax'), ('gin', 'musiclm_jax/gin_files'),
                         ('tasks', 'musiclm_jax/tasks')):
    for path in (ROOT / folder).rglob('*'):
      if path.is_file() and '__pycache__' not in path.parts:
        name = f'{target}/{path.relative_to(ROOT / folder).as_posix()}'
        assert name in inside, f'{path} is not in the wheel'
  assert not [name for name in inside if name.startswith(('gin/', 'tasks/', 'tests/'))]
  assert any(name.endswith('licenses/LICENSE') for name in inside)


def test_the_command_works_from_an_empty_folder(musiclm, tmp_path):
  assert 'quickstart' in _run(musiclm, '--help', cwd=tmp_path)
  code = 'import musiclm_jax; print(musiclm_jax.__file__)'
  where = _run(musiclm.parent / 'python', '-c', code, cwd=tmp_path)
  assert str(ROOT) not in where


def test_a_dry_run_finds_the_experiments(musiclm, tmp_path):
  out = _run(musiclm, 'train', '--gin_file', 'experiments/codec.gin', '--gin_file', 'size/nano.gin',
             '--workdir', 'work', '--dry_run', cwd=tmp_path)
  assert 'parameters' in out
  assert not (tmp_path / 'work').exists(), 'a dry run writes nothing'


def test_tasks_are_found_by_their_name(musiclm, tmp_path):
  (tmp_path / 'x.gin').write_text('from __gin__ import dynamic_registration\nfrom musiclm_jax import specs\n'
                                  "import tasks\nRUN = @specs.TokenSpec\nspecs.TokenSpec.name = 'x'\n"
                                  'specs.TokenSpec.codebook_size = 2\n')
  code = ("from musiclm_jax import config; config.load_experiment(['x.gin']); "
          'import tasks; print(tasks.__file__)')
  assert 'musiclm_jax/tasks' in _run(musiclm.parent / 'python', '-c', code, cwd=tmp_path)


def test_a_bundle_makes_music_where_only_the_base_install_is(base, nano_bundle, tmp_path):
  shutil.copytree(nano_bundle, tmp_path / 'moved')
  for extra in ('flax', 'optax', 'orbax', 'tensorflow', 'seqio', 'gin'):
    code = f'import importlib.util; print(importlib.util.find_spec({extra!r}))'
    assert _run(base, '-c', code, cwd=tmp_path).strip() == 'None'
  generate = ('--prompt', 'slow piano', '--seconds', '0.5', '--seed', '7', '--output')
  _run(base, '-m', 'musiclm_jax.main', 'generate', '--bundle', 'moved', *generate, 'here.wav', cwd=tmp_path)
  # The same bundle in this environment; that it gives what its workdir gives is for tests/export.
  _run(sys.executable, '-m', 'musiclm_jax.main', 'generate', '--bundle', 'moved', *generate, 'there.wav', cwd=tmp_path)
  assert (tmp_path / 'here.wav').read_bytes() == (tmp_path / 'there.wav').read_bytes()
  _run(base, '-m', 'musiclm_jax.main', 'generate', '--bundle', 'moved', '--continue_audio', 'here.wav', *generate,
       'longer.wav', cwd=tmp_path)
  assert (tmp_path / 'longer.wav').stat().st_size > 1.9 * (tmp_path / 'here.wav').stat().st_size


def _run(*command, cwd: Path) -> str:
  done = subprocess.run([str(c) for c in command], cwd=cwd, capture_output=True, text=True, timeout=600,
                        env={'PATH': '/usr/bin:/bin', 'JAX_PLATFORMS': 'cpu', 'HOME': str(cwd)})
  assert done.returncode == 0, done.stderr[-3000:]
  return done.stdout
