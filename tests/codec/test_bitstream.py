"""Compressed audio files: what goes in comes out, and no damage passes in silence."""
import dataclasses
import io
import struct
import zlib

from hypothesis import given, settings, strategies as st
import numpy as np
import pytest

from musiclm_jax.codec import bitstream

HEADER = bitstream.StreamHeader('0123456789abcdef', 24000, 480, levels=3, codebook_size=1024, block_frames=10)


def written(header, tokens_FxQ, samples):
  """A whole file."""
  file = io.BytesIO()
  writer = bitstream.BitstreamWriter(file, header)
  for first in range(0, len(tokens_FxQ), header.block_frames):
    writer.write(tokens_FxQ[first:first + header.block_frames])
  writer.finish(samples)
  return file.getvalue()


def tokens(frames, header=HEADER, seed=0):
  return np.random.default_rng(seed).integers(0, header.codebook_size, (frames, header.levels)).astype(np.int32)


def read(content):
  reader = bitstream.BitstreamReader(io.BytesIO(content), 'a.mlc')
  blocks = list(reader)
  return reader.header, np.concatenate(blocks) if blocks else None, reader.samples


@settings(deadline=None, max_examples=50)
@given(frames=st.integers(1, 45), levels=st.integers(1, 12), size=st.integers(1, 5000), block=st.integers(1, 20),
       missing=st.integers(0, 479))
def test_what_goes_in_comes_out(frames, levels, size, block, missing):
  header = dataclasses.replace(HEADER, levels=levels, codebook_size=size, block_frames=block)
  there = tokens(frames, header)
  assert np.log2(size) <= header.bits < max(1, np.log2(size)) + 1
  found, here, samples = read(written(header, there, frames * 480 - missing))
  assert found == header and samples == frames * 480 - missing
  np.testing.assert_array_equal(here, there)
  assert here.dtype == np.int32


def test_the_size_is_what_the_bitrate_says():
  header = bitstream.StreamHeader('0' * 16, 24000, 480, levels=12, codebook_size=1024, block_frames=250)
  assert header.bitrate == 6000
  size = len(written(header, tokens(60 * 50, header), 60 * 24000))
  assert 60 * 6000 / 8 < size < 1.02 * 60 * 6000 / 8


def test_bits_lie_where_the_format_says():
  assert bitstream.pack(np.array([[1, 2], [3, 0]]), 10) == bytes([1, 8, 48, 0, 0])
  header = dataclasses.replace(HEADER, levels=2)
  content = written(header, np.array([[1, 2], [3, 0]]), 960)
  body = struct.pack('<I', 2) + bytes([1, 8, 48, 0, 0])
  end = struct.pack('<IQ', 0, 960)
  assert content.endswith(body + struct.pack('<I', zlib.crc32(body)) + end + struct.pack('<I', zlib.crc32(end)))


def test_every_flipped_bit_and_every_cut_is_noticed():
  whole = written(HEADER, tokens(25), 25 * 480 - 7)
  for place in range(len(whole)):
    damaged = bytearray(whole)
    damaged[place] ^= 1 << place % 8
    with pytest.raises(ValueError, match='a.mlc (is|has)'):
      read(bytes(damaged))
    with pytest.raises(ValueError, match='a.mlc is (truncated|not a compressed audio file)'):
      read(whole[:place])
  with pytest.raises(ValueError, match='something follows its end'):
    read(whole + b'x')


def test_the_place_of_the_damage_is_named():
  whole = bytearray(written(HEADER, tokens(25), 25 * 480))
  whole[-30] ^= 1
  with pytest.raises(ValueError, match=r'a.mlc is damaged: the checksum of its block 2 \(at 0.4 s\) differs'):
    read(bytes(whole))


def forged(**changes):
  """A file whose header is false, with a right checksum."""
  file = io.BytesIO()
  header = dataclasses.replace(HEADER)
  for name, value in changes.items():
    object.__setattr__(header, name, value)
  bitstream.BitstreamWriter(file, header)
  return file.getvalue()


@pytest.mark.parametrize('changes', [
    {'levels': 0}, {'levels': 'two'}, {'stride': -1}, {'block_frames': 1 << 40}, {'codebook_size': 1 << 40}])
def test_headers_that_make_no_sense(changes):
  with pytest.raises(ValueError, match='its header makes no sense'):
    read(forged(**changes))


@pytest.mark.parametrize('content, message', [
    (b'', 'not a compressed audio file'), (b'RIFF' + bytes(50), 'not a compressed audio file'),
    (b'MLMC' + struct.pack('<BI', 2, 10) + bytes(99), 'has format 2; this version of musiclm_jax reads 1'),
    (b'MLMC' + struct.pack('<BI', 1, 1 << 31) + bytes(99), 'its header cannot have 2147483648 bytes')])
def test_other_files(content, message):
  with pytest.raises(ValueError, match=message):
    read(content)


@pytest.mark.parametrize('block, message', [
    (np.zeros((11, 3), int), '1 to 10 frames of 3 levels'), (np.zeros((0, 3), int), '1 to 10 frames of 3 levels'),
    (np.zeros((5, 2), int), '1 to 10 frames of 3 levels'), (np.full((5, 3), 1024), 'tokens from 1024 to 1024'),
    (np.full((5, 3), -1), 'tokens from -1 to -1')])
def test_blocks_that_do_not_belong_there(block, message):
  with pytest.raises(ValueError, match=message):
    bitstream.BitstreamWriter(io.BytesIO(), HEADER).write(block)


def test_only_the_last_block_may_be_short():
  writer = bitstream.BitstreamWriter(io.BytesIO(), HEADER)
  writer.write(tokens(3))
  with pytest.raises(ValueError, match='only the last block'):
    writer.write(tokens(3))
