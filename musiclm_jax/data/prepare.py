"""Music to record sets: a folder of audio files, or the built-in composer.

Every file is read once to see whether it can be used and once to write it, both in parallel processes. The
result does not depend on how many, and an interrupted run continues where it stopped.
"""
from __future__ import annotations

import collections
from collections.abc import Iterable, Iterator, Mapping, Sequence
import dataclasses
import hashlib
import heapq
import os
import pathlib
import warnings

import numpy as np

from musiclm_jax import provenance
from musiclm_jax.data import audio_files, composer, records, source
from musiclm_jax.data import captions as captions_lib
from musiclm_jax.data.workers import Progress, Workers

# Hours of music in a shard, unless the number of shards is given: about 170 MB.
_SHARD_HOURS = 1.0
_MAX_NAMES = 20  # file names kept for each reason of skipping
# Built-in music by size: clips to train on, clips held out, seconds of each.
COMPOSER_SIZES = {
    'nano': (64, 16, 5.0), 'tiny': (4000, 400, 5.0), 'small': (16_000, 400, 5.0),
    'base': (100_000, 2000, 30.0), 'paper': (500_000, 5000, 30.0)}
# Settings that are hashes, and what it means that one differs.
_HASHED = {'content': 'the names or sizes of the audio files have changed',
           'texts': 'the captions, titles, artists or licences have changed',
           'music': 'the composer has changed'}


@dataclasses.dataclass(frozen=True)
class Recording:
  """A usable file and what is known about it."""

  name: str  # relative to the folder, with "/"
  path: bytes
  info: audio_files.AudioInfo
  facts: captions_lib.Facts

  @property
  def group(self) -> str:
    """Recordings of one group are never on both sides of the split: the artist where known."""
    return f'artist {self.facts.artist}' if self.facts.artist else f'recording {self.name}'


def prepare_folder(audio_dir: str | os.PathLike, output_dir: str | os.PathLike, *,
                   captions: str | os.PathLike | None = None, caption_column: str | None = None,
                   segment_seconds: float = 30.0, min_seconds: float = 1.0, num_shards: int = 0,
                   held_out_share: float = 0.1, sample_rate: int = 24000, channels: int = 1, workers: int = 0,
                   progress: Progress | None = None) -> records.Manifest:
  """Writes the audio files of a folder, at any depth, as a record set with the splits "train" and "test".

  Recordings become 16-bit clips of at most `segment_seconds`. Titles, artists, licences, captions and tags come
  from `manifest.jsonl` files in the folder, where there are any; a `captions` file replaces their captions and
  tags (it may be such a manifest itself). The split is by a hash of the artist, where known, else of the
  recording: in a collection of many it stays the same for a recording when others are added. Files that cannot be
  used, and copies of others, are left out and counted by reason in the manifest. Does nothing where the
  set is already there.

  Args:
    captions: CSV, TSV or JSON lines with the columns `file` and `caption`, `text` or `caption_column`.
    segment_seconds: longer recordings are cut into pieces of this length.
    min_seconds: shorter recordings, and shorter last pieces, are left out.
    num_shards: files of the split "train"; 0 chooses by the amount of music.
    held_out_share: share of the artists, or recordings, in "test".
    channels: 1 averages those of a file. With more, files with as many are taken as they are and those with one have it
      repeated; others are left out.
    workers: processes; 0 takes one for each core.
    progress: called with (what, done, total).

  Raises:
    FileNotFoundError: no such folder.
    ValueError: no usable audio (with counts by reason), a caption file that does not fit, or `output_dir`
      holds a set made with other settings.
  """
  if not 1000 <= sample_rate <= 768_000 or not 1 <= channels <= 64:
    raise ValueError(f'sample_rate {sample_rate} must lie between 1000 and 768000, and channels {channels} between 1 '
                     'and 64')
  if not 0 < min_seconds <= segment_seconds or not 0 <= held_out_share <= 0.5:
    raise ValueError(f'min_seconds {min_seconds:g} must be positive and at most segment_seconds '
                     f'{segment_seconds:g}, and held_out_share {held_out_share:g} between 0 and 0.5')
  files, unsupported = audio_files.walk(audio_dir)
  names = [name for name, _ in files]
  texts = captions_lib.read_captions(captions, names, caption_column) if captions else None
  facts = captions_lib.folder_facts(audio_dir, names)
  header = records.Header('audio', records.audio_streams(sample_rate, channels), {
      'made from': 'folder', 'files': len(files),
      'content': source.digest([(n, _size(p)) for n, p in files]),
      'texts': source.digest([sorted((n, dataclasses.asdict(f)) for n, f in facts.items()),
                              texts and sorted(texts.texts.items())]),
      'segment_seconds': segment_seconds, 'min_seconds': min_seconds, 'held_out_share': held_out_share,
      'num_shards': num_shards})
  if done := _already(output_dir, header):
    return done
  with Workers(workers) as pool:
    usable, skipped = audio_files.sort_out(
        files, unsupported, min_seconds, channels, workers=pool, progress=progress)
    recordings = [Recording(name, path, info, _with_texts(facts.get(name, captions_lib.Facts()), texts, name))
                  for name, path, info in usable]
    recordings = _without_copies(recordings, skipped)
    if not recordings:
      raise audio_files.nothing_usable(audio_dir, skipped)
    if texts and texts.unmatched:
      warnings.warn(f'{len(texts.unmatched)} rows of {captions} name no recording of {audio_dir}, for '
                    f'example {texts.unmatched[0]!r}', stacklevel=1)
      skipped['caption without a recording'].extend(texts.unmatched)
    shards = _shard(_split(recordings, held_out_share), num_shards)
    work = [(os.fspath(output_dir), split, i, len(parts), part, header)
            for split, parts in shards.items() for i, part in enumerate(parts)]
    list(pool.map(_write_folder_shard, work, progress, 'shards written'))
  left_out = {reason: {'count': len(found), 'files': found[:_MAX_NAMES]}
              for reason, found in sorted(skipped.items())}
  return records.finish(
      output_dir, header, {split: len(parts) for split, parts in shards.items()}, skipped=left_out)


