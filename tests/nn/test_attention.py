"""Attention in blocks, with a gradient of its own, beside the plain formula; kernels of other devices by lowering."""
import functools
import math

import jax
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp
import numpy as np
import pytest

from musiclm_jax import axes
from musiclm_jax.nn import attention as attentions, distance_kernel
from musiclm_jax.nn.attention import attention, by_distance
from musiclm_jax.training.partition import Partitioner


def formula(q, k, v, mask=None, bias=None, causal=False):
  """Written down once more, with [T, S] everywhere."""
  T, S = q.shape[1], k.shape[1]
  logits = jnp.einsum('bthk,bshk->bhts', q, k) / math.sqrt(q.shape[-1])
  if bias is not None:
    place = jnp.arange(S)[None] - jnp.arange(T)[:, None] + T - 1
    logits = logits + jnp.repeat(bias[..., place], q.shape[0] // bias.shape[0], axis=0)
  if mask is not None:
    logits = jnp.where(mask, logits, -1e30)
  if causal:
    logits = jnp.where(jnp.arange(S)[None] <= jnp.arange(T)[:, None] + S - T, logits, -1e30)
  return jnp.einsum('bhts,bshk->bthk', jax.nn.softmax(logits), v)


def arrays(B, T, S, H, K, *, groups=0, masked=''):
  generator = np.random.default_rng(T * S + H)
  normal = lambda *shape: jnp.asarray(generator.normal(size=shape), jnp.float32)
  mask = {'': None, 'keys': np.arange(S) < generator.integers(1, S + 1, (B, 1, 1, 1)),
          'places': generator.random((1, 1, T, S)) < 0.7, 'heads': generator.random((1, H, T, 1)) < 0.9,
          'all': generator.random((B, H, T, S)) < 0.7}[masked]
  if mask is not None:
    mask = jnp.asarray(mask | (np.arange(S) == 0)[None, None, None] if masked != 'heads' else mask)
  bias = normal(groups, H, T + S - 1) if groups else None
  return normal(B, T, H, K), normal(B, S, H, K), normal(B, S, H, K), mask, bias


# Batch, queries, keys, heads, head width; queries a block.
SHAPES = {'one block': (2, 9, 9, 3, 8, 128), 'blocks': (2, 24, 24, 2, 4, 8), 'a rest': (1, 29, 29, 2, 6, 8),
          'segments of several blocks': (2, 75, 75, 2, 4, 2), 'more keys': (2, 12, 31, 2, 4, 5),
          'one query': (2, 1, 7, 2, 4, 4), 'one by one': (1, 10, 10, 2, 4, 1)}


def compare(given, *, causal, rtol=1e-5, **options):
  q, k, v, mask, bias = given
  run = lambda f: jax.jit(jax.value_and_grad(lambda q, k, v, bias: jnp.sum(jnp.sin(f(q, k, v, bias))), (0, 1, 2) if (
      bias is None) else (0, 1, 2, 3)))(q, k, v, bias)
  ours = run(lambda q, k, v, bias: attention(q, k, v, mask=mask, bias_GxHxR=bias, causal=causal, **options))
  theirs = run(lambda q, k, v, bias: formula(q, k, v, mask, bias, causal))
  for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
    np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol * max(1.0, float(jnp.abs(b).max())))


@pytest.mark.parametrize('groups', [0, 1])
@pytest.mark.parametrize('causal', [True, False])
@pytest.mark.parametrize('shape', SHAPES.values(), ids=SHAPES)
def test_values_and_gradients_are_those_of_the_formula(shape, causal, groups):
  *sizes, block = shape
  compare(arrays(*sizes, groups=groups), causal=causal, kind='blockwise', block=block)


@pytest.mark.parametrize('shape', [SHAPES['more keys'], SHAPES['one query']])
def test_all_logits_at_once_are_those_of_the_formula(shape):
  *sizes, _ = shape
  compare(arrays(*sizes, groups=1, masked='places'), causal=True, kind='xla')
  compare(arrays(6, *sizes[1:], groups=3), causal=True, kind='xla')


