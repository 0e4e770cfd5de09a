"""The model card of a bundle, filled from the run: what the networks are, what they learned from, how good they are."""
from __future__ import annotations

import collections
from collections.abc import Mapping, Sequence
import dataclasses
import json
import os
import pathlib
import re
from typing import Any

from musiclm_jax.data import records

# (label, where in report.json, unit): the figures that say most, in the order of the chain.
_FIGURES = (
    ('codec: log-mel distance of reconstructions', 'codec.mel_distance', ''),
    ('codec: the same of the clip\'s own median spectrum', 'codec.mel_distance_clip_median', ''),
    ('codec: SI-SDR', 'codec.si_sdr_db', ' dB'),
    ('MuLan: text finds its clip among 64, first place', 'mulan.recall_at_1', ''),
    ('MuLan: the same by chance', 'mulan.recall_at_1_chance', ''),
    ('semantic stage', 'stages.semantic.bits_per_token', ' bits a token'),
    ('semantic stage, bigram', 'stages.semantic.bigram_bits_per_token', ' bits a token'),
    ('coarse stage', 'stages.coarse.bits_per_token', ' bits a token'),
    ('coarse stage, bigram', 'stages.coarse.bigram_bits_per_token', ' bits a token'),
    ('fine stage', 'stages.fine.bits_per_token', ' bits a token'),
    ('fine stage, bigram', 'stages.fine.bigram_bits_per_token', ' bits a token'),
    ('generated music: MuLan score with its text', 'generation.mcc_matched', ''),
    ('generated music: the same with other texts', 'generation.mcc_mismatched', ''),
    ('real music: MuLan score with its text', 'generation.mcc_references.real.mcc_matched', ''),
)


@dataclasses.dataclass(frozen=True)
class Data:
  """Training music under one licence, in one record set."""

  records: str
  licence: str
  clips: int
  hours: float


@dataclasses.dataclass(frozen=True)
class Part:
  """One network: its name in the bundle, steps it was trained for, numbers in it, hash of its content."""

  network: str
  steps: int
  numbers: int
  content: str


def data_of(directory: str | os.PathLike) -> list[Data]:
  """Hours of the training split by licence. Records are read only where there is more than one licence.

  Raises FileNotFoundError where there is no record set.
  """
  manifest, name = records.read_manifest(directory), pathlib.Path(directory).name
  clips = manifest.records('train')
  if not clips:
    return []
  if len(manifest.licences) == 1:
    return [Data(name, next(iter(manifest.licences)), clips, manifest.hours('train'))]
  corpus = records.RecordSet(directory, 'train')
  count, seconds = collections.Counter(), collections.Counter()
  for index, duration in enumerate(corpus.durations):
    licence = corpus[index].get('source', {}).get('licence') or 'not stated'
    count[licence] += 1
    seconds[licence] += float(duration)
  return [Data(name, licence, count[licence], seconds[licence] / 3600) for licence in sorted(count)]


def figures_of(workdir: str | os.PathLike) -> dict[str, Any]:
  """The report of a workdir; empty where there is none that can be read."""
  try:
    return json.loads((pathlib.Path(workdir) / 'report.json').read_text())
  except (OSError, ValueError):
    return {}


def check(licence: str, data: Sequence[Data]) -> None:
  """Raises ValueError that names every field of the card that is still empty, and the flag that fills it."""
  empty = [] if licence.strip() else ['the licence of the weights (--licence, as CC-BY-4.0)']
  if not data:
    empty.append('hours of training music by licence (--records, the record sets that it was trained on)')
  if empty:
    raise ValueError(f'the model card still needs {" and ".join(empty)}')


def write(*, licence: str, data: Sequence[Data], parts: Sequence[Part], report: Mapping[str, Any], weights: str,
          made_with: Mapping[str, str]) -> str:
  """The card as Markdown, with the fields that model hubs read in front. Raises ValueError as `check` does."""
  check(licence, data)
  total = sum(d.hours for d in data)
  unknown = sum(d.hours for d in data if d.licence == 'not stated')
  return '\n'.join([
      '---', f'license: {_plain(licence.lower())}', 'library_name: musiclm_jax', 'pipeline_tag: text-to-audio', '---',
      '',
      '# Text to music', '',
      'A MusicLM (arXiv 2301.11325): MuLan, semantic, coarse and fine token stages, and the SoundStream codec, '
      f'exported by musiclm_jax {made_with["musiclm_jax"]}. Weights are {weights}.', '',
      '```', 'import musiclm_jax', 'bundle = musiclm_jax.load("PATH OF THIS FOLDER")',
      'audio = bundle.generate("a slow flute tune in a minor key", seconds=10, seed=7)', '```', '',
      '## Licence', '', f'Weights: {licence}', '',
      '## Training music', '',
      *_table(('record set', 'licence', 'clips', 'hours'),
              [(d.records, d.licence, str(d.clips), f'{d.hours:.2f}') for d in data]), '',
      f'{total:.2f} hours in all; for {unknown:.2f} of them no licence was stated.', '',
      '## Networks', '',
      *_table(('network', 'steps (of a fit: passes)', 'parameters', 'content'),
              [(p.network, str(p.steps), f'{p.numbers:,}', p.content) for p in parts]), '',
      '## Figures', '', *_figures(report), '',
      '## Use and limits', '',
      'It is made for research, and for music of the kind that it was trained on; it knows no other. Whatever it '
      'generates is told to be made by a model in the file beside it. It may repeat its training music: how often was '
      'not measured. It does not sing words.', ''])


def _plain(text: str) -> str:
  """A value of the fields in front; in quotes where YAML could take it for something else."""
  return text if re.fullmatch(r'[a-z][a-z0-9.+-]*', text) else json.dumps(text)


def _figures(report: Mapping[str, Any]) -> list[str]:
  rows = []
  for label, place, unit in _FIGURES:
    value: Any = report
    for key in place.split('.'):
      value = value.get(key) if isinstance(value, Mapping) else None
    if isinstance(value, (int, float)):
      rows.append((label, f'{value:.3g}{unit}'))
  if not rows:
    return ['None were measured: there is no report.json of `musiclm evaluate`.']
  bars = f'{report.get("bars_passed")} of {report.get("bars_total")} bars of the report were reached.'
  return ['On music that training never saw, by `musiclm evaluate`.', '', *_table(('figure', 'value'), rows), '', bars]


def _table(names: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
  line = lambda cells: f'| {" | ".join(" ".join(cell.replace("|", "/").split()) for cell in cells)} |'
  return [line(names), line(['---'] * len(names)), *map(line, rows)]
