"""The same function over many tasks, in this process or in several."""
from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
import concurrent.futures
from concurrent.futures.process import BrokenProcessPool
import functools
import multiprocessing
import os
import signal
import sys
import threading
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
    if self._executor is None:
      return
    if exception[0] is not None:  # nobody waits for what is at work: it ends as `_keep_until_told` says
      for process in list((self._executor._processes or {}).values()):
        process.terminate()
    self._executor.shutdown(cancel_futures=True)

  def map(self, function: Callable[[Any], Any], tasks: Sequence[Any], progress: Progress | None = None,
          what: str = '', *, together: int = 1) -> Iterator[Any]:
    """The results in the order of the tasks. `function` is one of a module, so that processes can find it.

    Args:
      together: how many tasks at most a process is given at a time, where they are short and many.

    Raises what `function` raises, and `WorkerLost`.
    """
    if self._count == 1 or len(tasks) < 2:
      results = map(functools.partial(function, *self._context), tasks)
    else:
      if self._executor is None:
        # "spawn": a process that forks while JAX or TensorFlow has threads can hang.
        self._executor = concurrent.futures.ProcessPoolExecutor(
            min(self._count, len(tasks)), mp_context=multiprocessing.get_context('spawn'),
            initializer=_keep_until_told, initargs=self._context)
      chunk = max(1, min(together, len(tasks) // (4 * self._count)))
      results = self._executor.map(functools.partial(with_context, function), tasks, chunksize=chunk)
    try:
      for done, result in enumerate(results, 1):
        if progress:
          progress(what, done, len(tasks))
        yield result
    except BrokenProcessPool:
      raise WorkerLost('shares the work', 'with fewer --workers where it has them') from None


# Of a worker process.
_context: tuple[Any, ...] = ()
_ending = False


def keep_context(*context: Any) -> None:
  """Initializes a worker process, which ends with its parent, however that ends.

  It holds both ends of the queue of tasks, and would wait there for ever.
  """
  global _context
  for number in (signal.SIGINT, signal.SIGTERM):  # a terminal and a cluster send them to all; the parent decides
    signal.signal(number, signal.SIG_IGN)
  if (parent := multiprocessing.parent_process()) is not None:
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
  _context = context


def _keep_until_told(*context: Any) -> None:
  """As `keep_context`; on SIGTERM the task at work ends by an exception, so that it cleans up, and no other begins."""
  keep_context(*context)
  signal.signal(signal.SIGTERM, _end)


def _end(*_: object) -> None:
  global _ending
  _ending = True
  sys.exit(1)


def _end_with(parent: multiprocessing.process.BaseProcess) -> None:
  parent.join()
  os._exit(1)  # what is written is written beside its place and renamed


def with_context(function: Callable[..., Any], *arguments: Any) -> Any:
  """Calls `function`, in a worker process, with what that process was given at its start."""
  if _ending:
    sys.exit(1)
  return function(*_context, *arguments)
