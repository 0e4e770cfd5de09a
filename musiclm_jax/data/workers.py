"""The same function over many tasks, in this process or in several."""
from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
import concurrent.futures
from concurrent.futures.process import BrokenProcessPool
import functools
import multiprocessing
import os
import signal
from typing import Any

Progress = Callable[[str, int, int], None]  # what, done, of how many


class WorkerLost(RuntimeError):
  """A process ended that should not have: killed, or it could not start."""

  def __init__(self, work: str, advice: str):
    super().__init__(f'a process that {work} ended, killed perhaps for want of memory; what was done is kept: run the '
                     f'same command again, {advice}')


class Workers:
  """Processes that start with the first task and end with the `with` block.

  Args:
    count: of processes; 0 takes one for each core, 1 works in this process.
    context: a first argument for each call, sent to each process once.
  """

  def __init__(self, count: int = 0, *context: Any):
    self._count = count or os.cpu_count() or 1
    self._context = context
    self._executor: concurrent.futures.ProcessPoolExecutor | None = None

  def __enter__(self) -> Workers:
    return self

  def __exit__(self, *exception: object) -> None:
    if self._executor is not None:
      self._executor.shutdown(cancel_futures=True)

  def map(self, function: Callable[[Any], Any], tasks: Sequence[Any], progress: Progress | None = None,
          what: str = '') -> Iterator[Any]:
    """The results in the order of the tasks. `function` is one of a module, so that processes can find it.

    Raises what `function` raises, and `WorkerLost`.
    """
    if self._count == 1 or len(tasks) < 2:
      results = map(functools.partial(function, *self._context), tasks)
    else:
      if self._executor is None:
        # "spawn": a process that forks while JAX or TensorFlow has threads can hang.
        self._executor = concurrent.futures.ProcessPoolExecutor(
            min(self._count, len(tasks)), mp_context=multiprocessing.get_context('spawn'),
            initializer=keep_context, initargs=self._context)
      chunk = max(1, min(16, len(tasks) // (4 * self._count)))
      results = self._executor.map(functools.partial(with_context, function), tasks, chunksize=chunk)
    try:
      for done, result in enumerate(results, 1):
        if progress:
          progress(what, done, len(tasks))
        yield result
    except BrokenProcessPool:
      raise WorkerLost('shares the work', 'with fewer --workers where it has them') from None


_context: tuple[Any, ...] = ()  # of a worker process


def keep_context(*context: Any) -> None:
  """Initializes a worker process."""
  global _context
  signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends Ctrl-C to all; the parent decides what ends when
  _context = context


def with_context(function: Callable[..., Any], *arguments: Any) -> Any:
  """Calls `function`, in a worker process, with what that process was given at its start."""
  return function(*_context, *arguments)
