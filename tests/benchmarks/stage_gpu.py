"""The token stages on an accelerator, all in one call and without TensorFlow or PyTorch.

  python -m tests.benchmarks.stage_gpu [--size paper] [--batch 32] [--decode 1 8 64] [--profile DIR] [--rounds 5]
      [--what training decoding audio] [--stages semantic coarse] [--positions rotary t5] [--dropout 0.1] [--remat]

Random weights. Training: a step of the semantic and of the coarse stage in bfloat16, by rotary positions and by the T5
bias: tokens a second, what computes attention, the share of the machine's measured products (6 operations for each
parameter in a product and token, and causal attention once; what is computed again is not counted), and memory.
Decoding: steps of cached sampling at each batch, tokens a second, and the share of the speed at which the weights could
be read from memory once a step. Generation: 30 s of audio from MuLan tokens through all three stages and the codec,
beside the 30 s that it lasts, compiled before. `--profile` writes traces of a training step and of decoding for
TensorBoard or Perfetto. Runs on CPU, too, with `--size nano`, to see that it runs.
"""
from __future__ import annotations

import argparse
from collections.abc import Callable
import contextlib
import statistics
import time
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from musiclm_jax import config
from musiclm_jax.generate import windows
from musiclm_jax.generate.pipeline import Settings
from musiclm_jax.nn.attention import fitting
from musiclm_jax.specs import Stage
from musiclm_jax.token_lm.draw import Sampling
from musiclm_jax.token_lm.objective import NextToken
from musiclm_jax.token_lm.sample import sample
from musiclm_jax.token_lm.sequence import Layout
from musiclm_jax.training import state as states
from tests.benchmarks import turns
from tests.benchmarks.paper_step import batch_of, compiled_step, stage_of

SECONDS = 30.0


def median_seconds(call: Callable[[], Any], rounds: int) -> float:
  jax.block_until_ready(call())
  spent = []
  for _ in range(rounds):
    begun = time.perf_counter()
    jax.block_until_ready(call())
    spent.append(time.perf_counter() - begun)
  return statistics.median(spent)


def operations(objective: NextToken) -> float:
  """Of a training step, for each sequence."""
  net, stage = objective.transformer, objective.stage
  inner = net.heads * net.head_width
  layer = 4 * net.width * inner + (3 if net.gated else 2) * net.width * net.mlp_width
  length, predicted = stage.length - 1, stage.target.tokens(stage.seconds)
  return 6 * (length * net.depth * layer + predicted * net.width * stage.target.codebook_size
              ) + 6 * length ** 2 * inner * net.depth


