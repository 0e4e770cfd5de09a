"""Near-duplicates: found where there are some, not found where there are none, and removed."""
import numpy as np
import pytest

from musiclm_jax import specs
from musiclm_jax.data import duplicates, records

SEMANTIC = specs.TokenSpec('semantic', 64, 1, 25.0)
HEADER = records.Header('tokens', records.token_streams([SEMANTIC]))


def music(seed, frames=250):
  """Tokens that stay for a while, from a few that the piece likes: repetitive, as music is."""
  rng = np.random.default_rng(seed)
  liked = rng.integers(0, 64, 12)
  return np.repeat(rng.choice(liked, frames), rng.integers(1, 5, frames))[:frames, None]


def example(name, tokens):
  return {'recording': name, 'start': 0.0, 'semantic': tokens}


def noisy(tokens, seed, share=0.15):
  rng = np.random.default_rng(seed)
  return np.where(rng.random(tokens.shape) < share, rng.integers(0, 64, tokens.shape), tokens)


@pytest.fixture
def leaky(tmp_path):
  """Of ten held-out clips, 0 is a training clip, 1 one with errors, 2 a later cut of one; the others are new."""
  train = [music(i, 300) for i in range(40)]
  held_out = [train[5][:250], noisy(train[11][:250], 1), train[33][37:287], *(music(i) for i in range(100, 107))]
  records.write_records(tmp_path, {'train': [example(f't{i}', t) for i, t in enumerate(train)],
                                   'test': [example(f'h{i}', t) for i, t in enumerate(held_out)]}, HEADER, num_shards=4)
  return tmp_path


@pytest.mark.parametrize('workers', [1, 2])
def test_copies_are_found_and_new_music_is_not(leaky, workers):
  found = duplicates.find(leaky, threshold=0.4, workers=workers)
  assert {(p.recording, p.train_recording) for p in found.pairs} == {('h0', 't5'), ('h1', 't11'), ('h2', 't33')}
  assert found.pairs[0].share == pytest.approx(1.0)
  assert np.sort(found.shares)[:7].max() < 0.2
  assert '3 of 10 held-out clips' in found.text()


def test_removed_clips_are_counted_and_gone(leaky):
  made = duplicates.remove(leaky, duplicates.find(leaky, threshold=0.4, workers=1))
  assert made.records('test') == 7 and made.records('train') == 40
  assert made.skipped == {duplicates.REASON: {'count': 3, 'files': []}}
  again = duplicates.find(leaky, threshold=0.4, workers=1)
  assert again.clips == 7 and again.pairs == ()


def test_a_held_note_is_no_evidence(tmp_path):
  """Silence and long notes sound alike everywhere: shared ones do not make two pieces the same."""
  silence = np.full((150, 1), 7)
  parts = lambda seed: np.concatenate([silence, music(seed, 100)])
  records.write_records(tmp_path, {'train': [example(f't{i}', parts(i)) for i in range(10)],
                                   'test': [example(f'h{i}', parts(50 + i)) for i in range(10)]}, HEADER)
  assert duplicates.find(tmp_path, threshold=0.3, workers=1).pairs == ()


def test_a_clip_of_nothing_but_a_held_note_is_no_duplicate(tmp_path):
  held = lambda frames: np.full((frames, 1), 7)
  records.write_records(tmp_path, {
      'train': [example(f't{i}', np.concatenate([held(200), music(i, 100)])) for i in range(10)],
      'test': [example('h', held(250)), example('copy', np.concatenate([held(120), music(3, 100)]))]}, HEADER)
  assert [p.recording for p in duplicates.find(tmp_path, workers=1).pairs] == ['copy']


def test_short_clips_and_other_records(tmp_path):
  short = np.zeros((2, 1), int)
  records.write_records(tmp_path / 'a', {'train': [example('t', music(0))], 'test': [example('h', short)]}, HEADER)
  assert duplicates.find(tmp_path / 'a', workers=1).pairs == ()
  audio = records.Header('audio', records.audio_streams(24000))
  records.write_records(tmp_path / 'b', {'train': [{'audio': np.zeros(10, np.float32)}]}, audio)
  with pytest.raises(ValueError, match='has no semantic tokens to compare, only audio: run `musiclm extract` first'):
    duplicates.find(tmp_path / 'b')
