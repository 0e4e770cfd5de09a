"""A trainable toy: linear regression with a second parameter group and a running statistic."""
from __future__ import annotations

import dataclasses

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from musiclm_jax.objective import Aux, Objective


class Line(nnx.Module):

  def __init__(self, width: int, *, rngs: nnx.Rngs):
    self.w = nnx.Param(jax.random.normal(rngs.params(), (width, 2)), axes=('embed', None))
    self.extra = nnx.Param(jnp.ones((2,)), axes=(None,))
    self.seen = nnx.Variable(jnp.zeros(()), axes=())


# Frozen dataclasses outside the package cannot be read back from specs.json, so tests that save use real objectives.
@dataclasses.dataclass(frozen=True)
class Regression(Objective):
  width: int = 4
  extra_weight: float = 1.0
  chance: float = 100.0

  groups = ('main', 'extra')

  def model(self, rngs):
    return Line(self.width, rngs=rngs)

  def batch_spec(self, batch_size):
    return {'x': jax.ShapeDtypeStruct((batch_size, self.width), jnp.float32),
            'slot': jax.ShapeDtypeStruct((batch_size,), jnp.int32)}

  def loss(self, model, batch, key, *, training):
    y = batch['x'] @ model.w[...] + self.extra_weight * model.extra[...]
    loss = jnp.mean(jnp.square(y - batch['x'][:, :2]))
    return loss, Aux({'loss_chance': jnp.float32(self.chance)}, {'seen': jnp.float32(batch['x'].shape[0])})

  def update(self, buffers, statistics, key):
    return {'seen': buffers['seen'] + statistics['seen']}, {}

  def group(self, path):
    return 'extra' if path[0] == 'extra' else 'main'

  def active(self):
    return {'main': True, 'extra': self.extra_weight > 0}


class Batches:
  """Normal numbers that depend on the step alone."""

  fingerprint = 'toy'

  def __init__(self, batch_size: int = 8, width: int = 4):
    self.batch_size, self.width = batch_size, width

  def __call__(self, step, process_index=0, process_count=1):
    rows = self.batch_size // process_count
    first = process_index * rows
    x = np.random.default_rng(step).normal(size=(self.batch_size, self.width)).astype(np.float32)
    return {'x': x[first:first + rows], 'slot': np.arange(first, first + rows, dtype=np.int32)}
