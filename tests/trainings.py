"""The six trainings at size nano on data made in a moment, for the tests that hold for all of them."""
from __future__ import annotations

from collections.abc import Mapping
import dataclasses
import functools
import os
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax

from musiclm_jax import config
from musiclm_jax.cascade import Cascade
from musiclm_jax.data import records
from musiclm_jax.specs import TokenSpec
from musiclm_jax.training import checkpoint
from musiclm_jax.training.state import create

WAVEFORMS = ('codec', 'mulan', 'w2v_bert')
STAGES = ('semantic_lm', 'coarse_lm', 'fine_lm')
TRAININGS = WAVEFORMS + STAGES


def experiment(name: str, tokens: str | os.PathLike = 'nowhere', *overlays: str, **macros) -> config.Experiment:
  """A training at size nano; stages read the token records at `tokens`."""
  given = {**({'TOKENS': tokens} if name in STAGES else {}), **macros}
  return config.load_experiment(
      [f'experiments/{name}.gin', 'size/nano.gin', *overlays], [(k, str(v)) for k, v in given.items()],
      provided=('workdir', 'dry_run'))


@functools.cache
def token_specs() -> dict[str, TokenSpec]:
  """The streams of size nano, by feature."""
  coarse, fine = (experiment(n).macro(m) for n, m in (('coarse_lm', 'COARSE_TOKENS'), ('fine_lm', 'FINE_TOKENS')))
  acoustic = TokenSpec('acoustic', coarse.codebook_size, coarse.levels + fine.levels, coarse.frame_rate)
  mulan, semantic = (experiment('semantic_lm').macro(m) for m in ('MULAN_TOKENS', 'SEMANTIC_TOKENS'))
  return {s.feature: s for s in (mulan, semantic, acoustic)}


def write_tokens(folder: str | os.PathLike, *, clips: int = 24, seconds: float = 4.0, lineage=None) -> pathlib.Path:
  """Token records in which each token repeats the one before half of the time: there is something to learn."""
  generator = np.random.default_rng(0)

  def stream(spec):
    fresh = generator.integers(0, spec.codebook_size, (spec.frames(seconds), spec.levels))
    repeat = generator.random(fresh.shape) < 0.5
    for i in range(1, len(fresh)):
      fresh[i] = np.where(repeat[i], fresh[i - 1], fresh[i])
    return fresh.astype(np.int32)

  def examples(split, count):
    return [{'recording': f'{split}-{i}', 'artist': 'test', 'start': 0.0,
             **{name: stream(spec) for name, spec in token_specs().items()}} for i in range(count)]

  header = records.Header('tokens', records.token_streams(token_specs().values()), lineage=lineage or {})
  records.write_records(folder, {'train': examples('train', clips), 'test': examples('test', 12)}, header, num_shards=2)
  return pathlib.Path(folder)


def make_networks(folder: str | os.PathLike, audio: str | os.PathLike) -> pathlib.Path:
  """Untrained networks and fitted tokenizers at size nano, as `extract` wants them: a workdir in seconds."""
  folder = pathlib.Path(folder)
  for name, macros in (('codec', {'NUM_STEPS': 1}), ('mulan', {'NUM_STEPS': 0}), ('w2v_bert', {'NUM_STEPS': 0}),
                       ('mulan_tokens', {'MULAN_WORKDIR': folder / 'mulan'}),
                       ('semantic_tokens', {'W2V_WORKDIR': folder / 'w2v_bert'})):
    built = experiment(name, RECORDS=audio, **macros, **{'partition.Partitioner.data': 1})
    built.build(workdir=str(folder / name), dry_run=False)
  return folder


