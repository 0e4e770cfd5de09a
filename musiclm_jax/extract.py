"""Audio records to token records: the frozen networks run once over a corpus, shard by shard.

Any number of processes share the work without speaking to one another: process i of n takes every n-th shard. A shard
is a function of its audio shard and of the networks, so it does not matter who writes it, when, or how often the work
was interrupted.

Shapes: B batch (all devices of this process), N samples, F frames, Q levels.
"""
from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
import math
import os
import sys
from typing import Any

import jax
import numpy as np

from musiclm_jax import provenance, specs
from musiclm_jax.cascade import Cascade, TOKENIZERS
from musiclm_jax.data import records
from musiclm_jax.data.prefetch import Prefetch

# What a token record keeps of its audio record.
_CARRIED = ('recording', 'artist', 'start', 'texts', 'attributes', 'source')
Report = Callable[[str], None]


def extract(audio_dir: str | os.PathLike, output_dir: str | os.PathLike, cascade: Cascade, *,
            roles: Sequence[str] = tuple(TOKENIZERS), batch_size: int = 16, process_index: int = 0,
            process_count: int = 1, report: Report | None = None) -> records.Manifest | None:
  """Tokenises this process's shards of every split of a record set; shards that are done are skipped.

  Batches never cross a shard and have one static shape, so a shard's tokens do not depend on where the work was
  interrupted, nor on how many processes share it.

  Args:
    roles: whose tokens are written, of "codec", "semantic" and "mulan"; AudioLM's stages, say, need no MuLan.
    batch_size: clips at a time on each device.
    process_index, process_count: which of how many processes this is. The one that finds all shards written, whoever
      wrote them, writes the manifest.
    report: called with a line now and then; stderr by default.

  Returns the manifest, or None where other processes still have shards to write.

  Raises ValueError where `output_dir` holds tokens, finished or not, of other networks or other audio, naming both.
  """
  if not 0 <= process_index < process_count:
    raise ValueError(f'process {process_index} of {process_count}: the index counts from 0')
  if unknown := sorted(set(roles) - set(TOKENIZERS)):
    raise ValueError(f'there are no {unknown[0]!r} tokens, only those of {", ".join(TOKENIZERS)}')
  if 'codec' not in roles:
    raise ValueError(f'tokens of {", ".join(roles)} alone: those of the codec are needed, too')
  report = report or _to_stderr
  audio = records.read_manifest(audio_dir)
  _check_audio(audio_dir, audio, cascade)
  header = records.Header(
      'tokens', records.token_streams([cascade.token_spec(role) for role in roles]),
      settings={'audio': audio.fingerprint, 'batch': batch_size},
      lineage={role: content for role, content in cascade.lineage.items() if role in roles})
  counts = {split: len(shards) for split, shards in audio.splits.items()}
  if other := records.difference(output_dir, header):
    name, there, here = other
    raise ValueError(f'{output_dir} holds tokens of {name} {there}, this would be {name} {here}; name another output')
  made_with = provenance.made_with(networks=cascade.networks(roles))
  corpora = {split: records.RecordSet(audio_dir, split) for split in counts if audio.records(split)}
  longest = max(float(corpus.durations.max()) for corpus in corpora.values())
  tokenise = _Tokeniser(cascade, roles, longest, batch_size * jax.local_device_count())
  places = [(split, i) for split, count in counts.items() for i in range(count)]
  mine = places[process_index::process_count]
  for split, index in mine:
    if not records.shard_done(output_dir, split, index, counts[split], header):
      examples = tokenise(corpora[split], index) if split in corpora else ()
      records.write_shard(output_dir, split, index, counts[split], examples, header, made_with=made_with)
      report(f'extracted {split} {index + 1}/{counts[split]}')
  try:
    return records.finish(output_dir, header, counts)
  except records.Unfinished as unfinished:
    if process_count == 1:
      raise
    report(f'process {process_index} of {process_count} is done with its {len(mine)} shards; {len(unfinished.missing)} '
           'of other processes are missing, and the last to end writes the manifest')
    return None


