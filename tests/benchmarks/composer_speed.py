"""Seconds of music that one core composes in a second, beside reading the same music back from records.

  python -m tests.benchmarks.composer_speed
"""
from __future__ import annotations

import pathlib
import statistics
import tempfile
import time

from musiclm_jax.data import composer, prepare, records

CLIPS, SECONDS = 8, 10.0


def rate(corpus) -> float:
  begun = time.perf_counter()
  for i in range(CLIPS):
    corpus[i]
  return CLIPS * SECONDS / (time.perf_counter() - begun)


def main() -> None:
  folder = pathlib.Path(tempfile.mkdtemp())
  prepare.prepare_composer(CLIPS, folder, seconds=SECONDS, workers=1)
  new = lambda run: composer.Corpus(first=run * CLIPS, size=CLIPS, seconds=SECONDS)  # clips are kept once made
  read = records.RecordSet(folder, 'train')
  rate(new(0)), rate(read)  # tables of notes are made, files are in memory
  pairs = [(rate(new(run)), rate(read)) for run in range(1, 6)]
  a, b = (statistics.median(column) for column in zip(*pairs))
  ratio = statistics.median(y / x for x, y in pairs)
  print(f'composed {a:,.0f} s/s, read {b:,.0f} s/s: reading is {ratio:.0f} times as fast')


if __name__ == '__main__':
  main()
