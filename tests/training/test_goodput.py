"""Where the time of a run went: what is counted for a cause is not productive, and all adds up."""
from __future__ import annotations

import json
import time

import pytest

from musiclm_jax.data import batches
from musiclm_jax.training import checkpoint, goodput
from tests.trainings import experiment, save_random, write_tokens


def test_shares_add_up(monkeypatch):
  now = [0.0]
  monkeypatch.setattr(goodput.time, 'monotonic', lambda: now[0])
  wall = goodput.WallTime()
  for cause, seconds in (('start', 2.0), ('compilation', 3.0), ('data', 1.0), ('data', 1.0), ('checkpoints', 3.0)):
    with wall.lost_to(cause):
      now[0] += seconds
  now[0] += 10
  wall.first, wall.last = 4, 14
  report = wall.report()
  assert report['wall_seconds'] == 20 and report['goodput'] == 0.5 and report['data'] == 2
  wall.again = 3
  again = wall.report()
  assert again['steps done again'] == pytest.approx(3) and again['goodput'] == pytest.approx(0.35)
  assert 'data 10.0%' in goodput.words(again) and '35.0% of 0.3 min' in goodput.words(again)
  with pytest.raises(ValueError, match="'lunch' is none of"), wall.lost_to('lunch'):
    pass


def test_a_run_leaves_a_line_for_each_start(tmp_path, monkeypatch):
  tokens, donor = write_tokens(tmp_path / 'tokens'), tmp_path / 'donor'
  save_random(donor, 'fine_lm', {})
  load = checkpoint.load
  monkeypatch.setattr(checkpoint, 'load', lambda *of: time.sleep(1) or load(*of))

  def run(steps):
    made = experiment('fine_lm', tokens, NUM_STEPS=steps, CHECKPOINT_EVERY=2, INIT_FROM=donor,
                      **{'partition.Partitioner.data': 1})
    made.build(workdir=str(tmp_path / 'run'), dry_run=False)

  run(4)
  run(6)
  with monkeypatch.context() as patched, pytest.raises(OSError, match='this disk is broken'):
    call = batches.TokenBatches.__call__
    broken = lambda self, step, *args: _raise(OSError('this disk is broken')) if step == 9 else call(self, step, *args)
    patched.setattr(batches.TokenBatches, '__call__', broken)
    run(12)
  lines = [json.loads(line) for line in (tmp_path / 'run' / goodput.FILE).read_text().splitlines()]
  assert [(line['first'], line['last']) for line in lines] == [(0, 4), (4, 6), (6, 9)]
  assert lines[0]['start'] > 1  # reading the donor is no step
  for line in lines:
    assert 0 < line['goodput'] < 1 and line['compilation'] > 0 and (line['evaluation'] > 0) == (line['last'] != 9)
    assert sum(line[cause] for cause in goodput.CAUSES) + line['goodput'] * line['wall_seconds'] == pytest.approx(
        line['wall_seconds'])


def test_the_time_of_a_run_is_that_of_all_its_starts(tmp_path):
  assert goodput.total_seconds(tmp_path) == 0
  for seconds in (20.0, 10.5):
    goodput.write(tmp_path, {'wall_seconds': seconds})
  with (tmp_path / goodput.FILE).open('a') as file:
    file.write('{"first": 3, "wall_sec')  # a disk that was full
  assert goodput.total_seconds(tmp_path) == 30.5


def _raise(error):
  raise error