@pytest.mark.parametrize('masked', ['keys', 'places', 'heads', 'all'])
@pytest.mark.parametrize('shape', [SHAPES['a rest'], SHAPES['more keys'], SHAPES['segments of several blocks']])
def test_masks(shape, masked):
  *sizes, block = shape
  # A row without a key has equal weights, as by the formula; which keys causality hides from it then is undefined.
  compare(arrays(*sizes, groups=1, masked=masked), causal=masked in ('keys', 'places'), kind='blockwise', block=block)


@pytest.mark.parametrize('sizes', [(6, 40, 40, 4, 8), (5, 33, 40, 3, 8)])
def test_heads_a_few_at_a_time(sizes, monkeypatch):
  monkeypatch.setattr(attentions, '_TILE', 2 * 16 * 40)
  compare(arrays(*sizes, groups=1, masked='keys'), causal=True, kind='blockwise', block=16)


def test_each_group_of_examples_has_its_bias():
  compare(arrays(6, 11, 11, 2, 4, groups=3), causal=True, kind='blockwise', block=4)


def test_a_bias_by_distance_is_the_lookup():
  bias = jax.random.normal(jax.random.key(0), (2, 3, 11))
  place = np.arange(7)[None] - np.arange(5)[:, None] + 4
  np.testing.assert_array_equal(by_distance(bias, 5, 7), np.asarray(bias)[..., place])


def test_half_precision_stays_near():
  q, k, v, mask, bias = arrays(2, 40, 40, 2, 16, groups=1, masked='keys')
  half = [x.astype(jnp.bfloat16) for x in (q, k, v)]
  y = attention(*half, mask=mask, bias_GxHxR=bias, causal=True, kind='blockwise', block=16)
  assert y.dtype == jnp.bfloat16
  np.testing.assert_allclose(y.astype(jnp.float32), formula(q, k, v, mask, bias, True), atol=0.05)


MESHES = {'data': dict(data=8), 'fsdp': dict(data=1, fsdp=8), 'tensor': dict(data=1, tensor=8),
          'sequence': dict(data=1, sequence=8), 'all': dict(data=1, fsdp=2, tensor=2, sequence=2)}


@pytest.mark.parametrize('causal', [True, False])
@pytest.mark.parametrize('mesh', MESHES.values(), ids=MESHES)
def test_a_mesh_changes_nothing(mesh, causal):
  q, k, v, mask, bias = arrays(8, 48, 48, 8, 4, groups=1, masked='keys')

  def loss(q, k, v, bias):
    q, k, v = (axes.constrain(x, 'batch', 'length', 'heads_activation', None) for x in (q, k, v))
    return jnp.sum(jnp.sin(attention(q, k, v, mask=mask, bias_GxHxR=bias, causal=causal, block=8)))

  run = lambda: jax.device_get(jax.jit(jax.value_and_grad(loss, (0, 1, 2, 3)))(q, k, v, bias))
  alone = run()
  partitioner = Partitioner(**mesh)
  with partitioner.active():
    together = run()
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * max(1, np.abs(a).max())),
               alone, together)


def test_memory_is_linear_in_the_length():
  def temporaries(T, kind):
    spec = jax.ShapeDtypeStruct((1, T, 2, 16), jnp.float32)
    bias = jax.ShapeDtypeStruct((1, 2, 2 * T - 1), jnp.float32)
    loss = lambda q, k, v, bias: jnp.sum(jnp.sin(attention(q, k, v, bias_GxHxR=bias, causal=True, kind=kind)))
    compiled = jax.jit(jax.grad(loss, (0, 1, 2, 3))).lower(spec, spec, spec, bias).compile()
    return compiled.memory_analysis().temp_size_in_bytes

  assert temporaries(4096, 'blockwise') < 2.3 * temporaries(2048, 'blockwise')
  assert temporaries(2048, 'xla') > 3 * temporaries(1024, 'xla')  # what is measured would show a square


