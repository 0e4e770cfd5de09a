"""Recordings through the codec: files of any length to compressed files and back, in bounded memory.

Shapes: N samples, F frames, Q levels.
"""
from __future__ import annotations

from collections.abc import Callable, Iterator
import dataclasses
import math
import os
import pathlib

import numpy as np
import soundfile

from musiclm_jax import specs
from musiclm_jax.codec.bitstream import BitstreamReader, BitstreamWriter, StreamHeader
from musiclm_jax.codec.model import SoundStream
from musiclm_jax.data import audio_files, records
from musiclm_jax.training import checkpoint, state as states
from musiclm_jax.training.checkpoint import Loaded

_BLOCK_SECONDS = 5.0


@dataclasses.dataclass(frozen=True)
class Transcoded:
  """What was written.

  Attributes:
    size: bytes of the file. bitrate: of the tokens, bits a second.
  """

  path: pathlib.Path
  seconds: float
  size: int
  bitrate: float
  levels: int

  def text(self) -> str:
    return (f'{self.path}: {self.seconds:.2f} s with {self.levels} levels ({self.bitrate / 1000:g} kbit/s), '
            f'{self.size:,} bytes')


def load(workdir: str | os.PathLike) -> Loaded:
  """The codec of a run, or of a folder that holds a run `codec`. Raises ValueError where it is another network."""
  folder = checkpoint.run_in(workdir, 'codec')
  loaded = checkpoint.load(folder)
  if not isinstance(loaded.model, SoundStream):
    raise ValueError(f'{folder} holds a {type(loaded.objective).__name__}, not a codec')
  return loaded


