"""A token stage's training step and generation, beside those that a user of PyTorch would take.

  pip install -e .[train] torch transformers audiolm-pytorch x-transformers
  python -m tests.benchmarks.stage_speed [--rounds 7] [--what ...] [--only ...] [--length 1024] [--tokens 512]

Random weights, float32, width 512, 6 layers of 8 heads, a vocabulary of 1024. The training step is forward, loss,
backward and Adam of 4 sequences of 1024 tokens; generation is 512 tokens from nothing, with temperature 1. musiclm_jax
is the stage class with rotary positions and no dropout, its gated feed-forward as wide as makes the parameters those
of GPT-2; "T5 bias" has those positions. audiolm-pytorch is its SemanticTransformer as it comes, and with flash
attention, one residual stream and no masking of keys in training; x-transformers a decoder with rotary positions and
flash attention; GPT-2 that of transformers without dropout. The systems take turns (`turns`); a round whose ratio lies
far off the middle of all was disturbed and is left out, and how many is said. Shares are of the operations that this
machine does in products of 2048 x 2048: 6 for each parameter in a product and token, and causal attention once.
"""
from __future__ import annotations

import argparse
import functools
import os
import statistics
from typing import Any

import numpy as np

from tests.benchmarks import turns
from tests.benchmarks.turns import Calls

WIDTH, DEPTH, HEADS, CODES, BATCH = 512, 6, 8, 1024, 4
STEP, ONE, EIGHT = WHAT = ('training step', 'generation, batch 1', 'generation, batch 8')
OURS, OURS_T5 = 'musiclm_jax', 'musiclm_jax, T5 bias'
LEARNING_RATE = 1e-4
DISTURBED = 1.3  # a round whose ratio to another system is this many times its median, or a part of it


def tokens(length: int) -> np.ndarray:
  return np.random.default_rng(0).integers(0, CODES, (BATCH, length))


def ours(length: int, count: int, positions: str) -> tuple[Calls, dict[str, Any]]:
  import jax
  import jax.numpy as jnp
  from flax import nnx
  from musiclm_jax.nn.transformer import TransformerConfig
  from musiclm_jax.specs import Stage, TokenSpec
  from musiclm_jax.token_lm.objective import NextToken
  from musiclm_jax.token_lm.sample import sample
  from musiclm_jax.token_lm.draw import Sampling
  from musiclm_jax.token_lm.sequence import Layout
  from musiclm_jax.training import optimizer, state as states
  rate = 25.0
  stage = Stage('semantic', (), TokenSpec('semantic', CODES, 1, rate), length / rate)
  objective = NextToken(stage, TransformerConfig(
      width=WIDTH, depth=DEPTH, heads=HEADS, mlp_width=_gated_width(), positions=positions,
      relative_max_distance=length))
  skeleton = states.Skeleton.of(objective)
  transform = optimizer.by_group(objective, nnx.to_pure_dict(skeleton.params), optimizer.Adam(LEARNING_RATE))
  key = jax.random.key(0)
  held = [jax.jit(lambda k: states.create(objective, transform, k, keep_ema=False))(key)]
  batch = {'semantic': jnp.asarray(tokens(length)[..., None], jnp.int32), 'slot': jnp.arange(BATCH)}
  step = states.jitted_step(states.make_step(objective, skeleton, transform), jax.default_backend())

  def train():
    held[0], metrics = step(held[0], batch, key)
    return metrics['loss'].block_until_ready()

  model = skeleton.model(jax.tree.map(jnp.copy, held[0].params), jax.tree.map(jnp.copy, held[0].buffers))
  layout = Layout(stage, count / rate)
  generate = lambda size: sample(model, layout, {}, jax.random.split(key, size), Sampling()).block_until_ready()
  limits, work = turns.ceilings()
  about = {'parameters': skeleton.count(), 'device': jax.devices()[0].device_kind}
  calls = {STEP: train, ONE: lambda: generate(1), EIGHT: lambda: generate(8)}
  return calls | {turns.PRODUCTS: limits[turns.PRODUCTS]}, about | work


def _gated_width() -> int:
  """Three matrices with the parameters of two of four times the width."""
  return round(WIDTH * 8 / 3 / 8) * 8


def operations(length: int) -> float:
  """Of a training step: those that the gradient needs, what is computed again is not counted."""
  products = DEPTH * 12 * WIDTH ** 2 + WIDTH * CODES
  return BATCH * length * (6 * products + 6 * length * WIDTH * DEPTH)


def _torch_step(model, loss):
  def training():
    model.train()  # generation has left it in the other mode
    return loss()

  return turns.torch_step(model.parameters(), training, LEARNING_RATE)


def _torch_about(model) -> dict[str, Any]:
  return {'parameters': sum(p.numel() for p in model.parameters())}