class On:
  """A step on one device of another kind."""

  num_devices = 1

  def __init__(self, platform):
    self.platform = platform

  def parts(self, name):
    return 1

  def constrain(self, x, names):
    return x

  def apart(self, f, names, arrays, kernel):
    return f(*arrays)


@pytest.mark.parametrize('platform, kind, changes, words', [
    ('gpu', 'cudnn', {'K': 12}, 'multiple of 8 and at most 128 channels, found 12'),
    ('gpu', 'cudnn', {'S': 48}, '40 queries and 48 keys'),
    ('gpu', 'cudnn', {'T': 4100, 'S': 4100, 'H': 1, 'groups': 1}, 'over 16777216 logits a head at most'),
    ('tpu', 'pallas', {'groups': 1}, 'where attention is causal alone'),
    ('gpu', 'cudnn', {'groups': 1, 'masked': 'keys'}, 'no bias by distance .* beside a mask'),
    ('gpu', 'cudnn', {'masked': 'all'}, 'no mask but one of keys'),
    ('tpu', 'pallas', {'masked': 'places'}, 'no mask but one of keys'),
    ('tpu', 'pallas', {'S': 48}, '40 queries and 48 keys')])
def test_a_kernel_that_cannot_do_it_is_refused_in_a_line(platform, kind, changes, words):
  sizes = {'B': 2, 'T': 40, 'S': 40, 'H': 2, 'K': 16, **changes}
  q, k, v, mask, bias = arrays(**sizes)
  with axes.constraining(On(platform)), pytest.raises(ValueError, match=words) as refused:
    attention(*(x.astype(jnp.bfloat16) for x in (q, k, v)), mask=mask, bias_GxHxR=bias, kind=kind)
  assert '\n' not in str(refused.value)


@pytest.mark.parametrize('platform, kind', [('cpu', 'cudnn'), ('cpu', 'pallas'), ('gpu', 'cudnn')])
def test_a_kernel_is_named_for_its_device_and_type_alone(platform, kind):
  """What was trained by it is evaluated in float32, and used anywhere."""
  q, k, v, _, _ = arrays(2, 40, 40, 2, 16)
  with axes.constraining(On(platform)):
    np.testing.assert_array_equal(attention(q, k, v, kind=kind), attention(q, k, v))


@pytest.mark.parametrize('platform, changes, kind', [
    ('cpu', {}, 'blockwise'), ('gpu', {}, 'cudnn'), ('tpu', {}, 'pallas'), ('gpu', {'groups': 1}, 'cudnn'),
    ('tpu', {'groups': 1}, 'xla'), ('tpu', {'groups': 1, 'causal': True}, 'pallas'),
    ('tpu', {'groups': 1, 'causal': True, 'K': 12}, 'xla'),
    ('tpu', {'groups': 1, 'causal': True, 'masked': 'keys'}, 'xla'),
    ('gpu', {'masked': 'keys'}, 'cudnn'), ('gpu', {'masked': 'places'}, 'xla'),
    ('tpu', {'masked': 'keys'}, 'pallas'), ('gpu', {'K': 12}, 'xla'),
    ('tpu', {'S': 48}, 'xla'), ('gpu', {'S': 48}, 'xla'), ('cpu', {'T': 1}, 'xla'), ('tpu', {'T': 1}, 'xla'),
    ('tpu', {'groups': 1, 'T': 3000, 'S': 3000}, 'blockwise')])
def test_the_device_decides(platform, changes, kind):
  given = {'B': 1, 'T': 40, 'S': 40, 'H': 2, 'K': 16, 'causal': False, **changes}
  causal = given.pop('causal')
  q, k, v, mask, bias = arrays(**given)
  with axes.constraining(On(platform)):
    assert attentions.fitting(q.astype(jnp.bfloat16), k.astype(jnp.bfloat16), mask, bias, causal) == kind


