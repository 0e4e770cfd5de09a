"""Counted operations against arithmetic by hand."""
import jax
from jax.experimental import pallas as pl
import jax.numpy as jnp
import pytest

from musiclm_jax.training.flops import flops
from musiclm_jax.training import state as states
from musiclm_jax.training.state import Skeleton
from tests.trainings import experiment


def shape(*dims):
  return jax.ShapeDtypeStruct(dims, jnp.float32)


def test_products():
  assert flops(lambda a, b: a @ b, shape(3, 4), shape(4, 5)) == 2 * 3 * 4 * 5
  assert flops(lambda a, b: jnp.einsum('BHTK,BHSK->BHTS', a, b), shape(2, 3, 7, 8), shape(2, 3, 9, 8)) == (
      2 * 2 * 3 * 7 * 9 * 8)
  assert flops(jax.grad(lambda a, b: jnp.sum(jnp.tanh(a @ b)), (0, 1)), shape(3, 4), shape(4, 5)) == 3 * 2 * 3 * 4 * 5


def test_what_each_device_does_of_its_own_rows_counts_for_all_of_them():
  mesh = jax.make_mesh((8,), ('data',), axis_types=(jax.sharding.AxisType.Auto,))
  product = lambda x: jax.shard_map(lambda rows: rows @ rows.T, mesh=mesh, in_specs=jax.P('data'),
                                    out_specs=jax.P('data'))(x)
  assert flops(product, shape(16, 4)) == 8 * 2 * 2 * 2 * 4


def test_a_kernel_counts_once_for_each_place_of_its_grid():
  def kernel(x, y):
    y[...] = x[...] @ x[...].T
  block = pl.BlockSpec((8, 8), lambda i, j: (i, j))
  product = pl.pallas_call(kernel, grid=(2, 3), in_specs=[block], out_specs=block, interpret=True,
                           out_shape=jax.ShapeDtypeStruct((16, 24), jnp.float32))
  assert flops(product, shape(16, 24)) == 2 * 3 * 2 * 8 * 8 * 8


def test_a_kernel_that_states_its_cost_is_believed():
  cost = pl.CostEstimate(flops=1234, transcendentals=0, bytes_accessed=0)
  kernel = pl.pallas_call(lambda x, y: None, out_shape=jax.ShapeDtypeStruct((8, 8), jnp.float32), cost_estimate=cost)
  assert flops(kernel, shape(8, 8)) == 1234


@pytest.mark.parametrize('groups, stride', [(1, 1), (2, 1), (1, 2)])
def test_convolutions(groups, stride):
  conv = lambda x, w: jax.lax.conv_general_dilated(
      x, w, (stride,), 'VALID', feature_group_count=groups, dimension_numbers=('NWC', 'WIO', 'NWC'))
  out = (20 - 3) // stride + 1
  assert flops(conv, shape(2, 20, 8), shape(3, 8 // groups, 6)) == 2 * 2 * out * 6 * 3 * 8 // groups


def test_loops_branches_and_calls_count_as_often_as_they_run():
  def body(x, w):
    return jax.checkpoint(lambda x: jnp.tanh(x @ w))(x), ()
  run = lambda x, w: jax.lax.scan(body, x, w)[0]
  assert flops(run, shape(2, 4), shape(5, 4, 4)) == 5 * 2 * 2 * 4 * 4
  # Backward: the product of the forward pass, once more (rematerialised), and two for the gradients.
  assert flops(jax.grad(lambda x, w: jnp.sum(run(x, w)), (0, 1)), shape(2, 4), shape(5, 4, 4)) == 4 * 5 * 2 * 2 * 4 * 4
  branch = lambda p, x: jax.lax.cond(p, lambda x: x @ x, lambda x: x, x)
  assert flops(branch, True, shape(4, 4)) == 2 * 4 ** 3
  with pytest.raises(ValueError, match='a loop of unknown length'):
    flops(lambda x: jax.lax.while_loop(lambda x: x[0, 0] < 1, lambda x: x @ x, x), shape(4, 4))


def test_a_stage_costs_six_operations_a_parameter_and_token():
  """And attention: 12 N D T for each token (arXiv 2001.08361, section 2.1), half of it for a causal block."""
  objective = experiment('coarse_lm').argument('objective')
  skeleton = Skeleton.of(objective)
  params, buffers = (states.nnx.to_pure_dict(t) for t in (skeleton.params, skeleton.buffers))
  batch = objective.batch_spec(2)
  key = jax.eval_shape(lambda: jax.random.key(0))
  loss = lambda p, b, batch, key: objective.loss(skeleton.model(p, b), batch, key, training=True)[0]
  counted = flops(jax.grad(loss), params, buffers, batch, key)
  c, length = objective.transformer, objective.layout.length - 1
  products = sum(v.size for v in jax.tree.leaves(params['transformer']['layers']) if v.ndim == 3)
  target = objective.stage.target
  head = 6 * target.tokens(objective.stage.seconds) * c.width * target.codebook_size
  least = 2 * (6 * length * products + head)
  attention = 2 * 12 * c.depth * c.width * length ** 2
  assert least < counted < least + 1.4 * attention  # blocks are computed again in the backward pass
