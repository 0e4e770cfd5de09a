"""How long a fresh process takes to the first batch after a step in the middle of millions of examples.

  python -m tests.benchmarks.resume_time

Beside it, what an iterator costs that has to skip the examples before it, in the fastest form: a loop that only counts.
"""
from __future__ import annotations

import statistics
import subprocess
import sys
import time

EXAMPLES, SEEN, BATCH = 10_000_000, 5_000_000, 1000
CODE = f'''
import numpy as np
from musiclm_jax.data import source
order = source.IndexMap(({EXAMPLES},), (1.0,), 7, {BATCH})
ids = order({{step}}, np.arange({BATCH})).index
assert len(set(ids.tolist())) == {BATCH}
'''


def seconds(step: int) -> float:
  begun = time.perf_counter()
  subprocess.run([sys.executable, '-c', CODE.format(step=step)], check=True)
  return time.perf_counter() - begun


def skipping() -> float:
  begun = time.perf_counter()
  stream = iter(range(EXAMPLES))
  for _ in range(SEEN):
    next(stream)
  return time.perf_counter() - begun


def main() -> None:
  rounds = [(seconds(0), seconds(SEEN // BATCH), skipping()) for _ in range(5)]
  first, middle, skipped = (statistics.median(column) for column in zip(*rounds))
  print(f'a fresh process has the {BATCH:,} examples of its next step after {first:.2f} s at the start and '
        f'{middle:.2f} s at example {SEEN:,} of {EXAMPLES:,}; only counting to there takes {skipped:.2f} s')


if __name__ == '__main__':
  main()
