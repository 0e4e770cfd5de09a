"""Computes batches ahead of the training step, in a thread or in processes of their own."""
from __future__ import annotations

import collections
from collections.abc import Callable, Iterator
import concurrent.futures
from concurrent.futures.process import BrokenProcessPool
import functools
import multiprocessing
import time
from typing import Any

from musiclm_jax.data.workers import keep_context, with_context, WorkerLost

Batch = Any


class Prefetch(Iterator[Batch]):
  """The batches of steps `first_step` to `first_step + num_steps - 1` in order, computed ahead.

  A batch is a function of its step, so running ahead changes nothing and there is no state to save. An
  exception in a batch is raised to the consumer at that batch's turn. Leaving a `with` block, or `close`,
  ends the workers.

  Args:
    depth: batches that are computed or wait to be taken, at least one for each worker.
    processes: workers that are processes: for batches that cost Python time (decoding, composing). 0 is one thread,
      which costs nothing to start.
  """

  def __init__(self, batches: Callable[..., Batch], first_step: int, num_steps: int, *,
               process_index: int = 0, process_count: int = 1, depth: int = 2, processes: int = 0):
    if depth < 1 or processes < 0:
      raise ValueError(f'prefetching needs a depth of at least 1, found {depth}, and no negative number of processes, '
                       f'found {processes}')
    self._hosts = (process_index, process_count)
    self._steps = iter(range(first_step, first_step + num_steps))
    if processes and num_steps:
      # "spawn": a process that forks while JAX or TensorFlow has threads can hang.
      self._pool: concurrent.futures.Executor = concurrent.futures.ProcessPoolExecutor(
          processes, mp_context=multiprocessing.get_context('spawn'), initializer=keep_context, initargs=(batches,))
      self._compute = functools.partial(with_context, _call)
    else:
      self._pool = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix='batches')
      self._compute = batches
    self._pending: collections.deque[concurrent.futures.Future[Batch]] = collections.deque()
    self._started = time.perf_counter()
    self._waited = 0.0
    for _ in range(max(depth, processes + 1)):
      self._submit()

  def _submit(self) -> None:
    if (step := next(self._steps, None)) is not None:
      self._pending.append(self._pool.submit(self._compute, step, *self._hosts))

  def __next__(self) -> Batch:
    if not self._pending:
      self.close()
      raise StopIteration
    began = time.perf_counter()
    try:
      batch = self._pending.popleft().result()
      self._submit()
    except BrokenProcessPool:
      self.close()
      raise WorkerLost('prepares batches', 'with fewer of them (DATA_PROCESSES)') from None
    except BaseException:
      self.close()
      raise
    finally:
      self._waited += time.perf_counter() - began
    return batch

  @property
  def waited_share(self) -> float:
    """Share of the time since the start, or the last `reset_wait`, that the consumer spent waiting here."""
    elapsed = time.perf_counter() - self._started
    return self._waited / elapsed if elapsed > 0 else 0.0

  def reset_wait(self) -> None:
    """Starts a new measurement of `waited_share`."""
    self._started, self._waited = time.perf_counter(), 0.0

  def close(self) -> None:
    """Cancels what has not begun. Safe to call twice."""
    self._steps = iter(())
    self._pending.clear()
    self._pool.shutdown(wait=False, cancel_futures=True)

  def __enter__(self) -> Prefetch:
    return self

  def __exit__(self, *exception: object) -> None:
    self.close()



def _call(batches: Callable[..., Batch], step: int, *hosts: int) -> Batch:
  return batches(step, *hosts)
