import math
import types

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from musiclm_jax import axes, train
from musiclm_jax.nn import spectral
from musiclm_jax.nn.transformer import TransformerConfig
from musiclm_jax.specs import Stage, TokenSpec
from musiclm_jax.token_lm.objective import NextToken
from musiclm_jax.training import optimizer as optimizers
from musiclm_jax.training import state as states
from musiclm_jax.training.hlo import Program
from musiclm_jax.training.optimizer import Adam
from musiclm_jax.training.partition import _arranged, RULES, Partitioner
from musiclm_jax.training.state import Skeleton
from tests.trainings import experiment

STAGE = Stage('semantic', (TokenSpec('mulan', 16, 3),), TokenSpec('semantic', 16, 1, 25), 0.4)


def shardings_of(partitioner, **changes):
  net = {'width': 32, 'depth': 2, 'heads': 4, 'mlp_width': 48, **changes}
  objective = NextToken(STAGE, TransformerConfig(**net))
  skeleton = Skeleton.of(objective)
  optimizer = optimizers.by_group(objective, nnx.to_pure_dict(skeleton.params), Adam(0.1))
  abstract = jax.eval_shape(lambda: states.create(objective, optimizer, jax.random.key(0), keep_ema=True))
  return abstract, partitioner.state_shardings(skeleton, abstract)


def test_no_matrix_is_whole_on_any_device_and_the_optimizer_follows():
  abstract, shardings = shardings_of(Partitioner(data=2, fsdp=2, tensor=2))
  leaves = lambda tree: jax.tree_util.tree_leaves_with_path(tree)
  for (path, leaf), (_, sharding) in zip(leaves(abstract), leaves(shardings), strict=True):
    # A stacked vector [layers, width] is no matrix.
    if leaf.ndim >= 2 and 'norm' not in jax.tree_util.keystr(path):
      assert not sharding.is_fully_replicated, jax.tree_util.keystr(path)


@pytest.mark.parametrize('mesh, changes, words', [
    (dict(data=1, tensor=8), {'heads': 2, 'head_dim': 6}, r"attention/.*axis 'heads' has 12 entries.*tensor = 8"),
    (dict(data=1, fsdp=8), {'width': 36}, r"axis 'embed' has 36 entries.*fsdp = 8"),
])
def test_a_size_that_does_not_divide_is_named(mesh, changes, words):
  with pytest.raises(ValueError, match=words):
    shardings_of(Partitioner(**mesh), **changes)


def test_a_batch_that_does_not_divide_is_named():
  with pytest.raises(ValueError, match='batch 6 is not a multiple of data x fsdp = 4'):
    Partitioner(data=2, fsdp=2).check_batch(6)


def test_microbatches_are_dealt_to_all_devices_too():
  Partitioner(data=8).check_batch(16, microbatches=2)
  with pytest.raises(ValueError, match='batch 8 is not .* data x fsdp x microbatches = 8 x 2 = 16; choose a multiple'):
    Partitioner(data=8).check_batch(8, microbatches=2)


