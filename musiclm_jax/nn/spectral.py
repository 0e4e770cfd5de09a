"""Short-time Fourier transform, log-mel spectrogram, and how far two signals are apart.

B batch, N samples, F frames, W window, C frequency bins, M mel bands.
"""
from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from musiclm_jax import axes

# Added under the square root of |X|^2 so that the gradient of a silent bin is finite; far below any floor.
_MAGNITUDE_EPSILON = 1e-16
# How far below the loudest cell of a clip `distance_floor` is, 80 dB, and the least that it is, for clips of silence.
_DISTANCE_RANGE, _LEAST_FLOOR = 1e-4, 1e-7


@dataclasses.dataclass(frozen=True)
class MelConfig:
  """A mel spectrogram of `bands` bands from `low_hz` to `high_hz` (0: half the sample rate).

  Attributes:
    window, hop: samples of a (periodic Hann) window, and between frames.
    floor: the smallest amplitude told apart: log_mel is never below log(floor).
    fft_size: samples that a window is zero-padded to; 0 means `window`. With few bins, low bands lie
      between two bins and stay empty (at the floor): 64 bands at 24 kHz need 512.
  """

  window: int
  hop: int
  bands: int
  sample_rate: int = 24000
  low_hz: float = 0.0
  high_hz: float = 0.0
  floor: float = 1e-5
  fft_size: int = 0

  def __post_init__(self):
    if self.window < 2 or not 0 < self.hop <= self.window or self.bands < 1 or self.floor <= 0:
      raise ValueError(f'mel spectrogram: window, hop, bands and floor do not fit together in {self}')
    if not 0 <= self.low_hz < self.top_hz <= self.sample_rate / 2:
      raise ValueError(
          f'mel spectrogram: bands from {self.low_hz} to {self.top_hz} Hz do not lie between 0 and '
          f'{self.sample_rate / 2} Hz, half the sample rate')
    if self.fft_size and self.fft_size < self.window:
      raise ValueError(f'mel spectrogram: fft_size {self.fft_size} is smaller than the window {self.window}')

  @property
  def top_hz(self) -> float:
    return self.high_hz or self.sample_rate / 2

  @property
  def bins(self) -> int:
    return (self.fft_size or self.window) // 2 + 1

  @property
  def frame_rate(self) -> float:
    return self.sample_rate / self.hop


@functools.lru_cache(maxsize=64)
def hann(window: int) -> np.ndarray:
  """The periodic Hann window [W], float32."""
  return (0.5 - 0.5 * np.cos(2 * np.pi * np.arange(window) / window)).astype(np.float32)


