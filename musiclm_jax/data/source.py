"""Which example fills which slot: corpora, mixtures, and the index map that orders them.

The order is a pure function of (seed, step, slot), so the step is the data position: there is no iterator to
checkpoint, any number of hosts sees the same global order, and starting at step 5,000,000 costs what step 0
does.
"""
from __future__ import annotations

from collections.abc import Mapping, Sequence
import dataclasses
import fractions
import functools
import hashlib
import importlib.util
import json
import math
import os
from typing import Any, NamedTuple, Protocol, runtime_checkable
import warnings

import numpy as np

Example = dict[str, Any]

# Slots are dealt in blocks in which each corpus has a fixed number of slots; rates finer than this are
# rounded.
MAX_BLOCK = 10_000
_ROUNDS = 6
_MIN_BITS = 6  # tiny corpora are permuted inside 64 values: a Feistel network needs some room to mix
_GOLDEN = 0x9E3779B97F4A7C15
# Uses of the slot hash, so that no two of them share random numbers.
_DEAL, _PERMUTE, _SLOT = 1, 2, 3
READER_VARIABLE = 'MUSICLM_READER'
# Stands for the built-in music in place of a directory: nothing needs to be prepared to try things out.
BUILT_IN = 'builtin'
TASK = 'task:'  # before the name of a registered SeqIO task or mixture
_BUILT_IN_CLIPS = {'train': 4000, 'test': 400}
_BUILT_IN_SECONDS = 10.0


@runtime_checkable
class Corpus(Protocol):
  """Random access to examples. `fetch(indices, seeds) -> list[Example]` is used instead where it is offered;
  there audio may be int16 samples.

  `durations` (float64 [len], seconds) and `text_kinds` (a tuple of kinds for each example), where offered,
  let problems be reported before training starts.
  """

  @property
  def fingerprint(self) -> str:
    """Changes whenever an example does."""

  def __len__(self) -> int: ...

  def __getitem__(self, index: int) -> Example: ...


@dataclasses.dataclass(frozen=True)
class Mixture:
  """Several corpora, drawn in proportion to `rates`; None draws from all as from one corpus, each example
  once.

  Not a corpus itself: it has no order of its own. Mixtures do not nest.
  """

  corpora: tuple[Corpus, ...]
  rates: tuple[float, ...] | None = None

  def __post_init__(self):
    object.__setattr__(self, 'corpora', tuple(self.corpora))
    if self.rates is not None:
      for rate in self.rates:
        if isinstance(rate, bool) or not isinstance(rate, (int, float)):
          raise ValueError(f'mixture rates must be positive numbers, found {rate!r}')
      object.__setattr__(self, 'rates', tuple(map(float, self.rates)))
      if len(self.rates) != len(self.corpora):
        raise ValueError(f'a mixture of {len(self.corpora)} corpora has {len(self.rates)} rates')

  def __len__(self) -> int:
    return sum(len(c) for c in self.corpora)

  @property
  def fingerprint(self) -> str:
    return digest(['mixture', [c.fingerprint for c in self.corpora], self.rates])

  @property
  def lineage(self) -> dict[str, str]:
    """The lineage that all parts share; ValueError names the first two parts that disagree."""
    merged: dict[str, str] = {}
    for corpus in self.corpora:
      for name, value in getattr(corpus, 'lineage', {}).items():
        if merged.setdefault(name, value) != value:
          raise ValueError(f'the mixture holds tokens of two versions of {name}: {merged[name]} and {value}')
    return merged


