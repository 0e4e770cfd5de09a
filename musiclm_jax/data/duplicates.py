"""Held-out clips that also sound in the training music, found by their semantic tokens.

Two recordings of the same music (another encoding, another loudness, a cut of it) share long runs of tokens at a
constant distance in time. So, for each held-out clip, matches of short runs are counted by that distance, as in audio
fingerprinting (Wang 2003, "An industrial-strength audio search algorithm"), each weighted by its information: how rare
it is in the training music, so that a held chord or silence, which is everywhere, says little.

Shapes: G runs of the held-out split, U different ones among them, W runs of a clip.
"""
from __future__ import annotations

from collections.abc import Sequence
import dataclasses
import os

import numpy as np

from musiclm_jax.data import records, source
from musiclm_jax.data.workers import Progress, Workers

STREAM = 'semantic'
RUN = 4  # tokens: 160 ms at 25 Hz
_COMMON = 500  # a run that held-out music has more often is silence or a held note, and says nothing
# The information of a clip counts as at least this share of what runs have that no training music has: a clip of held
# notes and silence only is found everywhere, whole.
_LEAST_INFORMATION = 0.5
REASON = 'near-duplicate of training music'
_SHOWN = 20


@dataclasses.dataclass(frozen=True)
class Pair:
  """A held-out clip and the training clip that is most like it.

  Attributes:
    share: of the held-out clip's information that is found in the other at one distance in time, 0 to 1.
  """

  held_out: int
  recording: str
  start: float
  train_recording: str
  train_start: float
  share: float


@dataclasses.dataclass(frozen=True)
class Duplicates:
  """What `find` found; `pairs` are those at or above the threshold, the most alike first."""

  clips: int
  threshold: float
  pairs: tuple[Pair, ...]
  shares: np.ndarray  # float [clips]: the best share of each held-out clip

  def text(self) -> str:
    lines = [f'{len(self.pairs)} of {self.clips} held-out clips are near-duplicates of training music (share of at '
             f'least {self.threshold:g}; the median clip has {np.median(self.shares):.2f})']
    lines += [f'  {p.share:.2f}  {p.recording} at {p.start:g} s  =  {p.train_recording} at {p.train_start:g} s'
              for p in self.pairs[:_SHOWN]]
    if len(self.pairs) > _SHOWN:
      lines.append(f'  ... and {len(self.pairs) - _SHOWN} more')
    return '\n'.join(lines)


@dataclasses.dataclass(frozen=True)
class _Index:
  """Where each run of the held-out clips is: sorted by hash."""

  hash_G: np.ndarray
  clip_G: np.ndarray
  place_G: np.ndarray
  bits_G: np.ndarray
  total: np.ndarray  # bits of each clip, as they count


def runs(tokens_FxQ: np.ndarray) -> np.ndarray:
  """A hash of each run of `RUN` tokens of the first level, uint64 [W]."""
  tokens = np.asarray(tokens_FxQ)[:, 0]
  count = max(len(tokens) - RUN + 1, 0)
  return source.hashed(*(tokens[i:i + count] for i in range(RUN))) if count else np.zeros(0, np.uint64)


def _index(clips: Sequence[np.ndarray], count_U: np.ndarray, total: int) -> _Index:
  """Of the held-out clips, given how often each of their different runs is among all `total` of the training music."""
  hash_G = np.concatenate(clips)
  clip_G = np.repeat(np.arange(len(clips)), [len(c) for c in clips])
  place_G = np.concatenate([np.arange(len(c)) for c in clips])
  _, inverse, held_out_U = np.unique(hash_G, return_inverse=True, return_counts=True)
  most = np.log2(total + 1)
  bits_G = np.where(held_out_U > _COMMON, 0.0, most - np.log2(count_U + 1))[inverse]
  total = np.maximum(np.bincount(clip_G, bits_G, minlength=len(clips)),
                     _LEAST_INFORMATION * most * np.bincount(clip_G, minlength=len(clips)))
  order = np.argsort(hash_G, kind='stable')
  order = order[bits_G[order] > 0]
  return _Index(hash_G[order], clip_G[order], place_G[order], bits_G[order], total)


