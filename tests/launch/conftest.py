"""Stand-ins for what launchers run: each call leaves its arguments and its environment in a folder."""
from __future__ import annotations

from collections.abc import Iterator
import contextlib
import importlib
import io
import pathlib
import shutil
import socket
import stat
import subprocess
import sys
import time
from typing import NamedTuple

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
# What a shell, YAML, Kubernetes or JSON might take for something else.
HARD = ("--gin.NAME=a b 'c'", '--gin.B="$HOME" $(date) `id`', '--gin.C=back\\slash \\n', '--gin.D=*? # ; & | < > !',
        '--gin.E=', '--gin.F=two\nlines', '--gin.G=$$(JAX_PROCESS_ID) ${HOME}', '--gin.H=% %h é 🎵',
        '--gin.I={"a": [1, ~]}')
TRAINING = ('--gin_file', 'experiments/coarse_lm.gin', '--workdir', '/data/my runs/coarse', *HARD)

_RECORD = '''#!/bin/sh
call=$(mktemp -d "$CALLS/{name}.XXXXXX")
printf '%s\\0' "$@" > "$call/arguments"
env -0 > "$call/environment"
'''

LAUNCHERS = ('slurm', 'gke', 'tpu_vm', 'hosts', 'sweep')


def _load():
  """The launchers as modules: as scripts they find one another in their own folder."""
  sys.path.insert(0, str(ROOT / 'launch'))
  try:
    return {name: importlib.import_module(name) for name in (*LAUNCHERS, 'command', 'tpus')}
  finally:
    sys.path.remove(str(ROOT / 'launch'))


MODULES = _load()


class Call(NamedTuple):
  """One call of a stand-in."""
  arguments: list[str]
  environment: dict[str, str]
  folder: pathlib.Path


class Fakes:
  """A PATH with stand-ins.

  Attributes:
    folder: where they are, and where what they recorded is.
    environment: for processes that shall see them.
  """

  def __init__(self, folder: pathlib.Path):
    self.folder = folder
    (folder / 'bin').mkdir()
    (folder / 'calls').mkdir()
    self.environment = {'PATH': f'{folder}/bin:/usr/bin:/bin', 'CALLS': f'{folder}/calls', 'HOME': str(folder),
                        'PYTHONDONTWRITEBYTECODE': '1'}

  def add(self, name: str, script: str = '') -> None:
    """A command that records its call and goes on with these lines of sh."""
    path = self.folder / 'bin' / name
    path.write_text(_RECORD.format(name=name) + script)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)

  def calls(self, name: str) -> list[Call]:
    """In the order in which they were made."""
    made = lambda folder: (folder / 'arguments').stat().st_mtime_ns
    folders = sorted((self.folder / 'calls').glob(f'{name}.*'), key=made)
    read = lambda path: path.read_bytes().decode().split('\0')[:-1]
    return [Call(read(f / 'arguments'), dict(v.split('=', 1) for v in read(f / 'environment')), f) for f in folders]

  def start(self, launcher: str, *arguments: str, **options) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, ROOT / 'launch' / f'{launcher}.py', *arguments], text=True,
                            cwd=self.folder, env=self.environment,
                            **{'stdout': subprocess.PIPE, 'stderr': subprocess.PIPE, **options})

  def run(self, launcher: str, *arguments: str, code: int = 0) -> str:
    """Its output."""
    process = self.start(launcher, *arguments)
    try:
      out, error = process.communicate(timeout=60)
    finally:
      process.kill()
    assert process.returncode == code, error + out
    return out


@pytest.fixture
def fakes(tmp_path) -> Iterator[Fakes]:
  found = Fakes(tmp_path)
  yield found
  shutil.rmtree(tmp_path / 'calls')  # stand-ins that run for long end with it, also where a test has failed


def dry(launcher: str, *arguments: str) -> str:
  """What it prints with --dry_run."""
  split = arguments.index('--') if '--' in arguments else len(arguments)
  with contextlib.redirect_stdout(io.StringIO()) as out:
    assert MODULES[launcher].main([*arguments[:split], '--dry_run', *arguments[split:]]) == 0
  return out.getvalue()


def refused(launcher: str, *arguments: str) -> str:
  """The line with which it refuses; `test_scripts.py` has what becomes of such a line."""
  with pytest.raises(MODULES['command'].Mistake) as error:
    MODULES[launcher].main(list(arguments))
  assert '\n' not in str(error.value)
  return str(error.value)


# A stand-in for musiclm that joins the cluster as `musiclm train` does: how many processes, which, which GPUs.
JAX = f'''#!{sys.executable}
import jax
from jax._src import xla_bridge
from musiclm_jax import main
jax.distributed.initialize(**main._cluster(num_processes='JAX_NUM_PROCESSES', process_id='JAX_PROCESS_ID'))
print('found', jax.process_count(), jax.process_index(), xla_bridge.CUDA_VISIBLE_DEVICES.value, flush=True)
'''


def add_jax(fakes: Fakes) -> None:
  path = fakes.folder / 'bin' / 'musiclm'
  path.write_text(JAX)
  path.chmod(0o755)
  fakes.environment['JAX_PLATFORMS'] = 'cpu'


def free_port() -> int:
  with socket.socket() as probe:
    probe.bind(('127.0.0.1', 0))
    return probe.getsockname()[1]


def until(condition, seconds: float = 30) -> None:
  deadline = time.monotonic() + seconds
  while not condition():
    assert time.monotonic() < deadline
    time.sleep(0.02)
