"""Adherence, the judge's verdict and MuLan's recall on embeddings with known answers."""
from __future__ import annotations

import types

import numpy as np
import pytest

from musiclm_jax.evaluation import generation_figures, mulan_figures

P, S, T = 16, 4, 2400


def unit(x):
  return x / np.linalg.norm(x, axis=-1, keepdims=True)


def prompts(seed=0):
  return unit(np.random.default_rng(seed).standard_normal((P, 12)))


class Judge:
  """Hears the timbre whose number is the clip's first sample."""

  classes = ('flute', 'organ', 'piano', 'voice')

  def name(self, audio):
    return np.array(self.classes)[audio[:, 0].astype(int)]

  def embed(self, audio):
    return audio[:, :3]


def test_samples_near_their_prompts_are_matched():
  rng = np.random.default_rng(1)
  near = unit(prompts()[:, None] + 0.3 * rng.standard_normal((P, S, 12)))
  found = generation_figures.adherence(near, prompts())
  assert found['mcc_matched'] > found['mcc_mismatched'] + 0.3
  assert found['mcc_p_value'] < 1e-3


def test_samples_that_ignore_the_prompt_are_not():
  same = np.broadcast_to(unit(np.ones(12)), (P, S, 12))
  found = generation_figures.adherence(same, prompts())
  assert found['mcc_matched'] == pytest.approx(found['mcc_mismatched'])
  random = [unit(np.random.default_rng(i).standard_normal((P, S, 12))) for i in range(20)]
  p = [generation_figures.adherence(r, prompts())['mcc_p_value'] for r in random]
  assert np.mean(np.array(p) < 0.05) <= 0.15


def test_one_prompt_is_refused():
  with pytest.raises(ValueError, match='at least 2'):
    generation_figures.adherence(np.ones((1, 2, 3)), np.ones((1, 3)))


def test_all_figures():
  rng = np.random.default_rng(0)
  timbres = [Judge.classes[p % 4] for p in range(P)]
  samples = rng.standard_normal((P, S, T))
  samples[..., 0] = np.arange(P)[:, None] % 4
  samples[:, 0, 0] = 0  # the first sample of each prompt is a flute: right for a quarter of the prompts
  held_out = np.concatenate([samples[:, 1:].reshape(-1, T)] * 2)[:64]
  sampled = generation_figures.Samples(
      samples, np.repeat(prompts()[:, None], S, 1), prompts(), timbres, wall_seconds=2.0)
  found = generation_figures.generation_figures(
      sampled, references={'real': prompts()[:, None]}, judge=Judge(), judge_accuracy=0.9,
      held_out_NxT=held_out, frechet_rows={'unigram': 5 + rng.standard_normal((64, T))})
  assert found['judge_timbre'] == pytest.approx(3 / 4 + 1 / 16)
  assert found['judge_chance'] == 0.25
  low, high = found['judge_timbre_interval']
  assert 0.25 < low < found['judge_timbre'] < high <= 1
  assert found['frechet'] < found['frechet_unigram']
  assert found['realtime_factor'] == pytest.approx(P * S * 0.1 / 2)
  assert found['mcc_references']['real']['mcc_matched'] == pytest.approx(1)


def test_recall_and_agreement():
  rng = np.random.default_rng(0)
  audio = unit(rng.standard_normal((210, 16)))
  text = unit(audio + 0.2 * rng.standard_normal(audio.shape))
  tokens = rng.integers(0, 8, (210, 1, 3))
  text_tokens = tokens.copy()
  text_tokens[:, 0, 1] = rng.integers(0, 8, 210)
  found = mulan_figures.mulan_figures(
      audio, text, tokens=(tokens, text_tokens), oracle_NxN=np.eye(210),
      unknown_text_NxE=unit(rng.standard_normal(audio.shape)))
  assert 0.9 < found['recall_at_1_of_200'] <= found['recall_at_1'] <= 1
  assert found['oracle_recall_at_1'] == 1
  assert found['unknown_synonyms_recall_at_1'] < 0.1
  assert found['recall_at_1_chance_of_200'] == 1 / 200
  agreement = found['text_audio_agreement']
  assert agreement[0] == agreement[2] == 1
  assert agreement[1] == pytest.approx(found['text_audio_agreement_chance'][1], abs=0.1)
  assert found['text_audio_agreement_so_far'][2] == pytest.approx(agreement[1])


def test_pools_that_are_too_large_are_left_out():
  eye = np.eye(64)
  assert 'recall_at_1_of_200' not in mulan_figures.mulan_figures(eye, eye)


def test_clips_that_share_a_text_are_all_right_for_it():
  text = np.repeat(np.eye(32), 2, axis=0)  # two pieces of each recording have its caption
  alone, shared = (mulan_figures.mulan_figures(text, text, texts_N=texts) for texts in (
      None, [f'recording {i // 2}' for i in range(64)]))
  assert alone['recall_at_1'] == pytest.approx(0.5) and shared['recall_at_1'] == 1
  assert alone['recall_at_1_chance'] == 1 / 64 and shared['recall_at_1_chance'] == pytest.approx(2 / 64)
  assert alone['cosine_own'] == shared['cosine_own'] == 1
  assert alone['cosine_other'] == pytest.approx(1 / 63) and shared['cosine_other'] == 0


def test_texts_and_clips_are_embedded_in_one_shape():
  shapes = set()
  model = types.SimpleNamespace(
      embed_audio=lambda a: shapes.add(a.shape) or np.asarray(a)[:, :2],
      embed_text=lambda t: shapes.add(t.shape) or np.asarray(t)[:, :2])
  audio, text = np.arange(70).reshape(7, 10), np.arange(28).reshape(7, 4)
  audio, text = mulan_figures.embed(model, audio, text, batch_size=4)
  assert shapes == {(4, 10), (4, 4)}
  np.testing.assert_array_equal(audio[:, 0], np.arange(7) * 10)
  np.testing.assert_array_equal(text[:, 0], np.arange(7) * 4)
