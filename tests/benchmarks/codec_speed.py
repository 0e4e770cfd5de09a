"""The codec's encoding, decoding and training step, beside the codecs that a user of PyTorch would take.

  pip install -e .[train] torch transformers audiolm-pytorch
  python -m tests.benchmarks.codec_speed [--rounds 7] [--what encode decode] [--only musiclm_jax] [--batch 4]

Random weights, float32. SoundStream of audiolm-pytorch has the same widths, strides (480 samples a frame), latent and
codebooks, without its attention layers; EnCodec is that of 24 kHz in transformers, with 8 codebooks, as it comes.
"generator step" is forward, spectral and waveform losses, backward and Adam, without discriminators; "full step" is
the whole adversarial one with the discriminators of each system at their sizes. The systems take turns (`turns`). The
ceilings are what this machine multiplies matrices of 2048 x 2048 at and, on an accelerator, copies memory at; the
operations are those of the matrices and convolutions, the bytes those of XLA's program.
"""
from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
import functools
import statistics
import sys
import types
from typing import Any

import numpy as np

from tests.benchmarks import turns
from tests.benchmarks.turns import Calls

RATE, LEVELS, CODES, LATENT = 24000, 12, 1024, 512
WIDTHS, STRIDES = (32, 64, 128, 256, 512), (3, 4, 5, 8)
OURS = 'musiclm_jax'
ENCODE, DECODE, GENERATOR, FULL = WHAT = ('encode', 'decode', 'generator step', 'full step')
CODED_SECONDS = 10.0


def clips(count: int, seconds: float) -> np.ndarray:
  return np.random.default_rng(0).uniform(-0.3, 0.3, (count, round(RATE * seconds))).astype(np.float32)


def ours(wanted: Sequence[str], coded: np.ndarray, trained: np.ndarray) -> tuple[Calls, dict[str, Any]]:
  import jax
  from flax import nnx
  from musiclm_jax import config
  from musiclm_jax.codec.model import SoundStream
  from musiclm_jax.training import flops, optimizer, state as states

  def experiment(**macros):
    given = {'CODEC_LATENT': LATENT, 'CODEC_WIDTHS': WIDTHS, 'CODEC_STRIDES': STRIDES, 'ACOUSTIC_LEVELS': LEVELS,
             'ACOUSTIC_CODES': CODES, 'CODEC_BATCH': len(trained), 'CODEC_SECONDS': trained.shape[1] / RATE, **macros}
    return config.load_experiment(['experiments/codec.gin', 'size/paper.gin'], [(k, str(v)) for k, v in given.items()],
                                  provided=('workdir', 'dry_run', 'configuration'))

  about: dict[str, Any] = {'device': jax.devices()[0].device_kind}

  def training(name, **macros):
    """One step after another; the state is given away to the next, as in training."""
    built = experiment(**macros)
    objective = built.argument('objective')
    skeleton = states.Skeleton.of(objective)
    transform = optimizer.by_group(objective, states.nnx.to_pure_dict(skeleton.params), built.argument('optimizer'))
    key = jax.random.key(0)
    batch = {'audio': jax.numpy.asarray(trained), 'slot': jax.numpy.arange(len(trained))}
    fresh = jax.jit(lambda k: states.create(objective, transform, k, keep_ema=False))(key)
    held = [jax.jit(lambda s, b, k: states.started(objective, skeleton, s, b, k))(fresh, batch, key)]
    step = states.make_step(objective, skeleton, transform)
    about[name] = {'flops': flops.flops(step, held[0], batch, key)}
    compiled = states.jitted_step(step, jax.default_backend()).lower(held[0], batch, key).compile()
    about[name]['bytes'] = compiled.cost_analysis().get('bytes accessed', 0.0)

    def run():
      held[0], metrics = compiled(held[0], batch, key)
      return metrics['loss'].block_until_ready()

    return run

  model = SoundStream(experiment().argument('objective').codec, rngs=nnx.Rngs(0))
  about['parameters'] = sum(v.size for v in jax.tree.leaves(nnx.to_pure_dict(nnx.state(model, nnx.Param))))
  graph, variables = nnx.split(model)

  def coding(name, method, given):
    run = jax.jit(lambda v, x: getattr(nnx.merge(graph, v), method)(x))
    about[name] = {'flops': flops.flops(run, variables, given)}
    compiled = run.lower(variables, given).compile()
    about[name]['bytes'] = compiled.cost_analysis().get('bytes accessed', 0.0)
    return lambda: compiled(variables, given).block_until_ready()

  encode = coding(ENCODE, 'encode', jax.numpy.asarray(coded))
  calls = {ENCODE: encode, DECODE: coding(DECODE, 'decode', encode())}
  if GENERATOR in wanted:
    calls[GENERATOR] = training(GENERATOR, CODEC_WAVEFORM_WEIGHT=1.0, **{
        'objective.LossWeights.adversarial': 0.0, 'objective.LossWeights.feature': 0.0})
  if FULL in wanted:
    calls[FULL] = training(FULL, CODEC_WAVEFORM_WEIGHT=1.0)

  limits, work = turns.ceilings()
  calls, about = calls | limits, about | work
  return calls, about


