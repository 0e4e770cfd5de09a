"""What a record set and a record are: the header, the manifest, and how an example becomes bytes and back."""
from __future__ import annotations

from collections.abc import Iterable, Mapping
import dataclasses
import functools
from typing import Any

import msgpack
import numpy as np

from musiclm_jax import specs
from musiclm_jax.data import source

FORMAT_VERSION = 2
KINDS = ('audio', 'tokens')
_PCM_SCALE = 32768.0
_ARRAY = 1  # msgpack extension: [dtype, shape, bytes]


@dataclasses.dataclass(frozen=True)
class Header:
  """What all shards of a record set have in common.

  Attributes:
    kind: "audio" or "tokens".
    streams: for audio {"audio": {"sample_rate": 24000}}, with "channels" where there are more than one; for
      tokens, by feature, the `codebook_size`, `levels` and `frame_rate` of each (see `token_streams`).
    settings: what the set was made with; the same command with other settings refuses to continue it.
    lineage: content hash of each network that made the tokens, by role.
  """

  kind: str
  streams: Mapping[str, Mapping[str, Any]]
  settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  lineage: Mapping[str, str] = dataclasses.field(default_factory=dict)

  def __post_init__(self):
    if self.kind not in KINDS:
      raise ValueError(f'a record set holds one of {KINDS}, not {self.kind!r}')

  @property
  def fingerprint(self) -> str:
    return source.digest(dataclasses.asdict(self))


@dataclasses.dataclass(frozen=True)
class Shard:
  """One file of a record set."""

  file: str
  records: int
  bytes: int
  sha256: str
  seconds: float


@dataclasses.dataclass(frozen=True)
class Manifest:
  """What a record set holds; `manifest.json`.

  Attributes:
    splits: shards of each split in order.
    licences: records under each licence.
    skipped: by reason, how many files were left out and the names of some.
    made_with: code, packages and configuration that wrote the shards; more than one where they changed on the way.
  """

  header: Header
  splits: Mapping[str, tuple[Shard, ...]]
  licences: Mapping[str, int]
  skipped: Mapping[str, Mapping[str, Any]]
  made_with: tuple[Mapping[str, Any], ...] = ()

  @functools.cached_property
  def fingerprint(self) -> str:
    files = {split: [(s.file, s.sha256) for s in shards] for split, shards in self.splits.items()}
    return source.digest([FORMAT_VERSION, self.header.fingerprint, files])

  def records(self, split: str) -> int:
    return sum(s.records for s in self.splits.get(split, ()))

  def hours(self, split: str) -> float:
    return sum(s.seconds for s in self.splits.get(split, ())) / 3600

  def summary(self) -> str:
    """One line for the terminal."""
    held = ', '.join(f'{n} {self.records(n)} clips ({self.hours(n) * 60:.1f} min)' for n in self.splits)
    reasons = ', '.join(f'{s["count"]} {reason}' for reason, s in sorted(self.skipped.items()))
    return held + (f'; skipped: {reasons}' if reasons else '')


def token_streams(token_specs: Iterable[specs.TokenSpec]) -> dict[str, dict[str, Any]]:
  """The `streams` of a token header, one entry for each spec's feature."""
  return {s.feature: {'codebook_size': s.codebook_size, 'levels': s.levels, 'frame_rate': s.frame_rate}
          for s in token_specs}


def audio_streams(sample_rate: int, channels: int = 1) -> dict[str, dict[str, Any]]:
  """The `streams` of an audio header; of one channel nothing is said, as always."""
  return {'audio': {'sample_rate': sample_rate, **({'channels': channels} if channels > 1 else {})}}


def rate_of(header: Header) -> int:
  """Samples a second of the clips of an audio set."""
  return header.streams['audio']['sample_rate']


def channels_of(header: Header) -> int:
  """How many channels the clips of an audio set have."""
  return header.streams['audio'].get('channels', 1)


def _is_audio(value: np.ndarray, header: Header) -> bool:
  """Whether this is [N], or [N, channels] where there are more than one."""
  return value.ndim > 0 and value.shape[1:] == specs.channel_axis(channels_of(header))


