"""The cascade from text to audio with small untrained networks: shapes, reproducibility, windows, bad input."""
import dataclasses
import functools
import types

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from musiclm_jax.generate import pipeline
from musiclm_jax.generate.pipeline import Settings
from musiclm_jax.nn.transformer import TransformerConfig
from musiclm_jax.specs import Stage, TokenSpec
from musiclm_jax.text.tokenizer import Tokenizer
from musiclm_jax.token_lm.objective import NextToken
from musiclm_jax.token_lm.sample import Sampling

MULAN, SEMANTIC = TokenSpec('mulan', 8, 12), TokenSpec('semantic', 8, 1, 25)
ACOUSTIC = TokenSpec('acoustic', 8, 6, 50)
COARSE, FINE = ACOUSTIC.part('coarse', 0, 2), ACOUSTIC.part('fine', 2, 4)
STAGES = {'semantic': Stage('semantic', (MULAN,), SEMANTIC, 1.0),
          'coarse': Stage('coarse', (MULAN, SEMANTIC), COARSE, 0.4),
          'fine': Stage('fine', (COARSE,), FINE, 0.2)}
GREEDY = {name: Sampling(0.0) for name in STAGES}


class StandIn:
  """A cascade with real, untrained stages and a codec that writes its codes as samples."""

  tokenizer = Tokenizer.load()

  @functools.cache  # noqa: B019
  def stage(self, name):
    objective = NextToken(STAGES[name], TransformerConfig(width=16, depth=2, heads=2, mlp_width=16))
    return types.SimpleNamespace(objective=objective, model=objective.model(nnx.Rngs(len(name))))

  def part(self, role):
    text = types.SimpleNamespace(length=24)
    return types.SimpleNamespace(objective=types.SimpleNamespace(
        token_spec=ACOUSTIC, mulan=types.SimpleNamespace(text=text)))

  def function(self, role, method):
    return {
        'embed_text': lambda ids: jnp.asarray(ids, jnp.float32),
        'text_tokens': lambda e: (jnp.cumsum(e.astype(int), axis=-1)[:, None, :12]) % 8,
        'decode': lambda codes: jnp.repeat(codes.sum(-1) / 64, 480, axis=-1)}[method]


@pytest.fixture(scope='module')
def cascade():
  return StandIn()


@pytest.mark.parametrize('seconds', [0.1, 0.4, 1.0, 2.3])
def test_audio_has_the_length_asked_for(cascade, seconds):
  made = pipeline.generate(cascade, ['slow piano'], Settings(seconds=seconds))
  assert made.sample_rate == 24000
  assert made.audio_BxN.shape == (1, round(seconds * 24000))
  assert made.tokens['acoustic'].shape[-1] == 6


def test_the_seed_decides(cascade):
  prompts = ['slow piano', 'fast drums']
  run = lambda seed: pipeline.generate(cascade, prompts, Settings(seconds=1.0), seed=seed).audio_BxN
  np.testing.assert_array_equal(run(1), run(1))
  assert not np.array_equal(run(1), run(2))


def test_a_prompt_sounds_the_same_beside_others(cascade):
  one = pipeline.generate(cascade, ['slow piano'], Settings(seconds=1.0), seed=1).audio_BxN
  two = pipeline.generate(cascade, ['slow piano', 'fast drums'], Settings(seconds=1.0), seed=1).audio_BxN
  np.testing.assert_array_equal(one[0], two[0])


def test_the_prompt_is_heard_and_no_level_means_unconditional(cascade):
  # Strong guidance, because a network without training says little.
  sampling = {**GREEDY, 'semantic': Sampling(1.0, guidance=30.0)}
  settings = Settings(seconds=1.0, mulan_levels=12, sampling=sampling)
  run = lambda text, s: pipeline.generate(cascade, [text], s, seed=1).tokens['semantic']
  assert not np.array_equal(run('slow piano', settings), run('loud trumpet', settings))
  deaf = dataclasses.replace(settings, mulan_levels=0)
  np.testing.assert_array_equal(run('slow piano', deaf), run('loud trumpet', deaf))


def test_one_window_that_covers_all_is_the_sliding_result_of_the_first_window(cascade):
  short = pipeline.generate(cascade, ['slow piano'], Settings(seconds=0.4, sampling=GREEDY), seed=1).tokens
  long = pipeline.generate(cascade, ['slow piano'], Settings(seconds=2.0, sampling=GREEDY), seed=1).tokens
  np.testing.assert_array_equal(long['acoustic'][:, :20, :2], short['acoustic'][..., :2])


def test_a_window_continues_the_one_before(cascade):
  # With greedy sampling, the second window of the coarse stage is what the stage says after the shared frames.
  from musiclm_jax.token_lm.sample import sample
  made = pipeline.generate(cascade, ['slow piano'], Settings(seconds=0.6, sampling=GREEDY), seed=1).tokens
  loaded = cascade.stage('coarse')
  given = {'mulan': made['mulan'], 'semantic': made['semantic'][:, 5:15]}
  again = sample(loaded.model, loaded.objective.layout, given, jax.random.split(jax.random.key(0), 1), Sampling(0.0),
                 keep={'mulan': jnp.ones((1,), int)}, prefix_BxFxQ=made['acoustic'][:, 10:20, :2])
  np.testing.assert_array_equal(again, made['acoustic'][:, 10:30, :2])


@pytest.mark.parametrize('prompt', ['静かな弦', '🎸 riff', 'zzyzx', 'тихие струны'])
def test_any_script_is_read(cascade, prompt):
  assert pipeline.text_tokens(cascade, [prompt]).shape == (1, 1, 12)


@pytest.mark.parametrize('prompt, words', [
    ('', 'empty'), ('  ', 'empty'), ('🎸🎹!', 'knows nothing of the prompt'),
    ('a very long tune ' * 40, 'the text tower reads 24')])
def test_impossible_prompts_are_refused(cascade, prompt, words):
  with pytest.raises(ValueError, match=words):
    pipeline.generate(cascade, [prompt], Settings(seconds=1.0))


@pytest.mark.parametrize('seconds', [0, -1, 1e9, float('nan')])
def test_impossible_lengths_are_refused(seconds):
  with pytest.raises(ValueError, match='seconds must lie between'):
    Settings(seconds=seconds)
