"""Music to a file as it is made, and beside it where it comes from.

N samples.
"""
from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
import contextlib
import dataclasses
import json
import os
import pathlib
import time
from typing import Any

import numpy as np
import soundfile

from musiclm_jax.provenance import hash_file

FORMATS = {'.wav': ('WAV', 'PCM_16'), '.flac': ('FLAC', 'PCM_16'), '.ogg': ('OGG', 'VORBIS')}
_SLICE = 1 << 16  # samples: the Vorbis encoder puts all that it is given at a time on the stack
# Called with the finished audio file and what will be in its sidecar; returns that, changed or not.
After = Callable[[pathlib.Path, dict[str, Any]], Mapping[str, Any]]


@dataclasses.dataclass(frozen=True)
class Written:
  """What was written.

  Attributes:
    sidecar: the JSON file beside the audio; None where there is none.
    seconds: of audio. wall_seconds, first_seconds: time until all of it, and until the first block, was there.
  """

  path: pathlib.Path
  sidecar: pathlib.Path | None
  seconds: float
  wall_seconds: float
  first_seconds: float

  def text(self) -> str:
    """A line for the user."""
    beside = f', {self.sidecar}' if self.sidecar else ''
    return (f'{self.path}{beside}: {self.seconds:.1f} s of audio in {self.wall_seconds:.1f} s, the first of it after '
            f'{self.first_seconds:.1f} s')


def sidecar_of(path: str | os.PathLike) -> pathlib.Path:
  return pathlib.Path(path).with_suffix('.json')


def check(path: str | os.PathLike, *, sidecar: bool = True) -> pathlib.Path:
  """Raises ValueError for a format that cannot be written, FileNotFoundError for a folder that is not there.

  With `sidecar`, ValueError, too, where its name belongs to another file: nothing but an older sidecar makes way.
  """
  path = pathlib.Path(path)
  if path.suffix.lower() not in FORMATS:
    raise ValueError(f'{path}: the name must end with one of {", ".join(FORMATS)}')
  if not path.parent.is_dir():
    raise FileNotFoundError(f'{path}: there is no folder {str(path.parent)!r}')
  if path.is_dir():
    raise ValueError(f'{path} is a folder')
  if not os.access(path.parent, os.W_OK):
    raise ValueError(f'{path}: the folder {str(path.parent)!r} cannot be written to')
  if sidecar and os.path.lexists(beside := sidecar_of(path)) and not _is_of(beside, path):
    raise ValueError(f'{beside} is there and says nothing of {path.name}; what is generated would replace it: name '
                     'another output, or write no sidecar (--no_sidecar)')
  return path


def _is_of(sidecar: pathlib.Path, path: pathlib.Path) -> bool:
  """Whether it is the sidecar of an older file of this name."""
  try:
    told = json.loads(sidecar.read_bytes())
  except (OSError, ValueError):
    return False
  return isinstance(told, dict) and told.get('audio') == path.name and 'audio_sha256' in told


def write(path: str | os.PathLike, blocks: Iterator[np.ndarray], sample_rate: int, *,
          about: Mapping[str, Any] | None = None, after: After | None = None) -> Written:
  """Writes blocks [N] of audio in [-1, 1] as they come; the file takes its name once all of it is there.

  Args:
    about: what the sidecar says (`modes.about`); it gains the length and the SHA-256 of the audio. None: no sidecar,
      and an older one, which would speak of other audio, goes.
    after: for signing or watermarking. It may change the audio file, whose SHA-256 is taken again, and add to what the
      sidecar says.

  Raises ValueError and FileNotFoundError as `check` does, OSError where the disk takes no more.
  """
  path, begun, first, samples = check(path, sidecar=about is not None), time.monotonic(), 0.0, 0
  kind, subtype = FORMATS[path.suffix.lower()]
  with _replacing(path) as partial:
    try:
      with soundfile.SoundFile(os.fsencode(partial), 'w', sample_rate, 1, subtype, format=kind) as file:
        for block_N in blocks:
          if not np.isfinite(block_N).all():
            raise ValueError('the networks made samples that are no numbers; they may not be trained')
          first = first or time.monotonic() - begun
          for start in range(0, len(block_N), _SLICE):
            file.write(np.clip(block_N[start:start + _SLICE], -1, 1))
          samples += len(block_N)
    except soundfile.LibsndfileError as error:
      raise OSError(f'{path} cannot be written ({error.error_string.rstrip(".")}); is the disk full?') from error
    wall = time.monotonic() - begun
    told = None if about is None else {**about, 'seconds': samples / sample_rate, 'sample_rate': sample_rate,
                                       'audio': path.name, 'audio_sha256': hash_file(partial)}
    if after is not None:
      changed = after(partial, dict(told or {}))
      told = None if told is None else {**changed, 'audio_sha256': hash_file(partial)}
  sidecar = sidecar_of(path)
  if told is not None:
    with _replacing(sidecar) as partial:
      partial.write_text(json.dumps(told, indent=2, ensure_ascii=False) + '\n', encoding='utf-8')
  elif _is_of(sidecar, path):
    sidecar.unlink()
  return Written(path, None if told is None else sidecar, samples / sample_rate, wall, first)


@contextlib.contextmanager
def _replacing(path: pathlib.Path) -> Iterator[pathlib.Path]:
  """A name beside `path` that takes its place at the end, and is gone where something fails."""
  partial = path.with_name(f'.{path.stem}.partial{path.suffix}')
  try:
    yield partial
    os.replace(partial, path)
  finally:
    partial.unlink(missing_ok=True)