def train(stage: str, positions: str, args: argparse.Namespace, products: float) -> None:
  experiment = stage_of(args.size, stage, LM_POSITIONS=positions, LM_REMAT=args.remat, LM_DROPOUT=args.dropout)
  objective = experiment.argument('objective')
  # As many tokens for each stage.
  size = max(1, args.batch * stage_of(args.size, 'semantic').argument('objective').stage.length
             // objective.stage.length)
  create, step = compiled_step(experiment, size, jnp.bfloat16)
  key, held = jax.random.key(0), [create()]
  batch = jax.tree.map(jnp.asarray, batch_of(objective, size))

  def run():
    held[0], metrics = step(held[0], batch, key)
    return metrics['loss']

  seconds = median_seconds(run, args.rounds)
  if args.profile:
    with jax.profiler.trace(f'{args.profile}/{stage}_{positions}'):
      jax.block_until_ready(run())
  net, length = objective.transformer, objective.stage.length - 1
  q = jax.ShapeDtypeStruct((size, length, net.heads, net.head_width), jnp.bfloat16)
  kind = fitting(q, q, None, q if positions == 't5' else None)
  memory = step.memory_analysis()
  gib = (memory.argument_size_in_bytes + memory.temp_size_in_bytes) / 2 ** 30
  share = size * operations(objective) / seconds / products
  print(f'| {stage}, {positions} | {size} x {length} | {kind} | {seconds * 1e3:.1f} ms | {size * length / seconds:.0f} '
        f'| {share:.0%} | {gib:.1f} GiB |', flush=True)


def network(objective: NextToken, dtype: Any = jnp.bfloat16) -> Any:
  """Random weights of one type."""
  skeleton = states.Skeleton.of(objective)

  @jax.jit
  def make():
    params, buffers = states.split_model(objective.model(nnx.Rngs(0)))
    return jax.tree.map(lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, (params, buffers))

  return skeleton.model(*make())


def conditions(stage: Stage, seconds: float, size: int) -> dict[str, jax.Array]:
  generator = np.random.default_rng(0)
  levels: dict[str, int] = {}
  for spec in stage.conditions:
    levels[spec.feature] = max(levels.get(spec.feature, 0), spec.first_level + spec.levels)
  return {spec.feature: jnp.asarray(
      generator.integers(0, spec.codebook_size, (size, spec.frames(seconds), levels[spec.feature])), jnp.int32)
          for spec in stage.conditions}


def run_stage(model: Any, objective: NextToken, size: int, known: int = 0) -> jax.Array:
  """The target of one whole crop for `size` sequences, the first `known` frames of which are there."""
  layout, target = Layout(objective.stage), objective.stage.target
  given = conditions(objective.stage, layout.duration, size)
  return sample(model, layout, given, jax.random.split(jax.random.key(0), size), Sampling(),
                prefix_BxFxQ=jnp.zeros((size, known, target.levels), jnp.int32))


def decode(args: argparse.Namespace, bandwidth: float) -> None:
  objective = stage_of(args.size, 'semantic', LM_POSITIONS='rotary').argument('objective')
  model = network(objective)
  read = sum(x.size * x.dtype.itemsize for path, x in jax.tree_util.tree_leaves_with_path(
      states.split_model(model)[0]) if 'embedding' not in jax.tree_util.keystr(path))
  steps = objective.stage.target.tokens(objective.stage.seconds)
  for size in args.decode:
    run = lambda size=size: run_stage(model, objective, size)
    seconds = median_seconds(run, args.rounds) / steps
    if args.profile:
      with jax.profiler.trace(f'{args.profile}/decoding_{size}'):
        jax.block_until_ready(run())
    print(f'| {size} | {size / seconds:.0f} | {seconds * 1e3:.2f} ms | {read / seconds / bandwidth:.0%} |', flush=True)


def text_to_audio(args: argparse.Namespace) -> None:
  """From MuLan tokens on: 30 s in the windows of `musiclm generate`, one after another where one continues another,
  else as one batch; and the codec."""
  stages = {name: stage_of(args.size, name, LM_POSITIONS='rotary').argument('objective')
            for name in ('semantic', 'coarse', 'fine')}
  models = {name: network(objective) for name, objective in stages.items()}
  codec = config.load_experiment(['experiments/codec.gin', f'size/{args.size}.gin'],
                                 provided=('workdir', 'dry_run', 'configuration')).argument('objective')
  params, buffers = jax.jit(lambda: states.split_model(codec.model(nnx.Rngs(0))))()
  decoder = states.compiled(states.Skeleton.of(codec).model(params, buffers), 'decode')
  spec = codec.token_spec
  codes = jnp.zeros((1, spec.frames(SECONDS), spec.levels), jnp.int32)
  plans = {name: windows.cover(objective.stage, windows.ticks(SECONDS), overlap=Settings().overlap_of(name))
           for name, objective in stages.items()}

  def run():
    begun = time.perf_counter()
    parts = {}
    for name, objective in stages.items():
      places = plans[name].windows
      if plans[name].stand_alone:
        jax.block_until_ready(run_stage(models[name], objective, len(places)))
      else:
        for place in places:
          known = windows.frame(place.first - place.start, objective.stage.target)
          jax.block_until_ready(run_stage(models[name], objective, 1, known))
      parts[name], begun = time.perf_counter() - begun, time.perf_counter()
    jax.block_until_ready(decoder(codes))
    return {**parts, 'codec': time.perf_counter() - begun}

  run()
  parts = run()
  total = sum(parts.values())
  print(f'{SECONDS:.0f} s of audio in {total:.1f} s, {SECONDS / total:.1f} times faster than real time: '
        + ', '.join(f'{name} {seconds:.1f} s' for name, seconds in parts.items()), flush=True)


def main() -> None:
  parser = argparse.ArgumentParser()
  parser.add_argument('--size', default='paper')
  parser.add_argument('--batch', type=int, default=32, help='sequences of the semantic stage, for training')
  parser.add_argument('--decode', type=int, nargs='+', default=[1, 8, 64])
  parser.add_argument('--rounds', type=int, default=5)
  parser.add_argument('--remat', action='store_true', help='compute each layer again in the backward pass')
  parser.add_argument('--dropout', type=float, default=0.0)
  parser.add_argument('--what', nargs='+', default=['training', 'decoding', 'audio'])
  parser.add_argument('--stages', nargs='+', default=['semantic', 'coarse'])
  parser.add_argument('--positions', nargs='+', default=['rotary', 't5'])
  parser.add_argument('--profile', metavar='DIR')
  args = parser.parse_args()
  limits, work = turns.ceilings(8192 if jax.default_backend() != 'cpu' else 1024, 'bfloat16')
  products = work[turns.PRODUCTS] / median_seconds(limits[turns.PRODUCTS], args.rounds)
  words = jnp.ones(2 ** 26)
  copy = jax.jit(lambda x: x + 1)
  bandwidth = 2 * 4 * 2 ** 26 / median_seconds(lambda: copy(words), args.rounds)
  print(f'{jax.devices()[0].device_kind}: {products / 1e12:.1f} TFLOP/s in products of bfloat16, copies at '
        f'{bandwidth / 1e9:.0f} GB/s', flush=True)
  if 'training' in args.what:
    print('\n| training | batch | attention | a step | tokens a second | products | memory |\n|' + '---|' * 7)
    for stage in args.stages:
      for positions in args.positions:
        with _continuing(f'{stage}, {positions}'):
          train(stage, positions, args, products)
  if 'decoding' in args.what:
    print('\n| batch | tokens a second | a step | weight bandwidth |\n|---|---|---|---|')
    with _continuing('decoding'):
      decode(args, bandwidth)
  if 'audio' in args.what:
    print(flush=True)
    text_to_audio(args)


@contextlib.contextmanager
def _continuing(what: str):
  """One measurement that does not fit the memory leaves the others."""
  try:
    yield
  except jax.errors.JaxRuntimeError as error:
    print(f'| {what} | failed: {str(error).splitlines()[0]} |', flush=True)


if __name__ == '__main__':
  main()