def audiolm(wanted: Sequence[str], coded: np.ndarray, trained: np.ndarray) -> tuple[Calls, dict[str, Any]]:
  # It imports a part of fairseq for another of its models, and fairseq imports on no Python after 3.10.
  sys.modules.setdefault('fairseq', types.ModuleType('fairseq'))
  import torch
  from torch.nn import functional
  from audiolm_pytorch.soundstream import SoundStream, log, vector_norm

  def network():
    torch.manual_seed(0)
    return SoundStream(
        channels=WIDTHS[0], strides=STRIDES, channel_mults=tuple(w // WIDTHS[0] for w in WIDTHS[1:]),
        codebook_dim=LATENT, codebook_size=CODES, rq_num_quantizers=LEVELS, target_sample_hz=RATE, use_local_attn=False)

  audio, batch = torch.from_numpy(coded), torch.from_numpy(trained)
  model = network().eval()
  with torch.no_grad():
    codes = model(audio, return_codes_only=True)
  codes = codes.permute(1, 2, 0, 3).reshape(len(coded), -1, LEVELS)  # from [groups, B, F, Q]

  @torch.no_grad()
  def encode():
    return model(audio, return_codes_only=True)

  @torch.no_grad()
  def decode():
    return model.decode_from_codebook_indices(codes)

  def generator_step():
    x = trainee.encoder(batch[:, None]).transpose(1, 2)
    x, _, commitment = trainee.rq(x)
    decoded = trainee.decoder(x.transpose(1, 2))
    loss = functional.mse_loss(batch[:, None], decoded) + commitment.sum()
    for transform, alpha in zip(trainee.mel_spec_transforms, trainee.mel_spec_recon_alphas):
      a, b = transform(batch[:, None]), transform(decoded)
      loss = loss + (a - b).abs().sum(dim=-2).mean() + alpha * vector_norm(log(a) - log(b), dim=-2).mean()
    update(loss, generator, trainee.non_discr_parameters())

  def full_step():
    update(trainee(batch), generator, trainee.non_discr_parameters())
    update(trainee(batch, return_discr_loss=True), discriminator, judges)

  def update(loss, optimizer, parameters):
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()

  trainee = network().train()
  own = {id(p) for p in trainee.non_discr_parameters()}
  judges = [p for p in trainee.parameters() if id(p) not in own]
  generator = torch.optim.Adam(trainee.non_discr_parameters(), 1e-4)
  discriminator = torch.optim.Adam(judges, 1e-4)
  calls = {ENCODE: encode, DECODE: decode, GENERATOR: generator_step, FULL: full_step}
  return calls, {'parameters': sum(p.numel() for p in model.non_discr_parameters())}


def encodec(wanted: Sequence[str], coded: np.ndarray, trained: np.ndarray) -> tuple[Calls, dict[str, Any]]:
  import torch
  from transformers import EncodecConfig, EncodecModel
  torch.manual_seed(0)
  model = EncodecModel(EncodecConfig()).eval()
  audio = torch.from_numpy(coded)[:, None]

  @torch.no_grad()
  def encode():
    return model.encode(audio, bandwidth=6.0)

  codes = encode()

  @torch.no_grad()
  def decode():
    return model.decode(codes.audio_codes, codes.audio_scales)

  return {ENCODE: encode, DECODE: decode}, {'parameters': sum(p.numel() for p in model.parameters())}


SYSTEMS = {OURS: ours, 'audiolm-pytorch': audiolm, 'EnCodec': encodec}


def main() -> None:
  parser = argparse.ArgumentParser()
  parser.add_argument('--rounds', type=int, default=7)
  parser.add_argument('--what', nargs='+', choices=WHAT, default=WHAT)
  parser.add_argument('--only', choices=SYSTEMS)
  parser.add_argument('--batch', type=int, default=4)
  parser.add_argument('--seconds', type=float, default=1.0, help='of each clip of a training batch')
  args = parser.parse_args()
  given = args.what, clips(1, CODED_SECONDS), clips(args.batch, args.seconds)
  times, about = turns.take_turns(
      {name: functools.partial(SYSTEMS[name], *given) for name in ([args.only] if args.only else SYSTEMS)},
      args.what, args.rounds)
  print('| | system | s of audio a second | times as fast as it | products | memory |\n|---|---|---|---|---|---|')
  for what in args.what:
    audio = args.batch * args.seconds if what in (GENERATOR, FULL) else CODED_SECONDS
    mine = times.get((OURS, what))
    for name in about:
      if spent := times.get((name, what)):
        cells = ['', *(shares(about[OURS], times, what) if name == OURS else ('', ''))]
        if name != OURS and mine:
          cells[0] = f'{turns.times_as_fast(spent, mine):.2f}'
        print('| ' + ' | '.join([what, name, f'{audio / statistics.median(spent):.2f}', *cells]) + ' |', flush=True)


def shares(about: dict[str, Any], times: Mapping[tuple[str, str], list[float]], what: str) -> list[str]:
  """Of the operations, and of the bytes, that this machine manages in a second."""
  return [f'{turns.share(about[what][kind], times[OURS, what], about[ceiling], times[OURS, ceiling]):.0%}'
          if ceiling in about else '' for kind, ceiling in (('flops', turns.PRODUCTS), ('bytes', turns.MEMORY))]


if __name__ == '__main__':
  main()