class Transcoder:
  """One codec, compiled for blocks of a few seconds, with the state of the stream between them.

  With `denoise`, the half of it that can takes noise out. ValueError where neither can, and of `encode` and `decode`
  where the other one does.
  """

  def __init__(self, codec: Loaded, *, denoise: bool = False):
    self.codec = codec
    self.config = codec.model.config
    if denoise and not self.config.denoise_at:
      raise ValueError('this codec cannot take noise out: train one with the file codec/denoising.gin')
    self.block_frames = max(1, round(_BLOCK_SECONDS * self.config.sample_rate / self.config.stride))
    self._denoise = denoise
    asked = lambda half: {'denoise': True} if denoise and self.config.denoise_at == half else {}
    self._encode = states.compiled(codec.model, 'encode_step', **asked('encoder'))
    self._decode = states.compiled(codec.model, 'decode_step', **asked('decoder'))
    self._channel_axis = specs.channel_axis(self.config.channels)

  def encode(self, source: str | os.PathLike, target: str | os.PathLike, *, levels: int | None = None) -> Transcoded:
    """An audio file to a compressed one with the first `levels` levels (all of them by default).

    A codec of one channel hears the average of the file's, other rates are resampled. Raises ValueError where the
    source cannot be read as audio (`data.audio_files.AudioFault`, with the name of the file), has samples that are no
    numbers, or other channels than a codec of several takes; `target` is then as it was.
    """
    self._check_half('encoder')
    header = self._header(levels)
    samples = 0
    with records.replacing(target) as file:
      writer = BitstreamWriter(file, header)
      for tokens_FxQ, length in self._tokens(source):
        writer.write(tokens_FxQ[:, :header.levels])
        samples += length
      writer.finish(samples)
    return _result(target, samples, header)

  def decode(self, source: str | os.PathLike, target: str | os.PathLike, *, levels: int | None = None) -> Transcoded:
    """A compressed file to a WAV file, from its first `levels` levels (all of them by default).

    Raises ValueError where the source is damaged, truncated, made by another codec, or has fewer levels.
    """
    self._check_half('decoder')
    with open(source, 'rb') as stream:
      reader = BitstreamReader(stream, os.fspath(source))
      there = reader.header
      if there.codec != self.codec.content_hash:
        raise ValueError(f'{source} was encoded by codec {there.codec}, this is {self.codec.content_hash}: name the '
                         'run that encoded it')
      if levels is not None and not 1 <= levels <= there.levels:
        raise ValueError(f'{source} has {there.levels} levels; {levels} were asked for')
      header = dataclasses.replace(there, levels=levels or there.levels)
      blocks = (tokens_FxQ[:, :header.levels] for tokens_FxQ in reader)
      self._write_wav(target, blocks, header, lambda: reader.samples)
    return _result(target, reader.samples, header)

  def round_trip(self, source: str | os.PathLike, target: str | os.PathLike, *, levels: int | None = None
                 ) -> Transcoded:
    """What a listener would hear: an audio file to a WAV file, through the codec."""
    header = self._header(levels)
    lengths = []

    def blocks() -> Iterator[np.ndarray]:
      for tokens_FxQ, length in self._tokens(source):
        lengths.append(length)
        yield tokens_FxQ[:, :header.levels]

    self._write_wav(target, blocks(), header, lambda: sum(lengths))
    return _result(target, sum(lengths), header)

  def _check_half(self, half: str) -> None:
    if self._denoise and self.config.denoise_at != half:
      action = {'encoder': 'encode', 'decoder': 'decode'}[self.config.denoise_at]
      raise ValueError(f'the {self.config.denoise_at} of this codec takes the noise out, not its {half}: denoise in '
                       f'`musiclm codec {action}`')

  def _header(self, levels: int | None) -> StreamHeader:
    config = self.config
    return StreamHeader(self.codec.content_hash, config.sample_rate, config.stride, config.first_levels(levels),
                        config.codebook_size, self.block_frames)

  def _tokens(self, source: str | os.PathLike) -> Iterator[tuple[np.ndarray, int]]:
    """(tokens [F, Q] of all levels, samples) of each block of a file."""
    if not os.path.exists(source):
      raise FileNotFoundError(f'there is nothing at {os.fspath(source)!r}')
    stride = self.config.stride
    state = self.codec.model.init_state(1)
    blocks = audio_files.segments(source, self.block_frames * stride / self.config.sample_rate,
                                  self.config.sample_rate, self.config.channels)
    count = 0
    while True:
      try:
        block = next(blocks, None)
      except audio_files.AudioFault as fault:
        raise ValueError(f'{source}: {fault}') from None
      if block is None:
        break
      padded = np.zeros((1, self.block_frames * stride, *self._channel_axis), np.float32)
      padded[0, :len(block)] = block
      tokens_BxFxQ, state = self._encode(padded, state)
      count += 1
      yield np.asarray(tokens_BxFxQ)[0, :math.ceil(len(block) / stride)], len(block)
    if not count:
      raise ValueError(f'{source}: empty: the file has no samples')

  def _write_wav(self, target: str | os.PathLike, blocks: Iterator[np.ndarray], header: StreamHeader,
                 samples: Callable[[], int]) -> None:
    """Decodes blocks of tokens [F, Q]; `samples` says, after the last, how many there are of the recording."""
    state = self.codec.model.init_state(1)
    written, held = 0, np.zeros((0, *self._channel_axis), np.float32)
    with records.replacing(target) as file:
      with soundfile.SoundFile(file, 'w', header.sample_rate, self.config.channels, 'PCM_16', format='WAV') as wav:
        for tokens_FxQ in blocks:
          wav.write(held)
          written += len(held)
          padded = np.zeros((1, header.block_frames, header.levels), np.int32)
          padded[0, :len(tokens_FxQ)] = tokens_FxQ
          audio_BxN, state = self._decode(padded, state)
          held = np.clip(np.asarray(audio_BxN)[0, :len(tokens_FxQ) * header.stride], -1, 1)
        wav.write(held[:samples() - written])


def _result(path: str | os.PathLike, samples: int, header: StreamHeader) -> Transcoded:
  return Transcoded(pathlib.Path(path), samples / header.sample_rate, os.path.getsize(path), header.bitrate,
                    header.levels)
