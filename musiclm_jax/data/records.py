"""Record sets: directories of random-access ArrayRecord shards with a manifest, readable without TensorFlow.

    <dir>/train-00000-of-00004.arrayrecord       one record a clip: a msgpack map with the arrays inside
    <dir>/train-00000-of-00004.arrayrecord.json  what the shard holds, written after it
    <dir>/manifest.json                          what the set holds, written last: without it there is no set

Every file is written beside its place, synced and renamed, so an interrupted run leaves whole shards or none,
and the same command continues it.
"""
from __future__ import annotations

import collections
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
import contextlib
import dataclasses
import functools
import json
import os
import pathlib
import re
import threading
import time
from typing import Any, BinaryIO
import uuid

from array_record.python import array_record_module
import numpy as np

from musiclm_jax import provenance
from musiclm_jax.data import source
from musiclm_jax.data.record_format import (
  audio_streams,
  channels_of,
  check,
  decode,
  encode,
  FORMAT_VERSION,
  from_pcm,
  Header,
  Manifest,
  rate_of,
  seconds_of,
  Shard,
  text_kinds_of,
  to_pcm,
  token_streams,
)

__all__ = [
    'FORMAT_VERSION', 'Header', 'Manifest', 'MANIFEST', 'RecordSet', 'Shard', 'Unfinished', 'audio_streams',
    'channels_of', 'check', 'decode', 'difference', 'encode', 'finish', 'from_pcm', 'open_shard',
    'rate_of', 'read_manifest', 'replacing', 'rewrite', 'seconds_of', 'shard_done', 'shard_name',
    'text_kinds_of', 'to_pcm', 'token_streams', 'write_atomically', 'write_records', 'write_shard']

MANIFEST = 'manifest.json'
_SHARD_FILE = re.compile(r'.+-\d{5,}-of-\d{5,}\.arrayrecord(\.json)?')
_STALE_SECONDS = 24 * 3600.0  # nobody takes as long for a shard
# Examples are read in random order, so read-ahead would fetch what nobody asked for.
_READER_OPTIONS = 'readahead_buffer_size:0,max_parallelism:0'
# A process may have 1,024 files open where nobody has raised that.
_OPEN_SHARDS = 256
# Waveforms do not shrink under a general compressor and decompressing them costs three times the read.
_WRITER_OPTIONS = {'audio': 'group_size:1,uncompressed', 'tokens': 'group_size:1'}


class Unfinished(ValueError):
  """Shards of a set are not there yet; `missing` has their names."""

  def __init__(self, directory: pathlib.Path, missing: list[str], total: int):
    super().__init__(f'{directory}: {len(missing)} of {total} shards are missing or were written with other settings, '
                     f'the first is {missing[0]}')
    self.missing = missing


def write_atomically(path: str | os.PathLike, content: bytes) -> None:
  """Writes beside `path`, syncs and renames: readers see the old file or the new one."""
  with replacing(path) as file:
    file.write(content)


@contextlib.contextmanager
def replacing(path: str | os.PathLike) -> Iterator[BinaryIO]:
  """A file that takes the place of `path` once it is whole; after an error all is as it was."""
  path = pathlib.Path(path)
  if not path.parent.is_dir():
    raise FileNotFoundError(f'there is no folder {os.fspath(path.parent)!r}')
  if path.is_dir():
    raise IsADirectoryError(f'{path} is a folder; name a file')
  temporary = _temporary(path)
  try:
    with open(temporary, 'wb+') as file:
      yield file
      file.flush()
      os.fsync(file.fileno())
    _put(temporary, path)
  finally:
    temporary.unlink(missing_ok=True)


def _temporary(path: pathlib.Path) -> pathlib.Path:
  """A name beside `path` that no other process on any machine takes."""
  return path.with_name(f'.{path.name}.{uuid.uuid4().hex}.tmp')


def _put(temporary: pathlib.Path, path: pathlib.Path) -> None:
  os.replace(temporary, path)
  handle = os.open(path.parent, os.O_RDONLY)
  try:
    os.fsync(handle)  # the rename itself must survive a power cut
  finally:
    os.close(handle)


