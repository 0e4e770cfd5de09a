"""What the tokens of a layer tell over the training of w2v-BERT, and where learning passes k-means of log-mel.

  python -m tests.benchmarks.probe_curve W [--steps 250 1000 4000] [--layer 1] [--gin.RECORDS=...] [--output curve.png]

Trains a w2v-BERT of size tiny in W (again and again further, its schedule as long as the last of the steps) and asks
`musiclm semantic layers` at each of them: accuracy as the probes were fitted, in noise, and of other leads.
"""
from __future__ import annotations

import argparse
from collections.abc import Mapping
import json
import pathlib
import subprocess
import sys
from typing import Any

from musiclm_jax.layer_study import CLEAN, LOG_MEL, NOISE, OTHER_LEADS, TRAINED, UNTRAINED

TESTS = {CLEAN: 'as fitted', NOISE: 'in noise', OTHER_LEADS: 'other leads'}


def main() -> None:
  parser = argparse.ArgumentParser()
  parser.add_argument('workdir', type=pathlib.Path)
  parser.add_argument('--steps', type=int, nargs='+', default=[250, 1000, 4000])
  parser.add_argument('--layer', type=int, default=1)
  parser.add_argument('--probes', nargs='+', default=['tempo', 'drum_style', 'chord', 'pitch_class', 'onset'])
  parser.add_argument('--seconds', type=float, default=5.0)
  parser.add_argument('--output', type=pathlib.Path)
  args, settings = parser.parse_known_args()
  if unknown := [s for s in settings if not s.startswith('--gin.')]:
    parser.error(f'unknown: {" ".join(unknown)}')
  run = args.workdir / 'w2v_bert'
  studies = {}
  for steps in sorted(args.steps):
    folder = args.workdir / f'step_{steps}'
    if not (folder / 'layers.json').exists():
      command('train', '--gin_file=experiments/w2v_bert.gin', f'--gin.NUM_STEPS={steps}',
              f'--gin.W2V_DECAY_STEPS={max(args.steps)}', *settings, f'--workdir={run}')
      command('semantic', 'layers', f'--w2v={run}', f'--output={folder}', f'--seconds={args.seconds}',
              '--probes', *args.probes)
    studies[steps] = json.loads((folder / 'layers.json').read_text())
  first = next(iter(studies.values()))
  rows = {'chance': lambda test, name: first['chance'][name] if test == CLEAN else None,
          'k-means of log-mel': lambda test, name: value(first, LOG_MEL, 0, test, name),
          'before training': lambda test, name: value(first, UNTRAINED, args.layer, test, name)}
  for steps, study in studies.items():
    rows[f'{steps} steps'] = lambda test, name, study=study: value(study, TRAINED, args.layer, test, name)
  columns = [(test, name) for test in TESTS for name in args.probes]
  print(f'| layer {args.layer} | ' + ' | '.join(f'{name}, {TESTS[test]}' for test, name in columns) + ' |\n' +
        '|---' * (1 + len(columns)) + '|')
  for name, of in rows.items():
    cells = [of(*column) for column in columns]
    print(f'| {name} | ' + ' | '.join('' if c is None else f'{c:.2f}' for c in cells) + ' |')
  if args.output:
    plot(args.output, studies, args.layer, args.probes)


def command(*words: str) -> None:
  subprocess.run([sys.executable, '-m', 'musiclm_jax.main', *words], check=True, stdout=subprocess.DEVNULL)


def value(study: Mapping[str, Any], network: str, layer: int, test: str, name: str) -> float:
  found = next(row for row in study['layers'] if row['network'] == network and (row['place'] or 0) == layer)
  return found['probes'][test][name]['value']


def plot(path: pathlib.Path, studies: Mapping[int, Mapping[str, Any]], layer: int, names: list[str]) -> None:
  from matplotlib import figure as matplotlib_figure
  figure = matplotlib_figure.Figure(figsize=(2.5 * len(names), 2.6), dpi=130, layout='constrained')
  colours = dict(zip(TESTS, ('#2563eb', '#d97706', '#059669')))
  for axes, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names):
    for test, colour in colours.items():
      first = next(iter(studies.values()))
      axes.plot([0, *studies], [value(first, UNTRAINED, layer, test, name),
                                *(value(s, TRAINED, layer, test, name) for s in studies.values())],
                color=colour, marker='.', label=TESTS[test])
      axes.axhline(value(first, LOG_MEL, 0, test, name), color=colour, ls=':')
    axes.set_title(name.replace('_', ' '), fontsize=9)
    axes.set_xlabel('steps', fontsize=8)
    axes.tick_params(labelsize=7)
  figure.axes[0].legend(fontsize=7, frameon=False)
  figure.savefig(path)


if __name__ == '__main__':
  main()