def _count_shard(corpus: records.RecordSet, hash_U: np.ndarray, number: int) -> tuple[np.ndarray, int]:
  """How often each of these runs is in one training shard, and how many runs that has."""
  count_U, total = np.zeros(len(hash_U), np.int64), 0
  for row in corpus.shard_indices(number):
    runs_W = runs(corpus[int(row)][STREAM])
    place_W = np.minimum(np.searchsorted(hash_U, runs_W), max(len(hash_U) - 1, 0))
    np.add.at(count_U, place_W[hash_U[place_W] == runs_W] if len(hash_U) else place_W[:0], 1)
    total += len(runs_W)
  return count_U, total


def _best_shares(index: _Index, runs_W: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """(held-out clips that share runs with this one, the share at the best distance in time)."""
  first, last = (np.searchsorted(index.hash_G, runs_W, side) for side in ('left', 'right'))
  hits = last - first
  if not hits.any():
    return np.zeros(0, np.int64), np.zeros(0)
  rows = np.repeat(first - np.cumsum(hits) + hits, hits) + np.arange(hits.sum())
  clip, place, bits = index.clip_G[rows], index.place_G[rows], index.bits_G[rows]
  distance = np.repeat(np.arange(len(runs_W)), hits) - place
  # Frames need not fall on the same moments: neighbouring distances count as one, each run of the clip once.
  best: dict[int, float] = {}
  for shift in (0, 1):
    key = np.stack([clip, (distance + shift) // 2, place], axis=1)
    unique, chosen = np.unique(key, axis=0, return_index=True)
    group, inverse = np.unique(unique[:, :2], axis=0, return_inverse=True)
    score = np.bincount(inverse.reshape(-1), bits[chosen])
    for c, value in zip(group[:, 0], score):
      best[c] = max(best.get(c, 0.0), value)
  found = np.array(sorted(best))
  return found, np.array([best[c] for c in found]) / index.total[found]


_Best = dict[int, tuple[float, str, float]]  # (share, recording, start) of the most alike, by held-out clip


def _search_shard(corpus: records.RecordSet, index: _Index, number: int) -> _Best:
  """What one training shard has of the held-out clips."""
  best: _Best = {}
  for row in corpus.shard_indices(number):
    example = corpus[int(row)]
    for clip, share in zip(*_best_shares(index, runs(example[STREAM]))):
      if share > best.get(clip, (0.0,))[0]:
        best[int(clip)] = (float(share), example.get('recording', ''), float(example.get('start', 0.0)))
  return best


def find(directory: str | os.PathLike, *, threshold: float = 0.5, workers: int = 0, progress: Progress | None = None
         ) -> Duplicates:
  """Compares every clip of "test" with every clip of "train". Memory grows with the held-out music only.

  Raises ValueError where the set has no semantic tokens.
  """
  train = records.RecordSet(directory, 'train')
  if STREAM not in train.header.streams:
    raise ValueError(f'{directory} has no {STREAM} tokens to compare, only {", ".join(train.header.streams)}: run '
                     '`musiclm extract` first')
  held_out = records.RecordSet(directory, 'test')
  clips, places = [], []
  for i in range(len(held_out)):
    example = held_out[i]
    clips.append(runs(example[STREAM]))
    places.append((example.get('recording', ''), float(example.get('start', 0.0))))
  hash_U = np.unique(np.concatenate(clips))
  with Workers(workers, train, hash_U) as pool:
    counts = list(pool.map(_count_shard, range(len(train.shards)), progress, 'shards counted'))
  index = _index(clips, sum(count_U for count_U, _ in counts), sum(total for _, total in counts))
  best: _Best = {}
  with Workers(workers, train, index) as pool:
    for found in pool.map(_search_shard, range(len(train.shards)), progress, 'shards compared'):
      for clip, there in found.items():
        best[clip] = max(there, best.get(clip, there))
  pairs = [Pair(i, *places[i], recording, start, share) for i, (share, recording, start) in best.items()
           if share >= threshold]
  shares = np.array([best[i][0] if i in best else 0.0 for i in range(len(clips))])
  return Duplicates(len(clips), threshold, tuple(sorted(pairs, key=lambda p: (-p.share, p.held_out))), shares)


def remove(directory: str | os.PathLike, found: Duplicates) -> records.Manifest:
  """Writes the held-out split again without the clips that were found, and counts them as left out."""
  unwanted = {p.held_out for p in found.pairs}
  return records.rewrite(directory, 'test', lambda index, _: index not in unwanted, REASON)