def open_shard(path: str | os.PathLike) -> array_record_module.ArrayRecordReader:
  """Random access to the records of one file; RuntimeError or ValueError where it is not one."""
  return array_record_module.ArrayRecordReader(str(path), _READER_OPTIONS)


def shard_name(split: str, index: int, count: int) -> str:
  return f'{split}-{index:05d}-of-{count:05d}.arrayrecord'


def write_shard(directory: str | os.PathLike, split: str, index: int, count: int,
                examples: Iterable[source.Example], header: Header, *, left_out: Mapping[str, int] | None = None,
                made_with: Mapping[str, Any] | None = None) -> Shard:
  """Writes shard `index` of `count` and its `.json`; replaces one that is there.

  Args:
    left_out: counts, by reason, what `examples` did not yield; it is read after the last example.
    made_with: what `provenance.made_with` found. It is kept beside the shard and changes nothing about its identity.

  Raises: ValueError where an example does not have the shapes or the range that `header` says, OSError where the disk
    takes no more.
  """
  directory = pathlib.Path(directory)
  directory.mkdir(parents=True, exist_ok=True)
  path = directory / shard_name(split, index, count)
  sidecar = path.with_name(path.name + '.json')
  temporary = _temporary(path)
  seconds, kinds, licences = [], [], collections.Counter()
  writer = array_record_module.ArrayRecordWriter(str(temporary), _WRITER_OPTIONS[header.kind])
  try:
    for example in examples:
      content = encode(example, header)
      with _disk(path):
        writer.write(content)
      seconds.append(seconds_of(example, header))
      kinds.append(text_kinds_of(example))
      licences[example.get('source', {}).get('licence') or 'not stated'] += 1
    with _disk(path):
      writer.close()
    with open(temporary, 'rb') as file:
      os.fsync(file.fileno())
    shard = Shard(path.name, len(seconds), temporary.stat().st_size, provenance.hash_file(temporary), sum(seconds))
    sidecar.unlink(missing_ok=True)  # from here on the shard counts as missing, until its new description is there
    _put(temporary, path)
  except BaseException:
    with contextlib.suppress(RuntimeError):
      if writer.is_open():
        writer.close()
    temporary.unlink(missing_ok=True)
    raise
  kind_sets = sorted(set(kinds))
  write_atomically(sidecar, json.dumps({
      'format': FORMAT_VERSION, 'header': dataclasses.asdict(header), 'shard': dataclasses.asdict(shard),
      'made_with': dict(made_with or {}), 'record_seconds': seconds, 'licences': dict(licences),
      'left_out': dict(left_out or {}),
      # Most records have the same kinds of text, so each is a number in a short list.
      'text_kind_sets': kind_sets, 'record_text_kinds': [kind_sets.index(k) for k in kinds]}).encode())
  return shard


@contextlib.contextmanager
def _disk(path: pathlib.Path) -> Iterator[None]:
  """What ArrayRecord says where it cannot write, as OSError."""
  try:
    yield
  except RuntimeError as error:
    raise OSError(f'{path} cannot be written ({str(error).splitlines()[0][:200]}); is the disk full?') from error


def shard_done(directory: str | os.PathLike, split: str, index: int, count: int, header: Header) -> bool:
  """Whether this shard was already written, whole, with the same header."""
  return _written(pathlib.Path(directory) / shard_name(split, index, count), header) is not None


def _written(path: pathlib.Path, header: Header) -> dict[str, Any] | None:
  """What is beside a shard that is there, whole, with this header; None for any other."""
  try:
    sidecar = _sidecar(path)
    whole = (sidecar['format'] == FORMAT_VERSION and Header(**sidecar['header']).fingerprint == header.fingerprint and
             sidecar['shard']['bytes'] == path.stat().st_size)
  except (OSError, ValueError, KeyError, TypeError):
    return None
  return sidecar if whole else None


def difference(directory: str | os.PathLike, header: Header) -> tuple[str, Any, Any] | None:
  """(name, there, here) of the first thing that differs from the set there, finished or not, or None."""
  directory = pathlib.Path(directory)
  there = _header_there(directory)
  if there is not None:
    for name in ('kind', 'lineage', 'settings', 'streams'):
      before, now = getattr(there, name), getattr(header, name)
      if before == now:
        continue
      if not isinstance(now, Mapping):
        return name, before, now
      key = next(k for k in (*now, *before) if before.get(k) != now.get(k))
      return key, before.get(key), now.get(key)
  return None