@dataclasses.dataclass(frozen=True)
class Subset:
  """Some examples of a corpus, in the given order."""

  corpus: Corpus
  indices: np.ndarray = dataclasses.field(compare=False)

  def __len__(self) -> int:
    return len(self.indices)

  def __getitem__(self, index: int) -> Example:
    return self.corpus[int(self.indices[index])]

  def fetch(self, indices: np.ndarray, seeds: np.ndarray) -> list[Example]:
    return fetch(self.corpus, self.indices[indices], seeds)

  @functools.cached_property
  def fingerprint(self) -> str:
    rows = hashlib.sha256(np.asarray(self.indices, np.int64).tobytes()).hexdigest()
    return digest(['subset', self.corpus.fingerprint, rows])

  @property
  def durations(self) -> np.ndarray | None:
    values = getattr(self.corpus, 'durations', None)
    return None if values is None else np.asarray(values)[self.indices]

  @property
  def text_kinds(self) -> list[tuple[str, ...]] | None:
    values = getattr(self.corpus, 'text_kinds', None)
    return None if values is None else [values[int(i)] for i in self.indices]

  def __getattr__(self, name: str) -> Any:
    if name not in ('manifest', 'lineage'):
      raise AttributeError(name)
    return getattr(self.corpus, name)


def digest(value: Any) -> str:
  """Sixteen hex digits of the JSON form of `value`."""
  return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]


def parts(corpus: Corpus | Mixture) -> tuple[tuple[Corpus, ...], tuple[float, ...] | None]:
  """The corpora of a mixture and their rates; a corpus is a mixture of itself."""
  return (corpus.corpora, corpus.rates) if isinstance(corpus, Mixture) else ((corpus,), None)


def fetch(corpus: Corpus, indices: np.ndarray, seeds: np.ndarray) -> list[Example]:
  """The examples at `indices`. `seeds` (uint64) feed whatever is random in the corpus's own preprocessing."""
  if hasattr(corpus, 'fetch'):
    return corpus.fetch(indices, seeds)
  return [corpus[int(i)] for i in indices]


def mix(x: np.ndarray) -> np.ndarray:
  """The finaliser of splitmix64 (Steele, Lea and Flood 2014): a bijection of uint64 that scatters bits."""
  x = np.asarray(x, np.uint64)
  x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
  x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
  return x ^ (x >> np.uint64(31))


def hashed(*words: int | np.ndarray) -> np.ndarray:
  """A uint64 hash of the words, broadcast against one another. Order matters."""
  with np.errstate(over='ignore'):
    state = np.uint64(0)
    for word in words:
      if isinstance(word, int):
        word &= 0xFFFFFFFFFFFFFFFF
      word = np.asarray(word).astype(np.uint64)
      state = mix((state ^ word) + np.uint64(_GOLDEN))
    return np.asarray(state)


