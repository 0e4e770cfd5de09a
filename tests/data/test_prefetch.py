"""Prefetching: order, errors, ends, and how long the consumer waited."""
import multiprocessing
import os
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from musiclm_jax.data.prefetch import Prefetch
from musiclm_jax.data.workers import Workers, WorkerLost


def square(step, process_index=0, process_count=1):
  return {'x': np.array([step ** 2, process_index, process_count])}


def uneven(step, *hosts):
  time.sleep(0.002 * (step % 3))
  return square(step, *hosts)


@pytest.mark.parametrize('processes', [0, 2])
def test_order_is_that_of_the_steps(processes):
  with Prefetch(uneven, 5, 7, process_index=1, process_count=2, depth=4, processes=processes) as feed:
    assert [b['x'].tolist() for b in feed] == [[s ** 2, 1, 2] for s in range(5, 12)]


def dies(step, *_):
  os._exit(9)


def dies_later(step, *hosts):
  return dies(step) if step == 3 else square(step, *hosts)


@pytest.mark.parametrize('batches', [dies, dies_later])
def test_a_killed_process_is_one_clear_error(batches):
  with pytest.raises(WorkerLost, match='a process that prepares batches ended, killed.*DATA_PROCESSES'):
    for _ in Prefetch(batches, 0, 9, processes=1):
      time.sleep(0.2)  # the queue is full when the process dies


def test_errors_are_the_same_in_a_fresh_interpreter():
  """Parts of the standard library are imported late: what another test has imported must not matter."""
  code = ('from musiclm_jax.data.prefetch import Prefetch\n'
          'try:\n  next(Prefetch(lambda *step: 1 / 0, 0, 1))\nexcept ZeroDivisionError:\n  print("as it was")')
  done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, timeout=900)
  assert done.stdout == 'as it was\n', done.stderr


def test_it_runs_ahead_but_not_further_than_depth():
  seen = []
  feed = Prefetch(lambda step, *_: seen.append(step) or square(step), 0, 100, depth=3)
  next(feed)
  time.sleep(0.1)
  assert seen == [0, 1, 2, 3]
  feed.close()


def test_errors_reach_the_consumer_in_turn():
  def faulty(step, *_):
    if step == 2:
      raise ValueError('record 2 cannot be read')
    return square(step)
  feed = Prefetch(faulty, 0, 10, depth=4)
  assert [next(feed)['x'][0], next(feed)['x'][0]] == [0, 1]
  with pytest.raises(ValueError, match='record 2'):
    next(feed)
  with pytest.raises(StopIteration):
    next(feed)


def test_waiting_is_measured():
  def slow(step, *_):
    time.sleep(0.03)
    return square(step)
  with Prefetch(slow, 0, 4) as feed:
    for _ in feed:
      pass
    waiting = feed.waited_share
  with Prefetch(square, 0, 4) as feed:
    for _ in feed:
      time.sleep(0.3)
    assert feed.waited_share < waiting <= 1


def test_leaving_early_ends_the_thread():
  before = threading.active_count()
  with Prefetch(square, 0, 10 ** 9) as feed:
    next(feed)
  deadline = time.monotonic() + 5
  while threading.active_count() > before and time.monotonic() < deadline:
    time.sleep(0.01)
  assert threading.active_count() <= before


def test_nothing_to_do_is_no_batches():
  assert list(Prefetch(square, 3, 0)) == []
  with pytest.raises(ValueError, match='at least 1'):
    Prefetch(square, 0, 1, depth=0)


def add(context, task):
  if task == 'die':
    os._exit(9)
  return context + task


@pytest.mark.parametrize('count', [1, 2])
def test_workers_know_their_context(count):
  with Workers(count, 10) as pool:
    assert list(pool.map(add, [1, 2, 3])) == [11, 12, 13]


def linger(context, task):
  path = context / str(task)
  try:
    path.write_text(str(os.getpid()))
    time.sleep(60)
  finally:
    path.write_text('cleaned up')


def fail(context, task):
  if task:
    return linger(context, task)
  while not (context / '1').exists():
    time.sleep(0.05)
  raise ValueError('the first one')


def test_what_is_at_work_ends_when_the_work_fails(tmp_path):
  began = time.monotonic()
  with pytest.raises(ValueError, match='the first one'), Workers(2, tmp_path) as pool:
    list(pool.map(fail, range(40)))
  assert time.monotonic() - began < 30
  assert {path.read_text() for path in tmp_path.iterdir()} == {'cleaned up'}


def _share(folder):
  with Workers(2, folder) as pool:
    list(pool.map(linger, [1, 2]))


@pytest.mark.parametrize('how', ['terminate', 'kill'])
def test_workers_end_with_a_parent_that_is_killed(tmp_path, how):
  parent = multiprocessing.get_context('spawn').Process(target=_share, args=(tmp_path,))
  parent.start()
  pids: list[int] = []
  while len(pids) < 2:
    time.sleep(0.1)
    pids = [int(text) for path in tmp_path.iterdir() if (text := path.read_text())]
  getattr(parent, how)()
  parent.join()
  deadline = time.monotonic() + 20
  while any(os.path.exists(f'/proc/{pid}') for pid in pids):
    assert time.monotonic() < deadline, 'they wait for tasks that nobody will send'
    time.sleep(0.1)


def test_a_lost_worker_is_one_clear_error():
  with Workers(2, 10) as pool, pytest.raises(WorkerLost, match='a process that shares the work ended'):
    list(pool.map(add, [1, 'die', 3]))