def to_pcm(audio: np.ndarray) -> np.ndarray:
  """Waveform in [-1, 1] to int16; what lies outside is clipped. 16-bit sources survive bit for bit."""
  if audio.dtype == np.int16:
    return audio
  return np.clip(np.rint(audio * _PCM_SCALE), -_PCM_SCALE, _PCM_SCALE - 1).astype(np.int16)


def from_pcm(audio: np.ndarray) -> np.ndarray:
  """int16 to float32 in [-1, 1)."""
  return audio.astype(np.float32) * np.float32(1 / _PCM_SCALE)


def _pack_array(value: Any) -> Any:
  if isinstance(value, np.generic):
    return value.item()
  if not isinstance(value, np.ndarray):
    raise TypeError(f'a record cannot hold a {type(value).__name__}')
  return msgpack.ExtType(_ARRAY, msgpack.packb((value.dtype.str, value.shape, value.tobytes())))


def _unpack_array(code: int, data: bytes) -> np.ndarray:
  if code != _ARRAY:
    raise ValueError(f'unknown extension {code}')
  dtype, shape, content = msgpack.unpackb(data)
  return np.frombuffer(content, np.dtype(dtype)).reshape(shape)


def check(example: source.Example, header: Header) -> None:
  """Raises ValueError where a stream is missing, or does not have the shape or the range that `header` says."""
  for name, stream in header.streams.items():
    if name not in example:
      raise ValueError(f'it has no stream {name!r}, only {", ".join(sorted(example))}')
    value = np.asarray(example[name])
    if header.kind == 'audio':
      if not _is_audio(value, header):
        channels = channels_of(header)
        wanted = 'one row of samples' if channels == 1 else f'rows of samples of {channels} channels'
        raise ValueError(f'its audio must be {wanted}, found {value.shape}')
      continue
    if value.ndim != 2 or value.shape[1] != stream['levels']:
      raise ValueError(f'{name} tokens must be [frames, {stream["levels"]}], found {value.shape}')
    if value.size and (value.min() < 0 or value.max() >= stream['codebook_size']):
      raise ValueError(f'{name} tokens must lie in [0, {stream["codebook_size"]}), found '
                       f'{value.min()} to {value.max()}')


def encode(example: source.Example, header: Header) -> bytes:
  """One record. Audio is stored as int16, tokens as int16, or uint16 where the codebook needs it."""
  check(example, header)
  fields = {'texts': [], **example}
  for name, stream in header.streams.items():
    if header.kind == 'audio':
      fields[name] = to_pcm(np.asarray(fields[name]))
    else:
      fields[name] = np.asarray(fields[name]).astype(np.int16 if stream['codebook_size'] <= 1 << 15 else np.uint16)
  return msgpack.packb(fields, default=_pack_array)


def decode(record: bytes, header: Header) -> source.Example:
  """The inverse of `encode`, but for audio, which stays int16 (see `from_pcm`). Tokens are int32."""
  example = msgpack.unpackb(record, ext_hook=_unpack_array)
  if missing := [name for name in header.streams if name not in example]:
    raise ValueError(f'it has no stream {missing[0]!r}, only {", ".join(sorted(example))}')
  if header.kind == 'tokens':
    example.update({name: example[name].astype(np.int32) for name in header.streams})
  elif example['audio'].dtype != np.int16 or not _is_audio(example['audio'], header):
    raise ValueError(f'its audio is not int16 samples of {channels_of(header)} channel(s)')
  return example


def seconds_of(example: source.Example, header: Header) -> float:
  """Length of a clip: for tokens, what all streams with a frame rate cover."""
  if header.kind == 'audio':
    return len(example['audio']) / rate_of(header)
  lengths = [len(example[n]) / s['frame_rate'] for n, s in header.streams.items() if s['frame_rate']]
  return min(lengths, default=0.0)


def text_kinds_of(example: source.Example) -> tuple[str, ...]:
  """The kinds of text that an example has, sorted."""
  return tuple(sorted({t['kind'] for t in example.get('texts', ())}))