CUDNN = {'causal': dict(causal=True), 'full': {}, 'causal, odd': dict(causal=True, T=27), 'full, odd': dict(T=27),
         'bias': dict(causal=True, groups=1), 'bias, full': dict(groups=1),
         'bias, odd': dict(causal=True, groups=1, T=27), 'bias, full, odd': dict(groups=1, T=27),
         'mask': dict(masked='keys'), 'mask, odd': dict(masked='keys', T=27)}


@pytest.mark.parametrize('mesh', [None, dict(data=2, fsdp=2, tensor=2)], ids=['one device', 'a mesh'])
@pytest.mark.parametrize('case', CUDNN.values(), ids=CUDNN)
def test_what_the_kernel_of_nvidia_is_given(case, mesh, monkeypatch):
  """The kernel itself is replaced by JAX's formula of the same signature."""
  monkeypatch.setattr(attentions, '_fused', functools.partial(jax.nn.dot_product_attention, implementation='xla'))
  case = {'causal': False, 'T': 28, **case}
  causal, T = case.pop('causal'), case.pop('T')
  q, k, v, mask, bias = arrays(4, T, T, 4, 8, **case)

  def gradients(f, bias):
    which = (0, 1, 2) if bias is None else (0, 1, 2, 3)
    return jax.jit(jax.value_and_grad(lambda *given: jnp.sum(jnp.sin(f(*given))), which))(q, k, v, bias)

  theirs = gradients(lambda q, k, v, bias: formula(q, k, v, mask, bias, causal), bias)
  if mesh is None:
    ours = gradients(lambda q, k, v, bias: attentions._cudnn(q, k, v, mask, bias, causal), bias)
  else:
    partitioner = Partitioner(**mesh)
    each = None if bias is None else jnp.repeat(bias, 4, axis=0)  # a group for each part of the batch
    with partitioner.active():
      ours = gradients(lambda q, k, v, bias: attentions._cudnn(q, k, v, mask, bias, causal), each)
    if bias is not None:
      value, (*others, dbias) = ours
      ours = value, (*others, dbias.sum(axis=0, keepdims=True))
  for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * max(1.0, float(jnp.abs(b).max())))


@pytest.mark.skipif(jax.default_backend() != 'gpu', reason='no GPU')
@pytest.mark.parametrize('case', CUDNN.values(), ids=CUDNN)
def test_the_kernel_of_nvidia_is_the_formula(case):
  case = {'causal': False, 'T': 28, **case}
  causal, T = case.pop('causal'), case.pop('T')
  q, k, v, mask, bias = arrays(4, T, T, 4, 64, **case)
  which = (0, 1, 2) if bias is None else (0, 1, 2, 3)
  run = lambda f: jax.jit(jax.grad(lambda *given: jnp.sum(jnp.sin(f(*given))), which))(q, k, v, bias)
  half = lambda *given: (x.astype(jnp.bfloat16) for x in given)
  ours = run(lambda q, k, v, bias: attention(*half(q, k, v), mask=mask, bias_GxHxR=bias, causal=causal, kind='cudnn'
                                             ).astype(jnp.float32))
  theirs = run(lambda q, k, v, bias: formula(q, k, v, mask, bias, causal))
  for a, b in zip(ours, theirs, strict=True):
    assert float(jnp.linalg.norm((a - b).ravel()) / jnp.linalg.norm(b.ravel())) < 0.02


@pytest.mark.parametrize('length', [256, 300])
@pytest.mark.parametrize('case', ['causal', 'full', 'mask'])
def test_the_kernel_of_tpus_lowers_with_its_gradient(length, case):
  spec = jax.ShapeDtypeStruct((2, length, 2, 64), jnp.bfloat16)
  seen = jnp.arange(length)[None, None, None] < jnp.asarray([[[[7]]], [[[length]]]]) if case == 'mask' else None
  with axes.constraining(On('tpu')):
    run = functools.partial(attention, causal=case == 'causal', mask=seen)
    gradient = jax.grad(lambda q, k, v: jnp.sum(run(q, k, v).astype(jnp.float32)), (0, 1, 2))
    exported = jax.export.export(jax.jit(gradient), platforms=['tpu'])(spec, spec, spec)
  assert exported.mlir_module().count('tpu_custom_call') >= 3  # forward, and two of the gradient
  assert [a.shape for a in exported.out_avals] == [spec.shape] * 3