def frame(x_BxN: jax.Array, window: int, hop: int, *, padded: bool = True) -> jax.Array:
  """Overlapping windows of a signal, [B, F, W].

  With `padded`, zeros are added so that there are ceil(N / hop) frames and frame f is centred on the samples
  [f * hop, (f + 1) * hop): (window - hop) // 2 zeros before the signal and the rest after it. Otherwise only
  whole windows count: (N - window) // hop + 1 of them.

  Windows are put together from reshaped, shifted blocks: gathers are slow on every backend.
  """
  length = x_BxN.shape[-1]
  if padded:
    frames = -(-length // hop)
    left = (window - hop) // 2
  else:
    if length < window:
      raise ValueError(f'{length} samples are fewer than one window of {window}')
    frames = (length - window) // hop + 1
    left = 0
  block = math.gcd(window, hop)
  stride = hop // block
  # Whole hops are needed even by the last window's shifted slices, hence the round-up.
  needed = -(-((frames - 1) * hop + window) // hop) * hop
  pad = needed - left - length
  x_BxN = jnp.pad(x_BxN[..., :length + min(pad, 0)], ((0, 0), (left, max(pad, 0))))
  blocks = x_BxN.reshape(x_BxN.shape[0], needed // block, block)
  shifted = [
      jax.lax.slice_in_dim(blocks, i, i + (frames - 1) * stride + 1, stride, axis=1)
      for i in range(window // block)]
  return jnp.concatenate(shifted, axis=-1)


def stft(x_BxN: jax.Array, window: int, hop: int, *, padded: bool = True, fft_size: int = 0) -> jax.Array:
  """Short-time Fourier transform, complex64 [B, F, C] with C = fft_size // 2 + 1 (fft_size 0: window).

  Hann windows, no normalisation; frames as in `frame`. Always computed in float32.
  """
  frames_BxFxW = frame(x_BxN.astype(jnp.float32), window, hop, padded=padded) * hann(window)
  transform = lambda frames: jnp.fft.rfft(frames, n=fft_size or window)
  if frames_BxFxW.shape[0] % axes.parts('batch'):
    return transform(frames_BxFxW)
  # The compiler splits no Fourier transform: left to itself it gathers all frames on every device.
  return axes.apart(transform, [('batch', None, None)], frames_BxFxW, kernel=False)


def _hz_to_mel(hz):
  return 2595.0 * np.log10(1.0 + np.asarray(hz, np.float64) / 700.0)


def _mel_to_hz(mel):
  return 700.0 * (10.0 ** (np.asarray(mel, np.float64) / 2595.0) - 1.0)


@functools.lru_cache(maxsize=64)
def mel_matrix(config: MelConfig) -> np.ndarray:
  """Triangular filters on the HTK mel scale with peak 1, float32 [C, M]."""
  edges = _mel_to_hz(np.linspace(_hz_to_mel(config.low_hz), _hz_to_mel(config.top_hz), config.bands + 2))
  bins_Cx1 = np.linspace(0.0, config.sample_rate / 2, config.bins)[:, None]
  rising = (bins_Cx1 - edges[:-2]) / (edges[1:-1] - edges[:-2])
  falling = (edges[2:] - bins_Cx1) / (edges[2:] - edges[1:-1])
  return np.maximum(0.0, np.minimum(rising, falling)).astype(np.float32)


def mel(x_BxN: jax.Array, config: MelConfig, *, padded: bool = True) -> jax.Array:
  """Mel spectrogram of amplitudes, float32 [B, F, M].

  Amplitudes are divided by half the sum of the window: a sine of amplitude 1 has 1 at its bin whatever the
  window, so that one floor serves windows of all sizes.
  """
  spectrum = stft(x_BxN, config.window, config.hop, padded=padded, fft_size=config.fft_size)
  spectrum = spectrum * np.float32(2.0 / hann(config.window).sum())
  amplitude = jnp.sqrt(jnp.square(spectrum.real) + jnp.square(spectrum.imag) + _MAGNITUDE_EPSILON)
  return jnp.matmul(amplitude, mel_matrix(config), precision=jax.lax.Precision.HIGHEST)


def log_mel(x_BxN: jax.Array, config: MelConfig, *, padded: bool = True) -> jax.Array:
  """Natural logarithm of `mel`, not below log(config.floor); float32 [B, F, M].

  With `padded` (the default) a signal of a multiple of `hop` samples has exactly N // hop frames.
  """
  return jnp.log(jnp.maximum(mel(x_BxN, config, padded=padded), config.floor))


@functools.lru_cache(maxsize=8)
def distance_mels(sample_rate: int) -> tuple[MelConfig, ...]:
  """The spectrograms that `log_mel_distance` compares: windows 512, 1024 and 2048, hop a quarter of the window."""
  return tuple(MelConfig(sample_rate=sample_rate, window=w, hop=w // 4, bands=64) for w in (512, 1024, 2048))


def distance_floor(amplitudes_BxFxM: jax.Array | np.ndarray) -> jax.Array | np.ndarray:
  """80 dB below the loudest cell of each reference, [B, 1, 1]: quieter cells of both sides of a distance count as this.

  So a distance does not depend on how loud a recording was made, and nobody is judged by what cannot be heard.
  """
  xp = np if isinstance(amplitudes_BxFxM, np.ndarray) else jnp
  return xp.maximum(_DISTANCE_RANGE * amplitudes_BxFxM.max(axis=(1, 2), keepdims=True), _LEAST_FLOOR)


def log_mel_distance(reference_BxN: jax.Array, estimate_BxN: jax.Array, sample_rate: int = 24000) -> jax.Array:
  """Mean |ln mel(x) - ln mel(y)| over `distance_mels`, frames and bands, with `distance_floor`; [B].

  ln 2 is a factor of 2 on average.
  """
  distances = []
  for config in distance_mels(sample_rate):
    reference, estimate = mel(reference_BxN, config), mel(estimate_BxN, config)
    floor = distance_floor(reference)
    difference = jnp.log(jnp.maximum(reference, floor)) - jnp.log(jnp.maximum(estimate, floor))
    distances.append(jnp.mean(jnp.abs(difference), axis=(1, 2)))
  return sum(distances) / len(distances)


def si_sdr(reference_BxN: jax.Array | np.ndarray, estimate_BxN: jax.Array | np.ndarray) -> jax.Array | np.ndarray:
  """Scale-invariant signal-to-distortion ratio in dB, [B] (Le Roux et al., arXiv 1811.02508, eq. 5).

  Arrays of JAX or of NumPy, in their own precision. Both signals are made zero-mean first. Clips without any sound
  have no such ratio: NaN. An estimate without any has nothing of its clip: -300.
  """
  both_numpy = isinstance(reference_BxN, np.ndarray) and isinstance(estimate_BxN, np.ndarray)
  xp = np if both_numpy else jnp
  reference_BxN = reference_BxN - xp.mean(reference_BxN, axis=-1, keepdims=True)
  estimate_BxN = estimate_BxN - xp.mean(estimate_BxN, axis=-1, keepdims=True)
  energy_B = xp.sum(reference_BxN**2, axis=-1)
  least = 1e-12 * reference_BxN.shape[-1]
  silent_B = energy_B <= least
  scale_B = xp.sum(reference_BxN * estimate_BxN, axis=-1) / xp.where(silent_B, 1.0, energy_B)
  target_BxN = scale_B[..., None] * reference_BxN
  error_B = xp.sum((estimate_BxN - target_BxN)**2, axis=-1)
  target_B = xp.sum(target_BxN**2, axis=-1)
  # The limits keep a perfect and an unrelated estimate finite, at +300 and -300 dB.
  ratio_B = xp.maximum(target_B, 1e-30) / xp.maximum(error_B, 1e-30)
  ratio_B = xp.where(target_B + error_B <= least, 1e-30, xp.clip(ratio_B, 1e-30, 1e30))
  return xp.where(silent_B, xp.nan, 10 * xp.log10(ratio_B))
