"""The report of a run: `report.json` for machines, `report.html` for people.

The page is one file: pictures, players and styles are inside it, and it asks nothing of the network.
"""
from __future__ import annotations

from collections.abc import Mapping, Sequence
import dataclasses
import importlib.resources
import json
import math
import os
import pathlib
from typing import Any

import jinja2
import numpy as np

from musiclm_jax.evaluation import bars as bars_module
from musiclm_jax.evaluation import pictures, tables

SECTIONS = ('codec', 'mulan', 'semantic', 'stages', 'generation')
_TEMPLATE = 'report.html.j2'


@dataclasses.dataclass(frozen=True)
class Run:
  """One training of the chain.

  Attributes:
    name: as a reader knows it ("codec").
    seed, steps: of the run; the seed is None where unknown. wall_seconds: time that all its starts took, 0 where
      unknown.
    configuration_hash: fingerprint of its objective.
    parameters: trainable numbers, 0 where unknown.
    metrics_file: its metrics.jsonl, for the loss curves.
  """

  name: str
  seed: int | None
  steps: int
  wall_seconds: float
  configuration_hash: str
  parameters: int = 0
  metrics_file: pathlib.Path | None = None

  def as_dict(self) -> dict[str, Any]:
    fields = dataclasses.asdict(self)
    fields.pop('metrics_file')
    return fields


@dataclasses.dataclass(frozen=True)
class Clip:
  """A sound to play and look at: mono audio [N] in [-1, 1]."""

  title: str
  audio_N: np.ndarray
  sample_rate: int = 24000


@dataclasses.dataclass(frozen=True)
class Players:
  """Clips to compare with each other: samples of a prompt, or a clip and its reconstructions.

  `section` is where the page shows them: 'listen' (its top) or one of `SECTIONS`.
  """

  title: str
  clips: tuple[Clip, ...]
  section: str = 'listen'
  words: str = ''


def report_dict(
    figures: Mapping[str, Any], runs: Sequence[Run], *, title: str = '',
    environment: Mapping[str, Any] | None = None, notes: Sequence[str] = (),
    bars: Sequence[bars_module.Bar] | None = None) -> dict[str, Any]:
  """The content of `report.json`: the figures by section, the bars with `passed`, the runs.

  Raises ValueError for a section that the report does not have.
  """
  if unknown := sorted(set(figures) - set(SECTIONS)):
    raise ValueError(f'report: unknown section {unknown[0]!r}; sections are {", ".join(SECTIONS)}')
  figures = _plain(figures)
  results = bars_module.evaluate_bars(figures, bars)
  return _plain({
      'schema': 1, 'title': title, 'passed': all(r.passed for r in results),
      'bars_passed': sum(r.passed for r in results), 'bars_total': len(results),
      **{name: figures[name] for name in SECTIONS if name in figures},
      'bars': [r.as_dict() for r in results],
      'runs': {run.name: run.as_dict() for run in runs},
      'wall_seconds': sum(run.wall_seconds for run in runs),
      'environment': dict(environment or {}), 'notes': list(notes)})


def _plain(value: Any) -> Any:
  """Python numbers, lists and dicts; what is not finite becomes null, which JSON can hold."""
  if isinstance(value, Mapping):
    return {str(k): _plain(v) for k, v in value.items()}
  if isinstance(value, (list, tuple)):
    return [_plain(v) for v in value]
  if hasattr(value, 'tolist'):  # NumPy and JAX arrays and scalars
    return _plain(value.tolist())
  if isinstance(value, float) and not math.isfinite(value):
    return None
  if value is None or isinstance(value, (bool, int, float, str)):
    return value
  raise TypeError(f'report: {value!r} of type {type(value).__name__} cannot be written to report.json')


def render_html(report: Mapping[str, Any], runs: Sequence[Run], players: Sequence[Players] = ()) -> str:
  """The page for a report made by `report_dict`."""
  environment = jinja2.Environment(
      autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined)
  environment.filters |= {'duration': _duration, 'thousands': lambda n: f'{n:,}'}
  results = [bars_module.BarResult(**bar) for bar in report['bars']]
  shown = tables.sections(report)
  names = {section.name for section in shown}
  place = lambda group: group.section if group.section in names else 'listen'
  players_by_section: dict[str, list[dict[str, Any]]] = {name: [] for name in ('listen', *SECTIONS)}
  for group in players:
    players_by_section[place(group)].append(_player_group(group))
  curves = []
  for run in runs:
    uri = pictures.loss_curves_uri(pictures.read_metrics(run.metrics_file)) if run.metrics_file else None
    if uri:
      curves.append({'name': run.name, 'uri': uri})
  source = importlib.resources.files(__package__).joinpath(_TEMPLATE).read_text(encoding='utf-8')
  return environment.from_string(source).render(
      report=report, runs=report['runs'].values(), sections=shown, players=players_by_section, curves=curves,
      missed=[r for r in results if not r.passed], passed=[r for r in results if r.passed],
      value=_value)


def _player_group(group: Players) -> dict[str, Any]:
  clips = [
      {'title': clip.title, 'audio': pictures.audio_uri(clip.audio_N, clip.sample_rate),
       'picture': pictures.spectrogram_uri(clip.audio_N, clip.sample_rate),
       'seconds': len(clip.audio_N) / clip.sample_rate}
      for clip in group.clips]
  return {'title': group.title, 'words': group.words, 'clips': clips}


def _value(number: float | None) -> str:
  return '–' if number is None else f'{number:.4g}'


def _duration(seconds: float) -> str:
  if seconds < 90:
    return f'{seconds:.0f} s'
  return f'{seconds / 60:.1f} min' if seconds < 5400 else f'{seconds / 3600:.1f} h'


def write_report(
    directory: str | os.PathLike, figures: Mapping[str, Any], runs: Sequence[Run],
    players: Sequence[Players] = (), *, title: str = 'MusicLM in JAX',
    environment: Mapping[str, Any] | None = None, notes: Sequence[str] = (),
    bars: Sequence[bars_module.Bar] | None = None) -> dict[str, Any]:
  """Writes `report.json` and `report.html` to `directory` and returns the content of the former.

  Args:
    figures: sections as the `*_figures` functions return them; what is missing reads as not measured.
    environment: versions, device, data: any plain values, listed at the end of the page.
    notes: sentences for the reader, shown at the top ("MuLan was trained on the built-in pairs").
  """
  directory = pathlib.Path(directory)
  directory.mkdir(parents=True, exist_ok=True)
  report = report_dict(figures, runs, title=title, environment=environment, notes=notes, bars=bars)
  files = {'report.json': json.dumps(report, indent=2, ensure_ascii=False) + '\n',
           'report.html': render_html(report, runs, players)}
  for name, text in files.items():
    partial = directory / f'.{name}.partial'
    partial.write_text(text, encoding='utf-8')
    partial.replace(directory / name)
  return report
