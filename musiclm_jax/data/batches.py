"""Batches of crops: `batches(step)` is a pure function of the step, computed on the host with NumPy.

Shapes: B examples of this host, N samples, L text positions, F frames, Q levels.
"""
from __future__ import annotations

import collections
from collections.abc import Mapping
import dataclasses
import fractions
import functools
import math
from typing import NamedTuple, Protocol
import warnings

import numpy as np

from musiclm_jax import specs
from musiclm_jax.data import records, source

# How often each kind of text is drawn: short form, long form, playlist title, label at 2:2:1:1 as in MuLan
# (arXiv 2208.12415, section 3).
TEXT_RATES = {'tags': 2.0, 'description': 2.0, 'title': 1.0, 'label': 1.0}
ORDERS = ('shuffled', 'sequential')
_CROP, _KIND, _TEXT, _NOISE, _NOISE_CROP = 101, 102, 103, 104, 105  # uses of the slot seed
_SCAN_LIMIT = 4096  # a corpus without recorded durations is looked through at the start only up to this size


class ArraySpec(NamedTuple):
  """Shape and dtype of one array of a batch."""

  shape: tuple[int, ...]
  dtype: np.dtype


class Tokenizer(Protocol):
  """What turns text into ids int32 [length], filled up with 0. `text.tokenizer.Tokenizer` is one."""

  @property
  def content_hash(self) -> str: ...

  @property
  def vocab_size(self) -> int: ...

  def encode(self, text: str, length: int) -> np.ndarray: ...


def _uniform(seed: int, use: int) -> float:
  """A number in [0, 1) for one use of a slot seed."""
  return int(source.hashed(np.uint64(seed), use) >> np.uint64(11)) * 2.0 ** -53


def _choice(seed: int, use: int, count: int) -> int:
  return min(int(_uniform(seed, use) * count), count - 1)


