"""Audio files in, waveforms of one channel or more out: wav, flac, ogg, mp3 and what else libsndfile reads.

Shapes: N samples; waveforms of C > 1 channels are [N, C]. Files are streamed, so memory does not grow with their
length.
"""
from __future__ import annotations

import collections
from collections.abc import Iterator, Mapping, Sequence
import dataclasses
import os
import re
import warnings

import numpy as np
import soundfile
import soxr

from musiclm_jax import provenance
from musiclm_jax.data.workers import Progress, Workers

EXTENSIONS = ('.wav', '.flac', '.ogg', '.oga', '.opus', '.mp3', '.aif', '.aiff', '.au', '.caf', '.w64')
# Sound that a user expects to be read, but libsndfile cannot: counted as skipped instead of passed over.
UNSUPPORTED = ('.m4a', '.aac', '.wma', '.mp4', '.ape', '.mpc', '.webm')
NOT_SUPPORTED = 'format not supported'  # why those are skipped
SILENCE = 1e-4  # peak under -80 dBFS
_BLOCK = 1 << 17  # samples read at a time
_RATES = (1_000, 768_000)
_UNKNOWN_LENGTH = (1 << 63) - 1  # what libsndfile says of a stream whose header was written before its end was known
_LIMIT = 64.0  # samples beyond this are not a loud recording but another scale
# Encoders round a length up to whole frames and decoders trim it again.
_MP3_SLACK = 4 * 1152


class AudioFault(ValueError):
  """Why a file cannot be used.

  Attributes:
    reason: one of "unreadable", "truncated", "empty", "silent", "too short", "non-finite", "out of range", "wrong
      number of channels".
  """

  def __init__(self, reason: str, detail: str = ''):
    super().__init__(f'{reason}: {detail}' if detail else reason)
    self.reason = reason

  def __reduce__(self):
    return _fault, (self.reason, str(self))


def _fault(reason: str, message: str) -> AudioFault:
  """Rebuilds a fault that crossed a process boundary."""
  fault = AudioFault(reason)
  fault.args = (message,)
  return fault


@dataclasses.dataclass(frozen=True)
class AudioInfo:
  """What a full reading of a file found.

  Attributes:
    frames: samples of each channel.
    channels: of the file.
    peak: largest magnitude of what is read: of the mono mix, or of any channel.
    sha256: of the file's bytes.
  """

  frames: int
  sample_rate: int
  channels: int
  peak: float
  sha256: str

  @property
  def seconds(self) -> float:
    return self.frames / self.sample_rate


def walk(audio_dir: str | os.PathLike) -> tuple[list[tuple[str, bytes]], list[str]]:
  """(name, path) of the audio files below, sorted, and the names of files in formats that cannot be read.

  Paths are bytes, because a name need not be valid UTF-8; names are text for records and reports. Links to folders
  elsewhere are followed; of folders that cannot be opened there is a warning.
  """
  root = os.fsencode(audio_dir)
  if not os.path.isdir(root):
    raise FileNotFoundError(f'{audio_dir} is not a folder')
  files, unsupported = [], []
  seen = {os.path.realpath(root)}

  def enters(path: bytes) -> bool:
    if not os.path.islink(path):
      return True
    place = os.path.realpath(path)
    inside = any(os.path.commonpath([place, other]) in (place, other) for other in seen)
    seen.add(place)
    return not inside  # what lies in a folder that is visited has its name there

  def missed(error: OSError) -> None:
    warnings.warn(f'{os.fsdecode(error.filename)}: {error.strerror}; it is left out', stacklevel=1)

  for folder, folders, names in os.walk(root, onerror=missed, followlinks=True):
    folders[:] = [f for f in sorted(folders) if not f.startswith(b'.') and enters(os.path.join(folder, f))]
    for file in names:
      path = os.path.join(folder, file)
      relative = os.path.relpath(path, root).replace(os.fsencode(os.sep), b'/')
      name = relative.decode('utf-8', 'backslashreplace')
      extension = os.path.splitext(name)[1].lower()
      if file.startswith(b'.'):
        continue
      if extension in EXTENSIONS:
        files.append((name, path))
      elif extension in UNSUPPORTED:
        unsupported.append(name)
  return sorted(files), sorted(unsupported)


