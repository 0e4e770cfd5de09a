"""Saves a checkpoint while `faults.so` copies the folder before every call that changes a file; looks at each copy.

A copy is what a process that was killed at that moment would have left behind. Killing it for real, some hundred times,
would spend an hour on starting processes; `test_every_training.py` kills some.

  saver.py FOLDER KEEP      prints one JSON line for each copy that differs from the one before, and for the end
"""
import ctypes
import dataclasses
import hashlib
import json
import os
import pathlib
import sys

import jax
import numpy as np

from musiclm_jax.training import checkpoint, state as states
from musiclm_jax.training.state import Skeleton
from tests.trainings import experiment

OBJECTIVE = experiment('fine_lm').argument('objective')


def abstract():
  skeleton = Skeleton.of(OBJECTIVE)
  sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  described = lambda tree: jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), states.nnx.to_pure_dict(tree))
  scalar = jax.ShapeDtypeStruct((), np.int32, sharding=sharding)
  return states.TrainState(scalar, described(skeleton.params), described(skeleton.buffers), {'count': scalar}, {})


def numbers(step, shape, dtype):
  """What an array of this shape holds in this step: noise, which does not shrink when it is stored."""
  return (100 * np.random.default_rng([step, *shape]).random(shape)).astype(dtype)


def filled(step):
  state = jax.tree.map(lambda x: jax.device_put(numbers(step, x.shape, x.dtype), x.sharding), abstract())
  return dataclasses.replace(state, step=np.int32(step))


def holds(tree, step):
  return all(np.array_equal(leaf, numbers(step, leaf.shape, leaf.dtype)) for leaf in jax.tree.leaves(tree))


def save(folder, step, keep):
  with checkpoint.Checkpoints(folder, OBJECTIVE, keep=keep) as checkpoints:
    checkpoints.save(filled(step))


def examine(folder, keep, before, after):
  """What a run that starts after the kill sees; every value but `latest` must be true."""
  latest = checkpoint.latest_step(folder)
  with checkpoint.Checkpoints(folder, OBJECTIVE, keep=keep) as checkpoints:
    state = checkpoints.restore(abstract())
    whole = holds((state.params, state.buffers, state.opt_state), latest)
    checkpoints.save(filled(after + 1))
  names = {p.name for p in (pathlib.Path(folder) / 'checkpoints').iterdir()}
  return {'latest': latest, 'known': latest in (before, after), 'whole': whole, 'same': int(state.step) == latest,
          'saves_again': checkpoint.latest_step(folder) == after + 1, 'clean': all(n.isdigit() for n in names),
          'nothing_set_aside': not (pathlib.Path(folder) / 'checkpoints_unreadable').exists()}


def digest(folder):
  found = hashlib.sha256()
  for path in sorted(folder.rglob('*')):
    found.update(f'{path.relative_to(folder)}\n'.encode() + (path.read_bytes() if path.is_file() else b''))
  return found.digest()


def main(folder, keep):
  faults = ctypes.CDLL(None)
  work, copies = folder / 'work', folder / 'copies'
  copies.mkdir(parents=True)
  save(work, 1, keep)
  faults.faults_copy(os.fsencode(work), os.fsencode(copies))
  save(work, 2, keep)
  calls = faults.faults_stop()
  print(json.dumps({'calls': calls}))
  last = None
  for number, copy in enumerate([*(copies / str(n) for n in range(calls)), work]):  # the last is what no kill met
    if (now := digest(copy)) != last:
      last = now
      print(json.dumps({'call': number, **examine(copy, keep, 1, 2)}), flush=True)


if __name__ == '__main__':
  main(pathlib.Path(sys.argv[1]), int(sys.argv[2]))