@pytest.mark.parametrize('case', [dict(causal=True), {}, dict(masked='keys')], ids=['causal', 'full', 'mask'])
@pytest.mark.parametrize('length', [128, 150])
def test_the_kernel_of_tpus_is_the_formula(length, case, monkeypatch):
  """As Pallas interprets it, which is not how a TPU computes it."""
  from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
  monkeypatch.setattr(kernels, 'make_splash_mha_single_device',
                      functools.partial(kernels.make_splash_mha_single_device, interpret=True))
  case = dict(case)
  causal = case.pop('causal', False)
  q, k, v, mask, _ = arrays(2, length, length, 2, 64, **case)
  run = lambda f: jax.jit(jax.value_and_grad(lambda *x: jnp.sum(jnp.sin(f(*x))), (0, 1, 2)))(q, k, v)
  ours = run(lambda q, k, v: attentions._splash(q, k, v, mask, causal))
  theirs = run(lambda q, k, v: formula(q, k, v, mask, None, causal))
  for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4 * max(1.0, float(jnp.abs(b).max())))


@pytest.mark.parametrize('length, dtype', [(256, jnp.bfloat16), (762, jnp.bfloat16), (762, jnp.float32)])
def test_the_kernel_of_tpus_with_a_bias_lowers_with_its_gradient(length, dtype):
  spec = jax.ShapeDtypeStruct((2, length, 2, 64), dtype)
  bias = jax.ShapeDtypeStruct((1, 2, 2 * length - 1), jnp.float32)
  with axes.constraining(On('tpu')):
    loss = lambda q, k, v, bias: jnp.sum(attention(q, k, v, bias_GxHxR=bias, causal=True).astype(jnp.float32))
    exported = jax.export.export(jax.jit(jax.grad(loss, (0, 1, 2, 3))), platforms=['tpu'])(spec, spec, spec, bias)
  assert exported.mlir_module().count('tpu_custom_call') >= 2
  assert [a.shape for a in exported.out_avals] == [spec.shape] * 3 + [bias.shape]


@pytest.fixture
def interpreted(monkeypatch):
  """The kernel with a bias as Pallas interprets it, which is not how a TPU computes it, in tiles of 128."""
  monkeypatch.setattr(distance_kernel, '_pallas_call', functools.partial(distance_kernel._pallas_call, interpret=True))
  monkeypatch.setattr(distance_kernel, 'fitting_block', lambda *_: 128)


@pytest.mark.parametrize('groups', [1, 2])
@pytest.mark.parametrize('length', [70, 128, 300])
def test_the_kernel_of_tpus_with_a_bias_is_the_formula(length, groups, interpreted):
  q, k, v, _, bias = arrays(4, length, length, 2, 16, groups=groups)
  run = lambda f: jax.jit(jax.value_and_grad(lambda *x: jnp.sum(jnp.sin(f(*x))), (0, 1, 2, 3)))(q, k, v, bias)
  theirs = run(lambda q, k, v, bias: formula(q, k, v, None, bias, True))
  for a, b in zip(jax.tree.leaves(run(attentions._tiled)), jax.tree.leaves(theirs), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * max(1.0, float(jnp.abs(b).max())))


def test_the_kernel_of_tpus_with_a_bias_in_half_precision_stays_near(interpreted):
  q, k, v, _, bias = arrays(2, 200, 200, 2, 64, groups=1)
  half = lambda *given: (x.astype(jnp.bfloat16) for x in given)
  run = lambda f: jax.jit(jax.grad(lambda *x: jnp.sum(jnp.sin(f(*x).astype(jnp.float32))), (0, 1, 2, 3)))(q, k, v, bias)
  ours = run(lambda q, k, v, bias: attentions._tiled(*half(q, k, v), bias))
  theirs = run(lambda q, k, v, bias: formula(q, k, v, None, bias, True))
  for a, b in zip(ours, theirs, strict=True):
    assert float(jnp.linalg.norm((a - b).ravel()) / jnp.linalg.norm(b.ravel())) < 0.02


