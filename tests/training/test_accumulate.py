"""Sums over a corpus: the same on a mesh, in chunks, after an interruption; compiled once."""
from __future__ import annotations

import dataclasses
import os
import signal

from flax import nnx
import jax
import numpy as np
import pytest

from musiclm_jax.data.batches import AudioBatches
from musiclm_jax.semantic.tokenizer import KMEANS, NORMALISE, SemanticTokenizer
from musiclm_jax.training import accumulate
from musiclm_jax.training.partition import Partitioner
from musiclm_jax.training.workdir import Stopped
from tests.semantic import configs
from tests.trainings import experiment, save_random, write_signals

FIT = SemanticTokenizer(configs.encoder(), layer=1, codebook_size=32, iterations=4, seconds=0.8, decorrelate=True)
KEY = jax.random.key(3)


@pytest.fixture(scope='module')
def rows():
  rng = np.random.default_rng(0)
  centres = rng.normal(0, 4, (20, 16))
  return (centres[rng.integers(0, 20, 3000)] + rng.normal(0, 1, (3000, 16))).astype(np.float32)


def passes(rows, partitioner=Partitioner(data=1), *, fit=FIT, buffers=None, first=0, chunk=512):
  buffers = configs.split(fit.model(nnx.Rngs(0)))[2] if buffers is None else buffers
  return list(accumulate.run(fit, buffers, rows, partitioner, KEY, first=first, chunk=chunk))


def equal(buffers, expected, tolerance):
  """To a share of each array's largest value."""
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=tolerance * np.abs(b).max(), rtol=0), buffers,
               expected)


@pytest.mark.parametrize('sizes', [(8, 1, 1), (2, 4, 1), (4, 1, 2)])
def test_eight_devices_find_the_clusters_of_one(rows, sizes):
  mesh = Partitioner(**dict(zip(('data', 'fsdp', 'tensor'), sizes)))
  for one, eight in zip(passes(rows), passes(rows, mesh), strict=True):
    assert one[:2] == eight[:2]
    equal(eight[2:], one[2:], 1e-5)


def test_the_size_of_chunks_does_not_matter(rows):
  equal(passes(rows, chunk=1000)[-1][2], passes(rows, chunk=512)[-1][2], 1e-4)


def test_phases_come_in_order_and_lower_the_inertia(rows):
  found = passes(rows)
  assert [phase for phase, *_ in found] == [NORMALISE, *[KMEANS] * 4]
  inertia = [float(metrics['inertia']) for phase, _, _, metrics in found if phase == KMEANS]
  assert inertia == sorted(inertia, reverse=True)


@pytest.mark.parametrize('done', [1, 3])
def test_an_interrupted_run_goes_on_exactly(rows, done):
  whole = passes(rows)
  rest = passes(rows, buffers=whole[done - 1][2], first=done)
  assert [d for _, d, *_ in rest] == list(range(done + 1, 6))
  equal(rest[-1][2], whole[-1][2], 0)


def test_a_second_run_compiles_nothing(rows):
  passes(rows)
  compiled = accumulate._begin, accumulate._statistics, accumulate._fitted
  before = [function._cache_size() for function in compiled]
  passes(rows + 1, fit=dataclasses.replace(FIT))
  assert [function._cache_size() for function in compiled] == before


def test_a_large_corpus_gives_as_many_rows_of_each_batch(monkeypatch):
  """Chosen by the seed, and padding is none of them."""
  class Rows:
    features = staticmethod(lambda model, batch: batch['x'].reshape(-1, 2))
    counted = staticmethod(lambda batch: None)
    model = staticmethod(lambda params, buffers: None)

  batches = [{'x': np.arange(64, dtype=np.float32).reshape(8, 4, 2) + 100 * i, 'weight': np.array([1] * 6 + [0] * 2)}
             for i in range(3)]
  gather = lambda seed: accumulate.gather_features(
      Rows, Rows, {}, {}, [dict(b) for b in batches], Partitioner(data=2), num_batches=3, seed=seed)
  whole = gather(0)
  assert whole.shape == (3 * 24, 2)
  monkeypatch.setattr(accumulate, 'FEATURE_BYTES', 3 * 5 * 8)
  some = gather(0)
  assert some.shape == (3 * 5, 2) and {tuple(x) for x in some} <= {tuple(x) for x in whole}
  np.testing.assert_array_equal(some, gather(0))
  assert (some != gather(1)).any()


def test_a_fit_ends_between_two_batches_where_it_is_asked_to(tmp_path, monkeypatch):
  save_random(tmp_path / 'w2v_bert', 'w2v_bert', {}, RECORDS='nowhere')
  read, original = [], AudioBatches.__call__

  def batch(self, step, *hosts):
    read.append(step)
    if step == 5:
      os.kill(os.getpid(), signal.SIGTERM)
    return original(self, step, *hosts)

  monkeypatch.setattr(AudioBatches, '__call__', batch)
  built = experiment('semantic_tokens', RECORDS=write_signals(tmp_path / 'audio'), W2V_WORKDIR=tmp_path / 'w2v_bert',
                     SEMANTIC_TOKENS_BATCHES=1000, **{'partition.Partitioner.data': 1})
  with pytest.raises(Stopped, match='by SIGTERM before the first step; run the same command') as stopped:
    built.build(workdir=str(tmp_path / 'semantic_tokens'), dry_run=False)
  assert stopped.value.exit_code == 143 and len(read) < 50
