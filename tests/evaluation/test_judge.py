"""The judge tells synthetic timbres apart, and its embedding separates them."""
from __future__ import annotations

import numpy as np
import pytest

from musiclm_jax.evaluation import frechet, judge

RATE = 24000
# (harmonic amplitudes, decay a second)
TIMBRES = {
    'flute': ((1.0, 0.1), 0.5), 'guitar': ((1.0, 0.7, 0.5, 0.3, 0.2), 6.0),
    'organ': ((1.0, 0.9, 0.0, 0.8, 0.0, 0.7), 0.0), 'clarinet': ((1.0, 0.0, 0.7, 0.0, 0.5, 0.0, 0.3), 0.5)}


def clips(count, seed):
  rng = np.random.default_rng(seed)
  t = np.arange(RATE // 2) / RATE
  audio, labels = [], []
  for i in range(count):
    label = list(TIMBRES)[i % len(TIMBRES)]
    harmonics, decay = TIMBRES[label]
    hz, loud = rng.uniform(150, 500), rng.uniform(0.05, 0.5)
    clip = sum(a * np.sin(2 * np.pi * hz * (k + 1) * t + rng.uniform(0, 6)) for k, a in enumerate(harmonics))
    audio.append(loud * clip * np.exp(-decay * (t % 0.25)) + 0.01 * loud * rng.standard_normal(len(t)))
    labels.append(label)
  return np.array(audio, np.float32), labels


@pytest.fixture(scope='module')
def fitted():
  return judge.fit(*clips(64, 0), epochs=40)


def test_it_names_held_out_timbres(fitted):
  assert fitted.accuracy(*clips(48, 1)) > 0.9


def test_it_does_not_listen_to_loudness(fitted):
  audio, _ = clips(8, 2)
  np.testing.assert_array_equal(fitted.name(audio), fitted.name(audio * 0.3))


def test_its_embedding_is_small_and_tells_sets_apart(fitted):
  audio, labels = clips(64, 3)
  labels = np.array(labels)
  embedding = fitted.embed(audio)
  assert embedding.shape == (64, 24)
  same = frechet.frechet_distance(embedding[::2], embedding[1::2])
  other = frechet.frechet_distance(embedding[labels == 'flute'], embedding[labels == 'organ'])
  assert other > same


def test_the_same_seed_gives_the_same_judge(fitted):
  audio, _ = clips(4, 5)
  again = judge.fit(*clips(64, 0), epochs=40)
  np.testing.assert_allclose(again.embed(audio), fitted.embed(audio), rtol=1e-5, atol=1e-5)


def test_one_label_is_refused():
  with pytest.raises(ValueError, match='two labels'):
    judge.fit(clips(4, 0)[0], ['flute'] * 4)