def sort_out(files: Sequence[tuple[str, bytes]], unsupported: Sequence[str], min_seconds: float, channels: int = 1, *,
             workers: Workers | None = None, progress: Progress | None = None
             ) -> tuple[list[tuple[str, bytes, AudioInfo]], dict[str, list[str]]]:
  """What `walk` found, read from end to end: the usable files, and a `defaultdict` of the names of others by reason."""
  skipped: dict[str, list[str]] = collections.defaultdict(list)
  if unsupported:
    skipped[NOT_SUPPORTED] += unsupported
  tasks = [(path, min_seconds, channels) for _, path in files]
  checks = (workers or Workers(1)).map(_checked, tasks, progress, 'files checked', together=16)
  usable = []
  for (name, path), (info, reason) in zip(files, checks):
    if info is None:
      skipped[reason].append(name)
    else:
      usable.append((name, path, info))
  return usable, skipped


def left_out(skipped: Mapping[str, Sequence[str]], shown: int = 3) -> list[str]:
  """A sentence for each reason, with the first names."""
  more = lambda names: f' and {len(names) - shown} more' if len(names) > shown else ''
  return [f'left out ({reason}): {", ".join(names[:shown])}{more(names)}' for reason, names in sorted(skipped.items())]


def _checked(task: tuple[bytes, float, int]) -> tuple[AudioInfo | None, str]:
  """What `check` finds, or why the file cannot be used."""
  try:
    return check(*task), ''
  except AudioFault as fault:
    return None, fault.reason
  except OSError as error:
    return None, f'unreadable ({error.strerror})'


def nothing_usable(audio_dir: str | os.PathLike, skipped: Mapping[str, Sequence[str]]) -> ValueError:
  """The error for a folder all of whose files were `skipped`, names by reason."""
  reasons = ', '.join(f'{len(names)} {reason}' for reason, names in sorted(skipped.items()))
  return ValueError(f'no usable audio in {audio_dir}: {reasons or "it has no audio files"}')


def _open(path: str | os.PathLike) -> soundfile.SoundFile:
  try:
    # As bytes: a name need not be valid UTF-8.
    file = soundfile.SoundFile(os.fsencode(path))
  except (soundfile.SoundFileError, RuntimeError, OSError, TypeError) as error:
    if os.path.exists(path) and os.path.getsize(path) == 0:
      raise AudioFault('empty', 'the file has no bytes') from None
    raise AudioFault('unreadable', str(error).partition(': ')[2] or str(error)) from None
  if not _RATES[0] <= file.samplerate <= _RATES[1]:
    rate = file.samplerate
    file.close()
    raise AudioFault('unreadable', f'{rate} samples a second')
  return file


def _mixed(block_NxF: np.ndarray, channels: int) -> np.ndarray:
  """The channels of a file as the `channels` that are wanted: averaged to one, or one repeated; [N] or [N, C]."""
  there = block_NxF.shape[1]
  if channels == 1:
    return block_NxF.mean(axis=1, dtype=np.float32) if there > 1 else block_NxF[:, 0]
  if there not in (1, channels):
    # Which of 5.1 channels belong where is not ours to say.
    raise AudioFault('wrong number of channels', f'{there}, where {channels} are wanted: mix it to {channels} first')
  return np.broadcast_to(block_NxF, (len(block_NxF), channels))


def _blocks(path: str | os.PathLike, channels: int) -> Iterator[tuple[np.ndarray, int, int]]:
  """Yields (float32 [n] or [n, C], sample rate, channels of the file); AudioFault where the file is at fault."""
  with _open(path) as file:
    rate, expected = file.samplerate, file.frames
    if expected == _UNKNOWN_LENGTH:
      expected, file.seekable = 0, lambda: False  # else soundfile seeks behind what it has read, which fails
    if _promises_more(file.extra_info):
      raise AudioFault('truncated', 'the header promises more samples than the file holds')
    if file.format == 'OGG' and not _ogg_ends(path):
      raise AudioFault('truncated', 'the last page of the Ogg stream is missing')
    read = 0
    while True:
      try:
        # Not `SoundFile.blocks`, which returns stale samples where the file ends early.
        block = file.read(_BLOCK, dtype='float32', always_2d=True)
      except (soundfile.SoundFileError, RuntimeError) as error:
        raise AudioFault('truncated', f'decoding fails after {read / rate:.1f} s: {error}') from None
      if not len(block):
        break
      read += len(block)
      mixed = _mixed(block, channels)
      if not np.isfinite(mixed).all():
        raise AudioFault('non-finite', f'samples that are no numbers before {read / rate:.1f} s')
      if np.abs(mixed).max() > _LIMIT:
        raise AudioFault('out of range', f'samples up to {np.abs(mixed).max():g} where 1 is full scale')
      yield mixed, rate, file.channels
    if read < expected - (_MP3_SLACK if file.format == 'MPEG' else 0):
      raise AudioFault('truncated', f'{read / rate:.1f} of {expected / rate:.1f} s are there')


