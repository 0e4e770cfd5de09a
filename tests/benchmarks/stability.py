"""Trainings of ten seeds: whether any of them blows up or collapses.

  python -m tests.benchmarks.stability codec [--seeds 10] [--steps 500] [--gin.CODEC_LEARNING_RATE=3e-4]
  python -m tests.benchmarks.stability w2v_bert [--steps 300]
  python -m tests.benchmarks.stability semantic_lm --gin.TOKENS=runs/tokens [--steps 300]

Each is `musiclm train --gin_file experiments/EXPERIMENT.gin` at size tiny on the built-in music, its schedule as long
as the run; `--gin.NAME=VALUE` changes a setting. A row has the last loss, also as a share of what it is where nothing
was learned, steps that were left out because their gradient was not finite, and what tells a collapse: the lowest
perplexity of the codes after a fifth of the steps as a share of all codes, and restarted codes a step.
"""
from __future__ import annotations

import argparse
import dataclasses
import pathlib
import subprocess
import sys
import tempfile

import numpy as np

from musiclm_jax import config
from musiclm_jax.training import metrics


@dataclasses.dataclass(frozen=True)
class Experiment:
  """Names of the macro of the schedule's length, of a loss and its chance, and of what a collapse shows in."""

  decay: str
  loss: str = 'loss'
  perplexity: str = ''
  codes: str = ''


EXPERIMENTS = {
    'codec': Experiment('CODEC_DECAY_STEPS', 'loss', 'perplexity_1', 'ACOUSTIC_CODES'),
    'w2v_bert': Experiment('W2V_DECAY_STEPS', 'masked_cross_entropy', 'target_perplexity', 'W2V_CODES'),
    'semantic_lm': Experiment('SEMANTIC_LM_DECAY_STEPS')}


def main() -> None:
  parser = argparse.ArgumentParser()
  parser.add_argument('experiment', choices=EXPERIMENTS)
  parser.add_argument('--seeds', type=int, default=10)
  parser.add_argument('--steps', type=int, default=500)
  args, settings = parser.parse_known_args()
  if unknown := [s for s in settings if not s.startswith('--gin.')]:
    parser.error(f'unknown: {" ".join(unknown)}')
  asked = EXPERIMENTS[args.experiment]
  files = [f'experiments/{args.experiment}.gin', 'size/tiny.gin']
  bindings = [tuple(s.removeprefix('--gin.').split('=', 1)) for s in settings]
  codes = asked.codes and config.load_experiment(files, bindings, provided=('workdir', 'dry_run')).macro(asked.codes)
  root = pathlib.Path(tempfile.mkdtemp())
  fixed = {'NUM_STEPS': args.steps, asked.decay: args.steps, 'MAX_SKIPPED': 10, 'EVAL_EVERY': 0, 'CHECKPOINT_EVERY': 0}
  print('| seed | loss | of chance | steps left out | perplexity / codes | lowest | restarts |\n' + '|---' * 7 + '|',
        flush=True)
  for seed in range(args.seeds):
    workdir = root / str(seed)
    flags = [f'--gin.{name}={value}' for name, value in {**fixed, 'SEED': seed}.items()]
    done = subprocess.run(
        [sys.executable, '-m', 'musiclm_jax.main', 'train', *(f'--gin_file={f}' for f in files), *flags, *settings,
         f'--workdir={workdir}'], capture_output=True, text=True)
    if done.returncode:
      print(f'| {seed} | {done.stderr.strip().splitlines()[-1]} | | | | | |', flush=True)
      continue
    rows = [row for row in metrics.read(workdir / 'metrics.jsonl') if row['part'] == 'train']
    print(f'| {seed} | {" | ".join(cells(rows, asked, codes, args.steps))} |', flush=True)


def cells(rows: list[dict[str, float]], asked: Experiment, codes: int, steps: int) -> list[str]:
  last = rows[-1]
  chance = last.get(f'{asked.loss}_chance')
  found = [f'{last[asked.loss]:.3f}', f'{last[asked.loss] / chance:.2f}' if chance else '',
           f'{sum(row.get("skipped", 0) for row in rows):.0f}']
  if asked.perplexity:
    share = [row[asked.perplexity] / codes for row in rows if row['step'] > steps / 5]
    found += [f'{share[-1]:.2f}', f'{min(share):.2f}']
  if 'restarts' in last:
    found.append(f'{np.mean([row["restarts"] for row in rows if row["step"] > 0.9 * steps]):.2%}')
  return found + [''] * (6 - len(found))


if __name__ == '__main__':
  main()
