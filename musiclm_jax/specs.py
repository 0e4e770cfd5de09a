"""What the tokens are: streams, vocabularies, offsets, frame rates and sequence lengths.

Every size that another file needs is a property here and a literal nowhere else. The file is framework
free (standard library only), so data pipelines, serving and documentation can all read it.
"""
from __future__ import annotations

import dataclasses
import hashlib
import importlib
import json
import math
from collections.abc import Collection, Mapping
from typing import Any

SCHEMA_VERSION = 1
# Shared time axis of all streams, in ticks a second: the least common multiple of the frame rates in use.
TICKS_PER_SECOND = 600


def frames_in(seconds: float, frame_rate: float) -> int:
  """Whole frames in `seconds` at `frame_rate` a second; exact where the product is a whole number."""
  return int(math.floor(seconds * frame_rate + 1e-6))


def channel_axis(channels: int) -> tuple[int, ...]:
  """What follows the samples in the shape of audio: nothing for one channel, else the channels as a last axis."""
  return () if channels == 1 else (channels,)


@dataclasses.dataclass(frozen=True)
class TokenSpec:
  """A stream of discrete tokens, or a range of levels of one.

  A frame holds one token for each level of a residual quantizer. `frame_rate` 0 means that the stream has
  exactly one frame whatever the length of the audio (the MuLan embedding of a clip).

  Attributes:
    name: what the tokens are called in a stage ("mulan", "semantic", "coarse", "fine").
    codebook_size: K, the number of codes of each level.
    levels: Q, the number of residual levels (1 for k-means).
    frame_rate: frames a second, or 0 for a single frame a clip.
    stream: the record feature that holds them; "" means `name`.
    first_level: index of the first level within the stream.
  """

  name: str
  codebook_size: int
  levels: int = 1
  frame_rate: float = 0.0
  stream: str = ''
  first_level: int = 0

  def __post_init__(self):
    if self.codebook_size < 1 or self.levels < 1 or self.frame_rate < 0 or self.first_level < 0:
      raise ValueError(f'token spec {self.name!r}: sizes must be positive, found {self}')

  @property
  def feature(self) -> str:
    return self.stream or self.name

  @property
  def vocab_size(self) -> int:
    """Tokens of level q occupy [q * K, (q + 1) * K)."""
    return self.levels * self.codebook_size

  @property
  def level_slice(self) -> slice:
    return slice(self.first_level, self.first_level + self.levels)

  @property
  def tokens_per_second(self) -> float:
    return self.frame_rate * self.levels

  @property
  def bitrate(self) -> float:
    """Nominal bits a second: frame_rate * levels * log2(K)."""
    return self.tokens_per_second * math.log2(self.codebook_size)

  def frames(self, seconds: float) -> int:
    return frames_in(seconds, self.frame_rate) if self.frame_rate else 1

  def tokens(self, seconds: float) -> int:
    return self.frames(seconds) * self.levels

  def part(self, name: str, first_level: int, levels: int) -> TokenSpec:
    """The range of levels [first_level, first_level + levels) of this stream under its own name."""
    if first_level + levels > self.levels:
      raise ValueError(
          f'{name}: levels {first_level} to {first_level + levels - 1} are not all among the {self.levels} '
          f'levels of {self.name}')
    return dataclasses.replace(
        self, name=name, levels=levels, stream=self.feature, first_level=self.first_level + first_level)


@dataclasses.dataclass(frozen=True)
class Stage:
  """One language model of the hierarchy: p(target | conditions), over crops of `seconds`.

  MusicLM (arXiv 2301.11325, section 3.2) has three: semantic, coarse acoustic and fine acoustic.
  """

  name: str
  conditions: tuple[TokenSpec, ...]
  target: TokenSpec
  seconds: float

  def __post_init__(self):
    object.__setattr__(self, 'conditions', tuple(self.conditions))
    names = [s.name for s in self.streams]
    if len(set(names)) != len(names):
      raise ValueError(f'stage {self.name!r} names a stream twice: {names}')

  @property
  def streams(self) -> tuple[TokenSpec, ...]:
    """All streams in the order of the sequence: conditions first, then the target."""
    return (*self.conditions, self.target)

  @property
  def timeless(self) -> tuple[str, ...]:
    """Names of the conditions that describe the music as a whole (a text, a clip) and do not follow it in time."""
    return tuple(s.name for s in self.conditions if not s.frame_rate)

  def condition_tokens(self, seconds: float) -> int:
    """Positions before the target; without a condition one, from which the first token can be predicted."""
    return sum(s.tokens(seconds) for s in self.conditions) if self.conditions else 1

  @property
  def condition_length(self) -> int:
    return self.condition_tokens(self.seconds)

  @property
  def length(self) -> int:
    """Positions of one training sequence: MusicLM's are 762, 2262 and 1800."""
    return self.condition_length + self.target.tokens(self.seconds)

  @property
  def vocab_size(self) -> int:
    """Rows of the unified vocabulary, without the null rows."""
    return sum(s.vocab_size for s in self.streams)

  def offset(self, spec: TokenSpec) -> int:
    """First row of `spec` in the unified vocabulary."""
    return sum(s.vocab_size for s in self.streams[:self.streams.index(spec)])

  @property
  def start_row(self) -> int:
    """The row that starts the sequence of a stage without conditions, which has no null rows."""
    return self.vocab_size

  def null_row(self, spec: TokenSpec) -> int:
    """The row that stands for a dropped condition; the null rows follow the vocabulary."""
    return self.vocab_size + self.conditions.index(spec)