def _header_there(directory: pathlib.Path) -> Header | None:
  """Of a finished set, or of the first shard of an unfinished one that can be read."""
  if (directory / MANIFEST).exists():
    return read_manifest(directory).header
  for path in directory.glob('*.arrayrecord.json'):
    try:
      return Header(**_sidecar(path.with_suffix(''))['header'])
    except (FileNotFoundError, KeyError, TypeError, ValueError):
      continue
  return None


def finish(directory: str | os.PathLike, header: Header, shards: Mapping[str, int], *,
           skipped: Mapping[str, Mapping[str, Any]] | None = None) -> Manifest:
  """Writes `manifest.json` once every shard is there; `shards` says how many each split has (0: no records).

  Processes that share the work may all call this: they write the same file.

  Raises: Unfinished where shards are missing or were written with another header.
  """
  directory = pathlib.Path(directory)
  directory.mkdir(parents=True, exist_ok=True)
  splits, licences, missing = {}, collections.Counter(), []
  versions: list[Mapping[str, Any]] = []  # shards need not have been written by one version
  skipped = {reason: dict(files) for reason, files in (skipped or {}).items()}
  for split, count in shards.items():
    held = []
    for name in (shard_name(split, i, count) for i in range(count)):
      sidecar = _written(directory / name, header)
      if sidecar is None:
        missing.append(name)
        continue
      held.append(Shard(**sidecar['shard']))
      licences.update(sidecar['licences'])
      if sidecar['made_with'] not in versions:
        versions.append(sidecar['made_with'])
      for reason, number in sidecar['left_out'].items():
        skipped[reason] = {'count': skipped.get(reason, {}).get('count', 0) + number, 'files': []}
    splits[split] = tuple(held)
  if missing:
    raise Unfinished(directory, missing, sum(shards.values()))
  manifest = Manifest(header, splits, dict(sorted(licences.items())), skipped, tuple(versions))
  document = {
      'format': FORMAT_VERSION, 'fingerprint': manifest.fingerprint, **dataclasses.asdict(header),
      'counts': {s: {'records': manifest.records(s), 'hours': round(manifest.hours(s), 6)} for s in splits},
      'licences': manifest.licences, 'skipped': manifest.skipped, 'made_with': manifest.made_with,
      'splits': {s: [dataclasses.asdict(shard) for shard in shards] for s, shards in splits.items()}}
  _remove_others(directory, {shard_name(s, i, n) for s, n in shards.items() for i in range(n)})
  write_atomically(directory / MANIFEST, json.dumps(document, indent=1, sort_keys=True).encode())
  return manifest


def _remove_others(directory: pathlib.Path, files: set[str]) -> None:
  """Removes what interrupted runs left: shards that do not belong to the set, and unfinished files.

  An unfinished file may be another process's that is at work: those of the last hours stay.
  """
  for path in directory.glob('*.arrayrecord*'):
    if _SHARD_FILE.fullmatch(path.name) and path.name.removesuffix('.json') not in files:
      path.unlink(missing_ok=True)
  for path in (*directory.glob('.*.arrayrecord*.tmp'), *directory.glob(f'.{MANIFEST}.*.tmp')):
    with contextlib.suppress(FileNotFoundError):
      if time.time() - path.stat().st_mtime > _STALE_SECONDS:
        path.unlink()


def write_records(directory: str | os.PathLike, examples: Mapping[str, Sequence[source.Example]],
                  header: Header, *, num_shards: int = 1) -> Manifest:
  """A whole record set from examples in memory, by split."""
  counts = {split: min(num_shards, len(rows)) for split, rows in examples.items()}
  for split, rows in examples.items():
    for i in range(counts[split]):
      write_shard(directory, split, i, counts[split], rows[i::counts[split]], header)
  return finish(directory, header, counts)


