"""The codec frame by frame, at MusicLM's preset with random weights: how many times as fast as the music runs.

  taskset -c 0 python -m tests.benchmarks.codec_streaming     # on one core

A row for each number of frames a step; medians of the steps.
"""
from __future__ import annotations

import statistics
import time

from flax import nnx
import numpy as np

from musiclm_jax import config
from musiclm_jax.codec.model import SoundStream
from musiclm_jax.training import state as states

SECONDS = 4


def main() -> None:
  objective = config.load_experiment(['experiments/codec.gin', 'size/paper.gin'],
                                     provided=('workdir', 'dry_run', 'configuration')).argument('objective')
  model = SoundStream(objective.codec, rngs=nnx.Rngs(0))
  stride, rate = model.config.stride, model.config.sample_rate
  audio = np.random.default_rng(0).uniform(-0.3, 0.3, (1, SECONDS * rate)).astype(np.float32)
  encode, decode = (states.compiled(model, name) for name in ('encode_step', 'decode_step'))
  print('| ms a step | encode | decode |\n|---|---|---|')
  for frames in (1, 5, 50):
    for _ in range(2):  # the first time to compile
      encoder, decoder, spent = model.init_state(1), model.init_state(1), ([], [])
      for first in range(0, audio.shape[1], frames * stride):
        begun = time.perf_counter()
        tokens, encoder = encode(audio[:, first:first + frames * stride], encoder)
        tokens.block_until_ready()
        between = time.perf_counter()
        heard, decoder = decode(tokens, decoder)
        heard.block_until_ready()
        spent[0].append(between - begun)
        spent[1].append(time.perf_counter() - between)
    length = frames * stride / rate
    print(f'| {1000 * length:.0f} | ' + ' | '.join(f'{length / statistics.median(s):.1f}' for s in spent) + ' |')


if __name__ == '__main__':
  main()
