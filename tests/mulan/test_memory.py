"""Batches of thousands of pairs: what the compiled step needs with the batch in chunks, and at once."""
from __future__ import annotations

import dataclasses

from flax import nnx
import jax

from musiclm_jax import config

BATCH = 4096


def temporary_bytes(chunks: int) -> int:
  """Of the gradient of the loss at size tiny, by XLA's own account; nothing is run."""
  loaded = config.load_experiment(['experiments/mulan.gin', 'size/tiny.gin'], provided=('workdir', 'dry_run'))
  objective = dataclasses.replace(loaded.argument('objective'), chunks=chunks)
  graph, params, rest = nnx.split(nnx.eval_shape(lambda: objective.model(nnx.Rngs(0))), nnx.Param, ...)

  def loss(params, rest, batch, key):
    return objective.loss(nnx.merge(graph, params, rest), batch, key, training=True)[0]

  key = jax.eval_shape(lambda: jax.random.key(0))
  compiled = jax.jit(jax.grad(loss)).lower(params, rest, objective.batch_spec(BATCH), key).compile()
  return compiled.memory_analysis().temp_size_in_bytes


def test_in_chunks_a_batch_of_thousands_takes_a_quarter_of_the_memory():
  direct, chunked = temporary_bytes(1), temporary_bytes(64)
  print(f'direct {direct / 2**30:.2f} GiB, in 64 chunks {chunked / 2**30:.2f} GiB: 1 / {direct / chunked:.1f}')
  assert chunked <= direct / 4
