"""Runs a finished run again from what it wrote down about itself, and compares the two, number by number."""
from __future__ import annotations

from collections.abc import Sequence
import dataclasses
import json
import os
import pathlib
import subprocess
import sys
from typing import Any

from musiclm_jax import provenance, specs
from musiclm_jax.objective import Fit
from musiclm_jax.training import checkpoint, metrics


@dataclasses.dataclass(frozen=True)
class Comparison:
  """Two runs of one experiment.

  Attributes:
    lines: of metrics that both wrote down, and so were compared.
    parameters: whether the parameters and buffers of the last step were compared too.
    changed: code and packages that are not what they were.
    first_difference: "" where the runs are the same.
  """

  lines: int
  parameters: bool
  changed: tuple[str, ...]
  first_difference: str

  @property
  def same(self) -> bool:
    return not self.first_difference

  def text(self) -> str:
    found = [f'changed since then: {change}' for change in self.changed]
    what = f'{self.lines} lines of metrics' + (' and all parameters' if self.parameters else '')
    return '\n'.join([*found, f'compared: {what}: ' + (self.first_difference or 'equal, bit for bit')])


def reproduce(run_dir: str | os.PathLike, workdir: str | os.PathLike, *, steps: int = 0, allow: Sequence[str] = ()
              ) -> Comparison:
  """Trains again in `workdir`, for as many steps as the run has (or the first `steps`), and compares.

  Args:
    allow: modules that the configuration may import, as for `musiclm train`.

  Raises:
    FileNotFoundError: there is no finished checkpoint in `run_dir`.
    ValueError: the run keeps no configuration, `workdir` is in use, or the repetition failed.
  """
  there = checkpoint.read_about(run_dir)
  configuration = there['made_with'].get('configuration')
  if not configuration:
    raise ValueError(f'{run_dir} was not started by `musiclm train`: it keeps no configuration')
  workdir = pathlib.Path(workdir)
  if checkpoint.latest_step(workdir) is not None:
    raise ValueError(f'{workdir} already holds a run; name another workdir')
  workdir.mkdir(parents=True, exist_ok=True)
  gin = workdir / 'reproduced.gin'
  gin.write_text(configuration)
  fitted = isinstance(specs.from_json(json.dumps(there['objective'])), Fit)
  if fitted and steps:
    raise ValueError(f'{run_dir} is a fit, which has passes and no steps; leave --steps out')
  last = steps or checkpoint.latest_step(run_dir)  # a run that was stopped has fewer than its configuration says
  extra = [] if fitted else [f'--gin.train.train.stop_after={last}']
  extra += [flag for module in allow for flag in ('--allow_import', module)]
  command = [sys.executable, '-m', 'musiclm_jax.main', 'train', '--gin_file', os.fspath(gin), *extra,
             '--workdir', os.fspath(workdir)]
  done = subprocess.run(command, stderr=subprocess.PIPE, text=True)
  if done.returncode:
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    raise ValueError(f'the repetition failed: {lines[-1] if lines else f"exit code {done.returncode}"}')
  return compare(run_dir, workdir)


def compare(run_dir: str | os.PathLike, workdir: str | os.PathLike) -> Comparison:
  """Compares the metrics of the steps that both runs took, and the parameters where both end at the same step."""
  there, here = checkpoint.read_about(run_dir)['made_with'], checkpoint.read_about(workdir)['made_with']
  changed = tuple(provenance.differences(there, here))
  rows = [{(row['step'], row['part']): row for row in metrics.read(pathlib.Path(w) / 'metrics.jsonl')}
          for w in (run_dir, workdir)]
  common = sorted(rows[0].keys() & rows[1].keys())
  last = [checkpoint.latest_step(w) for w in (run_dir, workdir)]
  parameters = last[0] == last[1]
  difference = _first_difference(there, here, rows, common)
  if not difference and parameters:
    contents = [checkpoint.load(w).content_hash for w in (run_dir, workdir)]
    if contents[0] != contents[1]:
      difference = f'parameters of step {last[0]}: {contents[0]}, now {contents[1]}'
  if not difference and not common and not parameters:
    difference = 'the runs have no step in common that could be compared'
  return Comparison(len(common), parameters, changed, difference)


def _first_difference(there: dict[str, Any], here: dict[str, Any], rows: list[dict[Any, dict[str, Any]]],
                      common: list[Any]) -> str:
  for fact in ('seed', 'data'):  # the order of the data follows from the seed, too
    if there.get(fact) != here.get(fact):
      return f'{fact}: {there.get(fact)}, now {here.get(fact)}'
  for step, part in common:
    before, now = (r[step, part] for r in rows)
    for name in before:
      if not _same(before[name], now.get(name)):
        return f'{name} of step {step} ({part}): {before[name]}, now {now.get(name)}'
  return ''


def _same(a: Any, b: Any) -> bool:
  return a == b or (a != a and b != b)  # not a number, both times
