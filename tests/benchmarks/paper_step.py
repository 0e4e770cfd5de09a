"""What a training step of a stage needs in memory: of the paper's size on this machine, and by the length.

  python -m tests.benchmarks.paper_step [--stage semantic] [--batch 1] [--size paper] [--positions t5]
  python -m tests.benchmarks.paper_step --lengths 1024 2048 4096 8192 [--size base] [--positions rotary] [--run]

The first takes one step (forward, backward, Adam) of random weights and tokens, in float32, and says what the process
held at its most. The second compiles the step of a coarse stage for sequences of these lengths and says what it keeps
beside parameters and batch; with `--run` it takes the last of them, too.
"""
from __future__ import annotations

import argparse
import resource
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from musiclm_jax import config
from musiclm_jax.objective import Objective
from musiclm_jax.training import optimizer as optimizers, state as states

GIB = 2 ** 30


def stage_of(size: str, stage: str = 'coarse', **macros: Any) -> config.Experiment:
  files = [f'experiments/{stage}_lm.gin', f'size/{size}.gin']
  given = {'TOKENS': 'nowhere', **macros}
  return config.load_experiment(files, [(k, str(v)) for k, v in given.items()],
                                provided=('workdir', 'dry_run', 'configuration'))


def seconds_of(experiment: config.Experiment, length: int) -> float:
  """Crop of a coarse stage whose sequences have this length, or a little less."""
  stage = experiment.argument('objective').stage
  whole = sum(s.tokens(0) for s in stage.conditions if not s.frame_rate)
  return (length - whole) / sum(s.tokens_per_second for s in stage.streams)


def batch_of(objective: Objective, size: int) -> dict[str, np.ndarray]:
  generator = np.random.default_rng(0)
  smallest = min(s.codebook_size for s in objective.stage.streams)
  batch = {name: generator.integers(0, smallest, spec.shape).astype(np.int32)
           for name, spec in objective.batch_spec(size).items()}
  return {**batch, 'slot': np.arange(size, dtype=np.int32)}


def compiled_step(experiment: config.Experiment, batch: int, dtype: Any = jnp.float32) -> tuple[Any, Any]:
  """A function that makes the state, and the compiled step, whose state is donated; it computes in `dtype`."""
  objective = experiment.argument('objective')
  skeleton = states.Skeleton.of(objective)
  transform = optimizers.by_group(objective, states.nnx.to_pure_dict(skeleton.params), experiment.argument('optimizer'))
  create = jax.jit(lambda: states.create(objective, transform, jax.random.key(0), keep_ema=False))
  key = jax.eval_shape(lambda: jax.random.key(0))
  made = states.make_step(objective, skeleton, transform, compute_dtype=dtype)
  step = states.jitted_step(made, jax.default_backend())
  return create, step.lower(jax.eval_shape(create), objective.batch_spec(batch), key).compile()


def peak() -> float:
  """GiB that this process held at its most."""
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB


def take(experiment: config.Experiment, batch: int) -> None:
  objective = experiment.argument('objective')
  create, step = compiled_step(experiment, batch)
  memory = step.memory_analysis()
  state = jax.block_until_ready(create())
  parameters = sum(x.size for x in jax.tree.leaves(state.params))
  print(f'{parameters / 1e6:.1f} M parameters, {objective.stage.length} positions, batch {batch}: '
        f'arguments {memory.argument_size_in_bytes / GIB:.2f} GiB, '
        f'temporaries {memory.temp_size_in_bytes / GIB:.2f} GiB', flush=True)
  begun = time.perf_counter()
  state, metrics = step(state, batch_of(objective, batch), jax.random.key(1))
  loss = float(jax.block_until_ready(metrics['loss']))
  if not jnp.isfinite(loss):
    raise SystemExit(f'the loss is {loss}')
  print(f'loss {loss:.3f} after one step of {time.perf_counter() - begun:.0f} s; the process held {peak():.1f} GiB at '
        'its most')


def main() -> None:
  parser = argparse.ArgumentParser()
  parser.add_argument('--stage', default='semantic', choices=('semantic', 'coarse', 'fine'))
  parser.add_argument('--size', default='')
  parser.add_argument('--batch', type=int, default=1)
  parser.add_argument('--positions', default='', choices=('', 'rotary', 't5'))
  parser.add_argument('--attention', default='auto')
  parser.add_argument('--lengths', type=int, nargs='+')
  parser.add_argument('--run', action='store_true')
  args = parser.parse_args()
  macros = {'LM_ATTENTION': args.attention, **({'LM_POSITIONS': args.positions} if args.positions else {})}
  if not args.lengths:
    take(stage_of(args.size or 'paper', args.stage, **macros), args.batch)
    return
  size = args.size or 'base'
  print('| positions | temporaries, MiB | for each position, kiB |\n|---|---|---|')
  for length in args.lengths:
    experiment = stage_of(size, COARSE_SECONDS=seconds_of(stage_of(size), length), **macros)
    found = experiment.argument('objective').stage.length
    temporaries = compiled_step(experiment, args.batch)[1].memory_analysis().temp_size_in_bytes
    print(f'| {found} | {temporaries / 2 ** 20:.0f} | {temporaries / found / 1024:.1f} |', flush=True)
  if args.run:
    take(experiment, args.batch)


if __name__ == '__main__':
  main()
