"""A training step of MuLan beside those that a user of PyTorch would take, and at the paper's size on an accelerator.

  pip install -e .[train] torch torchaudio transformers musiclm-pytorch
  python -m tests.benchmarks.mulan_speed [--rounds 7] [--batch 8]
  python -m tests.benchmarks.mulan_speed --paper [--batch 256] [--chunks 4] [--dtype bfloat16]

Random weights, float32, both towers of 6 layers of width 512 with 8 heads, 10 s of music as 496 patches of 16 x 16 and
texts of 64 tokens; forward, contrastive loss, backward and Adam. musiclm_jax starts from the waveform; the others are
given their spectrograms. "AST + BERT" are the two models of transformers with projections and the symmetric loss.
musiclm-pytorch is its MuLaN as it comes, whose patch dropout leaves a quarter of the audio out, and without it; it
stretches time by 0.8 in training, so it is given four fifths of the frames. The systems take turns (`turns`).

`--paper` is musiclm_jax alone with `size/paper.gin`: pairs a second, and the share of the operations that this machine
does in products of 8192 x 8192; operations are those that the gradient needs, what is computed again is not counted.
"""
from __future__ import annotations

import argparse
from collections.abc import Sequence
import functools
import math
import statistics
import sys
import types
from typing import Any

import numpy as np

from tests.benchmarks import turns
from tests.benchmarks.turns import Calls

WIDTH, DEPTH, HEADS, MLP, JOINT = 512, 6, 8, 2048, 128
BANDS, FRAMES, PATCH, TEXT, VOCABULARY, RATE = 128, 992, 16, 64, 30592, 24000
LEARNING_RATE = 1e-4
STEP = 'training step'
OURS, DROPPING = 'musiclm_jax', 'musiclm-pytorch, as it comes'


def numbers(batch: int, *shape: int) -> np.ndarray:
  return np.random.default_rng(0).uniform(-0.3, 0.3, (batch, *shape)).astype(np.float32)


def words(batch: int, length: int = TEXT) -> np.ndarray:
  return np.random.default_rng(1).integers(5, VOCABULARY, (batch, length))


def ours(batch: int, macros: Sequence[tuple[str, Any]] = (), dtype: str = 'float32') -> tuple[Calls, dict[str, Any]]:
  import jax
  import jax.numpy as jnp
  from musiclm_jax import config
  from musiclm_jax.training import flops, optimizer, state as states

  def built(**more):
    given = {'MULAN_BATCH': batch, 'MULAN_TEXT_VOCAB': VOCABULARY, **dict(macros), **more}
    return config.load_experiment(['experiments/mulan.gin', 'size/paper.gin'], [(k, str(v)) for k, v in given.items()],
                                  provided=('workdir', 'dry_run', 'configuration'))

  def training(objective, experiment):
    skeleton = states.Skeleton.of(objective)
    params = states.nnx.to_pure_dict(skeleton.params)
    transform = optimizer.by_group(objective, params, experiment.argument('optimizer'))
    return states.make_step(objective, skeleton, transform, compute_dtype=jnp.dtype(dtype)), transform

  experiment = built()
  objective = experiment.argument('objective')
  step, transform = training(objective, experiment)
  key = jax.random.key(0)
  held = [jax.jit(lambda k: states.create(objective, transform, k, keep_ema=False))(key)]
  spec = objective.batch_spec(batch)
  data = {'audio': jnp.asarray(numbers(*spec['audio'].shape)), 'slot': jnp.arange(batch),
          'text': jnp.asarray(words(*spec['text'].shape), jnp.int32)}
  plain = built(MULAN_REMAT=False, MULAN_CHUNKS=1)
  counted = flops.flops(training(plain.argument('objective'), plain)[0], held[0], data, key)
  compiled = states.jitted_step(step, jax.default_backend()).lower(held[0], data, key).compile()
  about = {'parameters': sum(v.size for v in jax.tree.leaves(held[0].params)), 'flops': counted,
           'device': jax.devices()[0].device_kind,
           'memory': compiled.memory_analysis().temp_size_in_bytes + compiled.memory_analysis().argument_size_in_bytes}

  def run():
    held[0], metrics = compiled(held[0], data, key)
    return metrics['loss'].block_until_ready()

  limits, work = turns.ceilings(8192 if dtype == 'bfloat16' else 2048, dtype)
  return {STEP: run, turns.PRODUCTS: limits[turns.PRODUCTS]}, about | work


SMALL = (('MULAN_AUDIO_WIDTH', WIDTH), ('MULAN_AUDIO_DEPTH', DEPTH), ('MULAN_AUDIO_HEADS', HEADS),
         ('MULAN_AUDIO_MLP_WIDTH', MLP), ('MULAN_TEXT_WIDTH', WIDTH), ('MULAN_TEXT_DEPTH', DEPTH),
         ('MULAN_TEXT_HEADS', HEADS), ('MULAN_TEXT_MLP_WIDTH', MLP), ('MULAN_TEXT_LENGTH', TEXT),
         ('MULAN_STRIDE_FRAMES', PATCH), ('MULAN_STRIDE_BANDS', PATCH), ('MULAN_REMAT', False), ('MULAN_CHUNKS', 1))