def audiolm(length: int, count: int, fast: bool) -> tuple[Calls, dict[str, Any]]:
  import sys
  import types
  # It imports a part of fairseq for another of its models, and fairseq imports on no Python after 3.10.
  sys.modules.setdefault('fairseq', types.ModuleType('fairseq'))
  os.environ['TQDM_DISABLE'] = '1'
  import torch
  from audiolm_pytorch import audiolm_pytorch, SemanticTransformer, SemanticTransformerWrapper
  audiolm_pytorch.get_encoded_dim = lambda name: WIDTH  # else it fetches a text encoder, which nothing here uses
  torch.manual_seed(0)
  options = {'flash_attn': True, 'num_residual_streams': 1} if fast else {}
  model = SemanticTransformer(dim=WIDTH, depth=DEPTH, heads=HEADS, num_semantic_tokens=CODES, **options)
  unmasked = {'mask_prob': 0.0} if fast else {}
  wrapper = SemanticTransformerWrapper(transformer=model, unique_consecutive=False, **unmasked)
  wrapper.eos_id = -2  # it goes on to the last token, as the others do
  ids = torch.from_numpy(tokens(length - 1))  # it appends one that ends the sequence

  def generate(size):
    model.eval()
    with torch.inference_mode():
      found = wrapper.generate(max_length=count, batch_size=size)
    if found.shape[1] != count:
      raise RuntimeError(f'{found.shape[1]} tokens')

  calls = {STEP: _torch_step(model, lambda: wrapper(semantic_token_ids=ids, return_loss=True)),
           ONE: lambda: generate(1), EIGHT: lambda: generate(8)}
  return calls, _torch_about(model)


def x_transformers(length: int, count: int) -> tuple[Calls, dict[str, Any]]:
  import torch
  from x_transformers import AutoregressiveWrapper, Decoder, TransformerWrapper
  torch.manual_seed(0)
  layers = Decoder(dim=WIDTH, depth=DEPTH, heads=HEADS, rotary_pos_emb=True, attn_flash=True)
  model = AutoregressiveWrapper(TransformerWrapper(num_tokens=CODES, max_seq_len=length, attn_layers=layers))
  ids = torch.from_numpy(np.concatenate([tokens(length), tokens(1)], axis=1))
  return {STEP: _torch_step(model, lambda: model(ids))}, _torch_about(model)


def gpt2(length: int, count: int) -> tuple[Calls, dict[str, Any]]:
  import torch
  from transformers import GPT2Config, GPT2LMHeadModel
  torch.manual_seed(0)
  model = GPT2LMHeadModel(GPT2Config(
      vocab_size=CODES, n_positions=max(length, count + 1), n_embd=WIDTH, n_layer=DEPTH, n_head=HEADS, resid_pdrop=0.0,
      embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=None))
  ids = torch.from_numpy(tokens(length))

  def generate(size):
    model.eval()
    with torch.inference_mode():
      model.generate(torch.zeros((size, 1), dtype=torch.long), max_new_tokens=count, do_sample=True, top_k=0,
                     pad_token_id=0)

  calls = {STEP: _torch_step(model, lambda: model(ids, labels=ids).loss),
           ONE: lambda: generate(1), EIGHT: lambda: generate(8)}
  return calls, _torch_about(model)


def ratio(theirs: list[float], us: list[float]) -> tuple[float, int]:
  """Times as fast, the median of the rounds that were not disturbed, and how many were."""
  ratios = [a / b for a, b in zip(theirs, us, strict=True)]
  middle = statistics.median(ratios)
  kept = [r for r in ratios if middle / DISTURBED <= r <= middle * DISTURBED]
  return statistics.median(kept), len(ratios) - len(kept)


def main() -> None:
  parser = argparse.ArgumentParser()
  parser.add_argument('--rounds', type=int, default=7)
  parser.add_argument('--what', nargs='+', choices=WHAT, default=list(WHAT))
  parser.add_argument('--only', nargs='+')
  parser.add_argument('--length', type=int, default=1024)
  parser.add_argument('--tokens', type=int, default=512)
  args = parser.parse_args()
  sizes = args.length, args.tokens
  systems = {OURS: functools.partial(ours, *sizes, 'rotary'), OURS_T5: functools.partial(ours, *sizes, 't5'),
             'audiolm-pytorch': functools.partial(audiolm, *sizes, False),
             'audiolm-pytorch, fast': functools.partial(audiolm, *sizes, True),
             'x-transformers': functools.partial(x_transformers, *sizes), 'GPT-2': functools.partial(gpt2, *sizes)}
  systems = {name: make for name, make in systems.items() if not args.only or name in args.only}
  if OURS not in systems:
    parser.error(f'--only must have {OURS!r}: the others are compared with it')
  times, about = turns.take_turns(systems, args.what, args.rounds)
  ceiling, seconds = about[OURS][turns.PRODUCTS], times[OURS, turns.PRODUCTS]
  print('| what | system | seconds | musiclm_jax is times as fast | disturbed rounds | products |')
  print('|---|---|---|---|---|---|')
  for what in args.what:
    for name in systems:
      if (spent := times.get((name, what))) is None:
        continue
      times_as_fast, disturbed = ratio(spent, times[OURS, what])
      share = f'{turns.share(operations(args.length), spent, ceiling, seconds):.0%}' if what == STEP else ''
      print(f'| {what} | {name} | {statistics.median(spent):.3f} | {times_as_fast:.2f} | {disturbed} | {share} |',
            flush=True)
  print(f'{about[OURS]["device"]}: {ceiling / statistics.median(seconds) / 1e9:.0f} GFLOP/s in products')


if __name__ == '__main__':
  main()
