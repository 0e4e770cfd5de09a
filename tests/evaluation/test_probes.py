"""Probes read what tokens hold and nothing else."""
from __future__ import annotations

from flax import nnx
import jax.numpy as jnp
import numpy as np
import pytest

from musiclm_jax.evaluation import probes, semantic_figures
from musiclm_jax.objective import Aux
from musiclm_jax.semantic.objective import W2vBertTraining
from musiclm_jax.semantic.tokenizer import SemanticTokenizer
from tests.semantic import configs as semantic

K, FRAMES, CLIPS = 8, 48, 60


def token_sets():
  """'trained' holds the clip's class and each frame's; the others hold nothing."""
  rng = np.random.default_rng(0)
  classes = rng.integers(0, 2, CLIPS)
  chords = np.repeat(rng.integers(0, 2, (CLIPS, FRAMES // 24)), 24, axis=1)
  noise = lambda: rng.integers(0, K, (CLIPS, FRAMES))
  informed = np.where(rng.random((CLIPS, FRAMES)) < 0.6, classes[:, None] * 2 + chords, noise())
  return {'trained': informed, 'untrained': noise(), 'log_mel': noise()}, classes, chords


def test_probes_find_what_is_there_and_nothing_where_there_is_none():
  tokens, classes, chords = token_sets()
  asked = {'tempo': probes.Probe(np.array(['slow', 'fast'])[classes]),
           'chord': probes.Probe(np.array(['C', 'F'])[chords])}
  figures = semantic_figures.semantic_figures(
      tokens['trained'], tokens['untrained'], tokens['log_mel'], K, asked=asked, masked={'masked_cross_entropy': 1.0})
  for probe in ('tempo', 'chord'):
    found = figures['probes'][probe]
    assert found['trained'] > 0.95
    assert abs(found['untrained'] - 0.5) < 0.2
    assert abs(found['log_mel'] - 0.5) < 0.2
    assert 0.5 <= found['chance'] < 0.65
    low, high = found['trained_interval']
    assert low <= found['trained'] <= high and high - low < 0.15
  assert figures['masked_cross_entropy'] == 1.0
  assert figures['probes']['tempo']['clips'] == CLIPS


def test_unknown_labels_are_left_out():
  tokens, classes, _ = token_sets()
  labels = [('slow', 'fast')[c] if i % 2 else probes.UNKNOWN for i, c in enumerate(classes)]
  figures = probes.probe_figures({'trained': tokens['trained']}, K, {'tempo': probes.Probe(np.array(labels))})
  assert figures['tempo']['clips'] == CLIPS // 2


def test_tokenizers_must_read_the_same_clips():
  with pytest.raises(ValueError, match='different shapes'):
    semantic_figures.semantic_figures(
        np.zeros((4, 10), int), np.zeros((4, 10), int), np.zeros((4, 11), int), K)


def test_composer_labels_follow_the_chords():
  attributes = [
      {'tempo': 'slow', 'meter': '3/4', 'drums': 'none', 'lead': 'flute',
       'chord_times': [0.0, 1.0], 'chord_names': ['C:maj', 'F:maj']},
      {'tempo': 'fast', 'meter': '4/4', 'drums': 'rock', 'chord_times': [0.5], 'chord_names': ['A:min']}]
  asked = semantic_figures.composer_probes(attributes, 4, 2.0)
  assert list(asked['timbre'].labels) == ['flute', probes.UNKNOWN]
  assert list(asked['drum_style'].labels) == ['none', 'rock']
  np.testing.assert_array_equal(
      asked['chord'].labels, [['C:maj', 'C:maj', 'F:maj', 'F:maj'], ['', 'A:min', 'A:min', 'A:min']])


def test_log_mel_tokens_tell_low_from_high():
  t = np.arange(24000) / 24000
  rng = np.random.default_rng(0)
  tone = lambda hz: 0.3 * np.sin(2 * np.pi * hz * t) + 1e-3 * rng.standard_normal(len(t))
  audio = np.array([tone(hz) for hz in (200, 3000) * 3])
  tokenizer = SemanticTokenizer(semantic.encoder(), layer=1, codebook_size=4, iterations=5, seconds=1.0)
  tokens = probes.log_mel_tokens(tokenizer, audio, audio)
  assert tokens.shape == (6, 25)
  assert not set(tokens[0, 2:-2]) & set(tokens[1, 2:-2])


class Constant(nnx.Module):
  """Predicts the same distribution everywhere."""

  def __init__(self):
    self.logits = nnx.Param(jnp.log(jnp.array([0.5, 0.25, 0.25])))


class Objective:

  def loss(self, model, batch, key, *, training):
    assert not training
    bits = -model.logits[...][batch['target']]
    counts = jnp.zeros((1, 3)).at[0, batch['target'].reshape(-1)].add(1.0)
    return bits.mean(), Aux({'masked_cross_entropy': bits.mean()}, {'hard': counts})

  def evaluated(self, statistics):
    return W2vBertTraining.evaluated(self, statistics)


def test_target_entropy_is_that_of_all_held_out_batches():
  targets = np.array([0, 0, 0, 0, 1, 1, 2, 2]).reshape(4, 2)
  batches = [{'target': targets[:2]}, {'target': targets[2:]}]
  figures = semantic_figures.masked_figures(Objective(), Constant(), batches)
  assert figures['target_entropy'] == pytest.approx(1.5 * np.log(2))
  assert figures['masked_cross_entropy'] == pytest.approx(1.5 * np.log(2))
  assert figures['masked_accuracy_chance'] == 0.5
  with pytest.raises(ValueError, match='no held-out batches'):
    semantic_figures.masked_figures(Objective(), Constant(), [])


def test_semantic_tokens_come_in_one_shape():
  shapes = []

  class Tokenizer:
    def tokens(self, audio):
      shapes.append(audio.shape)
      return jnp.zeros((*audio.shape[:1], 3, 1), jnp.int32)

  assert semantic_figures.tokens(Tokenizer(), np.zeros((5, 100)), batch_size=2).shape == (5, 3)
  assert set(shapes) == {(2, 100)}


def test_notes_are_asked_for_where_they_sound():
  attributes = [{'melody_times': [0.5, 1.0, 3.0], 'melody_pitches': [60, 62, 73]}]
  asked = semantic_figures.note_probes(attributes, 16, 4.0)
  assert list(asked['pitch_class'].labels[0]) == ['', '', '0', '0', '2', '2', '2', '2', '', '', '', '', *'1111']
  onsets = asked['onset'].labels[0]
  assert list(np.flatnonzero(onsets == 'begins')) == [2, 4, 12] and list(np.flatnonzero(onsets == 'held')) == [8]


def test_rows_are_read_from_the_tokens_around_their_frame():
  tokens = np.array([[0, 1, 2, 3, 3, 3], [4, 4, 4, 4, 4, 5]])
  labels = np.full((2, 6), probes.UNKNOWN, dtype='<U1')
  labels[0, 1], labels[1, 5] = 'a', 'b'
  probe = probes.Probe(labels, radius=1, stride=1)
  assert list(probe.answers) == ['a', 'b']
  third = 1 / 3
  np.testing.assert_allclose(
      probe.read(tokens, K)**2, [[third, third, third, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0.5, 0.5, 0, 0]], atol=1e-6)
  with pytest.raises(ValueError, match='labels for 6 frames, tokens for 5'):
    probe.read(tokens[:, :5], K)


def test_harder_questions_fall_where_tokens_hold_something_else():
  """A token set that holds (class, instrument) together answers for a new instrument by chance."""
  rng = np.random.default_rng(1)
  classes, instruments = rng.integers(0, 2, 200), rng.integers(0, 4, 200)
  probe = probes.Probe(np.array(['x', 'y'])[classes])
  tokens = np.repeat((classes * 4 + instruments)[:, None], FRAMES, axis=1)
  assert probes.answered(probe, tokens, K).mean() == 1
  assert probes.answered(probe, tokens, K, apart_N=instruments).mean() < 0.75
  assert probes.answered(probe, tokens, K, heard_NxF=np.roll(tokens, 1, axis=0)).mean() < 0.75
  assert probes.answered(probe, np.repeat(classes[:, None], FRAMES, axis=1), K, apart_N=instruments).mean() == 1
