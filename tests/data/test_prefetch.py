"""Prefetching: order, errors, ends, and how long the consumer waited."""
import threading
import time

import numpy as np
import pytest

from musiclm_jax.data.prefetch import prefetch


def square(step, process_index=0, process_count=1):
  return {'x': np.array([step ** 2, process_index, process_count])}


@pytest.mark.parametrize('workers', [1, 3])
def test_order_is_that_of_the_steps(workers):
  def uneven(step, *hosts):
    time.sleep(0.002 * (step % 3))
    return square(step, *hosts)
  found = [b['x'].tolist() for b in prefetch(uneven, 5, 7, 1, 2, depth=4, workers=workers)]
  assert found == [[s ** 2, 1, 2] for s in range(5, 12)]


def test_it_runs_ahead_but_not_further_than_depth():
  seen = []
  feed = prefetch(lambda step, *_: seen.append(step) or square(step), 0, 100, depth=3)
  next(feed)
  time.sleep(0.1)
  assert seen == [0, 1, 2, 3]
  feed.close()


def test_errors_reach_the_consumer_in_turn():
  def faulty(step, *_):
    if step == 2:
      raise ValueError('record 2 cannot be read')
    return square(step)
  feed = prefetch(faulty, 0, 10, depth=4)
  assert [next(feed)['x'][0], next(feed)['x'][0]] == [0, 1]
  with pytest.raises(ValueError, match='record 2'):
    next(feed)
  with pytest.raises(StopIteration):
    next(feed)


def test_waiting_is_measured():
  def slow(step, *_):
    time.sleep(0.03)
    return square(step)
  with prefetch(slow, 0, 4) as feed:
    for _ in feed:
      pass
    assert feed.waited_share > 0.5
  with prefetch(square, 0, 4) as feed:
    for _ in feed:
      time.sleep(0.03)
    assert feed.waited_share < 0.5


def test_leaving_early_ends_the_threads():
  before = threading.active_count()
  with prefetch(square, 0, 10 ** 9, workers=2) as feed:
    next(feed)
  deadline = time.monotonic() + 5
  while threading.active_count() > before and time.monotonic() < deadline:
    time.sleep(0.01)
  assert threading.active_count() <= before


def test_nothing_to_do_is_no_batches():
  assert list(prefetch(square, 3, 0)) == []
  with pytest.raises(ValueError, match='at least 1'):
    prefetch(square, 0, 1, depth=0)