def _check_audio(audio_dir: str | os.PathLike, audio: records.Manifest, cascade: Cascade) -> None:
  if audio.header.kind != 'audio':
    raise ValueError(f'{audio_dir} holds {audio.header.kind}, not audio; name what `musiclm prepare` wrote')
  there, wanted = records.rate_of(audio.header), cascade.part('codec').objective.codec.sample_rate
  if there != wanted:
    raise ValueError(f'{audio_dir} has {there} samples a second, the networks were trained with {wanted}: prepare the '
                     'music again')
  if (channels := records.channels_of(audio.header)) != 1:
    raise ValueError(f'{audio_dir} has {channels} channels, and tokens are of mono music: prepare the music again with '
                     '--channels 1')
  if not any(audio.records(split) for split in audio.splits):
    raise ValueError(f'{audio_dir} holds no records: {audio.summary()}')


def _to_stderr(line: str) -> None:
  print(line, file=sys.stderr, flush=True)


class _Tokeniser:
  """Clips to token examples in batches of one shape, the next batch read while the devices work on this one."""

  def __init__(self, cascade: Cascade, roles: Sequence[str], seconds: float, batch_size: int):
    self.batch_size = batch_size
    self.specs = {cascade.token_spec(role).feature: cascade.token_spec(role) for role in roles}
    self.rate = cascade.part('codec').objective.codec.sample_rate
    block = math.lcm(*(round(self.rate / s.frame_rate) for s in self.specs.values() if s.frame_rate))
    self.samples = math.ceil(seconds * self.rate / block) * block  # whole frames of every stream
    encode = cascade.function('codec', 'encode', parallel=True)
    self.start = {'acoustic': lambda audio_BxN, length_B: encode(audio_BxN)}
    if 'semantic' in roles:
      self.start['semantic'] = cascade.function('semantic', 'tokens', parallel=True)
    if 'mulan' in roles:
      embed, quantize = (cascade.function('mulan', name, parallel=True) for name in ('embed_audio', 'tokens'))
      self.start['mulan'] = lambda audio_BxN, length_B: quantize(embed(audio_BxN, length_B))

  def __call__(self, corpus: records.RecordSet, shard: int) -> Iterator[dict[str, Any]]:
    indices = corpus.shard_indices(shard)

    def read(batch: int, *_: int) -> tuple[list[dict[str, Any]], np.ndarray, np.ndarray]:
      chosen = indices[batch * self.batch_size:(batch + 1) * self.batch_size]
      return self._batch([corpus[int(i)] for i in chosen])

    with Prefetch(read, 0, -(-len(indices) // self.batch_size)) as batches:
      running = None
      for examples, audio_BxN, length_B in batches:
        # The devices start on this batch before the tokens of the one before are fetched and written.
        started = examples, length_B, self._start(audio_BxN, length_B)
        if running is not None:
          yield from self._finished(*running)
        running = started
      if running is not None:
        yield from self._finished(*running)

  def _batch(self, examples: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], np.ndarray, np.ndarray]:
    audio_BxN = np.zeros((self.batch_size, self.samples), np.float32)
    length_B = np.full((self.batch_size,), self.samples, np.int32)
    for row, example in enumerate(examples):
      audio = example.pop('audio')
      audio_BxN[row, :len(audio)] = audio
      length_B[row] = len(audio)
    return examples, audio_BxN, length_B

  def _start(self, audio_BxN: np.ndarray, length_B: np.ndarray) -> dict[str, jax.Array]:
    return {name: start(audio_BxN, length_B) for name, start in self.start.items()}

  def _finished(self, examples: list[dict[str, Any]], length_B: np.ndarray, tokens: dict[str, jax.Array]
                ) -> Iterator[dict[str, Any]]:
    tokens = jax.device_get(tokens)
    for row, example in enumerate(examples):
      held = {name: cut(tokens[name][row], self.specs[name], length_B[row] / self.rate) for name in tokens}
      yield {**{k: example[k] for k in _CARRIED if k in example}, **held}


def cut(tokens_FxQ: np.ndarray, spec: specs.TokenSpec, seconds: float) -> np.ndarray:
  """The frames that lie within the clip, without those of the padding behind it."""
  return tokens_FxQ[:spec.frames(seconds)]
