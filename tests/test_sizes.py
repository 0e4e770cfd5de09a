"""Size `tiny` is the paper's system with smaller numbers: the same classes and the same loss terms."""
import json

from flax import nnx
import jax
import pytest

from musiclm_jax import config, specs
from musiclm_jax.specs import TokenSpec
from musiclm_jax.training.state import Skeleton

EXPERIMENTS = ('codec', 'mulan', 'mulan_tokens', 'w2v_bert', 'semantic_tokens', 'semantic_lm', 'coarse_lm', 'fine_lm')
# What may differ beside integers: the weight of the waveform term, the kind of positions; and the length of a crop,
# which is data, and recomputation, which changes nothing but memory.
MAY_DIFFER = ('waveform', 'positions', 'seconds', 'remat')


def objective(name, size):
  files = [f'experiments/{name}.gin', f'size/{size}.gin']
  try:
    return config.load_experiment(files, provided=('workdir', 'dry_run')).argument('objective')
  except config.MissingValues as missing:
    return config.load_experiment(files, [(n, 'x') for n in missing.names],
                                  provided=('workdir', 'dry_run')).argument('objective')


def differences(a, b, path=''):
  """Paths at which two decoded specs differ in anything but integers."""
  if isinstance(a, dict) and isinstance(b, dict):
    assert a.keys() == b.keys(), path
    for key in a:
      yield from differences(a[key], b[key], f'{path}.{key}')
  elif isinstance(a, list) and isinstance(b, list):
    flat = lambda v: [x for y in v for x in (flat(y) if isinstance(y, list) else [y])]
    if not all(type(x) is int for x in flat(a) + flat(b)) and a != b:
      if len(a) != len(b):
        yield path
      for i, (x, y) in enumerate(zip(a, b)):
        yield from differences(x, y, f'{path}[{i}]')
  elif a != b and not (type(a) is int and type(b) is int):
    yield path


@pytest.mark.parametrize('name', EXPERIMENTS)
def test_tiny_and_paper_differ_in_integers(name):
  tiny, paper = (json.loads(specs.to_json(objective(name, size))) for size in ('tiny', 'paper'))
  found = [path for path in differences(tiny, paper) if path.rpartition('.')[2] not in MAY_DIFFER]
  assert not found, found


@pytest.mark.parametrize('name', EXPERIMENTS)
def test_tiny_and_paper_are_built_of_the_same_classes(name):
  def classes(size):
    model = nnx.eval_shape(lambda: objective(name, size).model(nnx.Rngs(0)))
    # The number of waveform discriminators beside the spectral one is an integer too, and 0 at size tiny.
    return {type(node).__name__ for path, node in nnx.iter_graph(model)
            if isinstance(node, nnx.Module) and not any('wave' in str(part) for part in path)}
  assert classes('tiny') == classes('paper')


def test_tiny_keeps_the_shape_of_the_system():
  stages = {n: objective(n, 'tiny').stage for n in ('semantic_lm', 'coarse_lm', 'fine_lm')}
  mulan, = stages['semantic_lm'].conditions
  semantic, coarse, fine = (stages[n].target for n in stages)
  assert mulan == TokenSpec('mulan', mulan.codebook_size, 12)
  assert (semantic.frame_rate, semantic.codebook_size >= 256) == (25, True)
  assert (coarse.levels, fine.levels, fine.first_level, coarse.frame_rate) == (4, 8, 4, 50)
  assert coarse.codebook_size == fine.codebook_size >= 256
  assert all(objective(n, 'tiny').transformer.depth >= 2 for n in stages)
  codec = objective('codec', 'tiny').token_spec
  assert (codec.levels, codec.codebook_size, codec.frame_rate) == (12, coarse.codebook_size, 50)
  assert objective('semantic_tokens', 'tiny').token_spec == semantic
  assert objective('mulan_tokens', 'tiny').token_spec == mulan


@pytest.mark.parametrize('name, low, high', [
    ('semantic_lm', 400e6, 432e6), ('coarse_lm', 400e6, 432e6), ('fine_lm', 400e6, 432e6)])
def test_a_paper_stage_has_the_papers_parameters(name, low, high):
  assert low <= Skeleton.of(objective(name, 'paper')).count() <= high


def test_the_arithmetic_of_a_paper_stage():
  # 24 layers of attention (4 d^2) and gated feed-forward (3 d f) with two norms, one more norm at the end, the T5 bias,
  # embedding rows (padded to 128) and the output codes.
  d, f, layers, heads = 1024, 4096, 24, 16
  for name in ('semantic_lm', 'coarse_lm', 'fine_lm'):
    o = objective(name, 'paper')
    rows = -(-(o.stage.vocab_size + len(o.stage.conditions)) // 128) * 128
    expected = layers * (4 * d * d + 3 * d * f + 2 * d) + d + 32 * heads + d * (rows + o.stage.target.vocab_size)
    assert Skeleton.of(o).count() == expected


@pytest.mark.parametrize('name, length', [('semantic_lm', 762), ('coarse_lm', 2262), ('fine_lm', 1800)])
def test_a_paper_stage_has_the_papers_lengths(name, length):
  assert objective(name, 'paper').stage.length == length


@pytest.mark.parametrize('name', EXPERIMENTS)
def test_specs_json_rebuilds_the_objective(name):
  paper = objective(name, 'paper')
  assert specs.from_json(specs.to_json(paper)) == paper
  assert jax.tree.structure(Skeleton.of(paper).params) is not None
