"""Reads every byte of a record set and says what is in it and what is wrong with it.

Shapes: F frames, Q levels, K codes.
"""
from __future__ import annotations

from collections.abc import Mapping
import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
from typing import Any

import numpy as np

from musiclm_jax import provenance
from musiclm_jax.data import records, token_counts
from musiclm_jax.data.workers import Progress, Workers

_SHOWN = 20  # faults listed


@dataclasses.dataclass(frozen=True)
class Fault:
  """What is wrong with one shard; the first thing that was found."""

  file: str
  problem: str


@dataclasses.dataclass
class ShardContent:
  """What one shard holds.

  Attributes:
    counts: how often each code was used, [Q, K] by stream; nothing for audio.
    keys: a hash of the recording and the start of each record that says them, uint64; rows: which records those are.
  """

  file: str
  records: int = 0
  seconds: float = 0.0
  problem: str = ''
  counts: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
  keys: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0, np.uint64))
  rows: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0, np.int32))


@dataclasses.dataclass(frozen=True)
class Inspection:
  """The state of a record set.

  Attributes:
    held: records and seconds of each split, as counted.
    repeated: records that are there more than once, in words. The files are as they were written.
    perplexity: codes in even use, by stream and level; `own` the same as the networks that made them had it.
  """

  directory: pathlib.Path
  manifest: records.Manifest
  held: Mapping[str, tuple[int, float]]
  faults: tuple[Fault, ...]
  repeated: tuple[str, ...]
  perplexity: Mapping[str, list[float]]
  own: Mapping[str, list[float]]

  def text(self) -> str:
    header = self.manifest.header
    lines = [f'{self.directory}: {header.kind}, fingerprint {self.manifest.fingerprint}']
    lines += [f'  {role} {content}' for role, content in sorted(header.lineage.items())]
    for split, (count, seconds) in self.held.items():
      lines.append(f'  {split}: {len(self.manifest.splits[split])} shards, {count} records, {seconds / 3600:.2f} h')
    for made in self.manifest.made_with:
      lines.append(f'  made with musiclm_jax {made.get("musiclm_jax", "?")}, code {made.get("code", "?")}')
    for name, used_Q in self.perplexity.items():
      codes = header.streams[name]['codebook_size']
      lines.append(f'  {name}: perplexity of {codes} codes by level ' + _numbers(used_Q))
      if name in self.own:
        lines.append(f'  {" " * len(name)}  the network\'s own, in training ' + _numbers(self.own[name]))
    for what, found in (('damaged', [f'{f.file}: {f.problem}' for f in self.faults]), ('repeated', self.repeated)):
      lines += [f'  {what}: {line}' for line in found[:_SHOWN]]
      if len(found) > _SHOWN:
        lines.append(f'  ... and {len(found) - _SHOWN} more')
    return '\n'.join(lines)

  def advice(self, *, deleted: bool) -> str:
    """What to do about it; "" where nothing is wrong."""
    if not self.faults:
      return '' if not self.repeated else (
          f'{len(self.repeated)} records are there more than once, the first: {self.repeated[0]}; prepare the music '
          'again, each recording once')
    total = sum(len(shards) for shards in self.manifest.splits.values())
    first = f'{self.directory / self.faults[0].file}: {self.faults[0].problem}'
    step = '' if deleted else 'delete them with --delete_damaged, then '
    return f'{len(self.faults)} of {total} shards are damaged, the first is {first}; {step}run the command that ' \
           'made the set again: it makes what is missing'

  def delete_damaged(self) -> None:
    """Deletes the damaged shards, and the manifest, which is no longer true."""
    (self.directory / records.MANIFEST).unlink(missing_ok=True)
    for fault in self.faults:
      for name in (fault.file + '.json', fault.file):
        (self.directory / name).unlink(missing_ok=True)


def _numbers(values: list[float]) -> str:
  return ' '.join(f'{v:.0f}' for v in values)


def inspect(directory: str | os.PathLike, *, workers: int = 0, progress: Progress | None = None) -> Inspection:
  """Checks a finished record set: sizes, checksums, counts, every record, and that no record is there twice.

  Raises FileNotFoundError or ValueError where there is no manifest to check it against.
  """
  manifest = records.read_manifest(directory)
  tasks = [(os.fspath(directory), shard, manifest.header) for shards in manifest.splits.values() for shard in shards]
  with Workers(workers) as pool:
    found: dict[str, ShardContent] = {}
    counts: dict[str, np.ndarray] = {}
    for content in pool.map(_read_shard, tasks, progress, 'shards inspected'):
      for name, count_QxK in content.counts.items():
        counts[name] = counts.get(name, 0) + count_QxK
      content.counts = {}  # there may be very many shards
      found[content.file] = content
  held = {split: (sum(found[s.file].records for s in shards), sum(found[s.file].seconds for s in shards))
          for split, shards in manifest.splits.items()}
  return Inspection(
      pathlib.Path(directory), manifest, held,
      tuple(Fault(c.file, c.problem) for c in found.values() if c.problem), _repeated(list(found.values())),
      {name: token_counts.perplexity(count_QxK).tolist() for name, count_QxK in counts.items()},
      _own_perplexity(manifest))


