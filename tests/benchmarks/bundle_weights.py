"""What smaller weights cost: size, time to load, bits a token of each stage and the codec's decoder beside a workdir's.

  python -m tests.benchmarks.bundle_weights --workdir quickstart
"""
from __future__ import annotations

import argparse
import pathlib
import tempfile
import time

import numpy as np

from musiclm_jax.cascade import Cascade
from musiclm_jax.cascade_networks import CascadeNetworks
from musiclm_jax.data import records
from musiclm_jax.export import bundle as exporting
from musiclm_jax.serving.bundle import Bundle
from musiclm_jax.serving.bundle_format import WEIGHT_KINDS
from musiclm_jax.specs import Stage
from musiclm_jax.token_lm import sequence
from musiclm_jax.token_lm.sequence import Layout


def rows_of(stage: Stage, corpus: records.RecordSet, count: int) -> tuple[Layout, np.ndarray]:
  """Sequences [count, L] of the beginnings of clips."""
  layout = Layout(stage)

  def rows(example):
    streams = {s.feature: example[s.feature][None, :layout.frames(s)] for s in stage.streams}
    return sequence.build(layout, streams, streams[stage.target.feature][..., stage.target.level_slice])

  return layout, np.concatenate([rows(corpus[i]) for i in range(count)])


def bits(networks, name: str, layout: Layout, rows_BxL: np.ndarray) -> np.ndarray:
  nats = networks.row_nats(name, rows_BxL, layout.positions_2xL, layout.condition_length)
  return np.asarray(nats)[:, layout.condition_length:] / np.log(2)


def decoded(networks, codes_1xFxQ: np.ndarray) -> np.ndarray:
  return np.asarray(networks.decode_step(codes_1xFxQ, networks.decode_state(1))[0])


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--workdir', required=True)
  parser.add_argument('--clips', type=int, default=32)
  args = parser.parse_args()
  networks = CascadeNetworks(Cascade(args.workdir))
  corpus = records.RecordSet(pathlib.Path(args.workdir) / 'tokens', 'test')
  stages = {name: rows_of(stage, corpus, args.clips) for name, stage in networks.stages.items()}
  expected = {name: bits(networks, name, *given) for name, given in stages.items()}
  codes = corpus[0]['acoustic'][None]
  audio = decoded(networks, codes)
  print('| weights | all | load | ' + ' | '.join(f'{name} bits a token (most)' for name in stages) + ' | decoder |')
  print('|---' * (4 + len(stages)) + '|')
  for kind in WEIGHT_KINDS:
    with tempfile.TemporaryDirectory() as folder:
      made = exporting.export(args.workdir, f'{folder}/bundle', licence='unknown', weights=kind)
      begun = time.monotonic()
      bundle = Bundle(made.path)
      seconds = time.monotonic() - begun
    cells = []
    for name, given in stages.items():
      found = bits(bundle, name, *given)
      difference = found - expected[name]
      cells.append(f'{found.mean():.4f} {difference.mean():+.4f} ({np.abs(difference).max():.5f})')
    error = np.square(decoded(bundle, codes) - audio).sum()
    ratio = 10 * np.log10(np.square(audio).sum() / max(error, 1e-30))
    print(f'| {kind} | {made.bytes / 1e6:.1f} MB | {seconds:.1f} s | {" | ".join(cells)} | '
          f'{"the same" if error == 0 else f"{ratio:.0f} dB"} |', flush=True)


if __name__ == '__main__':
  main()
