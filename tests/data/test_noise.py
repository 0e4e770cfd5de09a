"""The built-in noise: a function of its index, nothing held out is in training, and each kind sounds as it says."""
import numpy as np
import pytest

from musiclm_jax.data import noise


def spectrum_db(x):
  power = np.abs(np.fft.rfft(x * np.hanning(len(x)))) ** 2
  return 10 * np.log10(power / power.max() + 1e-12)


def test_a_noise_is_a_function_of_its_index_with_peak_one():
  a, b = noise.Corpus(seconds=0.5), noise.Corpus(first=5, size=5, seconds=0.5)
  for i in range(9):
    x = a[i]['audio']
    assert x.dtype == np.float32 and x.shape == (12000,) and np.abs(x).max() == pytest.approx(1)
    np.testing.assert_array_equal(x, noise.Corpus(seconds=0.5)[i]['audio'])
  np.testing.assert_array_equal(a[7]['audio'], b[2]['audio'])
  assert a.fingerprint != b.fingerprint != noise.Corpus(seconds=0.5, seed=1).fingerprint
  assert len({a[i]['audio'].tobytes() for i in range(30)}) == 30


def test_splits_share_nothing_and_follow_the_rate():
  train, test = (noise.open_noise('builtin', split, 16000) for split in ('train', 'test'))
  assert train.first + train.size <= test.first
  assert test[0]['sample_rate'] == 16000 and len(test[0]['audio']) == 160000
  with pytest.raises(ValueError, match="no split 'dev'; it has train, test"):
    noise.open_noise('builtin', 'dev')
  with pytest.raises(IndexError):
    test[len(test)]


def test_each_kind_sounds_as_it_says():
  corpus = noise.Corpus(seconds=4.0)
  named = {kind: [corpus[i]['audio'] for i in range(30) if corpus[i]['recording'].startswith(kind)]
           for kind in noise.KINDS}
  assert all(len(clips) == 10 for clips in named.values())
  for x in named['hum']:  # most of the energy in a few lines below 1 kHz
    power = np.abs(np.fft.rfft(x)) ** 2
    assert np.sort(power)[-200:].sum() > 0.8 * power.sum() and np.argmax(power) / 4 < 800
  for x in named['hiss']:  # no lines, never quiet for long
    assert np.sort(np.abs(np.fft.rfft(x)) ** 2)[-20:].sum() < 0.8 * np.sum(np.abs(np.fft.rfft(x)) ** 2)
  crest = lambda x: np.abs(x).max() / np.sqrt(np.mean(x ** 2))
  assert min(map(crest, named['crackle'])) > 10 > max(map(crest, named['hum']))
