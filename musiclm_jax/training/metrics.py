"""Metrics of a run: what is reported and where, means over held-out batches, a progress display, and the alarms."""
from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
import functools
import json
import os
import pathlib
import sys
import time
from typing import Any, NamedTuple

from absl import logging
import jax
import numpy as np
import rich.progress

from musiclm_jax.objective import Aux, Media, Objective
from musiclm_jax.training.tensorboard import EventFile


class _Bar(NamedTuple):
  """What a metric whose name ends in a suffix says of the one without it; `wrong(metric, value, bar)`: the alarm."""

  wrong: Callable[[str, float, float], bool]
  words: str
  held_out_words: str


def _at_chance(metric: str, value: float, bar: float) -> bool:
  """Within a hundredth of it nothing has been learned either; an accuracy is better when it is higher."""
  return value < bar + 0.01 if metric.endswith('accuracy') else value > bar - 0.01


_COLLAPSED = 'under its floor {:.4f}: it has collapsed'
_BARS = {
    '_chance': _Bar(
        _at_chance, 'at its chance level {:.4f}: nothing has been learned so far',
        'no better than its chance level {:.4f}: what was learned, if anything, holds for the training music only'),
    '_floor': _Bar(lambda metric, value, bar: value < bar, _COLLAPSED, _COLLAPSED),
}

Draw = Callable[[dict[str, np.ndarray], int], np.ndarray]  # sounds by name, their rate -> picture uint8 [H, W, 3]


class NonFiniteLoss(RuntimeError):
  """The loss of a step was not a finite number; `examples` is the file that names those of its batch."""

  def __init__(self, step: int, loss: float, examples: pathlib.Path | None = None):
    where = f' ({examples})' if examples else ': it is a pure function of the seed and the step'
    super().__init__(f'the loss of step {step} is {loss}; nothing of this step was saved. Lower the learning rate, or '
                     f'look at the batch of step {step}{where}')


class NonFiniteGradient(NonFiniteLoss):
  """The gradients of more steps in succession were not finite than may be left out."""

  def __init__(self, step: int, count: int):
    RuntimeError.__init__(
        self, f'the gradients of {count} steps in succession, up to step {step}, are not finite; nothing of them was '
        'applied or saved. Lower the learning rate, or look at the data')


def scalars(metrics: Mapping[str, Any]) -> dict[str, float]:
  """Floats; a vector [Q] becomes x_1 .. x_Q."""
  flat: dict[str, float] = {}
  for name, value in metrics.items():
    array = np.asarray(value)
    if array.ndim == 0:
      flat[name] = float(array)
    else:
      flat.update({f'{name}_{i + 1}': float(v) for i, v in enumerate(array.reshape(-1))})
  return flat


def held_out(objective: Objective, evaluate: Callable[[Any, jax.Array], tuple[jax.Array, Aux]],
             batches: Iterable[Any], key: jax.Array) -> dict[str, float]:
  """Metrics over evaluation batches of one size: means, and what `objective.evaluated` makes of all of them together.

  Args:
    evaluate: (batch, key) -> `objective.loss(..., training=False)`, compiled.
    key: of the masks and the like; a batch has the same ones every time.

  Raises ValueError where there are no batches.
  """
  total, count = None, 0
  for batch in batches:
    loss, aux = evaluate(batch, jax.random.fold_in(key, count))
    # Fetched before the next one begins: of several at a time, the collectives of processes on CPUs may meet in
    # another order, and then wait for one another for ever.
    values = jax.device_get(({'loss': loss, **aux.metrics}, aux.statistics))
    total = values if total is None else jax.tree.map(np.add, total, values)
    count += 1
  if total is None:
    raise ValueError('evaluation: there are no held-out batches')
  sums, statistics = total
  means = {name: value / count for name, value in sums.items()}
  return scalars(jax.device_get({**means, **objective.evaluated(statistics)}))


class MetricsWriter:
  """Appends to <workdir>/metrics.jsonl, and to an event file in <workdir>/tensorboard if asked; from process 0 only.

  Of a resumed run both forget the steps that it will take again; `forgotten` is how many there are, as far as they were
  reported.
  """

  def __init__(self, workdir: str | os.PathLike, first_step: int = 0, *, tensorboard: bool = False):
    self._path = pathlib.Path(workdir) / 'metrics.jsonl'
    self._active = jax.process_index() == 0
    self._first_step, self._tensorboard, self.forgotten = first_step, tensorboard, 0
    if self._active and self._path.exists():
      lines = read(self._path)
      self.forgotten = max([0, *(line['step'] - first_step for line in lines)])
      kept = [line for line in lines if line['step'] <= first_step]
      temporary = self._path.with_suffix('.partial')
      temporary.write_text(''.join(json.dumps(line) + '\n' for line in kept))
      temporary.replace(self._path)

  @functools.cached_property
  def _events(self) -> EventFile | None:
    """Opened by the first thing to write: a run that has nothing left to do leaves no file."""
    wanted = self._active and self._tensorboard
    return EventFile(self._path.parent / 'tensorboard', self._first_step) if wanted else None

  def write(self, step: int, values: Mapping[str, float], *, part: str = 'train') -> None:
    if self._active:
      with self._path.open('a') as file:
        file.write(json.dumps({'step': step, 'part': part, **values}) + '\n')
    if self._events:
      self._events.scalars(step, {f'{part}/{name}': value for name, value in values.items()})

  def write_media(self, step: int, media: Media, draw: Draw) -> None:
    """The sounds of each example, and one picture of them all: `clip_1/original`, `clip_1/pictures`, `clip_2/...`.

    Media and pictures go to TensorBoard alone. All processes draw, as a drawing may compute on the run's mesh.
    """
    for i in range(min(map(len, media.audio.values()), default=0)):
      sounds = {name: np.asarray(audio_BxN[i]) for name, audio_BxN in media.audio.items()}
      picture_HxWx3 = draw(sounds, media.sample_rate)
      if self._events:
        for name, audio_N in sounds.items():
          self._events.audio(step, f'clip_{i + 1}/{name}', audio_N, media.sample_rate)
        self._events.picture(step, f'clip_{i + 1}/pictures', picture_HxWx3)

  def close(self) -> None:
    if events := self.__dict__.get('_events'):  # asking for it would open it
      events.close()


