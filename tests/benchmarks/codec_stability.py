"""Codecs of ten seeds at a high learning rate: whether any of them blows up or collapses.

  python -m tests.benchmarks.codec_stability [--seeds 10] [--steps 500] [--learning_rate 3e-4] [--records DIR]

Each is `musiclm train --gin_file experiments/codec.gin` at size tiny, on the built-in music unless --records names a
set. A row has the last loss, steps that were left out because their gradient was not finite, the perplexity of the
first level as a share of its codes (at the end, and the lowest after a fifth of the steps), and restarted codes a step.
"""
from __future__ import annotations

import argparse
import pathlib
import subprocess
import sys
import tempfile

import numpy as np

from musiclm_jax import config
from musiclm_jax.training import metrics


def main() -> None:
  parser = argparse.ArgumentParser()
  parser.add_argument('--seeds', type=int, default=10)
  parser.add_argument('--steps', type=int, default=500)
  parser.add_argument('--learning_rate', type=float, default=3e-4)
  parser.add_argument('--records', default='builtin')
  args = parser.parse_args()
  root = pathlib.Path(tempfile.mkdtemp())
  files = ['experiments/codec.gin', 'size/tiny.gin']
  codes = config.load_experiment(files, provided=('workdir', 'dry_run')).macro('ACOUSTIC_CODES')
  settings = {'NUM_STEPS': args.steps, 'CODEC_LEARNING_RATE': args.learning_rate, 'CODEC_DECAY_STEPS': args.steps,
              'RECORDS': args.records, 'MAX_SKIPPED': 10, 'EVAL_EVERY': 0, 'CHECKPOINT_EVERY': 0}
  print('| seed | loss | steps left out | perplexity / codes | lowest | restarts |\n' + '|---' * 6 + '|', flush=True)
  for seed in range(args.seeds):
    workdir = root / str(seed)
    flags = [f'--gin.{name}={value}' for name, value in {**settings, 'SEED': seed}.items()]
    done = subprocess.run(
        [sys.executable, '-m', 'musiclm_jax.main', 'train', *(f'--gin_file={f}' for f in files), *flags,
         f'--workdir={workdir}'], capture_output=True, text=True)
    if done.returncode:
      print(f'| {seed} | {done.stderr.strip().splitlines()[-1]} | | | | |', flush=True)
      continue
    rows = [row for row in metrics.read(workdir / 'metrics.jsonl') if row['part'] == 'train']
    share = [row['perplexity_1'] / codes for row in rows if row['step'] > args.steps / 5]
    restarts = np.mean([row['restarts'] for row in rows if row['step'] > 0.9 * args.steps])
    left_out = sum(row.get('skipped', 0) for row in rows)
    print(f'| {seed} | {rows[-1]["loss"]:.3f} | {left_out:.0f} | {share[-1]:.2f} | {min(share):.2f} | {restarts:.2%} |',
          flush=True)


if __name__ == '__main__':
  main()