def permuted(offset: np.ndarray, length: int, key: np.ndarray) -> np.ndarray:
  """The image of `offset` under the permutation of [0, length) that `key` chooses; no table is built.

  A Feistel network over the next power of two, walked along its cycle until it is back inside the range
  (Black and Rogaway 2002, "Ciphers with arbitrary finite domains"). `offset` and `key` (uint64) have the same
  shape; each element may have a key of its own.
  """
  bits = max((length - 1).bit_length(), _MIN_BITS)
  low_bits, high_bits = np.uint64(bits // 2), np.uint64(bits - bits // 2)
  low_mask, high_mask = (np.uint64((1 << int(b)) - 1) for b in (low_bits, high_bits))
  value = np.asarray(offset, np.uint64).copy()
  pending = np.arange(value.size)
  keys = [hashed(key, r) for r in range(_ROUNDS)]
  while pending.size:
    x = value[pending]
    high, low = x >> low_bits, x & low_mask
    for r in range(_ROUNDS):  # the halves differ by up to a bit, so each round changes one of them in place
      if r % 2:
        low = low ^ (mix(high + keys[r][pending]) & low_mask)
      else:
        high = high ^ (mix(low + keys[r][pending]) & high_mask)
    x = (high << low_bits) | low
    value[pending] = x
    pending = pending[x >= np.uint64(length)]
  return value.astype(np.int64)


class Draw(NamedTuple):
  """What fills some slots: corpus number, example index, random seed and epoch of each."""

  corpus: np.ndarray  # int64 [N]
  index: np.ndarray  # int64 [N]
  seed: np.ndarray  # uint64 [N]
  epoch: np.ndarray  # int64 [N]


def _shares(rates: Sequence[float]) -> tuple[int, ...]:
  """Slots of each corpus in one block: the smallest whole numbers in the ratio of the rates."""
  if not rates or any(not math.isfinite(r) or r <= 0 for r in rates):
    raise ValueError(f'mixture rates must be positive numbers, found {tuple(rates)}')
  exact = [fractions.Fraction(repr(float(r))) for r in rates]
  scale = math.lcm(*(f.denominator for f in exact))
  counts = [int(f * scale) for f in exact]
  divisor = math.gcd(*counts)
  counts = [c // divisor for c in counts]
  if sum(counts) <= MAX_BLOCK:
    return tuple(counts)
  # Largest remainder: the shares still sum to the block, each within one slot of its rate.
  total = sum(exact)
  ideal = [f * MAX_BLOCK / total for f in exact]
  counts = [int(f) for f in ideal]
  for c in sorted(range(len(counts)), key=lambda c: counts[c] - ideal[c])[:MAX_BLOCK - sum(counts)]:
    counts[c] += 1
  if 0 in counts:
    raise ValueError(f'mixture rate {rates[counts.index(0)]} is under 1/{MAX_BLOCK} of the sum of '
                     f'{tuple(rates)}')
  return tuple(counts)


@dataclasses.dataclass(frozen=True)
class IndexMap:
  """(step, slots) -> which examples, with which seeds: the order of a training run.

  Every epoch over a corpus is a new permutation of it. A mixture deals its slots in blocks with an exact
  share for each corpus, shuffled inside the block; each corpus is walked in its own order, so within an epoch
  none of its examples is left out or repeated, whatever the rates.

  Attributes:
    lengths: examples in each corpus.
    rates: how often each corpus is drawn, in any unit; None draws all examples equally often, as one corpus.
    seed: chooses the order.
    batch_size: slots of one step, over all hosts.
  """

  lengths: tuple[int, ...]
  rates: tuple[float, ...] | None
  seed: int
  batch_size: int

  def __post_init__(self):
    object.__setattr__(self, 'lengths', tuple(int(n) for n in self.lengths))
    if not self.lengths or min(self.lengths) < 1:
      raise ValueError(f'each corpus needs at least one example; the lengths are {self.lengths}')
    if self.batch_size < 1:
      raise ValueError(f'the batch size must be positive, found {self.batch_size}')
    if self.rates is not None and len(self.rates) != len(self.lengths):
      raise ValueError(f'{len(self.lengths)} corpora have {len(self.rates)} rates')
    _ = self.shares  # a bad rate is an error now, not in the first step

  @functools.cached_property
  def shares(self) -> tuple[int, ...] | None:
    """Slots of each corpus in a block of a mixture."""
    return None if self.rates is None or len(self.lengths) == 1 else _shares(self.rates)

  @property
  def fingerprint(self) -> str:
    return digest(['index map 1', self.lengths, self.rates, self.seed, self.batch_size])

  def __call__(self, step: int, slots: np.ndarray) -> Draw:
    """What fills `slots` (int [N], each in [0, batch_size)) of step `step`."""
    place = step * self.batch_size + np.asarray(slots, np.int64)
    seeds = hashed(self.seed, _SLOT, place)
    if self.shares is None:
      total = sum(self.lengths)
      epoch, offset = np.divmod(place, total)
      index = permuted(offset, total, hashed(self.seed, _PERMUTE, 0, epoch))
      bounds = np.cumsum((0, *self.lengths))
      corpus = np.searchsorted(bounds, index, side='right') - 1
      return Draw(corpus, index - bounds[corpus], seeds, epoch)
    corpus, position = self._deal(place)
    lengths = np.asarray(self.lengths, np.int64)[corpus]
    epoch, offset = np.divmod(position, lengths)
    index = np.empty_like(offset)
    for c in np.unique(corpus):
      rows = corpus == c
      key = hashed(self.seed, _PERMUTE, int(c) + 1, epoch[rows])
      index[rows] = permuted(offset[rows], self.lengths[c], key)
    return Draw(corpus, index, seeds, epoch)

  def _deal(self, place: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The corpus at each global place and how often that corpus was drawn before it."""
    shares = np.asarray(self.shares, np.int64)
    size = int(shares.sum())
    block, inside = np.divmod(place, size)
    blocks, row = np.unique(block, return_inverse=True)
    order = np.argsort(hashed(self.seed, _DEAL, blocks[:, None], np.arange(size)), axis=1, kind='stable')
    labels = np.repeat(np.arange(len(shares)), shares)[order]  # [blocks, size]: the corpus at each place
    corpus = labels[row, inside]
    rank = np.empty_like(labels)  # places of the same corpus earlier in the block
    for c in range(len(shares)):
      mine = labels == c
      rank[mine] = (np.cumsum(mine, axis=1) - 1)[mine]
    return corpus, block * shares[corpus] + rank[row, inside]


def open_corpus(path: str | os.PathLike | Mapping[str, float] | Sequence[str], split: str, reader: str = 'auto'
                ) -> Corpus | Mixture:
  """The examples of one split of a record set, or of several together.

  Args:
    path: a directory with a `manifest.json`, as `prepare` and `extract` write them; "task:NAME", a registered
      SeqIO task or mixture over such; or "builtin", music that is composed as it is read. Of several a mapping to
      their shares of the examples, or a sequence: every example of each is then seen equally often.
    split: "train" or "test", or whatever the record set has.
    reader: "seqio" reads through a SeqIO task, "direct" without TensorFlow, with equal examples; "auto" takes
      SeqIO where it is installed. The environment variable MUSICLM_READER, where set, replaces "auto".

  Raises:
    FileNotFoundError: no record set there, or a shard of it is missing.
    ValueError: another format, no such split, a split without records, shares that are not positive.
  """
  from musiclm_jax.data import records
  if isinstance(path, (Mapping, list, tuple)):
    corpora = tuple(open_corpus(one, split, reader) for one in path)
    if not corpora:
      raise ValueError('no record set is named')
    if nested := [one for one, corpus in zip(path, corpora) if isinstance(corpus, Mixture)]:
      raise ValueError(f'{nested[0]} is a mixture, which cannot be part of another here: register one mixture of all')
    return Mixture(corpora, tuple(path.values()) if isinstance(path, Mapping) else None)
  if str(path) == BUILT_IN:
    return _built_in(split)
  if str(path).startswith(TASK):
    from musiclm_jax.data import seqio_source
    return seqio_source.open_task(str(path).removeprefix(TASK), split)
  if reader == 'auto':
    reader = os.environ.get(READER_VARIABLE, 'auto')
  if reader not in ('auto', 'seqio', 'direct'):
    raise ValueError(f'the reader must be "auto", "seqio" or "direct", found {reader!r}')
  corpus = records.RecordSet(path, split)
  if reader == 'direct' or (reader == 'auto' and importlib.util.find_spec('seqio') is None):
    return corpus
  try:
    from musiclm_jax.data import seqio_source  # takes seconds: it imports TensorFlow
  except ImportError as error:
    if reader == 'seqio':
      raise
    warnings.warn(f'SeqIO cannot be imported ({error}); the records are read without it', stacklevel=1)
    return corpus
  return seqio_source.open_records(path, split)


def _built_in(split: str) -> Corpus:
  from musiclm_jax.data import composer
  if split not in _BUILT_IN_CLIPS:
    raise ValueError(f'the built-in music has no split {split!r}; it has {", ".join(_BUILT_IN_CLIPS)}')
  first = 0 if split == 'train' else _BUILT_IN_CLIPS['train']
  return composer.Corpus(first=first, size=_BUILT_IN_CLIPS[split], seconds=_BUILT_IN_SECONDS, split=split)
