"""What a semantic stage gains from what it has heard: bits a token for longer and longer contexts.

  python -m tests.benchmarks.semantic_context --stage runs/semantic_lm --tokens data/mine_tokens [--contexts 1 5 15 30]

The same tokens are predicted each time: the last second of each held-out clip that is as long as the longest context,
given the context's seconds that end with it. A stage answers for contexts up to the length of its crops
(SEMANTIC_SECONDS). Beside them what n-grams of the training tokens need. Writes a plot where --output names a .png.
"""
from __future__ import annotations

import argparse
import dataclasses
import pathlib

import numpy as np

from musiclm_jax.data import records
from musiclm_jax.evaluation import batched, statistics
from musiclm_jax.evaluation.stage_figures import objective_bits
from musiclm_jax.training import checkpoint

PREDICTED = 1.0  # seconds
BATCH = 8


def main() -> None:
  parser = argparse.ArgumentParser()
  parser.add_argument('--stage', required=True)
  parser.add_argument('--tokens', required=True)
  parser.add_argument('--contexts', type=float, nargs='+', default=[1, 5, 15, 30])
  parser.add_argument('--clips', type=int, default=256)
  parser.add_argument('--output')
  args = parser.parse_args()
  loaded = checkpoint.load(args.stage)
  stage = loaded.objective.stage
  target, contexts = stage.target, [c for c in args.contexts if c <= stage.seconds]
  corpus, train = (records.RecordSet(args.tokens, split) for split in ('test', 'train'))
  long_enough = np.flatnonzero(corpus.durations >= max(contexts) - 1e-6)[:args.clips]
  if not len(long_enough):
    raise SystemExit(f'no clip of {args.tokens} is {max(contexts):g} s long')
  clips = [corpus[int(i)] for i in long_enough]
  predicted = target.frames(PREDICTED)
  rows = (train[i][target.feature] for i in range(min(len(train), 4000)))
  ngrams = statistics.fit_ngrams(rows, target.codebook_size)
  last = np.stack([c[target.feature][:target.frames(max(contexts))] for c in clips])
  tail = lambda bits_NxFxQ: bits_NxFxQ[:, -predicted:].mean(axis=(1, 2))
  found = {'unigram': tail(ngrams.unigram_bits(last)), 'bigram': tail(ngrams.bigram_bits(last))}
  for context in contexts:
    objective = dataclasses.replace(loaded.objective, stage=dataclasses.replace(stage, seconds=context))
    bits, frames = objective_bits(objective, loaded.model), target.frames(context)
    heard = last[:, -frames:]
    mulan = np.stack([c['mulan'] for c in clips])
    found[f'{context:g} s'] = tail(batched.in_batches(
        lambda semantic, mulan, slot, bits=bits: bits({target.feature: semantic, 'mulan': mulan, 'slot': slot}), heard,
        mulan, np.arange(len(clips), dtype=np.int32), batch_size=BATCH))
  print(f'{args.stage}, step {loaded.step}: the last {PREDICTED:g} s of {len(clips)} clips\n\n'
        '| context | bits a token | 95% |\n|---|---|---|')
  intervals = {name: statistics.bootstrap_interval(bits_N) for name, bits_N in found.items()}
  for name, interval in intervals.items():
    print(f'| {name} | {interval.value:.3f} | {interval.low:.3f} to {interval.high:.3f} |')
  if args.output:
    _plot(args.output, contexts, intervals)


def _plot(path: str, contexts: list[float], intervals: dict[str, statistics.Interval]) -> None:
  from matplotlib import figure as matplotlib_figure
  figure = matplotlib_figure.Figure(figsize=(4.5, 3), dpi=130, layout='constrained')
  axes = figure.subplots()
  values = [intervals[f'{c:g} s'] for c in contexts]
  axes.errorbar(contexts, [v.value for v in values], marker='o',
                yerr=[[v.value - v.low for v in values], [v.high - v.value for v in values]], label='stage')
  axes.axhline(intervals['bigram'].value, ls='--', color='#475569', label='bigram')
  axes.set_xscale('log')
  axes.set_xticks(contexts, [f'{c:g}' for c in contexts])
  axes.set_xlabel('seconds of context')
  axes.set_ylabel('bits a token')
  axes.legend(frameon=False)
  figure.savefig(pathlib.Path(path))


if __name__ == '__main__':
  main()
