"""Are these still the numbers that they were? Checksums of arrays, in checkpoints and across devices.

Disks and memories change bits, rarely and without a word (Dixit et al. 2021, "Silent data corruptions at scale",
arXiv 2102.11245).
"""
from __future__ import annotations

from collections.abc import Callable
import functools
import json
import os
import pathlib
from typing import Any

from absl import logging
import jax
from jax.experimental import multihost_utils
import jax.numpy as jnp
import numpy as np

_FILE = 'replicas_differ.json'
_AT_A_TIME = 1 << 20  # words


class NonFinite(RuntimeError):
  """A parameter is not a finite number."""


class ReplicasDiffer(RuntimeError):
  """Two devices hold different values of what must be the same."""


def _mixed(word: Any, place: Any) -> Any:
  """uint32 of uint32, in place where these are NumPy's: a bijection of the words for each place, far from linear
  (murmur3's last one): without that the changes of two words, such as their signs, could cancel in the sum."""
  word ^= place * np.uint32(0x9E3779B1)
  word ^= word >> np.uint32(16)
  word *= np.uint32(0x85EBCA6B)
  word ^= word >> np.uint32(13)
  word *= np.uint32(0xC2B2AE35)
  word ^= word >> np.uint32(16)
  return word


# What becomes of the word at a place. Checkpoints name the version of their checksums.
_TERMS = {1: lambda word, place: word * (2 * place + 1), 2: _mixed}
VERSION = 2


def _checksum(x: jax.Array, version: int = VERSION) -> jax.Array:
  """uint32: the words of x, each mixed with its place, summed modulo 2^32.

  Any change of a single word shows. Of changes of several, chance alone lets any pass: signs that are turned, of two
  words or of all, words that change places and bits that flip together are among those that tests have seen to show.
  The order of the sum does not matter, so the result is the same for any layout over devices; nothing is moved between
  them but the sums.
  """
  if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
    x = jax.random.key_data(x)
  if x.dtype == jnp.bool_:
    x = x.astype(jnp.uint8)
  word = {1: jnp.uint8, 2: jnp.uint16}.get(x.dtype.itemsize, jnp.uint32)
  words = jax.lax.bitcast_convert_type(x, word).astype(jnp.uint32)
  place, stride = jnp.zeros(words.shape, jnp.uint32), 1
  for axis in reversed(range(words.ndim)):
    place += jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis) * jnp.uint32(stride & 0xFFFFFFFF)
    stride *= words.shape[axis]
  return jnp.sum(_TERMS[version](words, place), dtype=jnp.uint32)


def name_of(path: Any) -> str:
  """A path in a tree as text."""
  return jax.tree_util.keystr(path, simple=True, separator='/')


def checksums(tree: Any, version: int = VERSION) -> dict[str, int]:
  """A checksum of each array by its path, computed where the arrays are.

  Raises ValueError for a version that is not known here.
  """
  if version not in _TERMS:
    raise ValueError(f'its checksums are of version {version}, and only {", ".join(map(str, _TERMS))} are known here')
  names = [name_of(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)]
  leaves = jax.tree.leaves(tree)
  values = [_host_checksum(x, version) for x in leaves] if _in_memory(leaves) else _checksums(leaves, version)
  return dict(zip(names, map(int, values)))


_checksums = jax.jit(lambda leaves, version: [_checksum(x, version) for x in leaves], static_argnums=1)
_finite = jax.jit(lambda leaves: [jnp.isfinite(x).all() for x in leaves])


def _in_memory(leaves: list[jax.Array]) -> bool:
  """Whether NumPy can read the arrays where they are: then nothing need be compiled, which takes seconds."""
  return all(x.is_fully_addressable and {d.platform for d in x.sharding.device_set} == {'cpu'} for x in leaves)


def _host_checksum(x: jax.Array, version: int = VERSION) -> int:
  """`_checksum`, by NumPy."""
  if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
    x = jax.random.key_data(x)
  array = np.ascontiguousarray(x).reshape(-1)
  words = array.view({1: np.uint8, 2: np.uint16}.get(array.dtype.itemsize, np.uint32))
  total = 0
  for first in range(0, len(words), _AT_A_TIME):
    part = words[first:first + _AT_A_TIME].astype(np.uint32)
    place = np.arange(first, first + len(part), dtype=np.uint64).astype(np.uint32)
    total += int(np.sum(_TERMS[version](part, place), dtype=np.uint32))
  return total & 0xFFFFFFFF