def random_cascade(folder: str | os.PathLike, *, conditions: Mapping[str, str] | None = None) -> pathlib.Path:
  """A workdir of untrained networks at size nano that belong together: all that generation and export need, in seconds.

  Codebooks are random, too, so that tokens differ; token records lie beside them. With `conditions`, of each stage as
  gin reads them, there is no MuLan.
  """
  folder = pathlib.Path(folder)
  save_random(folder / 'codec', 'codec', {}, RECORDS='nowhere')
  save_random(folder / 'semantic_tokens', 'semantic_tokens', {}, W2V_WORKDIR='nowhere')
  if conditions is None:
    save_random(folder / 'mulan_tokens', 'mulan_tokens', {}, MULAN_WORKDIR='nowhere')
  lineage = Cascade(folder).lineage
  tokens = write_tokens(folder / 'tokens', lineage=lineage)
  for name in STAGES:
    overlays, more = (), {'specs.Stage.conditions': conditions[name]} if conditions else {}
    if name == 'coarse_lm' and not conditions:  # one stage of each kind: this one hears points
      overlays, more = ('token_lm/points.gin',), {'MULAN_TOKENS_WORKDIR': folder / 'mulan_tokens'}
    save_random(folder / name, name, lineage, *overlays, TOKENS=tokens, **more)
  return folder


def save_random(workdir: str | os.PathLike, name: str, lineage: Mapping[str, str], *overlays: str, **macros) -> None:
  """A checkpoint of the training `name` as it begins, of step 1."""
  objective = experiment(name, 'nowhere', *overlays, **macros).argument('objective')
  state = jax.jit(functools.partial(create, objective, optax.sgd(0.0), keep_ema=False))(jax.random.key(len(name)))
  spread = lambda path, x: (jax.random.normal(jax.random.key(x.size), x.shape) * 0.1
                            if path[-1].key == 'codebook' else x)
  buffers = jax.tree_util.tree_map_with_path(spread, state.buffers)
  with checkpoint.Checkpoints(workdir, objective, lineage=lineage) as checkpoints:
    checkpoints.save(dataclasses.replace(state, step=jnp.int32(1), buffers=buffers))


def make_codec(folder: str | os.PathLike) -> pathlib.Path:
  """The workdir `codec` of a codec at size nano that was trained for a step, beside the records `audio` of it."""
  folder = pathlib.Path(folder)
  audio = write_signals(folder / 'audio')
  built = experiment('codec', RECORDS=audio, NUM_STEPS=1, **{'partition.Partitioner.data': 1})
  built.build(workdir=str(folder / 'codec'), dry_run=False)
  return folder / 'codec'


def for_commands(compiled: str | os.PathLike, **more: str) -> dict[str, str]:
  """The environment of commands: one device, and programs that are kept in `compiled`.

  They are compiled in a hurry, unless `more` has XLA_FLAGS of its own.
  """
  return {**os.environ, 'XLA_FLAGS': '--xla_backend_optimization_level=0', 'JAX_COMPILATION_CACHE_DIR': str(compiled),
          'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0.2', **more}


def write_signals(folder: str | os.PathLike, *, clips: int = 30, held_out: int = 4, shards: int = 5,
                  seconds: float = 2.0) -> pathlib.Path:
  """Audio records each of which is noise seeded by its index, and carries the index; the last clips are shorter."""
  def clip(i):
    length = int(24000 * (seconds if i % 7 else seconds / 2))
    audio = np.random.default_rng(i).normal(0, 0.1, length).astype(np.float32)
    return {'audio': audio, 'sample_rate': 24000, 'recording': f'signal {i}', 'artist': '', 'start': 0.0,
            'texts': [{'kind': 'title', 'text': f'signal {i}'}], 'attributes': {'index': i},
            'source': {'licence': 'CC0-1.0'}}

  header = records.Header('audio', records.audio_streams(24000))
  for split, numbers in (('train', range(clips)), ('test', range(clips, clips + held_out))):
    count = shards if split == 'train' else 1
    for shard in range(count):
      records.write_shard(folder, split, shard, count, (clip(i) for i in numbers[shard::count]), header)
  records.finish(folder, header, {'train': shards, 'test': 1})
  return pathlib.Path(folder)