@dataclasses.dataclass(frozen=True, eq=False)
class Batches:
  """Base of the batches below.

  Calling one gives a dict of arrays for this host: rows [p * B / P, (p + 1) * B / P) of the global batch,
  with `slot` int32, the row's place in the global batch. The order and the content of the global batch are
  the same for any number of hosts.

  Attributes:
    corpus: a corpus or a mixture.
    batch_size: examples of one step, over all hosts.
    seed: chooses the order and all crops.
    order: "shuffled", without end; or "sequential" for evaluation and extraction: each example once, in
      order, with `weight` float32 (0 for the rows that pad the last batch).
    unusable: what happens where examples cannot be used (too short, without text): "refuse" is an error with
      the counts, "drop" leaves them out with a warning.
    min_clips: how many usable examples there must be; 0 means a batch. Evaluation may repeat examples of a
      small held-out set with 1.
  """

  corpus: source.Corpus | source.Mixture
  _: dataclasses.KW_ONLY
  batch_size: int
  seed: int = 0
  order: str = 'shuffled'
  unusable: str = 'refuse'
  min_clips: int = 0

  def __post_init__(self):
    if self.order not in ORDERS:
      raise ValueError(f'the order must be one of {ORDERS}, found {self.order!r}')
    if self.unusable not in ('refuse', 'drop'):
      raise ValueError(f'unusable must be "refuse" or "drop", found {self.unusable!r}')
    needed = self.min_clips or (1 if self.order == 'sequential' else self.batch_size)
    usable = sum(len(c) for c in self._parts[0])
    if usable < needed:
      why = f' ({self._lost})' if self._lost else ''
      raise ValueError(f'{usable} usable clips, batch {needed}: use a smaller batch or more music{why}')
    _ = self._map  # errors in rates or sizes are raised here, not in the first step

  @functools.cached_property
  def _parts(self) -> tuple[tuple[source.Corpus, ...], tuple[float, ...] | None]:
    """The corpora with what cannot be used taken out."""
    corpora, rates = source.parts(self.corpus)
    masks, message = self._masks, self._lost
    if not message:
      return corpora, rates
    if self.unusable == 'refuse':
      raise ValueError(message)
    warnings.warn(f'{message}; they are left out', stacklevel=1)
    kept = [c if m is None or m.all() else source.Subset(c, np.flatnonzero(m))
            for c, m in zip(corpora, masks)]
    if rates is not None:
      rates = tuple(r for r, c in zip(rates, kept) if len(c))
    return tuple(c for c in kept if len(c)), rates

  @functools.cached_property
  def _masks(self) -> list[np.ndarray | None]:
    corpora, _ = source.parts(self.corpus)
    for corpus in corpora:
      self._check_corpus(corpus)
    return [self._usable(c) for c in corpora]

  @functools.cached_property
  def _lost(self) -> str:
    """What cannot be used, and why; empty where everything can."""
    lost = sum(int(np.sum(~m)) for m in self._masks if m is not None)
    return self._unusable_message(lost, sum(len(c) for c in source.parts(self.corpus)[0])) if lost else ''

  @functools.cached_property
  def _map(self) -> source.IndexMap | None:
    corpora, rates = self._parts
    return source.IndexMap(tuple(len(c) for c in corpora), rates, self.seed, self.batch_size)

  @functools.cached_property
  def _bounds(self) -> np.ndarray:
    return np.cumsum((0, *(len(c) for c in self._parts[0])))

  @property
  def num_clips(self) -> int:
    """Usable examples."""
    return int(self._bounds[-1])

  @property
  def num_batches(self) -> int:
    """Batches in which a sequential pass shows every example once."""
    return -(-self.num_clips // self.batch_size)

  @functools.cached_property
  def fingerprint(self) -> str:
    """Changes with the corpus, the order, or anything that changes a batch."""
    return source.digest([type(self).__name__, self.corpus.fingerprint, self._settings()])

  def _settings(self) -> dict[str, object]:
    """The fields beside the corpus that change a batch, as plain values."""
    return {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != 'corpus'}

  def epochs(self, step: int) -> float:
    """Passes over the corpus in the first `step` steps; for a mixture with rates, over its most used part."""
    corpora, rates = self._parts
    drawn = step * self.batch_size
    if rates is None or self.order == 'sequential':
      return drawn / self.num_clips
    return max(drawn * r / sum(rates) / len(c) for r, c in zip(rates, corpora))

  def draw(self, step: int, slots: np.ndarray) -> source.Draw:
    """Which examples fill `slots` of `step`, as positions in the usable part of each corpus."""
    if self.order == 'shuffled':
      return self._map(step, slots)
    place = np.minimum(step * self.batch_size + slots, self.num_clips - 1)
    corpus = np.searchsorted(self._bounds, place, side='right') - 1
    seeds = source.hashed(self.seed, source._SLOT, place)
    return source.Draw(corpus, place - self._bounds[corpus], seeds, np.zeros_like(place))

  def examples(self, step: int, process_index: int = 0, process_count: int = 1) -> list[source.Example]:
    """The whole examples, before cropping, that fill this host's rows of `step`; raises as a call does."""
    return self._examples(self._drawn(step, process_index, process_count)[1])

  def _drawn(self, step: int, process_index: int, process_count: int) -> tuple[np.ndarray, source.Draw]:
    if self.batch_size % process_count:
      raise ValueError(f'batch {self.batch_size} is not a multiple of {process_count} processes')
    if self.order == 'sequential' and not 0 <= step < self.num_batches:
      raise IndexError(f'batch {step} of {self.num_batches}')
    rows = self.batch_size // process_count
    slots = np.arange(process_index * rows, (process_index + 1) * rows)
    return slots, self.draw(step, slots)

  def _examples(self, drawn: source.Draw) -> list[source.Example]:
    examples: list[source.Example | None] = [None] * len(drawn.index)
    for c, corpus in enumerate(self._parts[0]):
      mine = np.flatnonzero(drawn.corpus == c)
      if mine.size:
        for row, example in zip(mine, source.fetch(corpus, drawn.index[mine], drawn.seed[mine]), strict=True):
          examples[row] = example
    return examples

  def __call__(self, step: int, process_index: int = 0, process_count: int = 1) -> dict[str, np.ndarray]:
    """This host's rows of the batch of `step`.

    Raises:
      ValueError: the batch cannot be divided among the hosts, an example cannot be used.
      IndexError: a sequential pass has no such step.
    """
    slots, drawn = self._drawn(step, process_index, process_count)
    batch = self._collate(self._examples(drawn), [int(s) for s in drawn.seed])
    batch['slot'] = slots.astype(np.int32)
    if self.order == 'sequential':
      batch['weight'] = (step * self.batch_size + slots < self.num_clips).astype(np.float32)
    return batch

  def spec(self) -> dict[str, ArraySpec]:
    """Shapes and dtypes of the global batch."""
    arrays = self._row_spec()
    arrays['slot'] = ArraySpec((), np.dtype(np.int32))
    if self.order == 'sequential':
      arrays['weight'] = ArraySpec((), np.dtype(np.float32))
    return {name: ArraySpec((self.batch_size, *a.shape), a.dtype) for name, a in arrays.items()}

  def _check_corpus(self, corpus: source.Corpus) -> None:
    """Raises ValueError where the corpus is of the wrong kind."""
    raise NotImplementedError

  def _usable(self, corpus: source.Corpus) -> np.ndarray | None:
    """Mask of the examples that can be used; None where all can or it is not known before reading."""
    raise NotImplementedError

  def _unusable_message(self, lost: int, total: int) -> str:
    raise NotImplementedError

  def _collate(self, examples: list[source.Example], seeds: list[int]) -> dict[str, np.ndarray]:
    raise NotImplementedError

  def _row_spec(self) -> dict[str, ArraySpec]:
    raise NotImplementedError


def _name(example: source.Example) -> str:
  return example.get('recording', 'an example')


def _header(corpus: source.Corpus) -> records.Header | None:
  manifest = getattr(corpus, 'manifest', None)
  return getattr(manifest, 'header', None)


@dataclasses.dataclass(frozen=True, eq=False)
class AudioBatches(Batches):
  """Random crops of waveforms.

  {'audio': float32 [B, N] in [-1, 1], 'length': int32 [B], 'slot': int32 [B]}: the samples from `length` on
  are zeros that fill up a clip shorter than the crop. Sequential batches start every crop at the clip's
  beginning. Audio of more than one channel is [B, N, channels].

  Attributes:
    seconds: length of a crop.
    sample_rate, channels: what the corpus must have.
    noise: a corpus of noises; each example then comes with a crop of one, 'noise', in the shape of the audio. Which one
      is drawn by the slot. A noise shorter than the crop is repeated; one channel serves all.
  """

  _: dataclasses.KW_ONLY
  seconds: float
  sample_rate: int = 24000
  channels: int = 1
  noise: source.Corpus | None = None

  @property
  def samples(self) -> int:
    return specs.frames_in(self.seconds, self.sample_rate)

  def _check_corpus(self, corpus: source.Corpus) -> None:
    header = _header(corpus)
    if header is None:
      return
    if header.kind != 'audio':
      raise ValueError(f'audio is needed, but the record set holds {header.kind}: '
                       f'{", ".join(header.streams)}')
    if (rate := records.rate_of(header)) != self.sample_rate:
      raise ValueError(f'the record set has {rate} samples a second, the network takes {self.sample_rate}')
    if (there := records.channels_of(header)) != self.channels:
      raise ValueError(f'the record set has {there} channel{"s" * (there > 1)}, the network takes {self.channels}: '
                       f'prepare the music again with --channels {self.channels}')

  def _usable(self, corpus: source.Corpus) -> np.ndarray | None:
    return None

  def _settings(self) -> dict[str, object]:
    return {**super()._settings(), 'noise': self.noise and self.noise.fingerprint}

  def _collate(self, examples: list[source.Example], seeds: list[int]) -> dict[str, np.ndarray]:
    audio_BxN = np.zeros((len(examples), *self._shape), np.float32)
    length_B = np.zeros(len(examples), np.int32)
    for row, (example, seed) in enumerate(zip(examples, seeds)):
      clip = self._clip(example, (self.channels,))
      starts = max(len(clip) - self.samples, 0) + 1
      start = 0 if self.order == 'sequential' else _choice(seed, _CROP, starts)
      crop = clip[start:start + self.samples]
      audio_BxN[row, :len(crop)] = _floats(crop)
      length_B[row] = len(crop)
    noise = {} if self.noise is None else {'noise': self._noises(seeds)}
    return {'audio': audio_BxN, 'length': length_B, **noise}

  @property
  def _shape(self) -> tuple[int, ...]:
    return (self.samples, *specs.channel_axis(self.channels))

  def _clip(self, example: source.Example, channels: tuple[int, ...]) -> np.ndarray:
    """The sound of an example, [N] of one channel or [N, C]; ValueError where it is not what the network takes."""
    clip, rate = example['audio'], int(example.get('sample_rate', self.sample_rate))
    if rate != self.sample_rate:
      raise ValueError(f'{_name(example)} has {rate} samples a second, the network takes '
                       f'{self.sample_rate}')
    if (there := 1 if clip.ndim == 1 else clip.shape[1]) not in channels:
      raise ValueError(f'{_name(example)} has {there} channel{"s" * (there > 1)}, the network takes {self.channels}')
    return clip

  def _noises(self, seeds: list[int]) -> np.ndarray:
    """A crop of noise for each slot, in the shape of the audio."""
    noise_BxN = np.zeros((len(seeds), *self._shape), np.float32)
    chosen = np.array([_choice(seed, _NOISE, len(self.noise)) for seed in seeds])
    for row, example in enumerate(source.fetch(self.noise, chosen, np.array(seeds, np.uint64))):
      clip = self._clip(example, (1, self.channels))
      start = _choice(seeds[row], _NOISE_CROP, max(len(clip) - self.samples, 0) + 1)
      crop = np.take(clip, np.arange(start, start + self.samples), axis=0, mode='wrap')
      noise_BxN[row] = _floats(crop).reshape(len(crop), -1) if self.channels > 1 else _floats(crop)
    return noise_BxN

  def _row_spec(self) -> dict[str, ArraySpec]:
    audio = ArraySpec(self._shape, np.dtype(np.float32))
    return {'audio': audio, 'length': ArraySpec((), np.dtype(np.int32)),
            **({} if self.noise is None else {'noise': audio})}


def _floats(audio: np.ndarray) -> np.ndarray:
  return records.from_pcm(audio) if audio.dtype == np.int16 else audio


@dataclasses.dataclass(frozen=True, eq=False)
class AudioTextBatches(AudioBatches):
  """Crops of waveforms, each with one of the clip's texts: adds 'text' int32 [B, L], 0 is padding.

  A kind is drawn among those that the clip has, by its rate, then a text of that kind. Kinds without a rate
  are never used.

  Attributes:
    tokenizer: `encode(text, text_length)` gives the ids.
    text_length: L.
    vocab_size: rows of the embedding that the ids look up, which must be enough; 0 is not checked.
    kinds: rate of each kind of text.
  """

  _: dataclasses.KW_ONLY
  tokenizer: Tokenizer
  text_length: int
  vocab_size: int = 0
  kinds: Mapping[str, float] = dataclasses.field(default_factory=lambda: dict(TEXT_RATES))

  def __post_init__(self):
    if not self.kinds or any(rate <= 0 for rate in self.kinds.values()):
      raise ValueError(f'the rates of the kinds of text must be positive, found {dict(self.kinds)}')
    if self.vocab_size and self.vocab_size < self.tokenizer.vocab_size:
      raise ValueError(f'the vocabulary has {self.tokenizer.vocab_size} pieces and the text tower only '
                       f'{self.vocab_size} rows: set MULAN_TEXT_VOCAB to as many or more')
    super().__post_init__()

  def _usable(self, corpus: source.Corpus) -> np.ndarray | None:
    kinds = getattr(corpus, 'text_kinds', None)
    if kinds is None:
      return None
    known = {k: not self.kinds.keys().isdisjoint(k) for k in set(kinds)}
    return np.fromiter((known[k] for k in kinds), bool, len(kinds))

  def _unusable_message(self, lost: int, total: int) -> str:
    return (f'{lost} of {total} clips have no text of the kinds {", ".join(self.kinds)}: prepare the music '
            'again with --captions FILE')

  @functools.cached_property
  def fingerprint(self) -> str:
    return source.digest(
        [type(self).__name__, self.corpus.fingerprint, self._settings(), self.tokenizer.content_hash])

  def _settings(self) -> dict[str, object]:
    return {name: value for name, value in super()._settings().items() if name != 'tokenizer'}

  def text_of(self, example: source.Example, seed: int) -> str:
    """The text that an example contributes in a slot with this seed."""
    texts = collections.defaultdict(list)
    for text in example.get('texts', ()):
      if text['kind'] in self.kinds:
        texts[text['kind']].append(text['text'])
    if not texts:
      raise ValueError(f'{_name(example)} has no text of the kinds {", ".join(self.kinds)}: prepare the '
                       'music again with --captions FILE')
    kinds = sorted(texts)
    edges = np.cumsum([self.kinds[k] for k in kinds])
    place = int(np.searchsorted(edges, _uniform(seed, _KIND) * edges[-1], side='right'))
    kind = kinds[min(place, len(kinds) - 1)]
    return texts[kind][_choice(seed, _TEXT, len(texts[kind]))]

  def _collate(self, examples: list[source.Example], seeds: list[int]) -> dict[str, np.ndarray]:
    batch = super()._collate(examples, seeds)
    text_BxL = np.zeros((len(examples), self.text_length), np.int32)
    for row, (example, seed) in enumerate(zip(examples, seeds)):
      text_BxL[row] = self.tokenizer.encode(self.text_of(example, seed), self.text_length)
    batch['text'] = text_BxL
    return batch

  def _row_spec(self) -> dict[str, ArraySpec]:
    return {**super()._row_spec(), 'text': ArraySpec((self.text_length,), np.dtype(np.int32))}


class _Stream(NamedTuple):
  """What a stage reads of one recorded feature."""

  levels: int
  codebook_size: int
  frame_rate: float
  frames: int

  @property
  def rate(self) -> fractions.Fraction:
    """Frames a second as an exact number; 75 and 22.05 are what they say."""
    return fractions.Fraction(self.frame_rate).limit_denominator(10_000)


@dataclasses.dataclass(frozen=True, eq=False)
class TokenBatches(Batches):
  """Crops of token streams for one stage, aligned in time: by feature, int32 [B, F, Q].

  A crop starts at a time where every stream has a frame boundary (the coarsest common grid), so its frames in
  all streams show the same music. A stream without a frame rate gives its single frame. Q is the number of
  levels from the first up to the last that the stage uses. Sequential batches start at the beginning.

  Attributes:
    stage: the streams and the seconds of a crop.
  """

  _: dataclasses.KW_ONLY
  stage: specs.Stage

  @functools.cached_property
  def _streams(self) -> dict[str, _Stream]:
    streams: dict[str, _Stream] = {}
    for spec in self.stage.streams:
      new = _Stream(spec.first_level + spec.levels, spec.codebook_size, spec.frame_rate,
                    spec.frames(self.stage.seconds))
      old = streams.get(spec.feature, new)
      if old[1:] != new[1:]:
        raise ValueError(f'stage {self.stage.name!r} reads {spec.feature!r} with two codebook sizes or frame '
                         'rates')
      streams[spec.feature] = new._replace(levels=max(old.levels, new.levels))
    return streams

  @functools.cached_property
  def _grid(self) -> fractions.Fraction:
    """Seconds between the times at which every stream has a frame boundary."""
    rates = [s.rate for s in self._streams.values() if s.frame_rate]
    if not rates:
      return fractions.Fraction(1)
    # The least common multiple of the frame lengths 1 / rate.
    return fractions.Fraction(
        math.lcm(*(r.denominator for r in rates)), math.gcd(*(r.numerator for r in rates)))

  def _check_corpus(self, corpus: source.Corpus) -> None:
    header = _header(corpus)
    if header is None:
      return
    if header.kind != 'tokens':
      raise ValueError(f'tokens are needed, but the record set holds {header.kind}: run `musiclm extract` '
                       'first')
    for name, wanted in self._streams.items():
      if name not in header.streams:
        raise ValueError(f'stage {self.stage.name!r} needs the stream {name!r}; the record set has '
                         f'{", ".join(header.streams)}')
      held = header.streams[name]
      for field in ('codebook_size', 'frame_rate'):
        if held[field] != getattr(wanted, field):
          raise ValueError(f'stream {name!r}: the record set has {field} {held[field]}, stage '
                           f'{self.stage.name!r} needs {getattr(wanted, field)}')
      if held['levels'] < wanted.levels:
        raise ValueError(f'stream {name!r}: the record set has {held["levels"]} levels, stage '
                         f'{self.stage.name!r} needs {wanted.levels}')

  def _starts(self, example: source.Example) -> int:
    """How many places a crop may start at; 0 or less where the clip is too short."""
    starts = []
    for name, stream in self._streams.items():
      if stream.frame_rate:
        step = int(self._grid * stream.rate)
        starts.append((len(example[name]) - stream.frames) // step + 1)
    return min(starts, default=1)

  def _usable(self, corpus: source.Corpus) -> np.ndarray | None:
    seconds = getattr(corpus, 'durations', None)
    if seconds is not None:
      timed = [s for s in self._streams.values() if s.frame_rate]
      needed = max((s.frames / s.frame_rate for s in timed), default=0.0)
      slack = max((1 / s.frame_rate for s in timed), default=0.0)
      usable = np.asarray(seconds) >= needed - 1e-6
      # The seconds are those of whole frames of the slowest stream; others may reach further.
      unclear = np.flatnonzero(~usable & (np.asarray(seconds) > needed - slack))
      for i in unclear[:_SCAN_LIMIT]:
        usable[i] = self._starts(corpus[int(i)]) > 0
      return usable
    if len(corpus) > _SCAN_LIMIT:
      return None
    return np.fromiter((self._starts(corpus[i]) > 0 for i in range(len(corpus))), bool, len(corpus))

  def _unusable_message(self, lost: int, total: int) -> str:
    return (f'{lost} of {total} clips are shorter than the crop of {self.stage.seconds:g} s of stage '
            f'{self.stage.name!r}: train on shorter crops, or prepare the music with '
            f'--min_seconds {self.stage.seconds:g}')

  def _collate(self, examples: list[source.Example], seeds: list[int]) -> dict[str, np.ndarray]:
    batch = {name: np.zeros((len(examples), s.frames, s.levels), np.int32)
             for name, s in self._streams.items()}
    for row, (example, seed) in enumerate(zip(examples, seeds)):
      if (starts := self._starts(example)) < 1:
        raise ValueError(f'{_name(example)} is shorter than the crop of '
                         f'{self.stage.seconds:g} s of stage {self.stage.name!r}')
      place = 0 if self.order == 'sequential' else _choice(seed, _CROP, starts)
      for name, stream in self._streams.items():
        # Seconds first, frames from them: exact, because the grid is a multiple of every frame.
        first = int(place * self._grid * stream.rate)
        batch[name][row] = example[name][first:first + stream.frames, :stream.levels]
    return batch

  def _row_spec(self) -> dict[str, ArraySpec]:
    return {n: ArraySpec((s.frames, s.levels), np.dtype(np.int32)) for n, s in self._streams.items()}