def rewrite(directory: str | os.PathLike, split: str, keep: Callable[[int, source.Example], bool], reason: str
            ) -> Manifest:
  """Writes a split again without the examples, by index, that `keep` refuses; they are counted as left out."""
  corpus = RecordSet(directory, split)
  manifest = corpus.manifest
  # Interrupted, it is an unfinished set: the command that made it takes the shards that are there, and finishes it.
  (corpus.directory / MANIFEST).unlink()
  for number, shard in enumerate(corpus.shards):
    sidecar = _sidecar(corpus.directory / shard.file)
    indices = [int(i) for i in corpus.shard_indices(number)]
    kept = [e for i in indices if keep(i, e := corpus[i])]
    if len(kept) < len(indices):
      left_out = collections.Counter(sidecar['left_out']) + collections.Counter({reason: len(indices) - len(kept)})
      write_shard(directory, split, number, len(corpus.shards), kept, manifest.header, left_out=left_out,
                  made_with=sidecar['made_with'])
  counted = {r for shards in manifest.splits.values() for s in shards
             for r in _sidecar(corpus.directory / s.file)['left_out']}
  return finish(directory, manifest.header, {s: len(shards) for s, shards in manifest.splits.items()},
                skipped={r: found for r, found in manifest.skipped.items() if r not in counted})


def _sidecar(path: pathlib.Path) -> dict[str, Any]:
  file = path.with_name(path.name + '.json')
  try:
    return json.loads(file.read_bytes())
  except FileNotFoundError:
    raise FileNotFoundError(f'{file} is missing; it belongs to the shard beside it') from None
  except ValueError as error:
    raise ValueError(f'{file} is damaged: {error}') from None


def read_manifest(directory: str | os.PathLike) -> Manifest:
  """The manifest of a record set.

  Raises:
    FileNotFoundError: there is none.
    ValueError: it is damaged or was written by another version of the format.
  """
  path = pathlib.Path(directory) / MANIFEST
  try:
    document = json.loads(path.read_bytes())
  except (FileNotFoundError, NotADirectoryError):
    raise FileNotFoundError(f'{directory} is not a record set: it has no {MANIFEST}. `musiclm prepare` makes one of a '
                            'folder of music; where it or `extract` was interrupted, run it again') from None
  except ValueError as error:
    raise ValueError(f'{path} is damaged: {error}') from None
  version = document.get('format') if isinstance(document, dict) else None
  if version != FORMAT_VERSION:
    raise ValueError(f'{path} has format {version}; this version of musiclm_jax reads {FORMAT_VERSION}')
  try:
    header = Header(document['kind'], document['streams'], document['settings'], document['lineage'])
    splits = {s: tuple(Shard(**shard) for shard in shards) for s, shards in document['splits'].items()}
    manifest = Manifest(header, splits, document['licences'], document['skipped'], tuple(document['made_with']))
    if manifest.fingerprint != document['fingerprint']:
      raise ValueError('its fingerprint does not match what it lists')
  except (KeyError, TypeError, ValueError) as error:
    raise ValueError(f'{path} is damaged: {error}') from None
  return manifest


