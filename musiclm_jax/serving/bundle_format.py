"""What a bundle is on disk: its manifest, its files, and how they are read without trusting them.

    manifest.json                       what it is, and size and SHA-256 of every other file
    specs.json                          the tokens, the stages, the sizes of the networks
    vocabulary.model                    the text tokenizer
    MODEL_CARD.md                       for people
    functions/codec.decode.stablehlo    one program each (jax.export), for all platforms and batch sizes
    weights/codec.safetensors           the arrays that all programs of one network take as their first argument

A file is opened once, never through a link, and its size is known before it is read; the bytes that were hashed are the
bytes that are used. Nothing is ever unpickled.
"""
from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
import re
import stat
from typing import Any, BinaryIO

FORMAT_VERSION = 2  # 1 says nothing of MuLan levels
MANIFEST, SPECS, VOCABULARY, CARD = 'manifest.json', 'specs.json', 'vocabulary.model', 'MODEL_CARD.md'
WEIGHT_KINDS = ('float32', 'bfloat16', 'int8')
_FUNCTION = re.compile(r'functions/([a-z_]+)\.([a-z_]+)\.stablehlo')
_WEIGHTS = re.compile(r'weights/([a-z_]+)\.safetensors')
_DIGEST = re.compile(r'[0-9a-f]{64}')
_MIB = 1 << 20
# Nothing larger is read, whatever a manifest says. The 430 M parameters of a paper-size stage are 1.7 GB.
_LIMITS = {MANIFEST: _MIB, SPECS: _MIB, CARD: _MIB, VOCABULARY: 64 * _MIB}
_FUNCTION_LIMIT, _WEIGHTS_LIMIT = 64 * _MIB, 8192 * _MIB
_AGAIN = 'export it again, or fetch it again'


def function_file(network: str, function: str) -> str:
  return f'functions/{network}.{function}.stablehlo'


def weights_file(network: str) -> str:
  return f'weights/{network}.safetensors'


def _limit(name: str) -> int | None:
  """Bytes that the file may have; None for a name that no bundle has."""
  if name in _LIMITS:
    return _LIMITS[name]
  if _FUNCTION.fullmatch(name):
    return _FUNCTION_LIMIT
  return _WEIGHTS_LIMIT if _WEIGHTS.fullmatch(name) else None


def is_name(name: str) -> bool:
  """Whether a bundle may have a file of this name."""
  return _limit(name) is not None


@dataclasses.dataclass(frozen=True)
class Manifest:
  """What a bundle says of itself.

  Attributes:
    licence: of the weights.
    created: when it was exported, UTC.
    made_with: version of this package, and of JAX.
    weights: one of `WEIGHT_KINDS`.
    lineage: content hash of each network, by its name in the bundle.
    defaults: how each stage is sampled where nothing else is asked for.
    files: (bytes, SHA-256) by name.
    format: version of this layout.
  """

  licence: str
  created: str
  made_with: Mapping[str, str]
  weights: str
  lineage: Mapping[str, str]
  defaults: Mapping[str, Mapping[str, float]]
  files: Mapping[str, tuple[int, str]]
  format: int = FORMAT_VERSION

  def to_bytes(self) -> bytes:
    """The manifest with its own checksum. There is one way to write it, so that any other byte shows."""
    document = dataclasses.asdict(self)
    return _canonical({**document, 'sha256': hashlib.sha256(_canonical(document)).hexdigest()})

  @property
  def identity(self) -> str:
    """Sixteen hex digits that change with any byte of the bundle."""
    return hashlib.sha256(self.to_bytes()).hexdigest()[:16]

  def _well_typed(self) -> bool:
    words = [self.licence, self.created, self.weights, *self.made_with.values(), *self.lineage.values()]
    numbers = [number for stage in self.defaults.values() for number in stage.values()]
    return (all(isinstance(word, str) for word in words) and all(type(n) in (int, float) for n in numbers) and
            all(type(size) is int and _DIGEST.fullmatch(digest) for size, digest in self.files.values()))

  @property
  def functions(self) -> dict[str, list[str]]:
    """Names of the functions of each network."""
    found: dict[str, list[str]] = {}
    for match in filter(None, map(_FUNCTION.fullmatch, sorted(self.files))):
      found.setdefault(match[1], []).append(match[2])
    return found


def _canonical(document: Any) -> bytes:
  return (json.dumps(document, indent=1, sort_keys=True) + '\n').encode()