def _promises_more(header_log: str) -> bool:
  """Whether there is less sound than a wav or aiff header says; a stream's "unknown" does not count."""
  pattern = r'^\s*(?:data|SSND) : (\d+) \(should be (\d+)\)'
  for promised, found in re.findall(pattern, header_log, re.MULTILINE):
    if int(found) < int(promised) < 0x7FFFF000:
      return True
  return False


def _ogg_ends(path: str | os.PathLike) -> bool:
  """Whether the last page of an Ogg file carries the end-of-stream flag (RFC 3533, section 6)."""
  with open(path, 'rb') as file:
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - (1 << 17)))
    tail = file.read()
  page = tail.rfind(b'OggS')
  return 0 <= page < len(tail) - 5 and bool(tail[page + 5] & 4)


def check(path: str | os.PathLike, min_seconds: float = 1.0, channels: int = 1) -> AudioInfo:
  """Reads the whole file. Raises AudioFault where it cannot be used as audio of `channels` channels."""
  frames, peak, rate, there = 0, 0.0, 0, 0
  for block, rate, there in _blocks(path, channels):  # noqa: B007
    frames += len(block)
    peak = max(peak, float(np.abs(block).max()))
  if not frames:
    raise AudioFault('empty', 'the file has no samples')
  if frames < min_seconds * rate - 0.5:
    raise AudioFault('too short', f'{frames / rate:.2f} s, at least {min_seconds:g} s are needed')
  if peak < SILENCE:
    raise AudioFault('silent', f'the largest sample is {peak:.1e}')
  return AudioInfo(frames, rate, there, peak, provenance.hash_file(path))


def segments(path: str | os.PathLike, segment_seconds: float, sample_rate: int = 24000,
             channels: int = 1) -> Iterator[np.ndarray]:
  """Consecutive pieces of a file, float32 at `sample_rate`, each `segment_seconds` long but the last; [N] or [N, C].

  Channels are averaged to one, or one is repeated; a file of any other number of channels than 1 and the `channels`
  that are wanted is refused. soxr resamples as one stream, so the pieces join without a seam. Raises AudioFault.
  """
  length = round(segment_seconds * sample_rate)
  held: list[np.ndarray] = []
  count = 0
  for block in _resampled(path, sample_rate, channels):
    held.append(block)
    count += len(block)
    if count >= length:
      joined = np.concatenate(held)
      whole = count // length * length
      yield from joined[:whole].reshape(-1, length, *joined.shape[1:])
      held, count = [joined[whole:]], count - whole
  if count:
    yield np.concatenate(held)


def _resampled(path: str | os.PathLike, sample_rate: int, channels: int) -> Iterator[np.ndarray]:
  resampler = None
  for block, rate, _ in _blocks(path, channels):
    if rate == sample_rate:
      yield block
      continue
    if resampler is None:
      resampler = soxr.ResampleStream(rate, sample_rate, channels, dtype='float32', quality='VHQ')
    yield resampler.resample_chunk(np.ascontiguousarray(block))
  if resampler is not None:
    yield resampler.resample_chunk(np.zeros((0, *block.shape[1:]), np.float32), last=True)


def read(path: str | os.PathLike, sample_rate: int = 24000, max_seconds: float = 0.0) -> np.ndarray:
  """A whole file, or its first `max_seconds`, as mono float32 [N]. Raises AudioFault."""
  pieces, count = [], 0
  limit = round(max_seconds * sample_rate) or None
  for block in _resampled(path, sample_rate, channels=1):
    pieces.append(block)
    count += len(block)
    if limit and count >= limit:
      break
  if not count:
    raise AudioFault('empty', 'the file has no samples')
  return np.concatenate(pieces)[:limit]


def write_wav(path: str | os.PathLike, audio: np.ndarray, sample_rate: int = 24000) -> None:
  """Writes float [N] or [N, channels] in [-1, 1] as 16-bit PCM; what lies outside is clipped."""
  audio = np.asarray(audio, np.float32)
  if not np.isfinite(audio).all():
    raise ValueError(f'{path}: the waveform has samples that are no numbers')
  soundfile.write(os.fsencode(path), np.clip(audio, -1.0, 1.0), sample_rate, subtype='PCM_16', format='WAV')