def test_the_kernel_of_tpus_with_a_bias_on_a_mesh(interpreted):
  q, k, v, _, bias = arrays(8, 130, 130, 4, 8, groups=1)
  run = lambda bias: jax.jit(jax.value_and_grad(lambda *x: jnp.sum(jnp.sin(attentions._tiled(*x))), (0, 1, 2, 3)))(
      q, k, v, bias)
  value, (*others, dbias) = run(bias)
  with Partitioner(data=2, fsdp=2, tensor=2).active():
    together, (*parts, dparts) = run(jnp.repeat(bias, 4, axis=0))  # a group for each part of the batch
  for a, b in zip((together, *parts, dparts.sum(0, keepdims=True)), (value, *others, dbias), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * max(1.0, float(jnp.abs(b).max())))


def test_the_kernel_of_tpus_with_a_bias_in_the_memory_of_a_chip(interpreted, monkeypatch):
  """What a TPU keeps of results between places of the grid, and when it writes them back; nothing begins as zero."""
  memory = pltpu.InterpretParams(uninitialized_memory='nan')
  call = functools.partial(distance_kernel._pallas_call, interpret=memory)
  monkeypatch.setattr(distance_kernel, '_pallas_call', call)
  q, k, v, _, bias = arrays(2, 300, 300, 2, 16, groups=1)
  run = lambda f: jax.jit(jax.grad(lambda *x: jnp.sum(jnp.sin(f(*x))), (0, 1, 2, 3)))(q, k, v, bias)
  theirs = run(lambda q, k, v, bias: formula(q, k, v, None, bias, True))
  for a, b in zip(run(attentions._tiled), theirs, strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * max(1.0, float(jnp.abs(b).max())))


@pytest.mark.parametrize('length, filled', [
    (1, 128), (128, 128), (200, 256), (300, 384), (1262, 1280), (4096, 4096),
    (762, 768), (2262, 2304), (1800, 1920)])  # the stages of MusicLM
def test_blocks_of_the_kernel_fill_little(length, filled):
  block = distance_kernel.fitting_block(length, 64, jnp.bfloat16)
  assert -(-length // block) * block == filled and block % 128 == 0


def test_what_does_not_fit_on_a_chip_is_computed_otherwise():
  q, k, v, _, bias = arrays(1, 4096, 4096, 1, 128, groups=1)
  assert distance_kernel.fitting_block(4096, 128, jnp.bfloat16) == 0
  with axes.constraining(On('tpu')):
    assert attentions.fitting(q.astype(jnp.bfloat16), k.astype(jnp.bfloat16), None, bias, True) == 'blockwise'
    with pytest.raises(ValueError, match='4096 positions of 128 channels in bfloat16 do not fit on the chip'):
      attention(*(x.astype(jnp.bfloat16) for x in (q, k, v)), bias_GxHxR=bias, causal=True, kind='pallas')


@pytest.mark.parametrize('kind', ['auto', 'blockwise'])
def test_lengths_may_be_left_open(kind):
  b, t, s = jax.export.symbolic_shape('b, t, s', constraints=['s >= t'])
  spec = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
  run = jax.jit(lambda q, k, v, bias: attention(q, k, v, bias_GxHxR=bias, causal=True, kind=kind))
  program = jax.export.export(run)(*(spec(b, n, 2, 4) for n in (t, s, s)), spec(1, 2, t + s - 1))
  for T, S in ((5, 9), (12, 12)):
    q, k, v, _, bias = arrays(2, T, S, 2, 4, groups=1)
    np.testing.assert_allclose(program.call(q, k, v, bias), formula(q, k, v, None, bias, True), atol=1e-5)
