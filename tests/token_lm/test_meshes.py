"""A stage's loss and gradient on eight devices are those of one, whatever is split over them."""
import functools

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from musiclm_jax.nn.transformer import TransformerConfig
from musiclm_jax.specs import Stage, TokenSpec
from musiclm_jax.token_lm.model import Points
from musiclm_jax.token_lm.objective import NextToken
from musiclm_jax.training import state as states
from musiclm_jax.training.partition import Partitioner
from musiclm_jax.training.state import Skeleton

# 3 + 10 + 4 * 20 tokens: a length that no mesh divides.
STAGE = Stage('coarse', (TokenSpec('mulan', 16, 3), TokenSpec('semantic', 16, 1, 25)),
              TokenSpec('coarse', 16, 4, 50, stream='acoustic'), 0.4)
MESHES = {
    'data': dict(data=8), 'fsdp': dict(data=1, fsdp=8), 'tensor': dict(data=1, tensor=8),
    'sequence': dict(data=1, sequence=8), 'all but sequence': dict(data=2, fsdp=2, tensor=2),
    'all but data': dict(data=1, fsdp=2, tensor=2, sequence=2), 'all but fsdp': dict(data=2, tensor=2, sequence=2),
}
# "points": rotary, and MuLan's points.
CASES = [(mesh, 'rotary', False) for mesh in MESHES] + [
    ('sequence', 'points', False), ('all but sequence', 'points', False), ('sequence', 'rotary', True),
    ('all but data', 't5', True),
    *(pytest.param(*case, marks=pytest.mark.slow) for case in (
        ('all but sequence', 'rotary', True), ('sequence', 't5', False), ('all but fsdp', 't5', False)))]


@functools.cache
def training(positions, remat):
  """The skeleton, parameters and buffers of the stage, a batch of 8, and a function to its loss and gradient."""
  points = positions == 'points'
  objective = NextToken(STAGE, TransformerConfig(
      width=32, depth=2, heads=8, mlp_width=64, positions='rotary' if points else positions, remat=remat,
      attention_block=16, dropout=0.1), points=Points(8, noise=0.3, continuous=True) if points else None)
  params, buffers = states.split_model(objective.model(nnx.Rngs(0)))
  generator = np.random.default_rng(0)
  batch = {name: jnp.asarray(generator.integers(0, 16, spec.shape), jnp.int32)
           for name, spec in objective.batch_spec(8).items()} | {'slot': jnp.arange(8)}

  def loss(params, batch):
    model = Skeleton.of(objective).model(params, buffers)
    return objective.loss(model, batch, jax.random.key(1), training=True)[0]

  return objective, params, batch, lambda: jax.jit(jax.value_and_grad(loss))


@functools.cache
def alone(positions, remat):
  _, params, batch, run = training(positions, remat)
  return jax.device_get(run()(params, batch))


@pytest.mark.parametrize(('mesh', 'positions', 'remat'), CASES)
def test_loss_and_gradient_are_those_of_one_device(mesh, positions, remat):
  objective, params, batch, run = training(positions, remat)
  partitioner = Partitioner(**MESHES[mesh])
  names, _ = Skeleton.of(objective).axes()
  shardings = jax.tree.map(lambda x, n: partitioner._sharding(tuple(n), x.shape, ''), params, names)
  with partitioner.active():
    laid_out = jax.device_put(params, shardings)
    loss, gradient = jax.device_get(run()(laid_out, partitioner.global_batch(jax.device_get(batch))))
  expected, expected_gradient = alone(positions, remat)
  assert loss == pytest.approx(expected, rel=1e-5)
  for (path, ours), theirs in zip(jax.tree_util.tree_leaves_with_path(gradient), jax.tree.leaves(expected_gradient)):
    size = np.linalg.norm(theirs)
    assert size > 0 and np.linalg.norm(ours - theirs) <= 1e-5 * size, jax.tree_util.keystr(path)


def test_queries_stay_with_their_device():
  """Split over the sequence, each device computes the logits of its own queries alone."""
  _, params, batch, run = training('rotary', False)
  partitioner = Partitioner(data=1, sequence=8)
  with partitioner.active():
    compiled = run().lower(params, batch).compile()
  one = run().lower(params, batch).compile()
  assert compiled.memory_analysis().temp_size_in_bytes < 0.5 * one.memory_analysis().temp_size_in_bytes
