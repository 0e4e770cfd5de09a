"""Bits of a stage with known answers: a model that copies its condition, one that ignores it."""
from __future__ import annotations

import numpy as np
import pytest

from musiclm_jax import specs
from musiclm_jax.evaluation import stage_figures

K, F = 8, 6
ACOUSTIC = specs.TokenSpec('acoustic', K, levels=4, frame_rate=50.0)
COARSE, FINE = ACOUSTIC.part('coarse', 0, 2), ACOUSTIC.part('fine', 2, 2)
MULAN = specs.TokenSpec('mulan', K, levels=3)
STAGE = specs.Stage('fine', (MULAN, COARSE), FINE, F / 50)


def streams(count=24, seed=0):
  """The fine levels are the coarse ones, shifted; MuLan tokens have nothing to do with them."""
  rng = np.random.default_rng(seed)
  coarse = rng.integers(0, K, (count, F, 2))
  return {'acoustic': np.concatenate([coarse, (coarse + 1) % K], axis=-1),
          'mulan': rng.integers(0, K, (count, 1, 3))}


def copying_bits(batch):
  """0.1 bits where the fine token follows from the coarse one, 5 where it does not."""
  acoustic = batch['acoustic']
  assert batch['slot'].shape == acoustic.shape[:1] == (5,)
  return np.where(acoustic[..., 2:] == (acoustic[..., :2] + 1) % K, 0.1, 5.0)


def figures(bits=copying_bits, recordings=None):
  held_out = streams()
  recordings = np.arange(24) // 3 if recordings is None else recordings
  return stage_figures.stage_figures(
      bits, STAGE, held_out, recordings, streams(200, 1)['acoustic'], batch_size=5, shuffles=2)


def test_figures_of_a_model_that_reads_its_condition():
  found = figures()
  assert found['bits_per_token'] == pytest.approx(0.1)
  assert found['unigram_bits_per_token'] == pytest.approx(3, abs=0.1)
  assert found['unigram_share_of_log2_k'] == pytest.approx(1, abs=0.05)
  assert found['unigram_bits_per_token'] <= found['bigram_bits_per_token'] < 3.5  # independent frames
  assert len(found['bits_by_level']) == len(found['bigram_bits_by_level']) == 2
  gap = found['condition_gap']['coarse']
  assert gap['bits'] == pytest.approx(4.9 * 7 / 8, abs=0.4)
  assert 0 < gap['interval'][0] < gap['bits'] < gap['interval'][1]
  assert found['condition_gap']['mulan'] == {
      'bits': 0, 'interval': [0, 0], 'bits_first_frame': 0, 'interval_first_frame': [0, 0]}


def test_one_recording_has_no_gap():
  assert figures(recordings=np.zeros(24))['condition_gap'] == {}


def test_bits_of_the_wrong_shape_are_refused():
  with pytest.raises(ValueError, match='bits of shape'):
    figures(lambda batch: np.zeros((5, F, 3)))


def test_only_the_levels_of_the_condition_are_exchanged():
  held_out = streams()
  changed = stage_figures.with_other_condition(held_out, COARSE, np.arange(24))
  np.testing.assert_array_equal(changed['acoustic'][..., 2:], held_out['acoustic'][..., 2:])
  np.testing.assert_array_equal(changed['mulan'], held_out['mulan'])
  assert (changed['acoustic'][..., :2] != held_out['acoustic'][..., :2]).any((1, 2)).all()


@pytest.mark.parametrize('recordings', [
    np.arange(10), np.arange(12) // 3, np.array([0, 0, 0, 1, 2, 3]), np.array([0] * 9 + [1, 2]),
    np.array(list('aabbbcc'))])
@pytest.mark.parametrize('seed', range(5))
def test_other_recordings_are_others(recordings, seed):
  index = stage_figures.other_recording(recordings, seed=seed)
  assert (recordings[index] != recordings).all()
  if np.unique(recordings, return_counts=True)[1].max() * 2 <= len(recordings):
    assert sorted(index) == list(range(len(recordings)))
