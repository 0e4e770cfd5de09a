"""The map-reduce engine: sums of statistics over a corpus and a mesh, then an update, repeated.

It fits what needs no gradient: feature normalisation, k-means, the residual quantizer of frozen embeddings.
"""
from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from musiclm_jax.objective import Fit
from musiclm_jax.training.partition import Partitioner
from musiclm_jax.training.state import Skeleton

FEATURE_BYTES = 2 ** 32  # of rows that are kept, which are there twice for a moment
SAMPLE_ROWS = 65_536  # rows that the start of a phase sees (k-means++ is sequential in the number of codes)


def gather_features(fit: Fit, skeleton: Skeleton, params: Any, buffers: Any, batches: Iterable[dict[str, np.ndarray]],
                    partitioner: Partitioner, *, num_batches: int, seed: int = 0) -> np.ndarray:
  """Rows [N, D] of this process: the frozen network runs once over the corpus.

  Of a corpus whose rows take more than 4 GiB, as many rows of each batch, chosen by the seed: at the paper's size all
  frames of w2v-BERT would take 786 GB, and a million of them are 1,000 for each centre.
  """

  @jax.jit
  def features(params, buffers, batch):
    return fit.features(skeleton.model(params, buffers), batch)

  rows = []
  for number, batch in enumerate(batches):
    weight = batch.pop('weight', None)
    out = features(params, buffers, partitioner.global_batch(batch))
    shards = sorted((s for s in out.addressable_shards if s.replica_id == 0), key=lambda s: s.index[0].start or 0)
    local = np.concatenate([np.asarray(s.data) for s in shards])
    counts = np.ones(len(local), bool) if (counted := fit.counted(batch)) is None else counted
    if weight is not None:  # rows of an example lie together; padding examples are left out
      counts = counts & np.repeat(weight > 0, len(local) // len(weight))
    local = local[counts]
    most = max(1, FEATURE_BYTES // (num_batches * local.itemsize * local.shape[-1]))
    if len(local) > most:
      local = local[np.sort(np.random.default_rng([seed, number]).permutation(len(local))[:most])]
    rows.append(local)
  return np.concatenate(rows)


def _chunks(rows_NxD: np.ndarray, size: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
  """Static-shape chunks with weights, 0 for the padding rows of the last one."""
  for first in range(0, len(rows_NxD), size):
    part = rows_NxD[first:first + size]
    weight = np.zeros((size,), np.float32)
    weight[:len(part)] = 1
    yield np.pad(part, ((0, size - len(part)), (0, 0))), weight


# A fit is a value: the same fit with rows of the same shape is compiled once in a process.
_begin = jax.jit(lambda fit, buffers, sample, phase, key: fit.begin(buffers, sample, phase=phase, key=key),
                 static_argnames=('fit', 'phase'))
_statistics = jax.jit(lambda fit, buffers, rows, weight, phase: fit.statistics(buffers, rows, weight, phase),
                      static_argnames=('fit', 'phase'))
_fitted = jax.jit(lambda fit, buffers, total, phase: fit.fitted(buffers, total, phase),
                  static_argnames=('fit', 'phase'))


def run(fit: Fit, buffers: Any, rows_NxD: np.ndarray, partitioner: Partitioner, key: jax.Array, *,
        first: int = 0, chunk: int = 8192) -> Iterator[tuple[str, int, Any, dict[str, jax.Array]]]:
  """Yields (phase, passes done, buffers, metrics) after each pass over the rows, from pass `first` on.

  A phase starts from a sample that depends on the key alone, so an interrupted run continues exactly.
  """
  sample_generator = np.random.default_rng(np.asarray(jax.random.key_data(key)).tolist())
  picked = np.sort(sample_generator.permutation(len(rows_NxD))[:SAMPLE_ROWS])
  sample = jnp.asarray(rows_NxD[picked])
  chunk = -(-chunk // partitioner.batch_parts) * partitioner.batch_parts
  done = 0
  for number, (phase, iterations) in enumerate(fit.phases()):
    for iteration in range(iterations):
      done += 1
      if done <= first:
        continue
      if iteration == 0:
        buffers = _begin(fit, buffers, sample, phase=phase, key=jax.random.fold_in(key, number))
      total = None
      for rows, weight in _chunks(rows_NxD, chunk):
        batch = partitioner.global_batch({'rows': rows, 'weight': weight})
        part = _statistics(fit, buffers, batch['rows'], batch['weight'], phase=phase)
        total = part if total is None else jax.tree.map(jnp.add, total, part)
      # Passes that are in flight at once would share the devices' threads where devices are simulated.
      buffers, metrics = jax.block_until_ready(_fitted(fit, buffers, total, phase=phase))
      yield phase, done, buffers, metrics
