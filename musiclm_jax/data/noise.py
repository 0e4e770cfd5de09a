"""The built-in noise: hiss, hum and crackle made from (seed, index), for networks that learn to take noise out.

N samples.
"""
from __future__ import annotations

import dataclasses
import os

import numpy as np

from musiclm_jax.data import source

# Raise whenever a sound changes: it is part of every fingerprint.
VERSION = 1
_CLIPS = {'train': 1000, 'test': 100}
KINDS = ('hiss', 'hum', 'crackle')
_LOWEST_HZ = 50.0  # a spectrum that falls from 0 Hz on would be all rumble


@dataclasses.dataclass(frozen=True)
class Corpus:
  """Noises `first` to `first + size - 1` of `seed`, made when asked for, with peak 1.

  Hiss is Gaussian with a spectrum that falls by 0 to 9 dB an octave and a slow swell; hum is a mains frequency with its
  overtones, and a little hiss; crackle is single clicks at random, each of which rings for a moment.
  """

  seed: int = 0
  first: int = 0
  size: int = 1000
  seconds: float = 10.0
  sample_rate: int = 24000

  def __post_init__(self):
    if self.size < 1 or self.first < 0 or self.seconds <= 0 or self.sample_rate < 1000:
      raise ValueError(f'noise needs size >= 1, first >= 0, seconds > 0 and sample_rate >= 1000, found {self}')

  def __len__(self) -> int:
    return self.size

  def __getitem__(self, i: int) -> source.Example:
    """Example `i`: float32 audio [N]."""
    if not 0 <= i < self.size:
      raise IndexError(f'example {i} of {self.size} noises')
    index = self.first + i
    rng = np.random.default_rng((VERSION, self.seed, index))
    kind = KINDS[index % len(KINDS)]
    audio = {'hiss': _hiss, 'hum': _hum, 'crackle': _crackle}[kind](
        rng, round(self.seconds * self.sample_rate), self.sample_rate)
    return {'audio': (audio / np.abs(audio).max()).astype(np.float32), 'sample_rate': self.sample_rate,
            'recording': f'{kind}-{self.seed}-{index}'}

  @property
  def fingerprint(self) -> str:
    return source.digest(['noise', VERSION, dataclasses.asdict(self)])


def open_noise(path: str | os.PathLike, split: str, sample_rate: int = 24000) -> source.Corpus:
  """The noises of a record set made by `musiclm prepare`, or with "builtin" the noise that ships.

  Raises: as `source.open_corpus` does.
  """
  if str(path) != source.BUILT_IN:
    return source.open_corpus(path, split)
  if split not in _CLIPS:
    raise ValueError(f'the built-in noise has no split {split!r}; it has {", ".join(_CLIPS)}')
  return Corpus(first=0 if split == 'train' else _CLIPS['train'], size=_CLIPS[split], sample_rate=sample_rate)


def _coloured(rng: np.random.Generator, samples: int, rate: int, slope_db: float) -> np.ndarray:
  """Gaussian noise whose spectrum falls by `slope_db` an octave from 50 Hz on; below there is none."""
  spectrum = np.fft.rfft(rng.standard_normal(samples))
  octaves = np.log2(np.maximum(np.fft.rfftfreq(samples, 1 / rate), 1.0) / _LOWEST_HZ)
  return np.fft.irfft(np.where(octaves < 0, 0, spectrum * 10 ** (-slope_db * octaves / 20)), samples)


def _hiss(rng: np.random.Generator, samples: int, rate: int) -> np.ndarray:
  seconds = np.arange(samples) / rate
  swell = 1 + rng.uniform(0, 0.5) * np.sin(2 * np.pi * (rng.uniform(0.1, 1) * seconds + rng.random()))
  return _coloured(rng, samples, rate, rng.uniform(0, 9)) * swell


def _hum(rng: np.random.Generator, samples: int, rate: int) -> np.ndarray:
  phase = 2 * np.pi * rng.choice([50, 60]) * rng.uniform(0.998, 1.002) * np.arange(samples) / rate
  falls = rng.uniform(0.5, 1.5)
  hum = sum(k ** -falls * np.sin(k * phase + rng.uniform(0, 2 * np.pi)) for k in range(1, 13))
  hiss = _coloured(rng, samples, rate, 3)
  return hum + rng.uniform(0.02, 0.2) * hiss / np.abs(hiss).max()


def _crackle(rng: np.random.Generator, samples: int, rate: int) -> np.ndarray:
  # At least one click, so that there is a peak to divide by.
  clicks = np.zeros(samples)
  count = 1 + rng.poisson(rng.uniform(2, 40) * samples / rate)
  clicks[rng.integers(0, samples, count)] = rng.laplace(size=count)
  time = np.arange(max(2, rate // 500)) / rate  # 2 ms
  ring = np.exp(-time * rng.uniform(1000, 4000)) * np.cos(2 * np.pi * rng.uniform(500, 5000) * time)
  return np.convolve(clicks, ring)[:samples] + 1e-3 * _coloured(rng, samples, rate, 0)
