"""The cascade from text to audio with small untrained networks: shapes, reproducibility, windows, bad input."""
import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from musiclm_jax.generate import pipeline
from musiclm_jax.generate.pipeline import Settings
from musiclm_jax.token_lm.draw import Sampling
from musiclm_jax.token_lm.sample import sample
from musiclm_jax.token_lm.sequence import Layout
from tests.generate.stand_in import keys, STAGES, StandIn

GREEDY = {name: Sampling(0.0) for name in STAGES}


@pytest.fixture(scope='module', name='networks')
def stand_in():
  return StandIn()


@pytest.mark.parametrize('seconds', [0.1, 0.4, 1.0, 2.3])
def test_audio_has_the_length_asked_for(networks, seconds):
  made = pipeline.generate(networks, ['slow piano'], Settings(seconds=seconds))
  assert made.sample_rate == 24000
  assert made.audio_BxN.shape == (1, round(seconds * 24000))
  assert made.tokens['acoustic'].shape[-1] == 6


def test_the_seed_decides(networks):
  prompts = ['slow piano', 'fast drums']
  run = lambda seed: pipeline.generate(networks, prompts, Settings(seconds=1.0), seed=seed).audio_BxN
  np.testing.assert_array_equal(run(1), run(1))
  assert not np.array_equal(run(1), run(2))


def test_a_prompt_sounds_the_same_beside_others(networks):
  one = pipeline.generate(networks, ['slow piano'], Settings(seconds=1.0), seed=1).audio_BxN
  two = pipeline.generate(networks, ['slow piano', 'fast drums'], Settings(seconds=1.0), seed=1).audio_BxN
  np.testing.assert_array_equal(one[0], two[0])


def test_the_prompt_is_heard_and_no_level_means_unconditional(networks):
  # Strong guidance, because a network without training says little.
  sampling = {**GREEDY, 'semantic': Sampling(1.0, guidance=30.0)}
  settings = Settings(seconds=1.0, mulan_levels=12, sampling=sampling)
  run = lambda text, s: pipeline.generate(networks, [text], s, seed=1).tokens['acoustic']
  assert not np.array_equal(run('slow piano', settings), run('loud trumpet', settings))
  deaf = dataclasses.replace(settings, mulan_levels=0)
  np.testing.assert_array_equal(run('slow piano', deaf), run('loud trumpet', deaf))


def test_a_stage_is_shown_the_levels_that_it_has_learned_to_hear_or_that_are_asked_for():
  networks, rows = StandIn(), {}
  networks.mulan_levels = {'coarse': 3}
  plain = networks.sample_rows

  def watched(stage, rows_BxT, *rest):
    rows[stage] = np.asarray(rows_BxT)
    return plain(stage, rows_BxT, *rest)

  networks.sample_rows = watched

  def shown(name, settings):
    pipeline.generate(networks, ['slow piano'], settings)
    stage = networks.stages[name]
    mulan = stage.conditions[0]
    return int((rows[name][0, :mulan.levels] != stage.null_row(mulan)).sum())

  theirs, five = Settings(seconds=0.4), Settings(seconds=0.4, mulan_levels=5)
  assert (shown('semantic', theirs), shown('coarse', theirs)) == (1, 3)
  assert (shown('semantic', five), shown('coarse', five)) == (5, 5)
  assert pipeline.mulan_levels_of(networks, theirs) == {'semantic': 1, 'coarse': 3}
  assert pipeline.mulan_levels_of(networks, five) == {'semantic': 5, 'coarse': 5}


def test_one_window_that_covers_all_is_the_sliding_result_of_the_first_window(networks):
  short = pipeline.generate(networks, ['slow piano'], Settings(seconds=0.4, sampling=GREEDY), seed=1).tokens
  long = pipeline.generate(networks, ['slow piano'], Settings(seconds=2.0, sampling=GREEDY), seed=1).tokens
  np.testing.assert_array_equal(long['acoustic'][:, :20, :2], short['acoustic'][..., :2])


def test_a_window_continues_the_one_before(networks):
  # With greedy sampling, the second window of the coarse stage is what the stage says after the shared frames.
  made = pipeline.generate(networks, ['slow piano'], Settings(seconds=0.6, sampling=GREEDY), seed=1).tokens
  draw = lambda name, given, prefix=None: sample(
      networks.model(name), Layout(STAGES[name]), {'mulan': made['mulan'], **given}, keys(1), Sampling(0.0),
      keep={'mulan': jnp.ones((1,), int)}, prefix_BxFxQ=prefix)
  semantic = draw('semantic', {})
  again = draw('coarse', {'semantic': semantic[:, 5:15]}, made['acoustic'][:, 10:20, :2])
  np.testing.assert_array_equal(again, made['acoustic'][:, 10:30, :2])


@pytest.mark.parametrize('prompt', ['静かな弦', '🎸 riff', 'zzyzx', 'тихие струны'])
def test_any_script_is_read(networks, prompt):
  assert pipeline.text_tokens(networks, [prompt]).shape == (1, 1, 12)


@pytest.mark.parametrize('prompt, words', [
    ('', 'empty'), ('  ', 'empty'), ('🎸🎹!', 'knows nothing of the prompt'),
    ('a very long tune ' * 40, 'the text tower reads 24')])
def test_impossible_prompts_are_refused(networks, prompt, words):
  with pytest.raises(ValueError, match=words):
    pipeline.generate(networks, [prompt], Settings(seconds=1.0))


@pytest.mark.parametrize('seconds', [0, -1, 1e9, float('nan')])
def test_impossible_lengths_are_refused(seconds):
  with pytest.raises(ValueError, match='seconds must lie between'):
    Settings(seconds=seconds)
