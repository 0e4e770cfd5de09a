"""The mel distance, its baselines and SI-SDR on signals with known answers."""
from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from musiclm_jax.evaluation import audio_measures, codec_figures
from musiclm_jax.nn import spectral

RATE = 24000


def tones(count=3, seconds=0.5, seed=0):
  """Clips with events: tones that begin at different times."""
  rng = np.random.default_rng(seed)
  t = np.arange(int(RATE * seconds)) / RATE
  clips = []
  for _ in range(count):
    clip = np.zeros_like(t)
    for start in (0.0, seconds / 2):
      decay = (t >= start) * np.exp(-8 * np.maximum(t - start, 0))
      clip += decay * np.sin(2 * np.pi * rng.uniform(200, 2000) * t)
    clips.append(0.3 * clip)
  return np.array(clips, np.float32)


def test_equal_clips_have_distance_zero():
  clips = tones()
  np.testing.assert_array_equal(audio_measures.mel_distance(clips, clips), 0)


def test_halving_the_amplitude_costs_ln_2_where_nothing_is_below_the_floor():
  noise = np.random.default_rng(0).standard_normal((2, RATE // 2)).astype(np.float32) * 0.1
  np.testing.assert_allclose(audio_measures.mel_distance(noise, noise / 2), np.log(2), rtol=2e-3)


def test_mel_distance_does_not_depend_on_the_loudness_of_the_recording():
  x = tones()
  y = x + 1e-3 * np.random.default_rng(1).standard_normal(x.shape).astype(np.float32)
  expected = audio_measures.mel_distance(x, y)
  np.testing.assert_allclose(audio_measures.mel_distance(0.1 * x, 0.1 * y), expected, rtol=1e-3)


def test_mel_distance_hears_nothing_80_db_below_the_loudest_cell():
  t = np.arange(RATE) / RATE
  # Steady and on bins of all windows; the ends, where windows reach beyond the clip, are in either.
  tone, other = np.sin(2 * np.pi * 750 * t)[None], np.sin(2 * np.pi * 6000 * t)[None]
  assert audio_measures.mel_distance(tone, tone + 1e-5 * other)[0] < 0.01
  assert audio_measures.mel_distance(tone, tone + 1e-2 * other)[0] > 0.05
  # What the estimate has above the reference's floor counts, whatever is loudest in the estimate.
  assert audio_measures.mel_distance(1e-3 * tone, 1e-3 * tone + other)[0] > 0.1


def test_baselines_are_ordered_as_their_knowledge():
  means = {k: v.mean() for k, v in audio_measures.mel_distance_baselines(tones(6)).items()}
  assert set(means) == {'silence', 'white_noise', 'another_clip', 'set_median', 'clip_median'}
  assert 0 < means['clip_median'] < means['set_median'] < means['silence']
  assert means['clip_median'] < means['another_clip']


def test_constant_sound_is_its_own_median():
  t = np.arange(RATE) / RATE
  steady = 0.3 * np.sin(2 * np.pi * 500 * t)[None].astype(np.float32)
  baselines = audio_measures.mel_distance_baselines(steady)
  assert baselines['clip_median'][0] < 0.25
  assert 'another_clip' not in baselines


def test_log_spectral_distance_of_a_gain_is_the_gain():
  noise = np.random.default_rng(0).standard_normal((2, RATE // 2)).astype(np.float32) * 0.1
  np.testing.assert_allclose(audio_measures.log_spectral_distance(noise, noise / 2), 20 * np.log10(2), rtol=2e-3)
  np.testing.assert_array_equal(audio_measures.log_spectral_distance(noise, noise), 0)


def test_log_spectral_distance_hears_nothing_80_db_below_the_loudest_cell():
  t = np.arange(RATE) / RATE
  tone = np.sin(2 * np.pi * 750 * t)[None]  # on a bin: nothing elsewhere but at the ends
  assert audio_measures.log_spectral_distance(tone, tone + 1e-6 * np.sin(2 * np.pi * 6000 * t))[0] < 0.01
  assert audio_measures.log_spectral_distance(tone, tone + 1e-2 * np.sin(2 * np.pi * 6000 * t))[0] > 0.5
  quiet = audio_measures.log_spectral_distance(1e-3 * tone, 1e-3 * tone + 1e-5 * np.sin(2 * np.pi * 6000 * t))
  np.testing.assert_allclose(
      quiet, audio_measures.log_spectral_distance(tone, tone + 1e-2 * np.sin(2 * np.pi * 6000 * t)), rtol=1e-3)


@pytest.mark.parametrize('samples', [1, 511, 6000, 11999])
def test_distances_of_a_padded_clip_are_those_of_the_clip(samples):
  x = tones(1)
  y = x + 0.05 * np.random.default_rng(1).standard_normal(x.shape).astype(np.float32)
  found = audio_measures.distances(x, y, np.array([samples]), sample_rate=RATE)
  x, y = x[:, :samples], y[:, :samples]
  np.testing.assert_allclose(found.si_sdr, audio_measures.si_sdr(x, y), rtol=1e-6)
  np.testing.assert_allclose(found.mel_distance, audio_measures.mel_distance(x, y), rtol=1e-4)
  np.testing.assert_allclose(found.log_spectral_distance, audio_measures.log_spectral_distance(x, y), rtol=1e-4)


def test_training_and_report_measure_the_same():
  x = tones()
  y = x + 0.05 * np.random.default_rng(1).standard_normal(x.shape).astype(np.float32)
  np.testing.assert_allclose(spectral.log_mel_distance(x, y), audio_measures.mel_distance(x, y), rtol=1e-5)
  np.testing.assert_allclose(spectral.si_sdr(jnp.asarray(x), jnp.asarray(y)), audio_measures.si_sdr(x, y), atol=1e-3)


def test_si_sdr_ignores_scale_and_offset():
  rng = np.random.default_rng(1)
  x = tones()
  y = x + 0.05 * rng.standard_normal(x.shape)
  expected = audio_measures.si_sdr(x, y)
  np.testing.assert_allclose(audio_measures.si_sdr(x, 7 * y + 0.3), expected, rtol=1e-6)
  np.testing.assert_allclose(audio_measures.si_sdr(0.1 * x, y), expected, rtol=1e-6)


def test_si_sdr_of_orthogonal_noise_is_the_ratio_of_energies():
  t = np.arange(RATE) / RATE
  x, n = np.sin(2 * np.pi * 100 * t)[None], np.cos(2 * np.pi * 100 * t)[None]
  np.testing.assert_allclose(audio_measures.si_sdr(x, x + 0.1 * n), 20.0, atol=1e-6)
  np.testing.assert_allclose(audio_measures.si_sdr(x, x + n), 0.0, atol=1e-6)
  assert audio_measures.si_sdr(x, x)[0] > 200


@pytest.mark.parametrize('xp', [np, jnp])
def test_si_sdr_of_an_estimate_without_any_sound_is_as_bad_as_any(xp):
  x = tones(1)
  noise = np.random.default_rng(0).standard_normal(x.shape).astype(np.float32)
  of = lambda estimate: float(spectral.si_sdr(xp.asarray(x), xp.asarray(estimate.astype(np.float32)))[0])
  for silent in (np.zeros_like(x), np.full_like(x, 0.3), 1e-17 * x):
    assert of(silent) == pytest.approx(-300)
  assert -100 < of(noise) < -20


def test_silent_clips_have_no_si_sdr():
  assert np.isnan(audio_measures.si_sdr(np.zeros((1, 100)), np.ones((1, 100))))[0]


class Codec:
  """A stand-in: frames of 480 samples; level q quantizes what the levels before left, 3 bit a sample."""

  frame = 480

  def __init__(self, levels=4, coarse=0.5):
    self.steps = [coarse / 4**q for q in range(levels)]

  def encode(self, audio, levels=None):
    whole = audio.shape[1] // self.frame * self.frame
    frames = np.asarray(audio)[:, :whole].reshape(len(audio), -1, self.frame)
    self.memory = frames  # codes only number the frames here
    index = np.arange(frames.shape[1]) % 8
    return np.broadcast_to(index[None, :, None], (*frames.shape[:2], len(self.steps))).astype(np.int32)

  def decode(self, indices):
    step = self.steps[indices.shape[-1] - 1]
    return (np.round(self.memory / step) * step).reshape(len(indices), -1)


def test_codec_figures_improve_with_levels_and_are_complete():
  clips = tones(2) + 0.02 * np.random.default_rng(0).standard_normal((2, RATE // 2)).astype(np.float32)
  figures = codec_figures.codec_figures(
      Codec(), clips, 8, levels=(1, 4), untrained=Codec(coarse=40.0), batch_size=2, more_clips_MxN=tones(3))
  assert figures['si_sdr_db'] == figures['si_sdr_db_by_levels']['4'] > figures['si_sdr_db_by_levels']['1']
  assert figures['mel_distance'] < figures['mel_distance_untrained']
  assert figures['perplexity_frames'] == 5 * 25
  assert len(figures['perplexity_share']) == 4
  np.testing.assert_allclose(figures['perplexity_share'], 1.0, atol=0.01)
  assert figures['si_sdr_db_interval'] == [None, None]  # of two clips


def test_clips_of_one_recording_do_not_narrow_the_interval():
  noise = np.random.default_rng(0).standard_normal((8, 4800)).astype(np.float32)
  clips = np.repeat(noise * np.linspace(0.05, 0.4, 8)[:, None].astype(np.float32), 2, axis=0)
  found = [codec_figures.codec_figures(Codec(), clips, 8, levels=(4,), batch_size=16, recordings_B=recordings)
           for recordings in (None, np.repeat(list('abcdefgh'), 2))]
  alone, by_recording = (f['si_sdr_db_interval'][1] - f['si_sdr_db_interval'][0] for f in found)
  assert by_recording > 1.2 * alone


def test_too_many_levels_is_refused():
  with pytest.raises(ValueError, match='12 levels asked for, the codec has 4'):
    audio_measures.round_trip(Codec(), tones(2), (1, 12))


def test_restart_share_is_that_of_the_end():
  rows = [{'step': s, 'restarts': 0.5 if s <= 90 else 0.002} for s in range(1, 101)]
  assert codec_figures.restart_share(rows) == pytest.approx(0.002)
  rows = [{'step': s, 'restarts': float(s < 95)} for s in range(0, 101, 5)]
  assert codec_figures.restart_share(rows) == 0
  assert codec_figures.restart_share([{'step': 1, 'loss': 2.0}]) is None
