"""Opus: the rate that was asked for, as many samples as came in, and no delay."""
from __future__ import annotations

import numpy as np
import pytest

from musiclm_jax.evaluation import audio_measures, opus

needs_opus = pytest.mark.skipif(bool(opus.missing()), reason='opusenc and opusdec are not installed')


def chords(rate: int, seconds: float = 2.0) -> np.ndarray:
  t = np.arange(round(rate * seconds)) / rate
  steps = np.exp(-6 * (t % 0.25))
  return 0.2 * steps * sum(np.sin(2 * np.pi * f * t) for f in (220.0, 331.0, 502.0, 1207.0))


def lag(audio_N, reference_N, farthest=32):
  """By how many samples `audio` comes after `reference`: where they correlate most."""
  spectra = [np.fft.rfft(x, 2 * len(x)) for x in (audio_N, reference_N)]
  correlation = np.fft.irfft(spectra[0] * np.conj(spectra[1]))
  return max(range(-farthest, farthest + 1), key=lambda d: correlation[d])


@needs_opus
@pytest.mark.parametrize('rate', [16000, 24000, 44100])
def test_rate_length_and_delay(rate):
  audio = chords(rate)
  before = -np.inf
  for kilobits in (6, 12, 24):
    decoded, bits = opus.round_trip(audio, rate, kilobits)
    assert decoded.shape == audio.shape and decoded.dtype == np.float32
    # One or two packets more than the sound lasts: they carry the encoder's delay.
    assert kilobits * 1000 <= bits / 2.0 <= kilobits * 1000 * 1.03
    if kilobits > 6:  # at 6 kbit/s the waveform itself is not kept: there is nothing to correlate
      assert lag(decoded, audio) == 0
    sdr = audio_measures.si_sdr(audio[None], decoded[None])[0]
    assert sdr > before
    before = sdr
  assert before > 10


@needs_opus
def test_what_is_too_loud_is_clipped_and_one_sample_is_enough():
  decoded, _ = opus.round_trip(np.array([2.0]), 24000, 6)
  assert decoded.shape == (1,) and np.isfinite(decoded).all()
  decoded, _ = opus.round_trip(np.zeros(2400), 24000, 6)
  np.testing.assert_allclose(decoded, 0, atol=1e-3)


def test_the_lag_that_is_looked_for():
  assert [lag(np.roll(chords(24000), n), chords(24000)) for n in (-2, 0, 3)] == [-2, 0, 3]


def test_packets_of_an_ogg_stream():
  page = lambda segments: b'OggS' + bytes(22) + bytes([len(segments), *segments]) + bytes(sum(segments))
  assert opus._packets(page([19]) + page([255, 30]) + page([10, 255, 255]) + page([0, 7])) == [19, 285, 10, 510, 7]
  with pytest.raises(RuntimeError, match='no Ogg pages'):
    opus._packets(b'RIFF' + bytes(40))


def test_a_program_that_fails_says_why():
  with pytest.raises(RuntimeError, match='sh failed: no such luck'):
    opus._run(['sh', '-c', 'echo no such luck >&2; exit 3'], b'')
