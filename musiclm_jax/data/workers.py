"""The same function over many tasks, in this process or in several."""
from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
import concurrent.futures
import multiprocessing
import os
from typing import Any

Progress = Callable[[str, int, int], None]  # what, done, of how many


class Workers:
  """Processes that start with the first task and end with the `with` block.

  Args:
    count: of processes; 0 takes one for each core, 1 works in this process.
  """

  def __init__(self, count: int = 0):
    self._count = count or os.cpu_count() or 1
    self._executor: concurrent.futures.ProcessPoolExecutor | None = None

  def __enter__(self) -> Workers:
    return self

  def __exit__(self, *exception: object) -> None:
    if self._executor is not None:
      self._executor.shutdown(cancel_futures=True)

  def map(self, function: Callable[[Any], Any], tasks: Sequence[Any], progress: Progress | None = None,
          what: str = '') -> Iterator[Any]:
    """The results in the order of the tasks. `function` is one of a module, so that processes can find it."""
    if self._count == 1 or len(tasks) < 2:
      results = map(function, tasks)
    else:
      if self._executor is None:
        # "spawn": a process that forks while JAX or TensorFlow has threads can hang.
        self._executor = concurrent.futures.ProcessPoolExecutor(
            min(self._count, len(tasks)), mp_context=multiprocessing.get_context('spawn'))
      chunk = max(1, min(16, len(tasks) // (4 * self._count)))
      results = self._executor.map(function, tasks, chunksize=chunk)
    for done, result in enumerate(results, 1):
      if progress:
        progress(what, done, len(tasks))
      yield result