def prepare_composer(size: str | int, output_dir: str | os.PathLike, *, seed: int = 0, seconds: float = 0.0,
                     held_out: int = 0, num_shards: int = 0, workers: int = 0,
                     progress: Progress | None = None) -> records.Manifest:
  """Writes the built-in music as a record set with the splits "train" and "test", with no piece in both.

  Args:
    size: a name in `COMPOSER_SIZES`, or the number of clips to train on.
    seconds: of each clip; 0 takes what the size says (10 for a number).
    held_out: clips of "test"; 0 takes what the size says (a tenth of a number).
    num_shards, workers, progress: as in `prepare_folder`.

  Raises: ValueError where the size is not known or `output_dir` holds a set made with other settings.
  """
  if isinstance(size, str) and size not in COMPOSER_SIZES:
    raise ValueError(f'the built-in music comes in the sizes {", ".join(COMPOSER_SIZES)}, not {size!r}')
  train, test, length = COMPOSER_SIZES[size] if isinstance(size, str) else (size, max(1, size // 10), 10.0)
  test, length = held_out or test, seconds or length
  corpora = {'train': composer.Corpus(seed=seed, first=0, size=train, seconds=length, split='train'),
             'test': composer.Corpus(seed=seed, first=train, size=test, seconds=length, split='test')}
  header = records.Header('audio', records.audio_streams(composer.SAMPLE_RATE), {
      'made from': 'composer', 'music': [c.fingerprint for c in corpora.values()], 'seed': seed,
      'clips': train, 'held_out': test, 'seconds': length, 'num_shards': num_shards})
  if done := _already(output_dir, header):
    return done
  counts = {s: _shard_count(s, len(c), len(c) * length / 3600, num_shards, 0.1) for s, c in corpora.items()}
  work = [(os.fspath(output_dir), split, i, counts[split], corpus, header)
          for split, corpus in corpora.items() for i in range(counts[split])]
  with Workers(workers) as pool:
    list(pool.map(_write_composer_shard, work, progress, 'shards written'))
  return records.finish(output_dir, header, counts)


def _size(path: bytes) -> int:
  try:
    return os.path.getsize(path)
  except OSError:  # a link to nothing, say: it is counted as unreadable later
    return -1


def _already(output_dir: str | os.PathLike, header: records.Header) -> records.Manifest | None:
  """The finished set that is there; ValueError where it, or what there is of it, was made with other settings."""
  if other := records.difference(output_dir, header):
    name, there, here = other
    if name in _HASHED:
      raise ValueError(f'{output_dir} was prepared from other music: {_HASHED[name]}; choose another --output_dir')
    raise ValueError(f'{output_dir} was prepared with other settings: {name}: {there} != {here}; choose another '
                     '--output_dir')
  return records.read_manifest(output_dir) if (pathlib.Path(output_dir) / records.MANIFEST).exists() else None


def _with_texts(facts: captions_lib.Facts, texts: captions_lib.Captions | None,
                name: str) -> captions_lib.Facts:
  """Adds the texts of a caption file, which replace those of the folder, and the title as a text."""
  chosen = facts.texts if texts is None else texts.texts.get(name, ())
  title = facts.source.get('title')
  return dataclasses.replace(facts, texts=(*chosen, *([{'kind': 'title', 'text': title}] if title else [])))


def _without_copies(recordings: Iterable[Recording], skipped: dict[str, list[str]]) -> list[Recording]:
  """Leaves out files with the bytes of another one: a copy on the other side of the split would be a leak.

  What is known of one is known of the other.
  """
  seen: dict[str, Recording] = {}
  for recording in recordings:
    if (first := seen.setdefault(recording.info.sha256, recording)) is not recording:
      skipped['copy of another file'].append(recording.name)
      a, b = first.facts, recording.facts
      facts = captions_lib.Facts(a.artist or b.artist, {**b.source, **a.source},
                                 (*a.texts, *(text for text in b.texts if text not in a.texts)))
      seen[recording.info.sha256] = dataclasses.replace(first, facts=facts)
  return list(seen.values())


def _split(recordings: Sequence[Recording], share: float) -> dict[str, list[Recording]]:
  """Splits by a hash of the group; with two groups or more "test" gets at least one, at most half."""
  groups: dict[str, list[Recording]] = collections.defaultdict(list)
  for recording in recordings:
    groups[recording.group].append(recording)
  place = {g: int.from_bytes(hashlib.sha256(g.encode()).digest()[:8], 'big') / 2.0 ** 64 for g in groups}
  held_out: set[str] = set()
  count = 0
  for group in sorted(groups, key=place.__getitem__):
    wanted = place[group] < share or (share > 0 and not held_out)
    # "train" keeps the larger part, whatever the hash says of a small collection.
    if wanted and 2 * (count + len(groups[group])) <= len(recordings):
      held_out.add(group)
      count += len(groups[group])
  if share > 0 and not held_out:
    warnings.warn(f'{len(recordings)} recordings in {len(groups)} groups (artists) cannot be split: nothing '
                  'is held out', stacklevel=1)
  return {'train': [r for r in recordings if r.group not in held_out],
          'test': [r for r in recordings if r.group in held_out]}


def _shard_count(split: str, parts: int, hours: float, num_shards: int, share: float) -> int:
  """How many shards a split has: as asked for "train", fewer for the smaller split, never more than parts."""
  if num_shards:
    wanted = num_shards if split == 'train' else max(1, round(num_shards * share))
  else:
    wanted = max(4 if split == 'train' else 1, round(hours / _SHARD_HOURS))
  return min(wanted, parts)


def _shard(splits: Mapping[str, Sequence[Recording]], num_shards: int) -> dict[str, list[list[Recording]]]:
  """Deals the recordings of each split to shards of about equal length, whole recordings only."""
  shards: dict[str, list[list[Recording]]] = {}
  for split, recordings in splits.items():
    hours = sum(r.info.seconds for r in recordings) / 3600
    count = _shard_count(split, len(recordings), hours, num_shards, 0.1)
    parts: list[list[Recording]] = [[] for _ in range(count)]
    least = [(0.0, number) for number in range(count)]  # a heap
    for recording in sorted(recordings, key=lambda r: (-r.info.seconds, r.name)):
      seconds, number = least[0]
      parts[number].append(recording)
      heapq.heapreplace(least, (seconds + recording.info.seconds, number))
    shards[split] = [sorted(part, key=lambda r: r.name) for part in parts]
  return shards


def _segments(recordings: Sequence[Recording], header: records.Header,
              left_out: collections.Counter[str]) -> Iterator[source.Example]:
  """The clips of some recordings in order; counts the pieces that are too short or silent."""
  settings, rate = header.settings, records.rate_of(header)
  for recording in recordings:
    facts = recording.facts
    for number, audio in enumerate(_pieces(recording, settings['segment_seconds'], header)):
      if number and len(audio) < settings['min_seconds'] * rate:
        left_out['last piece too short'] += 1
      elif np.abs(audio).max() < audio_files.SILENCE:
        left_out['silent piece'] += 1
      else:
        yield {
            'audio': audio, 'sample_rate': rate, 'recording': recording.name, 'artist': facts.artist,
            'start': number * float(settings['segment_seconds']), 'texts': [dict(t) for t in facts.texts],
            'attributes': {}, 'source': {**facts.source, 'sha256': recording.info.sha256}}


def _pieces(recording: Recording, seconds: float, header: records.Header) -> Iterator[np.ndarray]:
  rate, channels = records.rate_of(header), records.channels_of(header)
  try:
    yield from audio_files.segments(recording.path, seconds, rate, channels)
  except audio_files.AudioFault as fault:
    raise ValueError(f'{recording.path} changed while it was prepared ({fault}); run the same command again') from None


def _write_folder_shard(task: tuple[str, str, int, int, Sequence[Recording], records.Header]) -> None:
  directory, split, index, count, recordings, header = task
  if records.shard_done(directory, split, index, count, header):
    return
  left_out: collections.Counter[str] = collections.Counter()
  clips = _segments(recordings, header, left_out)
  records.write_shard(directory, split, index, count, clips, header, left_out=left_out,
                      made_with=provenance.made_with())


def _write_composer_shard(task: tuple[str, str, int, int, composer.Corpus, records.Header]) -> None:
  directory, split, index, count, corpus, header = task
  if records.shard_done(directory, split, index, count, header):
    return
  facts = {'licence': 'CC0-1.0', 'attribution': 'composed by musiclm_jax'}
  clips = ({**corpus[i], 'source': facts} for i in range(index, len(corpus), count))
  records.write_shard(directory, split, index, count, clips, header, made_with=provenance.made_with())
