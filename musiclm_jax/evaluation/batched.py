"""Running a model over many clips in batches of one static shape.

N clips, B batch, _ any other dimensions.
"""
from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np


def slices(count: int, batch_size: int) -> Iterator[np.ndarray]:
  """Indices [B] of each batch; the last one is filled up by repeating its first index."""
  for start in range(0, count, batch_size):
    index_B = np.arange(start, min(start + batch_size, count))
    yield np.concatenate([index_B, np.full(batch_size - len(index_B), start)])


def in_batches(function: Callable[..., Any], *arrays_Nx_: np.ndarray, batch_size: int) -> Any:
  """`function` over the leading axis of the arrays, a pytree of NumPy arrays with leading axis N.

  Every call sees exactly `batch_size` rows (the last one is filled up and cut again), so that one program is
  compiled and memory does not grow with N. Raises ValueError where the arrays differ in length or are empty.
  """
  count = len(arrays_Nx_[0])
  if count == 0 or any(len(a) != count for a in arrays_Nx_):
    raise ValueError(f'evaluation: arrays of lengths {[len(a) for a in arrays_Nx_]} cannot be read in step; '
                     'they must be equal and not 0')
  parts = []
  for start, index_B in zip(range(0, count, batch_size), slices(count, batch_size)):
    result = function(*(a[index_B] for a in arrays_Nx_))
    keep = min(batch_size, count - start)
    parts.append(jax.tree.map(lambda x, keep=keep: np.asarray(x)[:keep], result))
  return jax.tree.map(lambda *x: np.concatenate(x), *parts)
