"""Where the wall time of a run goes: the share spent on steps that count, and what took the rest."""
from __future__ import annotations

import collections
from collections.abc import Iterator
import contextlib
import json
import os
import pathlib
import time

from absl import logging
import jax

FILE = 'goodput.jsonl'
# Of reading other runs, and of restoring or creating the state; the first step, in which programs are compiled; waiting
# for batches; held-out measurements; saves, until training goes on; steps that an earlier start had done and not saved.
CAUSES = ('start', 'compilation', 'data', 'evaluation', 'checkpoints', 'steps done again')


class WallTime:
  """Counts seconds by cause from the moment it is made; what has no cause is productive."""

  def __init__(self):
    self._begun = time.monotonic()
    self._lost: dict[str, float] = collections.defaultdict(float)
    self.first = self.last = 0  # steps done when the run began, and so far
    self.again = 0  # of these, how many an earlier start had done and not saved

  @contextlib.contextmanager
  def lost_to(self, cause: str) -> Iterator[None]:
    """Counts what runs within for `cause`, one of `CAUSES`. Devices should have nothing left to do when it begins."""
    if cause not in CAUSES:
      raise ValueError(f'{cause!r} is none of {", ".join(CAUSES)}')
    begun = time.monotonic()
    try:
      yield
    finally:
      self._lost[cause] += time.monotonic() - begun

  @contextlib.contextmanager
  def reported(self, workdir: str | os.PathLike) -> Iterator[None]:
    """Reports at the end, whatever ends it, where there was a step."""
    try:
      yield
    except BaseException:
      with contextlib.suppress(OSError):  # a full disk, say, which may be what ended it
        self._report(workdir)
      raise
    self._report(workdir)

  def _report(self, workdir: str | os.PathLike) -> None:
    if self.last > self.first:
      report = self.report()
      write(workdir, report)
      logging.info('%s', words(report))

  def report(self) -> dict[str, float]:
    """Seconds by cause, and the share of them that went into steps."""
    first, last, again = self.first, self.last, self.again
    wall = time.monotonic() - self._begun
    lost = {cause: self._lost[cause] for cause in CAUSES}
    productive = max(wall - sum(lost.values()), 0.0)
    if last > first:
      lost['steps done again'] = productive * min(again, last - first) / (last - first)
    goodput = (productive - lost['steps done again']) / max(wall, 1e-9)
    return {'first': first, 'last': last, 'wall_seconds': wall, 'goodput': goodput, **lost}


def write(workdir: str | os.PathLike, report: dict[str, float]) -> None:
  """Appends a line to `goodput.jsonl` in the workdir: one for each start of a run."""
  if jax.process_index() == 0:
    with (pathlib.Path(workdir) / FILE).open('a') as file:
      file.write(json.dumps(report) + '\n')


def total_seconds(workdir: str | os.PathLike) -> float:
  """Wall time of all starts of a run that have ended by themselves; 0 where there is none, as for a fit."""
  path = pathlib.Path(workdir) / FILE
  total = 0.0
  for line in path.read_text().splitlines() if path.exists() else []:
    with contextlib.suppress(ValueError):  # half-written by a process that was killed
      total += json.loads(line)['wall_seconds']
  return total


def words(report: dict[str, float]) -> str:
  """'93% of 12.0 min went into steps; start 1%, compilation 4%, data 2%'."""
  share = lambda seconds: seconds / max(report['wall_seconds'], 1e-9)
  lost = [f'{cause} {share(report[cause]):.1%}' for cause in CAUSES if share(report[cause]) >= 0.001]
  minutes = report['wall_seconds'] / 60
  return f'{report["goodput"]:.1%} of {minutes:.1f} min went into steps; {", ".join(lost) or "nothing else"}'
