"""Builds `faults.c`, and runs commands with it preloaded."""
from __future__ import annotations

import functools
import pathlib
import shutil
import subprocess
import tempfile

import pytest

SOURCE = pathlib.Path(__file__).with_name('faults.c')


@functools.cache
def library() -> str:
  """The path of the shared library; skips the test where there is no C compiler."""
  compiler = shutil.which('cc') or shutil.which('gcc')
  if compiler is None:
    pytest.skip('needs a C compiler')
  path = pathlib.Path(tempfile.mkdtemp(prefix='faults')) / 'faults.so'
  subprocess.run([compiler, '-shared', '-fPIC', '-O1', '-o', str(path), str(SOURCE), '-ldl'], check=True)
  return str(path)


def environment(base: dict[str, str], **armed: object) -> dict[str, str]:
  """`base` with the library loaded; `armed` as `root`, `at` and `errno` arms it from the start of the process."""
  extra = {f'FAULTS_{name.upper()}': str(value) for name, value in armed.items()}
  return {**base, 'LD_PRELOAD': library(), **extra}
