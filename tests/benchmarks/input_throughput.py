"""How fast each experiment's batches can be made on this machine, beside how fast an accelerator would use them up.

  python -m tests.benchmarks.input_throughput [--size paper] [--seconds 5]

Batches are made by a thread and by processes, in turn, from the same records; the median of three runs counts. What a
chip uses is computed: half of its peak, divided by the operations that a training step needs for a second of audio or
a token (counted in the jaxpr of the gradient of the loss).
"""
from __future__ import annotations

import argparse
import os
import pathlib
import statistics
import tempfile
import time
import warnings

import jax
import numpy as np

from musiclm_jax import config
from musiclm_jax.data import prepare, records
from musiclm_jax.data.prefetch import Prefetch
from musiclm_jax.specs import TokenSpec
from musiclm_jax.training import state as states
from musiclm_jax.training.flops import flops
from musiclm_jax.training.state import Skeleton

# Dense bfloat16 peaks: NVIDIA's data sheet of the H200 (SXM), Google Cloud's TPU v5e page.
PEAKS = {'H200': 989e12, 'v5e': 197e12}
WAVEFORMS, STAGES = ('codec', 'mulan', 'w2v_bert'), ('semantic_lm', 'coarse_lm', 'fine_lm')
ROWS = 16  # of a batch: enough to be read in one go, and a batch of thousands need not fit


def experiment(name: str, size: str, **macros: object) -> config.Experiment:
  return config.load_experiment([f'experiments/{name}.gin', f'size/{size}.gin'],
                                [(k, str(v)) for k, v in macros.items()],
                                provided=('workdir', 'dry_run', 'configuration'))


def write_tokens(folder: pathlib.Path, size: str) -> None:
  """Random tokens of that size's codebooks, thirty seconds a clip."""
  stage = lambda name: experiment(name, size, TOKENS='unused').argument('objective').stage
  coarse, fine = stage('coarse_lm'), stage('fine_lm')
  mulan, semantic = coarse.conditions
  acoustic = TokenSpec('acoustic', coarse.target.codebook_size, coarse.target.levels + fine.target.levels,
                       coarse.target.frame_rate)
  specs = [mulan, semantic, acoustic]
  generator = np.random.default_rng(0)
  clips = [{'recording': str(i), 'start': 0.0,
            **{s.feature: generator.integers(0, s.codebook_size, (s.frames(30.0), s.levels)) for s in specs}}
           for i in range(64)]
  header = records.Header('tokens', records.token_streams(specs))
  records.write_records(folder, {'train': clips, 'test': clips[:ROWS]}, header, num_shards=4)


def rate(batches, units: float, processes: int, seconds: float) -> float:
  """Units a second, without the time that workers take to start."""
  with Prefetch(batches, 0, 10 ** 6, processes=processes, depth=4) as feed:
    for _ in range(4 + 2 * processes):
      next(feed)
    begun, count = time.perf_counter(), 0
    while time.perf_counter() - begun < seconds:
      next(feed)
      count += 1
    return count * units / (time.perf_counter() - begun)


def operations(objective, rows: int) -> float:
  """Of a training step, for one row."""
  skeleton = Skeleton.of(objective)
  params, buffers = (states.nnx.to_pure_dict(t) for t in (skeleton.params, skeleton.buffers))
  loss = lambda p, b, batch, key: objective.loss(skeleton.model(p, b), batch, key, training=True)[0]
  key = jax.eval_shape(lambda: jax.random.key(0))
  return flops(jax.grad(loss), params, buffers, objective.batch_spec(rows), key) / rows


def main() -> None:
  parser = argparse.ArgumentParser()
  parser.add_argument('--size', default='paper')
  parser.add_argument('--seconds', type=float, default=5.0)
  parser.add_argument('--processes', type=int, default=os.cpu_count())
  args = parser.parse_args()
  warnings.simplefilter('ignore')
  os.environ['MUSICLM_READER'] = 'direct'
  folder = pathlib.Path(tempfile.mkdtemp())
  prepare.prepare_composer(48, folder / 'records', seconds=30.0, held_out=ROWS, num_shards=4)
  write_tokens(folder / 'tokens', args.size)
  chips = list(PEAKS)
  print(f'| experiment ({args.size}) | unit | a thread | {args.processes} processes | '
        + ' | '.join(f'{c} at 50% | cores for it' for c in chips) + ' |')
  print('|---|---|---|---|' + '---|---|' * len(chips))
  for name in (*WAVEFORMS, *STAGES):
    data = {'RECORDS': folder / 'records'} if name in WAVEFORMS else {'TOKENS': folder / 'tokens'}
    data |= {'MULAN_CHUNKS': 1} if name == 'mulan' else {}  # towers in parts save memory, and change no operation
    built = experiment(name, args.size, **data, BATCH_SIZE=ROWS)
    batches, objective = built.argument('batches'), built.argument('objective')
    if name in WAVEFORMS:
      unit, row = 's of audio', batches.seconds
    else:
      unit, row = 'tokens', objective.layout.length
    rates = {p: statistics.median(rate(batches, ROWS * row, p, args.seconds) for _ in range(3))
             for p in (0, args.processes)}
    cost = operations(objective, ROWS) / row
    # A thread uses one core; what it lacks, more cores must bring.
    cells = [f'{0.5 * PEAKS[c] / cost:,.0f} | {0.5 * PEAKS[c] / cost / rates[0]:.2f}' for c in chips]
    print(f'| {name} | {unit}/s | {rates[0]:,.0f} | {rates[args.processes]:,.0f} | ' + ' | '.join(cells) + ' |',
          flush=True)


if __name__ == '__main__':
  main()