def _repeated(contents: list[ShardContent]) -> tuple[str, ...]:
  """Records of the same place in the same recording."""
  if not contents:
    return ()
  keys = np.concatenate([c.keys for c in contents])
  shard = np.repeat(np.arange(len(contents)), [len(c.keys) for c in contents])
  row = np.concatenate([c.rows for c in contents])
  order = np.argsort(keys, kind='stable')
  where = lambda i: f'record {row[i]} of {contents[shard[i]].file}'
  return tuple(f'{where(order[place + 1])} is also {where(order[place])}'
               for place in np.flatnonzero(keys[order][1:] == keys[order][:-1]))


def _own_perplexity(manifest: records.Manifest) -> dict[str, list[float]]:
  """By stream, as the extraction wrote it down."""
  own = {}
  for made in manifest.made_with:
    for network in made.get('networks', {}).values():
      own[network['feature']] = network['perplexity']
  return own


def _read_shard(task: tuple[str, records.Shard, records.Header]) -> ShardContent:
  directory, shard, header = task
  content = ShardContent(shard.file)
  try:
    _read_records(pathlib.Path(directory) / shard.file, shard, header, content)
  except (OSError, RuntimeError, ValueError) as error:
    content.problem = str(error)
  return content


def _read_records(path: pathlib.Path, shard: records.Shard, header: records.Header, content: ShardContent) -> None:
  if not path.exists():
    raise FileNotFoundError('it is missing')
  description = _description(path)
  there = records.Shard(**description['shard'])
  if there != shard:
    raise ValueError(f'its .json says {there.records} records with checksum {there.sha256[:12]}, the manifest '
                     f'{shard.records} with {shard.sha256[:12]}')
  if records.Header(**description['header']).fingerprint != header.fingerprint:
    raise ValueError('its .json says that it belongs to another set')
  if (size := path.stat().st_size) != shard.bytes:
    raise ValueError(f'it has {size} bytes and should have {shard.bytes}')
  changed = provenance.hash_file(path) != shard.sha256
  counts = {name: np.zeros((s['levels'], s['codebook_size']), np.int64)
            for name, s in header.streams.items() if header.kind == 'tokens'}
  seconds, kinds, keys, rows = [], [], [], []
  with contextlib.closing(records.open_shard(path)) as reader:
    if reader.num_records() != shard.records:
      raise ValueError(f'it has {reader.num_records()} records and should have {shard.records}')
    for row in range(shard.records):
      try:
        [record] = reader.read([row])
        example = records.decode(record, header)
        records.check(example, header)
      except Exception as error:  # the reader raises RuntimeError, msgpack and NumPy half a dozen others
        raise ValueError(f'record {row} cannot be read: {error}') from None
      seconds.append(records.seconds_of(example, header))
      kinds.append(list(records.text_kinds_of(example)))
      if example.get('recording'):
        name = f'{example["recording"]}\n{float(example.get("start", 0.0))!r}'
        keys.append(int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], 'big'))
        rows.append(row)
      for name, count_QxK in counts.items():
        count_QxK += token_counts.level_counts(example[name], count_QxK.shape[1])
  content.counts, content.records, content.seconds = counts, len(seconds), sum(seconds)
  content.keys, content.rows = np.array(keys, np.uint64), np.array(rows, np.int32)
  if changed:
    raise ValueError('its content has changed since it was written, though every record can be read')
  # What is usable is decided by these, without reading the records.
  if seconds != description['record_seconds'] or \
      kinds != [description['text_kind_sets'][k] for k in description['record_text_kinds']]:
    raise ValueError('its .json describes other records')


def _description(path: pathlib.Path) -> dict[str, Any]:
  """The `.json` of a shard, of which every entry that is read here is there."""
  try:
    found = json.loads(path.with_name(path.name + '.json').read_bytes())
    records.Shard(**found['shard'])
    records.Header(**found['header'])
    [found['text_kind_sets'][k] for k in found['record_text_kinds']], list(found['record_seconds'])
  except FileNotFoundError:
    raise ValueError('its .json is missing') from None
  except (ValueError, KeyError, TypeError, IndexError) as error:
    raise ValueError(f'its .json is damaged: {error!r}') from None
  return found
