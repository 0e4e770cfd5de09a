"""k-means beside scikit-learn's, and how much music a tokenizer takes to tokens in a given time.

  python -m tests.benchmarks.semantic_speed [--rounds 5] [--rows 100000] [--width 64] [--clusters 1024]
  python -m tests.benchmarks.semantic_speed --tokens runs/semantic_tokens [--batch 8] [--seconds 30]

k-means: the same rows (a mixture of Gaussians of unequal size and spread), as many clusters, 20 passes of Lloyd's
algorithm from a k-means++ start, each system's own; the inertia is that of the last centres on all rows. Tokens: hours
of audio an hour of a trained tokenizer, and the share of the operations that this machine does in products of
2048 x 2048. The systems take turns (`turns`).
"""
from __future__ import annotations

import argparse
import functools
import statistics
from typing import Any

import numpy as np

from tests.benchmarks import turns
from tests.benchmarks.turns import Calls

KMEANS, TOKENS = 'k-means', 'tokens'
OURS, SKLEARN = 'musiclm_jax', 'scikit-learn'
PASSES = 20


def mixture(rows: int, width: int) -> np.ndarray:
  """Rows [N, D] around 500 centres."""
  rng = np.random.default_rng(0)
  centres = rng.normal(0, 2, (500, width))
  spread = rng.uniform(0.3, 1.5, 500)
  chosen = rng.choice(500, rows, p=rng.dirichlet(np.full(500, 2.0)))
  return (centres[chosen] + spread[chosen, None] * rng.normal(0, 1, (rows, width))).astype(np.float32)


def inertia(rows_NxD: np.ndarray, centres_KxD: np.ndarray) -> float:
  total = 0.0
  for part in np.array_split(rows_NxD.astype(np.float64), 50):
    squares = np.square(part).sum(1)[:, None] - 2 * part @ centres_KxD.T + np.square(centres_KxD).sum(1)
    total += squares.min(1).sum()
  return total


def ours(rows: int, width: int, clusters: int) -> tuple[Calls, dict[str, Any]]:
  from musiclm_jax import config
  from musiclm_jax.evaluation import probes
  data = mixture(rows, width)
  built = config.load_experiment(['experiments/semantic_tokens.gin'], [
      ('W2V_WORKDIR', 'nowhere'), ('SEMANTIC_CODES', str(clusters)), ('SEMANTIC_TOKENS_ITERATIONS', str(PASSES))],
      provided=('workdir', 'dry_run'))
  fit = built.argument('objective')
  found: dict[str, Any] = {}

  def run():
    found['centres'] = probes.fitted(_Given(fit), data[None], seed=0)['quantizer']['codebook'][0]

  run()
  return {KMEANS: run}, {'parameters': clusters * width, 'inertia': inertia(data, found['centres'])}


class _Given:
  """The tokenizer's k-means without its normalisation: of rows as they are."""

  def __init__(self, fit: Any):
    self._fit = fit
    self.begin, self.statistics, self.fitted = fit.begin, fit.statistics, fit.fitted

  def phases(self) -> tuple[tuple[str, int], ...]:
    return self._fit.phases()[1:]


def sklearn(rows: int, width: int, clusters: int) -> tuple[Calls, dict[str, Any]]:
  from sklearn import cluster
  data = mixture(rows, width)
  found: dict[str, Any] = {}

  def run():
    fit = cluster.KMeans(clusters, n_init=1, max_iter=PASSES, tol=0, algorithm='lloyd', random_state=0).fit(data)
    found['centres'] = fit.cluster_centers_

  run()
  return {KMEANS: run}, {'parameters': clusters * width, 'inertia': inertia(data, found['centres'])}


def tokenizer(run_dir: str, batch: int, seconds: float) -> tuple[Calls, dict[str, Any]]:
  import jax
  from musiclm_jax.training import checkpoint, flops, state as states
  loaded = checkpoint.load(checkpoint.run_in(run_dir, 'semantic_tokens'))
  encoder = loaded.objective.encoder
  frames = int(seconds * encoder.frame_rate)
  audio = np.random.default_rng(0).normal(0, 0.1, (batch, frames * encoder.samples_per_frame)).astype(np.float32)
  tokens = states.compiled(loaded.model, 'tokens')
  limits, work = turns.ceilings()
  about = {'parameters': sum(x.size for x in jax.tree.leaves(loaded.params)), 'flops': flops.flops(tokens, audio),
           'device': jax.devices()[0].device_kind, 'seconds': batch * frames / encoder.frame_rate}
  return {TOKENS: lambda: tokens(audio).block_until_ready(), **limits}, about | work


def main() -> None:
  parser = argparse.ArgumentParser()
  parser.add_argument('--rounds', type=int, default=5)
  parser.add_argument('--rows', type=int, default=100_000)
  parser.add_argument('--width', type=int, default=64)
  parser.add_argument('--clusters', type=int, default=1024)
  parser.add_argument('--tokens', metavar='RUN')
  parser.add_argument('--batch', type=int, default=8)
  parser.add_argument('--seconds', type=float, default=30.0)
  args = parser.parse_args()
  if args.tokens:
    make = functools.partial(tokenizer, args.tokens, args.batch, args.seconds)
    times, about = turns.take_turns({OURS: make}, (TOKENS,), args.rounds)
    spent, own = times[OURS, TOKENS], about[OURS]
    share = turns.share(own['flops'], spent, own[turns.PRODUCTS], times[OURS, turns.PRODUCTS])
    print(f'{own["device"]}: {own["seconds"] / statistics.median(spent):.0f} hours of audio an hour, {share:.0%} of '
          'the operations in products')
    return
  sizes = args.rows, args.width, args.clusters
  times, about = turns.take_turns(
      {OURS: functools.partial(ours, *sizes), SKLEARN: functools.partial(sklearn, *sizes)}, (KMEANS,), args.rounds)
  print('| system | seconds | times as fast as it | inertia, of its own |\n|---|---|---|---|')
  for name in (OURS, SKLEARN):
    ratio = turns.times_as_fast(times[name, KMEANS], times[OURS, KMEANS])
    print(f'| {name} | {statistics.median(times[name, KMEANS]):.2f} | {ratio:.2f} | '
          f'{about[OURS]["inertia"] / about[name]["inertia"]:.4f} |')


if __name__ == '__main__':
  main()
