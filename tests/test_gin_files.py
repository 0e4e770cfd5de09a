"""Every experiment at every size: it parses, uses what it writes, and its model and loss trace."""
from __future__ import annotations

import functools

import jax
import pytest
from flax import nnx

from musiclm_jax import config
from musiclm_jax.objective import Fit

GIN = config.gin_folder()
EXPERIMENTS = [path.stem for path in sorted((GIN / 'experiments').glob('*.gin'))]
SIZES = ['nano', 'tiny', 'small', 'base', 'paper']
FAST = ('nano', 'paper')  # those between differ in integers only
PAIRS = [(e, s) for e in EXPERIMENTS for s in SIZES]
TRACED = [pytest.param(e, s, marks=() if s in FAST else pytest.mark.slow) for e, s in PAIRS]


@functools.cache
def experiment(name: str, size: str, mesh: str = '') -> config.Experiment:
  files = [f'experiments/{name}.gin', f'size/{size}.gin', *([f'mesh/{mesh}.gin'] if mesh else [])]
  provided = ('workdir', 'dry_run')
  try:
    return config.load_experiment(files, provided=provided)
  except config.MissingValues as missing:  # paths of other runs, which nothing here opens
    return config.load_experiment(files, [(m, 'somewhere') for m in missing.names], provided=provided)


@pytest.mark.parametrize(('name', 'size'), PAIRS)
def test_parses_and_uses_its_lines(name, size):
  assert experiment(name, size).operative()


@pytest.mark.parametrize('name', EXPERIMENTS)
def test_the_first_comment_names_what_is_required(name):
  comment = []
  for line in (GIN / 'experiments' / f'{name}.gin').read_text().splitlines():
    if not line.startswith('#'):
      break
    comment.append(line)
  assert comment, 'an experiment begins with a comment that says what it trains'
  try:
    config.load_experiment([f'experiments/{name}.gin'], provided=('workdir',))
  except config.MissingValues as missing:
    for required in missing.names:
      assert required in ' '.join(comment), f'{name}.gin: the first comment does not name {required}'


@pytest.mark.parametrize(('name', 'size'), TRACED)
def test_model_and_loss_trace(name, size):
  objective = experiment(name, size).argument('objective')
  batch = objective.batch_spec(experiment(name, size).macro('BATCH_SIZE'))
  assert 'slot' in batch

  def loss(key, batch):
    model = objective.model(nnx.Rngs(0))
    if isinstance(objective, Fit):
      return objective.features(model, batch)
    return objective.loss(model, batch, key, training=True)

  result = jax.eval_shape(loss, jax.eval_shape(lambda: jax.random.key(0)), batch)
  if isinstance(objective, Fit):
    assert result.ndim == 2
  else:
    assert result[0].shape == ()
    assert all(m.ndim <= 1 for m in jax.tree.leaves(result[1].metrics))  # a scalar, or one a level


@pytest.mark.parametrize('size', SIZES)
def test_every_line_of_a_size_is_used(size):
  assert not _unused(f'size/{size}', [experiment(name, size) for name in EXPERIMENTS])


@pytest.mark.parametrize('path', sorted(p for p in GIN.glob('*.gin')), ids=lambda p: p.name)
def test_every_line_of_a_shared_file_is_used(path):
  assert not _unused(path.name, [experiment(name, 'tiny') for name in EXPERIMENTS])


@pytest.mark.parametrize('mesh', [path.stem for path in sorted((GIN / 'mesh').glob('*.gin'))])
def test_every_line_of_a_mesh_is_used(mesh):
  loaded = experiment('codec', 'tiny', mesh)
  assert not _unused(f'mesh/{mesh}', [loaded])
  loaded.argument('partitioner')


@pytest.mark.parametrize('size', SIZES)
def test_sizes_define_the_same_macros(size):
  """Whatever one size sets, all set; else a later file would leave a value of an earlier one standing."""
  assert _macros(size) == _macros('tiny')


def _macros(size: str) -> set[str]:
  lines = experiment('codec', size).lines
  return {line.name for line in lines if line.file.startswith((f'size/{size}.gin', f'size/{size}/'))}


def _unused(prefix: str, experiments: list[config.Experiment]) -> set[str]:
  lines = {line for e in experiments for line in e.lines if line.file.startswith(prefix)}
  used = {line.where for e in experiments for line in e.lines if line.key in e.used}
  assert lines, f'no experiment includes {prefix}'
  return {f'{line.where} {line.name}' for line in lines if line.where not in used}


def test_every_network_of_a_size_is_included():
  for size in SIZES:
    included = (GIN / 'size' / f'{size}.gin').read_text()
    for part in (GIN / 'size' / size).glob('*.gin'):
      assert f"include 'size/{size}/{part.name}'" in included, f'size/{size}.gin does not include {part.name}'
