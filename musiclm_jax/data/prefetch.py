"""Computes batches ahead of the training step, in threads."""
from __future__ import annotations

import collections
from collections.abc import Callable, Iterator
import concurrent.futures
import time

import numpy as np

Batch = dict[str, np.ndarray]


class Prefetch(Iterator[Batch]):
  """The batches of steps `first_step` to `first_step + num_steps - 1` in order, computed ahead.

  A batch is a function of its step, so running ahead changes nothing and there is no state to save. An
  exception in a batch is raised to the consumer at that batch's turn. Leaving a `with` block, or `close`,
  ends the threads.
  """

  def __init__(self, batches: Callable[..., Batch], first_step: int, num_steps: int, *,
               process_index: int = 0, process_count: int = 1, depth: int = 2, workers: int = 1):
    if depth < 1 or workers < 1:
      raise ValueError(f'prefetching needs a depth and workers of at least 1, found {depth} and {workers}')
    self._batches = batches
    self._hosts = (process_index, process_count)
    self._steps = iter(range(first_step, first_step + num_steps))
    self._pool = concurrent.futures.ThreadPoolExecutor(workers, thread_name_prefix='batches')
    self._pending: collections.deque[concurrent.futures.Future[Batch]] = collections.deque()
    self._started = time.perf_counter()
    self._waited = 0.0
    for _ in range(max(depth, workers)):
      self._submit()

  def _submit(self) -> None:
    if (step := next(self._steps, None)) is not None:
      self._pending.append(self._pool.submit(self._batches, step, *self._hosts))

  def __next__(self) -> Batch:
    if not self._pending:
      self.close()
      raise StopIteration
    began = time.perf_counter()
    try:
      batch = self._pending.popleft().result()
    except BaseException:
      self.close()
      raise
    finally:
      self._waited += time.perf_counter() - began
    self._submit()
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


def prefetch(batches: Callable[..., Batch], first_step: int, num_steps: int, process_index: int = 0,
             process_count: int = 1, depth: int = 2, workers: int = 1) -> Prefetch:
  """An iterator over `batches(step, process_index, process_count)` that stays up to `depth` batches ahead."""
  return Prefetch(batches, first_step, num_steps, process_index=process_index, process_count=process_count,
                  depth=depth, workers=workers)
