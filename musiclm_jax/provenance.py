"""What a result was made with: the code, the packages, and what the caller adds (configuration, data, seeds)."""
from __future__ import annotations

from collections.abc import Mapping
import functools
import hashlib
import importlib.metadata
import os
import pathlib
import platform
from typing import Any

import musiclm_jax

# The packages whose version can change a number.
PACKAGES = ('jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'numpy', 'array-record', 'seqio', 'tensorflow',
            'gin-config', 'soundfile', 'soxr')


@functools.cache
def code_digest() -> str:
  """Sixteen hex digits over the Python files of the package; the same for a checkout and a wheel of it.

  The SeqIO tasks lie beside the package in a checkout and in it in a wheel: they are left out.
  """
  root = pathlib.Path(musiclm_jax.__file__).parent
  digest = hashlib.sha256()
  for path in sorted(p for p in root.rglob('*.py') if p.relative_to(root).parts[0] != 'tasks'):
    digest.update(f'{path.relative_to(root).as_posix()}\n'.encode())
    digest.update(path.read_bytes())
  return digest.hexdigest()[:16]


def hash_file(path: str | bytes | os.PathLike) -> str:
  """SHA-256 of a file's content, in hex."""
  with open(path, 'rb') as file:
    return hashlib.file_digest(file, 'sha256').hexdigest()


@functools.cache
def _packages() -> dict[str, str]:
  found = {}
  for name in PACKAGES:
    try:
      found[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
      pass
  return found


def made_with(**facts: Any) -> dict[str, Any]:
  """The code and the packages of this process, and `facts`; nothing in it depends on when or where."""
  return {'musiclm_jax': musiclm_jax.__version__, 'code': code_digest(), 'python': platform.python_version(),
          'packages': dict(_packages()), **facts}


def differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
  """"name: there, here" for the code and each package that is not the same; the callers' facts are theirs."""
  flat = lambda made: {**{k: made.get(k) for k in ('musiclm_jax', 'code', 'python')}, **made.get('packages', {})}
  a, b = flat(there), flat(here)
  changed = [name for name in sorted(a.keys() | b.keys()) if a.get(name) != b.get(name)]
  return [f'{name}: {a.get(name)}, now {b.get(name)}' for name in changed]