def parse_manifest(content: bytes) -> Manifest:
  """The inverse of `Manifest.to_bytes`. Raises ValueError that says what is wrong."""
  try:
    document = json.loads(content)
    version = document['format']
    if type(version) is int and version > FORMAT_VERSION:
      raise _Newer(f'it is of format {version}, this version of musiclm_jax reads {FORMAT_VERSION}: update musiclm_jax')
    del document['sha256']
    files = {name: (size, digest) for name, (size, digest) in document.pop('files').items()}
    manifest = Manifest(files=files, **document)
    same = type(version) is int and version >= 1 and manifest.to_bytes() == content and manifest._well_typed()
  except _Newer:
    raise
  except Exception as error:  # many kinds: the content may be anything
    raise ValueError(f'{MANIFEST} is not one of a bundle, or is damaged: {_AGAIN}') from error
  if not same:
    raise ValueError(f'{MANIFEST} is not what was exported: its checksum differs; {_AGAIN}')
  for name, (size, _) in manifest.files.items():
    limit = _limit(name)
    if limit is None or name == MANIFEST:
      raise ValueError(f'{MANIFEST} names {name[:80]!r}, which is no file of a bundle; do not use it')
    if not 0 <= size <= limit:
      raise ValueError(f'{MANIFEST} gives {name} {size!r} bytes, and at most {limit} are read; do not use it')
  for name in (SPECS, VOCABULARY, CARD, *map(weights_file, manifest.functions)):
    if name not in manifest.files:
      raise ValueError(f'{MANIFEST} does not name {name}, which every bundle has; {_AGAIN}')
  if manifest.weights not in WEIGHT_KINDS:
    raise ValueError(f'its weights are {manifest.weights!r}, not one of {", ".join(WEIGHT_KINDS)}')
  return manifest


class _Newer(ValueError):
  """A format of later versions: the bundle is fine."""


class Files:
  """The files of one bundle, each read at most once. Every error is a ValueError that names the file."""

  def __init__(self, path: str | os.PathLike):
    """Raises FileNotFoundError where there is no such folder, ValueError where it is no bundle."""
    self.path = pathlib.Path(path)
    if not self.path.is_dir():
      raise FileNotFoundError(f'no bundle at {self.path}: name the folder that `musiclm export` wrote')
    with self.errors():
      with self._opened(MANIFEST) as (file, size):
        if size > _LIMITS[MANIFEST]:
          raise ValueError(f'{MANIFEST} has {size} bytes, and at most {_LIMITS[MANIFEST]} are read; do not use it')
        content = _exactly(file, size, MANIFEST)
      self.manifest = parse_manifest(content)

  @contextlib.contextmanager
  def errors(self) -> Iterator[None]:
    """Puts the bundle's path before what is raised."""
    try:
      yield
    except OSError as error:
      raise ValueError(f'bundle {self.path}: {error.filename}: {error.strerror}; {_AGAIN}') from error
    except ValueError as error:
      raise ValueError(f'bundle {self.path}: {error}') from error

  def read(self, name: str, head: int = 0, check: Callable[[bytes, int], None] | None = None) -> bytearray:
    """The content of a file of the manifest, after its size and checksum were compared.

    `check(first bytes, size of the file)` sees the first `head` bytes before there is memory for the rest.

    Raises ValueError where the file is not the one of the manifest.
    """
    wanted, digest = self.manifest.files[name]
    with self._opened(name) as (file, size):
      if size != wanted:
        raise ValueError(f'{name} has {size} bytes, the manifest says {wanted}: it is damaged; {_AGAIN}')
      first = _exactly(file, min(head, size), name)
      if check is not None:
        check(first, size)
      content = _exactly(file, size, name, first)
    if hashlib.sha256(content).hexdigest() != digest:
      raise ValueError(f'{name} is not what was exported: its checksum differs; {_AGAIN}')
    return content

  @contextlib.contextmanager
  def _opened(self, name: str) -> Iterator[tuple[BinaryIO, int]]:
    """The open file and its size; it is a plain file in this folder, and no part of its path is a link."""
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC
    folder, _, leaf = name.rpartition('/')
    with contextlib.ExitStack() as stack:
      place = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
      stack.callback(os.close, place)
      try:
        if folder:
          place = os.open(folder, flags | os.O_DIRECTORY, dir_fd=place)
          stack.callback(os.close, place)
        # Without O_NONBLOCK, opening a pipe would wait for somebody to write into it.
        handle = os.open(leaf, flags | os.O_NONBLOCK, dir_fd=place)
      except FileNotFoundError:
        raise ValueError(f'{name} is missing; {_AGAIN}') from None
      except OSError as error:
        raise ValueError(f'{name} cannot be opened, or is a link, which no file of a bundle is: {error.strerror}'
                         ) from error
      file = stack.enter_context(os.fdopen(handle, 'rb', buffering=0))
      about = os.fstat(handle)
      if not stat.S_ISREG(about.st_mode):
        raise ValueError(f'{name} is not a plain file, as every file of a bundle is; do not use it')
      yield file, about.st_size


def _exactly(file: BinaryIO, size: int, name: str, first: bytes = b'') -> bytearray:
  """`size` bytes, of which the first were read before."""
  content = bytearray(size)
  content[:len(first)] = first
  view, filled = memoryview(content), len(first)
  while filled < size and (count := file.readinto(view[filled:])):
    filled += count
  if filled != size:
    raise ValueError(f'{name} ends after {filled} of {size} bytes; {_AGAIN}')
  return content


def described(files: Mapping[str, bytes]) -> dict[str, tuple[int, str]]:
  """Size and SHA-256 of contents, as a manifest has them."""
  return {name: (len(content), hashlib.sha256(content).hexdigest()) for name, content in files.items()}