def read(path: str | os.PathLike) -> list[dict[str, Any]]:
  """The lines of a metrics file so far; what a stopped process left half-written is skipped, a missing file has none.
  """
  path = pathlib.Path(path)
  lines = []
  for line in path.read_text(encoding='utf-8').splitlines() if path.exists() else []:
    try:
      row = json.loads(line)
    except ValueError:
      continue
    if isinstance(row, dict) and isinstance(row.get('step'), int):
      lines.append(row)
  return lines


def check_finite(step: int, loss: Any, keep_examples: Callable[[], pathlib.Path | None] = lambda: None) -> None:
  """Raises `NonFiniteLoss` where the loss is not finite; `keep_examples` then writes down what the batch had."""
  if not np.isfinite(loss):
    raise NonFiniteLoss(step, float(loss), keep_examples())


class BarAlarm:
  """Warns once of a metric that is on the wrong side of a bar after the warm-up.

  An objective names a bar by a metric beside the one that it is for: at `x_chance` nothing has been learned, under
  `x_floor` something has collapsed.
  """

  def __init__(self, after: int, *, held_out: bool = False):
    self._after, self._held_out = after, held_out
    self._warned: set[str] = set()

  def __call__(self, step: int, values: Mapping[str, float]) -> None:
    if step < self._after:
      return
    for name, bar in values.items():
      for suffix, kind in _BARS.items():
        metric = name.removesuffix(suffix)
        if (metric == name or name in self._warned or metric not in values
            or not kind.wrong(metric, values[metric], bar)):
          continue
        self._warned.add(name)
        where, words = ('held-out ', kind.held_out_words) if self._held_out else ('', kind.words)
        logging.warning('step %d: %s%s is %.4f, %s', step, where, metric, values[metric], words.format(bar))


class SkippedSteps:
  """Counts the steps that were left out because their gradient was not finite, and ends a run that only does that.

  Attributes:
    since_report: how many since `report` was last called.
  """

  def __init__(self, limit: int):
    self._limit, self._in_succession, self.since_report = limit, 0, 0

  def __call__(self, step: int, skipped: Any) -> None:
    """Takes the `skipped` of a step, 1 or 0. Raises `NonFiniteGradient` past `limit` of them in succession."""
    if not skipped:
      self._in_succession = 0
      return
    self._in_succession += 1
    self.since_report += 1
    logging.warning('step %d: the gradient is not finite; the step was left out', step)
    if self._in_succession > self._limit:
      raise NonFiniteGradient(step, self._in_succession)

  def report(self) -> float:
    count, self.since_report = self.since_report, 0
    return float(count)


class WaitAlarm:
  """True once: for the first interval in which steps waited for data for more than a tenth of the time.

  The first interval does not count: programs are compiled in it, or a file system warms up.
  """

  def __init__(self, share: float = 0.1):
    self._share, self._intervals, self._warned = share, 0, False

  def __call__(self, waited_share: float) -> bool:
    self._intervals += 1
    if self._intervals == 1 or self._warned or waited_share <= self._share:
      return False
    self._warned = True
    return True


class Progress:
  """Steps a second, time left and the loss: a bar on a terminal, plain lines in a log."""

  def __init__(self, title: str, first: int, total: int):
    self._title, self._first, self._total, self._begun = title, first, total, time.monotonic()
    self._bar = None
    if sys.stderr.isatty() and jax.process_index() == 0:
      columns = ('[progress.description]{task.description}', rich.progress.BarColumn(),
                 '{task.completed}/{task.total}', rich.progress.TimeRemainingColumn(), '{task.fields[note]}')
      self._bar = rich.progress.Progress(*columns, console=rich.console.Console(stderr=True))
      self._task = self._bar.add_task(title, completed=first, total=total, note='')
      self._bar.start()

  def update(self, done: int, note: str, *, report: bool) -> None:
    rate = (done - self._first) / max(time.monotonic() - self._begun, 1e-9)
    if self._bar is not None:
      self._bar.update(self._task, completed=done, note=f'{rate:.1f}/s {note}')
    elif report and jax.process_index() == 0:
      left = (self._total - done) / max(rate, 1e-9)
      print(f'{self._title}: {done}/{self._total}  {rate:.1f} steps/s  {left:.0f} s left  {note}',
            file=sys.stderr, flush=True)

  def close(self) -> None:
    if self._bar is not None:
      self._bar.stop()