@pytest.mark.parametrize('used, fits', [(4, False), (3, False), (6, True), (8, True)])
def test_a_mesh_that_leaves_a_process_without_a_device_is_refused(used, fits):
  all_of_them = tuple(types.SimpleNamespace(process_index=i // 4) for i in range(8))
  made = Partitioner(data=used, devices=all_of_them)
  made.__dict__['mesh'] = types.SimpleNamespace(
      shape={'data': used, 'fsdp': 1}, devices=np.array(all_of_them[:used]).reshape(used, 1, 1, 1))
  if fits:
    made.check_batch(used)
  else:
    with pytest.raises(ValueError, match=f'mesh data {used} .*uses {used} of the 8 devices, none of process 1: choose'):
      made.check_batch(used)


@pytest.mark.parametrize('processes, fits', [
    ([0, 0, 0, 0, 1, 1, 1, 1], True), ([0, 0, 1, 1, 2, 2, 3, 3], True), ([0, 1, 2, 3, 4, 5, 6, 7], False),
    ([0, 0, 0, 1, 1, 1, 2, 2], False)])
def test_rows_of_a_batch_belong_to_one_process(processes, fits):
  made = Partitioner(data=2, fsdp=2, tensor=2)
  devices = np.array([types.SimpleNamespace(process_index=i) for i in processes]).reshape(2, 2, 2, 1)
  made.__dict__['mesh'] = types.SimpleNamespace(shape={'data': 2, 'fsdp': 2}, devices=devices)
  if fits:
    made.check_batch(8)
  else:
    with pytest.raises(ValueError, match='the 2 devices of tensor x sequence .* must belong to one process'):
      made.check_batch(8)


def test_a_mesh_larger_than_the_machine_is_refused():
  with pytest.raises(ValueError, match='needs 64 devices, but there are 8'):
    Partitioner(data=8, fsdp=8).mesh  # noqa: B018


@pytest.mark.parametrize('axis, size, least', [('data', -1, 0), ('fsdp', 0, 1), ('tensor', -2, 1), ('sequence', 0, 1)])
def test_a_mesh_axis_without_a_device_is_refused(axis, size, least):
  with pytest.raises(ValueError, match=f'mesh axis {axis} must be at least {least}, found {size}'):
    Partitioner(**{axis: size})


@pytest.mark.parametrize('rules, words', [
    ((*RULES, ('embed', ())), "'embed' twice"), ((('embedding', ()),), 'not a logical axis'),
    ((('embed', ('model',)),), "'model'")])
def test_wrong_rules_are_refused(rules, words):
  with pytest.raises(ValueError, match=words):
    Partitioner(rules=rules)


def test_constraints_inside_a_step_follow_the_rules():
  partitioner = Partitioner(data=2, fsdp=2, tensor=2)
  with partitioner.active():
    y = jax.jit(lambda x: axes.constrain(x, 'batch', None))(jnp.zeros((8, 3)))
  assert y.sharding.shard_shape(y.shape) == (2, 3)
  np.testing.assert_array_equal(axes.constrain(y, 'batch', None), y)  # outside a mesh nothing happens


def a_described_run(**mesh):
  """The coarse stage at size nano with the T5 bias, on a mesh."""
  e = experiment('coarse_lm', LM_POSITIONS='t5')
  arguments = {name: e.argument(name) for name in ('objective', 'optimizer', 'precision')}
  return train.described(**arguments, partitioner=Partitioner(**mesh))


@pytest.mark.parametrize('mesh', [dict(data=8), dict(data=1, fsdp=8), dict(data=2, fsdp=2, tensor=2)])
def test_no_message_carries_the_relative_bias(mesh):
  """Its gradient is summed into buckets where it arises; at the paper's size [T, T] of it is the largest message."""
  described = a_described_run(**mesh)
  program = Program.parse(described.trace(8).lower().compile().as_text())
  length = described.objective.layout.length - 1
  dims = [d for c in program.collectives for d in c.dims]
  assert (32, 2 // mesh.get('tensor', 1)) in dims, 'the gradient of the table is summed over devices'
  assert not [d for d in dims if d.count(length) > 1 or math.prod(d) % length ** 2 == 0]


def test_relative_bias_on_a_mesh_has_the_gradient_of_one_device():
  objective = experiment('coarse_lm', LM_POSITIONS='t5').argument('objective')
  skeleton = Skeleton.of(objective)
  params, buffers = states.split_model(objective.model(nnx.Rngs(0)))
  spec = objective.batch_spec(8)
  batch = {name: jax.random.randint(jax.random.key(1), rows.shape, 0, 8) for name, rows in spec.items()}
  batch['slot'] = jnp.arange(8)
  loss = lambda p: objective.loss(skeleton.model(p, buffers), batch, jax.random.key(2), training=True)[0]
  expected, gradient = jax.jit(jax.value_and_grad(loss))(params)
  made = Partitioner(data=2, fsdp=2, tensor=2)
  with made.active():
    found, sharded = jax.jit(jax.value_and_grad(loss))(params)
  np.testing.assert_allclose(found, expected, rtol=1e-6)
  assert np.abs(gradient['transformer']['relative']).max() > 0
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), gradient, sharded)


def slices(count, each):
  """Devices of several slices, in an order that mixes them."""
  made = [types.SimpleNamespace(id=i, process_index=i // 4, slice_index=i // each, platform='cpu', device_kind='cpu')
          for i in range(count * each)]
  return tuple(sorted(made, key=lambda device: device.id % each))


def test_only_data_goes_between_slices():
  places = np.vectorize(lambda d: d.slice_index, otypes=[int])(_arranged((4, 2, 1, 1), list(slices(2, 4))))
  assert (places == places[:, :1]).all() and set(places[:, 0, 0, 0]) == {0, 1}
  # Where data is not a multiple of the slices, the mesh goes through them in order.
  assert _arranged((1, 8, 1, 1), list(slices(2, 4))).shape == (1, 8, 1, 1)


def test_a_mesh_of_given_devices():
  given = tuple(jax.devices()[4:])
  assert set(Partitioner(fsdp=2, devices=given).mesh.devices.flat) == set(given)
  assert Partitioner(fsdp=2, devices=given).mesh.shape['data'] == 2
  with pytest.raises(ValueError, match='needs 8 devices, but there are 4'):
    Partitioner(fsdp=8, devices=given).mesh  # noqa: B018


def test_parts_of_a_logical_axis():
  made = Partitioner(data=2, fsdp=2, tensor=2)
  assert (made.parts('batch'), made.parts('mlp'), made.parts('layer'), made.batch_parts) == (4, 2, 1, 4)
  assert axes.parts('batch') == 1
  with axes.constraining(made):
    assert axes.parts('batch') == 4


@pytest.mark.parametrize('rows', [8, 6])
def test_a_spectrogram_on_a_mesh_is_computed_where_its_clips_are(rows):
  """The compiler splits no Fourier transform: left to itself it gathers all frames on every device."""
  made = Partitioner(data=2, fsdp=2, tensor=2)
  loss = lambda x: jnp.sum(jnp.abs(spectral.stft(x, 64, 16)) ** 3)
  x = jax.random.normal(jax.random.key(0), (rows, 640))
  expected, gradient = jax.value_and_grad(loss)(x)
  with made.active():
    laid_out = jax.device_put(x, made.of_rows if rows == 8 else made.replicated)
    step = jax.jit(jax.value_and_grad(loss)).lower(laid_out).compile()
    found, sharded = step(laid_out)
  np.testing.assert_allclose(found, expected, rtol=1e-5)
  np.testing.assert_allclose(sharded, gradient, rtol=1e-4, atol=1e-4)
  largest = max(math.prod(d) for c in Program.parse(step.as_text()).collectives for d in c.dims) if rows == 8 else 0
  assert largest <= 2 * 640  # no frames, which are four times the samples: two clips a device at most
