"""Compressed audio files: the tokens of a recording, packed, with what is needed to decode them and to notice damage.

    magic "MLMC", version u8, header length u32, header (JSON), CRC-32 of the header u32
    blocks: frames u32, the packed tokens, CRC-32 u32; each has `block_frames` frames but the last
    the end: frames 0, samples u64, CRC-32 u32

Numbers are little-endian. A token takes ceil(log2(codebook_size)) bits, the first level of the first frame first and
its lowest bit first; a block is filled up to whole bytes. A CRC covers what lies between the one before and it. A file
without its end is truncated.

Shapes: F frames, Q levels.
"""
from __future__ import annotations

from collections.abc import Iterator
import dataclasses
import json
import struct
from typing import BinaryIO
import zlib

import numpy as np

VERSION = 1
_MAGIC = b'MLMC'
_LARGEST_HEADER = 1 << 16
_LARGEST_BLOCK = 1 << 24  # bytes, and samples: what a reader must hold


@dataclasses.dataclass(frozen=True)
class StreamHeader:
  """What a file is.

  Attributes:
    codec: content hash of the network that encoded it; no other can decode it.
    stride: samples a frame. levels: of each frame in this file, which may be fewer than the codec has.
    block_frames: frames of a block.
  """

  codec: str
  sample_rate: int
  stride: int
  levels: int
  codebook_size: int
  block_frames: int

  @property
  def bits(self) -> int:
    """Of a token."""
    return max(1, (self.codebook_size - 1).bit_length())

  @property
  def bitrate(self) -> float:
    """Bits a second, of the tokens alone."""
    return self.bits * self.levels * self.sample_rate / self.stride

  def block_bytes(self, frames: int) -> int:
    return -(-frames * self.levels * self.bits // 8)


def pack(tokens_FxQ: np.ndarray, bits: int) -> bytes:
  """Tokens in [0, 2^bits) as `bits` bits each."""
  set_bits = (np.asarray(tokens_FxQ, np.int64).reshape(-1, 1) >> np.arange(bits)) & 1
  return np.packbits(set_bits.astype(np.uint8), bitorder='little').tobytes()


def unpack(packed: bytes, frames: int, levels: int, bits: int) -> np.ndarray:
  """The inverse of `pack`, int32 [F, Q]."""
  set_bits = np.unpackbits(np.frombuffer(packed, np.uint8), count=frames * levels * bits, bitorder='little')
  return (set_bits.reshape(-1, bits).astype(np.int32) << np.arange(bits)).sum(
      axis=-1, dtype=np.int32).reshape(frames, levels)


class BitstreamWriter:
  """Writes a file block by block; without `finish` it is one that readers call truncated."""

  def __init__(self, file: BinaryIO, header: StreamHeader):
    self._file, self._header, self._complete = file, header, True
    content = json.dumps(dataclasses.asdict(header)).encode()
    _put(file, _MAGIC + struct.pack('<BI', VERSION, len(content)) + content)

  def write(self, tokens_FxQ: np.ndarray) -> None:
    """The next block: `block_frames` frames, or fewer where it is the last.

    Raises ValueError for tokens of another shape or outside the codebook.
    """
    header, tokens = self._header, np.asarray(tokens_FxQ)
    if not self._complete:
      raise ValueError('only the last block of a file may be incomplete')
    if tokens.ndim != 2 or tokens.shape[1] != header.levels or not 1 <= len(tokens) <= header.block_frames:
      raise ValueError(f'a block has 1 to {header.block_frames} frames of {header.levels} levels, found {tokens.shape}')
    if not 0 <= tokens.min() <= tokens.max() < header.codebook_size:
      raise ValueError(f'tokens from {tokens.min()} to {tokens.max()} are not codes of a codebook of '
                       f'{header.codebook_size}')
    self._complete = len(tokens) == header.block_frames
    _put(self._file, struct.pack('<I', len(tokens)) + pack(tokens, header.bits))

  def finish(self, samples: int) -> None:
    """The end of the file, with the exact length of the recording."""
    _put(self._file, struct.pack('<IQ', 0, samples))


def _put(file: BinaryIO, content: bytes) -> None:
  file.write(content + struct.pack('<I', zlib.crc32(content)))


class BitstreamReader:
  """Iterates over the blocks of a file, int32 [F, Q] each. Memory does not grow with its length.

  Attributes:
    header: of the file. samples: its exact length; known once all blocks were read.

  Raises ValueError naming the file where it is none, of another version, altered or truncated.
  """

  def __init__(self, file: BinaryIO, name: str):
    self._file, self._name = file, name
    self.samples: int | None = None
    try:
      start = self._take(len(_MAGIC) + 5, 'its header')
    except ValueError:
      start = b''
    if not start.startswith(_MAGIC):
      raise ValueError(f'{name} is not a compressed audio file of `musiclm codec encode`')
    version, length = struct.unpack('<BI', start[len(_MAGIC):])
    if version != VERSION:
      raise ValueError(f'{name} has format {version}; this version of musiclm_jax reads {VERSION}')
    if length > _LARGEST_HEADER:
      raise ValueError(f'{name} is damaged: its header cannot have {length} bytes')
    content = self._take(length, 'its header')
    self._check(start + content, 'its header')
    try:
      self.header = StreamHeader(**json.loads(content))
      numbers = dataclasses.asdict(self.header)
      numbers.pop('codec')
      if not all(isinstance(n, int) and n > 0 for n in numbers.values()):
        raise ValueError
      if self.header.codebook_size > 1 << 31 or self.header.block_frames * self.header.stride > _LARGEST_BLOCK or \
          self.header.block_bytes(self.header.block_frames) > _LARGEST_BLOCK:
        raise ValueError
    except (TypeError, ValueError):
      raise ValueError(f'{name} is damaged: its header makes no sense') from None

  def __iter__(self) -> Iterator[np.ndarray]:
    header, number, total, complete = self.header, 0, 0, True
    while True:
      seconds = number * header.block_frames * header.stride / header.sample_rate
      where = f'its block {number} (at {seconds:.1f} s)'
      start = self._take(4, where)
      [frames] = struct.unpack('<I', start)
      if frames == 0:
        break
      if frames > header.block_frames or not complete:
        raise ValueError(f'{self._name} is damaged: {where} cannot have {frames} frames')
      packed = self._take(header.block_bytes(frames), where)
      self._check(start + packed, where)
      tokens = unpack(packed, frames, header.levels, header.bits)
      if tokens.max() >= header.codebook_size:
        raise ValueError(f'{self._name} is damaged: {where} has tokens that do not exist')
      yield tokens
      complete = frames == header.block_frames
      number += 1
      total += frames
    content = self._take(8, 'its end')
    self._check(start + content, 'its end')
    [self.samples] = struct.unpack('<Q', content)
    if not (total - 1) * header.stride < self.samples <= total * header.stride:
      raise ValueError(f'{self._name} is damaged: {self.samples} samples are not {total} frames')
    if self._file.read(1):
      raise ValueError(f'{self._name} is damaged: something follows its end')

  def _take(self, size: int, what: str) -> bytes:
    content = self._file.read(size)
    if len(content) < size:
      raise ValueError(f'{self._name} is truncated: it ends within {what}')
    return content

  def _check(self, content: bytes, what: str) -> None:
    if self._take(4, what) != struct.pack('<I', zlib.crc32(content)):
      raise ValueError(f'{self._name} is damaged: the checksum of {what} differs')