def _encode(value: Any) -> Any:
  if dataclasses.is_dataclass(value) and not isinstance(value, type):
    kind = type(value)
    fields = {f.name: _encode(getattr(value, f.name)) for f in dataclasses.fields(value) if f.init}
    return {'type': f'{kind.__module__}.{kind.__qualname__}', **fields}
  if isinstance(value, (list, tuple)):
    return [_encode(v) for v in value]
  if isinstance(value, Mapping):
    if 'type' in value:
      raise TypeError('a mapping with the key "type" cannot be written to specs.json')
    return {str(k): _encode(v) for k, v in value.items()}
  if value is None or isinstance(value, (bool, int, float, str)):
    return value
  raise TypeError(f'{value!r} of type {type(value).__name__} cannot be written to specs.json')


def _decode(value: Any, kinds: Collection[type] | None) -> Any:
  if isinstance(value, list):
    return tuple(_decode(v, kinds) for v in value)
  if not isinstance(value, dict):
    return value
  fields = {k: _decode(v, kinds) for k, v in value.items() if k != 'type'}
  if 'type' not in value:
    return fields
  if kinds is not None and value['type'] not in {f'{kind.__module__}.{kind.__qualname__}' for kind in kinds}:
    raise ValueError(f'specs.json names {value["type"]!r}, which does not belong there')
  module, _, name = value['type'].rpartition('.')
  # Only dataclasses of this package: the file is data and must not be able to name code.
  root = __name__.partition('.')[0]
  kind = None
  if module == root or module.startswith(root + '.'):
    try:
      kind = getattr(importlib.import_module(module), name, None)
    except ModuleNotFoundError:
      kind = None
  if not (isinstance(kind, type) and dataclasses.is_dataclass(kind) and kind.__dataclass_params__.frozen):
    raise ValueError(f'specs.json names {value["type"]!r}, which is not a frozen dataclass of {root}')
  known = {f.name for f in dataclasses.fields(kind) if f.init}
  if unknown := sorted(set(fields) - known):
    raise ValueError(f'specs.json: {name} has no field {unknown[0]!r}; it was written by another version')
  return kind(**fields)


def to_json(value: Any) -> str:
  """A frozen dataclass (nested ones, tuples and plain values included) as JSON text."""
  return json.dumps({'schema': SCHEMA_VERSION, 'value': _encode(value)}, indent=2, sort_keys=True)


def from_json(text: str, kinds: Collection[type] | None = None) -> Any:
  """The inverse of `to_json`, for dataclasses of this package, or of `kinds` alone: no other module is imported then.

  Raises ValueError for another schema or another type.
  """
  document = json.loads(text)
  if document.get('schema') != SCHEMA_VERSION:
    raise ValueError(f'specs.json has schema {document.get("schema")}; this version reads {SCHEMA_VERSION}')
  return _decode(document['value'], kinds)


def fingerprint(value: Any) -> str:
  """Sixteen hex digits that change whenever a field of `value` does."""
  return hashlib.sha256(to_json(value).encode()).hexdigest()[:16]


def first_difference(a: Any, b: Any, path: str = '') -> str | None:
  """The first field at which two dataclasses differ, as "path: a != b"; None where they are equal."""
  if dataclasses.is_dataclass(a) and type(a) is type(b):
    for field in dataclasses.fields(a):
      name = f'{path}.{field.name}' if path else field.name
      if difference := first_difference(getattr(a, field.name), getattr(b, field.name), name):
        return difference
    return None
  if isinstance(a, (tuple, list)) and isinstance(b, (tuple, list)) and len(a) == len(b):
    for i, (x, y) in enumerate(zip(a, b)):
      if difference := first_difference(x, y, f'{path}[{i}]'):
        return difference
    return None
  return None if a == b else f'{path}: {a!r} != {b!r}'
