"""Opus, the codec that everybody has: what a clip becomes at a bitrate, by the programs `opusenc` and `opusdec`.

N samples; stereo has its channels as a last axis.
"""
from __future__ import annotations

import shutil
import subprocess

import numpy as np

from musiclm_jax.evaluation import audio_measures

PROGRAMS = ('opusenc', 'opusdec')
_HEADERS = 2  # packets of a stream that hold no sound: identification and comments (RFC 7845, section 5)


def missing() -> list[str]:
  """The programs that this machine lacks; Debian's package opus-tools has them."""
  return [name for name in PROGRAMS if not shutil.which(name)]


def version() -> str:
  """As `opusenc` states it, with that of the library: results differ between versions of it."""
  return _run(['opusenc', '--version'], b'').decode(errors='replace').splitlines()[0].removeprefix('opusenc ')


def round_trip(audio_N: np.ndarray, sample_rate: int, kilobits: float) -> tuple[np.ndarray, int]:
  """(decoded float32 [N] at the same rate, bits of the packets that hold sound).

  Mono or stereo in [-1, 1]; what lies outside is clipped, and the encoder gets 16 bits a sample. Constant bitrate, so
  that `kilobits` a second is what it takes (the default of variable bitrate takes half as much again on tonal music),
  and else the defaults of `opusenc`: complexity 10, frames of 20 ms. Opus works at 48 kHz inside; both programs
  resample.
  `opusdec` drops the samples by which the encoder declares to be late (RFC 7845, section 4.2). Raises
  RuntimeError where a program fails.
  """
  channels = audio_N.shape[1] if audio_N.ndim > 1 else 1
  samples = np.round(np.clip(np.asarray(audio_N, np.float64), -1, 1) * 32767).astype('<i2')
  encoded = _run(['opusenc', '--quiet', '--hard-cbr', '--bitrate', f'{kilobits:g}', '--raw', '--raw-bits', '16',
                  '--raw-chan', str(channels), '--raw-rate', str(sample_rate), '-', '-'], samples.tobytes())
  decoded = _run(['opusdec', '--quiet', '--float', '--rate', str(sample_rate), '-', '-'], encoded)
  audio = np.frombuffer(decoded[:len(decoded) // 4 * 4], '<f4').astype(np.float32)
  audio = audio.reshape(-1, *audio_N.shape[1:])
  return audio_measures.fit_length(audio, len(audio_N), axis=0), 8 * sum(_packets(encoded)[_HEADERS:])


def _run(command: list[str], given: bytes) -> bytes:
  done = subprocess.run(command, input=given, capture_output=True, check=False)
  if done.returncode:
    told = done.stderr.decode(errors='replace').strip().splitlines()[-1:] or ['no message']
    raise RuntimeError(f'{command[0]} failed: {told[0]}')
  return done.stdout


def _packets(stream: bytes) -> list[int]:
  """Bytes of each packet of an Ogg stream (RFC 3533, section 6): a page lists the lengths of its segments, and a
  packet ends with the first segment below 255 bytes."""
  packets, size, place = [], 0, 0
  while place < len(stream):
    if stream[place:place + 4] != b'OggS':
      raise RuntimeError('opusenc wrote no Ogg pages')
    segments = stream[place + 27:place + 27 + stream[place + 26]]
    for length in segments:
      size += length
      if length < 255:
        packets.append(size)
        size = 0
    place += 27 + len(segments) + sum(segments)
  return packets