class RecordSet:
  """One split of a record set as a corpus. May be pickled and read from several threads.

  Raises:
    FileNotFoundError: there is no record set, or a shard of it is missing.
    ValueError: another format; no such split, or no records in it; a shard's size is not the manifest's; on
      reading, a record that cannot be decoded. The message names the file.
  """

  def __init__(self, directory: str | os.PathLike, split: str):
    self.directory = pathlib.Path(directory)
    self.split = split
    self.manifest = read_manifest(directory)
    if split not in self.manifest.splits:
      held = ', '.join(f'{s} ({self.manifest.records(s)} records)' for s in self.manifest.splits)
      raise ValueError(f'{directory} has no split {split!r}; it has {held}')
    if not self.manifest.records(split):
      raise ValueError(f'the split {split!r} of {directory} has no records; '
                       f'the set holds {self.manifest.summary()}')
    self.shards = self.manifest.splits[split]
    self._ends = np.cumsum([s.records for s in self.shards])
    self._seen: dict[str, tuple[int, int, int]] = {}
    for shard in self.shards:
      self._check(shard)
    self._start_reading()

  def _start_reading(self) -> None:
    self._readers: collections.OrderedDict[int, array_record_module.ArrayRecordReader] = collections.OrderedDict()
    self._lock = threading.Lock()

  def __getstate__(self):
    return {k: v for k, v in self.__dict__.items() if k not in ('_readers', '_lock', '_columns')}

  def __setstate__(self, state):
    self.__dict__.update(state)
    self._start_reading()

  def __len__(self) -> int:
    return int(self._ends[-1])

  @property
  def header(self) -> Header:
    return self.manifest.header

  @property
  def lineage(self) -> Mapping[str, str]:
    return self.header.lineage

  @property
  def fingerprint(self) -> str:
    return source.digest([self.manifest.fingerprint, self.split])

  @functools.cached_property
  def _columns(self) -> tuple[np.ndarray, list[tuple[str, ...]]]:
    seconds, kinds = [], []
    for shard in self.shards:
      sidecar = _sidecar(self.directory / shard.file)
      seconds.append(np.asarray(sidecar['record_seconds'], np.float64))
      kind_sets = [tuple(k) for k in sidecar['text_kind_sets']]
      kinds.extend(kind_sets[k] for k in sidecar['record_text_kinds'])
    return np.concatenate(seconds), kinds

  @property
  def durations(self) -> np.ndarray:
    """Seconds of each clip, float64 [len], without reading the records."""
    return self._columns[0]

  @property
  def text_kinds(self) -> list[tuple[str, ...]]:
    """The kinds of text of each clip, without reading the records."""
    return self._columns[1]

  def shard_indices(self, number: int) -> np.ndarray:
    """The indices of the records in shard `number`."""
    return np.arange(self._ends[number] - self.shards[number].records, self._ends[number])

  def _check(self, shard: Shard) -> None:
    """Size and `.json`; reading would be slow where a shard was exchanged by another as large."""
    path = self.directory / shard.file
    try:
      status = path.stat()
    except FileNotFoundError:
      raise FileNotFoundError(f'the shard {path} is missing; {MANIFEST} lists it with {shard.records} '
                              'records') from None
    state = status.st_ino, status.st_size, status.st_mtime_ns
    if self._seen.get(shard.file) == state:
      return
    if status.st_size != shard.bytes:
      raise ValueError(f'the shard {path} has {status.st_size} bytes; {MANIFEST} says {shard.bytes}')
    if _sidecar(path)['shard']['sha256'] != shard.sha256:
      raise ValueError(f'{path}.json and {MANIFEST} describe different shards: it was written again; run the command '
                       'that makes the set once more, then start anew on the set as it is')
    self._seen[shard.file] = state

  def _reader(self, number: int) -> array_record_module.ArrayRecordReader:
    if number in self._readers:
      self._readers.move_to_end(number)
      return self._readers[number]
    shard = self.shards[number]
    self._check(shard)
    reader = open_shard(self.directory / shard.file)
    if reader.num_records() != shard.records:
      raise ValueError(f'it has {reader.num_records()} records; {MANIFEST} says {shard.records}')
    if len(self._readers) >= _OPEN_SHARDS:
      self._readers.popitem(last=False)[1].close()
    self._readers[number] = reader
    return reader

  def __getitem__(self, index: int) -> source.Example:
    example = self._read(int(index))
    if self.header.kind == 'audio':
      example['audio'] = from_pcm(example['audio'])
    return example

  def fetch(self, indices: np.ndarray, seeds: np.ndarray) -> list[source.Example]:
    """Examples with their audio still int16: whoever takes a crop converts that alone."""
    del seeds  # nothing here is random
    return [self._read(int(i)) for i in indices]

  def _read(self, index: int) -> source.Example:
    if not 0 <= index < len(self):
      raise IndexError(f'record {index} of {len(self)}')
    number = int(np.searchsorted(self._ends, index, side='right'))
    row = index - int(self._ends[number]) + self.shards[number].records
    try:
      with self._lock:
        [record] = self._reader(number).read([row])
      return decode(record, self.header)
    except FileNotFoundError:
      raise
    except Exception as error:  # the reader raises RuntimeError, msgpack and NumPy half a dozen others
      raise ValueError(f'record {row} of {self.directory / self.shards[number].file} cannot be read: '
                       f'{error}') from error