def ast_and_bert(batch: int) -> tuple[Calls, dict[str, Any]]:
  import torch
  from torch.nn import functional
  from transformers import ASTConfig, ASTModel, BertConfig, BertModel
  torch.manual_seed(0)
  sizes = {'hidden_size': WIDTH, 'num_hidden_layers': DEPTH, 'num_attention_heads': HEADS, 'intermediate_size': MLP,
           'hidden_dropout_prob': 0.0, 'attention_probs_dropout_prob': 0.0}
  model = torch.nn.ModuleDict({
      'audio': ASTModel(ASTConfig(**sizes, num_mel_bins=BANDS, max_length=FRAMES, patch_size=PATCH,
                                  frequency_stride=PATCH, time_stride=PATCH)),
      'text': BertModel(BertConfig(**sizes, vocab_size=VOCABULARY), add_pooling_layer=False),
      'audio_projection': torch.nn.Linear(WIDTH, JOINT, bias=False),
      'text_projection': torch.nn.Linear(WIDTH, JOINT, bias=False)}).train()
  temperature = torch.nn.Parameter(torch.tensor(math.log(0.1)))
  mel, text = torch.from_numpy(numbers(batch, FRAMES, BANDS)), torch.from_numpy(words(batch))

  def loss():
    audio = model['audio_projection'](model['audio'](mel).last_hidden_state[:, 0])
    said = model['text_projection'](model['text'](text).last_hidden_state[:, 0])
    score = functional.normalize(audio) @ functional.normalize(said).T / temperature.exp()
    right = torch.arange(batch)
    return (functional.cross_entropy(score, right) + functional.cross_entropy(score.T, right)) / 2

  parameters = [*model.parameters(), temperature]
  return {STEP: turns.torch_step(parameters, loss, LEARNING_RATE)}, {'parameters': sum(p.numel() for p in parameters)}


def musiclm_pytorch(batch: int, dropping: bool) -> tuple[Calls, dict[str, Any]]:
  # It imports a part of fairseq for another of its models, and fairseq imports on no Python after 3.10.
  sys.modules.setdefault('fairseq', types.ModuleType('fairseq'))
  import torch
  from musiclm_pytorch import AudioSpectrogramTransformer, MuLaN, TextTransformer
  torch.manual_seed(0)
  drop = {} if dropping else {'patch_dropout_prob': 0.0}
  model = MuLaN(
      AudioSpectrogramTransformer(dim=WIDTH, depth=DEPTH, heads=HEADS, patch_size=PATCH, accept_spec=True, **drop),
      TextTransformer(dim=WIDTH, depth=DEPTH, heads=HEADS, num_tokens=VOCABULARY, max_seq_len=TEXT),
      dim_latent=JOINT).train()
  # Its time stretching is a phase vocoder: of complex numbers.
  mel = torch.from_numpy(numbers(batch, math.ceil(FRAMES * 0.8), BANDS)).to(torch.complex64)
  text = torch.from_numpy(words(batch))
  augment = model.audio.aug
  model.audio.aug = torch.nn.Sequential(augment[0], Magnitude(), *augment[1:])
  loss = lambda: model(mel, texts=text)
  calls = {STEP: turns.torch_step(model.parameters(), loss, LEARNING_RATE)}
  return calls, {'parameters': sum(p.numel() for p in model.parameters())}


def Magnitude():
  import torch

  class Module(torch.nn.Module):
    def forward(self, x):
      return x.abs()

  return Module()


def main() -> None:
  parser = argparse.ArgumentParser()
  parser.add_argument('--rounds', type=int, default=7)
  parser.add_argument('--batch', type=int, default=8)
  parser.add_argument('--only', nargs='+')
  parser.add_argument('--paper', action='store_true')
  parser.add_argument('--chunks', type=int, default=1)
  parser.add_argument('--dtype', default='bfloat16')
  args = parser.parse_args()
  if args.paper:
    systems = {OURS: functools.partial(ours, args.batch, (('MULAN_CHUNKS', args.chunks),), args.dtype)}
  else:
    systems = {OURS: functools.partial(ours, args.batch, SMALL), 'AST + BERT of transformers': functools.partial(
        ast_and_bert, args.batch), 'musiclm-pytorch, no patch dropout': functools.partial(
            musiclm_pytorch, args.batch, False), DROPPING: functools.partial(musiclm_pytorch, args.batch, True)}
    systems = {name: make for name, make in systems.items() if not args.only or name in args.only}
  times, about = turns.take_turns(systems, (STEP,), args.rounds)
  print('| system | pairs a second | times as fast as it | products | memory |\n|---|---|---|---|---|')
  for name in systems:
    spent = times[name, STEP]
    if name == OURS:
      share = turns.share(about[OURS]['flops'], spent, about[OURS][turns.PRODUCTS], times[OURS, turns.PRODUCTS])
      cells = ['', f'{share:.0%}', f'{about[OURS]["memory"] / 2 ** 30:.1f} GiB']
    else:
      cells = [f'{turns.times_as_fast(spent, times[OURS, STEP]):.2f}' if OURS in systems else '', '', '']
    print('| ' + ' | '.join([name, f'{args.batch / statistics.median(spent):.1f}', *cells]) + ' |', flush=True)
  if OURS in systems:
    print(f'{about[OURS]["device"]}: '
          f'{about[OURS]["flops"] / statistics.median(times[OURS, STEP]) / 1e12:.1f} TFLOP/s of '
          f'{about[OURS][turns.PRODUCTS] / statistics.median(times[OURS, turns.PRODUCTS]) / 1e12:.1f}')


if __name__ == '__main__':
  main()