def check_finite(tree: Any, step: int) -> None:
  """Raises `NonFinite` naming the first array with an entry that is no number.

  The loss of a step is that of the parameters before it: it does not see what the step itself has spoilt.
  """
  entries = [(path, x) for path, x in jax.tree_util.tree_leaves_with_path(tree) if jnp.issubdtype(x.dtype, jnp.inexact)]
  if not entries:
    return
  leaves = [x for _, x in entries]
  finite = [np.isfinite(np.asarray(x)).all() for x in leaves] if _in_memory(leaves) else _finite(leaves)
  for (path, _), fine in zip(entries, finite):
    if not fine:
      raise NonFinite(f'{name_of(path)} is not finite after step {step}, though the loss of that step was; nothing of '
                      'it was saved. Lower the learning rate, and run the same command again to go on from the last '
                      'checkpoint')


@functools.lru_cache(maxsize=4)
def _on_each_device(mesh: jax.sharding.Mesh, specs: tuple[jax.P, ...]) -> Callable[..., jax.Array]:
  """uint32 [devices of the mesh, arrays]: each device's checksums of its own parts."""
  mine = lambda *parts: jnp.stack([_checksum(p) for p in parts])[None]
  return jax.jit(jax.shard_map(mine, mesh=mesh, in_specs=specs, out_specs=jax.P(mesh.axis_names), check_vma=False))


def check_replicas(tree: Any, step: int, workdir: str | os.PathLike) -> None:
  """Raises `ReplicasDiffer`, naming the devices, where copies of a part differ, and writes what was found to `workdir`.

  The run then goes on from its last checkpoint. Of three copies or more the one that differs is named at once; of two
  it is named when the step is taken again, if the fault came with that step. All arrays must be laid out on one mesh.
  """
  entries = jax.tree_util.tree_leaves_with_path(tree)
  leaves = [leaf for _, leaf in entries]
  if all(leaf.sharding.num_devices == 1 for leaf in leaves):
    return
  mesh = leaves[0].sharding.mesh
  found = _on_each_device(mesh, tuple(leaf.sharding.spec for leaf in leaves))(*leaves)
  if not found.is_fully_addressable:
    found = multihost_utils.process_allgather(found, tiled=True)
  rows = dict(zip(mesh.devices.flat, np.asarray(found)))
  suspect = _read(workdir, step)
  for number, (path, leaf) in enumerate(entries):
    groups: dict[str, dict[Any, int]] = {}
    for device, index in leaf.sharding.devices_indices_map(leaf.shape).items():
      groups.setdefault(str(index), {})[device] = int(rows[device][number])
    for copies in groups.values():
      name = name_of(path)
      here = sorted([d.process_index, d.id] for d in copies)
      if suspect and suspect['parameter'] == name and here == sorted(where for *where, _ in suspect['copies']):
        _confirm(suspect, set(copies.values()))
      if len(set(copies.values())) > 1:
        _raise(name, copies, step, workdir)
  if suspect and jax.process_index() == 0:
    (pathlib.Path(workdir) / _FILE).unlink(missing_ok=True)


def _raise(name: str, copies: dict[Any, int], step: int, workdir: str | os.PathLike) -> None:
  values = list(copies.values())
  common = max(set(values), key=values.count)
  sure = 2 * values.count(common) > len(values)
  odd = {d: v for d, v in copies.items() if v != common} if sure else copies
  if jax.process_index() == 0:
    (pathlib.Path(workdir) / _FILE).write_text(json.dumps(
        {'step': step, 'parameter': name, 'checksum_version': VERSION,
         'copies': [[d.process_index, d.id, v] for d, v in copies.items()]}))
  where = ', '.join(f'process {d.process_index} (device {d.id})' for d in odd)
  blame = f'{where} differ{"s" if len(odd) == 1 else ""} from the others' if sure else \
      f'{where} disagree: which one is wrong shows when the step is taken again'
  raise ReplicasDiffer(f'the copies of {name} are no longer the same after step {step}: {blame}. Nothing of this was '
                       'saved; run the same command again to go on from the last checkpoint')


def _read(workdir: str | os.PathLike, step: int) -> dict[str, Any] | None:
  try:
    found = json.loads((pathlib.Path(workdir) / _FILE).read_text())
    return found if (found['step'], found['checksum_version']) == (step, VERSION) else None
  except (OSError, ValueError, KeyError):
    return None


def _confirm(suspect: dict[str, Any], right: set[int]) -> None:
  processes = {process for process, _, _ in suspect['copies']}
  wrong = {process for process, _, value in suspect['copies'] if value not in right}
  if len(right) != 1 or not wrong:
    return
  # Gradients are shared: steps after the fault change all copies, and then none is what it should have been.
  who = f'process {", ".join(map(str, sorted(wrong)))}' if wrong != processes else 'one of the processes'
  logging.warning('step %d was taken again: %s had wrong values of %s before; test the memory of that machine',
                  suspect['step'], who, suspect['parameter'])
