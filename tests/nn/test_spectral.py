"""STFT and mel against independent implementations, and the framing contract."""
import numpy as np
import pytest

from musiclm_jax.nn import spectral


def noise(*shape, seed=0):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize('window, hop', [(256, 64), (600, 240), (400, 160), (480, 480)])
def test_frames_are_the_windows_of_the_padded_signal(window, hop):
  x = noise(2, 4800)
  framed = np.asarray(spectral.frame(x, window, hop))
  assert framed.shape == (2, 4800 // hop, window)
  padded = np.pad(x, ((0, 0), ((window - hop) // 2, window)))
  for f in range(framed.shape[1]):
    np.testing.assert_array_equal(framed[:, f], padded[:, f * hop:f * hop + window])


@pytest.mark.parametrize('window, hop', [(256, 64), (600, 240)])
def test_unpadded_frames_are_whole_windows_only(window, hop):
  x = noise(1, 2500)
  framed = np.asarray(spectral.frame(x, window, hop, padded=False))
  expected = np.lib.stride_tricks.sliding_window_view(x[0], window)[::hop]
  np.testing.assert_array_equal(framed[0], expected)


def test_a_signal_shorter_than_a_window_is_refused_without_padding():
  with pytest.raises(ValueError, match='100 samples'):
    spectral.frame(noise(1, 100), 256, 64, padded=False)


def test_stft_equals_scipy():
  signal = pytest.importorskip('scipy.signal')
  x = noise(1, 4096)
  ours = spectral.stft(x, 512, 128, padded=False)[0]
  _, _, theirs = signal.stft(x[0], window='hann', nperseg=512, noverlap=384, boundary=None, padded=False)
  # SciPy divides by the sum of the window.
  np.testing.assert_allclose(ours, theirs.T * 256, atol=2e-3)


def test_stft_keeps_energy():
  """Parseval: a rectangular signal frame's energy is the mean squared magnitude over all bins."""
  x = noise(1, 512)
  spectrum = np.asarray(spectral.stft(x, 512, 512, padded=False))[0, 0]
  twice = np.abs(spectrum) ** 2
  total = (twice[0] + twice[-1] + 2 * twice[1:-1].sum()) / 512
  np.testing.assert_allclose(total, np.sum((x[0] * spectral.hann(512)) ** 2), rtol=1e-4)


@pytest.mark.parametrize('window', [256, 1024])
def test_a_sine_of_amplitude_one_has_one_at_its_bin_for_any_window(window):
  hz = 24000 * 32 / 256
  x = np.sin(2 * np.pi * hz * np.arange(24000) / 24000)[None].astype(np.float32)
  config = spectral.MelConfig(window=window, hop=window // 4, bands=64)
  mel = np.asarray(spectral.mel(x, config, padded=False))
  # The window spreads a sine over three bins (1/2, 1, 1/2), which at most two bands share.
  matrix, middle = spectral.mel_matrix(config), round(hz / 24000 * window)
  peak = np.argmax(mel.mean(axis=(0, 1)))
  assert matrix[middle, peak] > 0.4
  np.testing.assert_allclose(mel[..., peak], np.array([0.5, 1, 0.5]) @ matrix[middle - 1:middle + 2, peak], rtol=0.01)


def test_log_mel_has_a_frame_a_hop_and_a_floor():
  config = spectral.MelConfig(window=512, hop=240, bands=32, floor=1e-4)
  silence = spectral.log_mel(np.zeros((1, 2400), np.float32), config)
  assert silence.shape == (1, 10, 32)
  np.testing.assert_allclose(silence, np.log(1e-4), rtol=1e-6)


def test_padding_the_fft_fills_the_low_bands():
  sparse = spectral.mel_matrix(spectral.MelConfig(window=128, hop=32, bands=64))
  dense = spectral.mel_matrix(spectral.MelConfig(window=128, hop=32, bands=64, fft_size=512))
  assert (sparse.sum(axis=0) == 0).any() and (dense.sum(axis=0) > 0).all()


def test_bands_beyond_half_the_sample_rate_are_refused():
  with pytest.raises(ValueError, match='8000'):
    spectral.MelConfig(window=512, hop=128, bands=8, sample_rate=16000, high_hz=9000)


def test_the_gradient_is_finite_at_silence():
  jax = pytest.importorskip('jax')
  config = spectral.MelConfig(window=64, hop=16, bands=8)
  gradient = jax.grad(lambda x: spectral.log_mel(x, config).sum())(np.zeros((1, 256), np.float32))
  assert np.isfinite(gradient).all()


@pytest.mark.parity
def test_mel_matrix_equals_transformers():
  audio_utils = pytest.importorskip('transformers.audio_utils')
  ours = spectral.mel_matrix(spectral.MelConfig(window=1024, hop=256, bands=64, low_hz=60.0, high_hz=7800.0))
  theirs = audio_utils.mel_filter_bank(
      num_frequency_bins=513, num_mel_filters=64, min_frequency=60.0, max_frequency=7800.0,
      sampling_rate=24000, norm=None, mel_scale='htk')
  np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_log_mel_distance_of_a_gain():
  x = np.random.default_rng(0).uniform(-0.5, 0.5, size=(1, 4800)).astype(np.float32)
  np.testing.assert_allclose(spectral.log_mel_distance(x, x), [0.0], atol=1e-6)
  # Bands between two bins are empty at either gain.
  assert 0.8 < float(spectral.log_mel_distance(x, x * np.e)[0]) <= 1.0
