"""Imports only go down. The table is the architecture; a new package is placed in it before it is used."""
from __future__ import annotations

import ast
import dataclasses
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / 'musiclm_jax'
L0 = {'specs', 'axes', 'objective'}
MODELS = {'codec', 'semantic', 'mulan', 'token_lm', 'diffusion'}
BELOW = L0 | MODELS | {'nn', 'text', 'training', 'data', 'provenance'}
TENSORFLOW = {'tensorflow', 'tensorflow_datasets', 'tensorflow_text', 'seqio', 't5', 'clu'}
NUMERIC = {'jax', 'flax', 'numpy', 'optax'}


@dataclasses.dataclass(frozen=True)
class Layer:
  """What the parts of one layer may import; a part may always import from itself."""

  packages: set[str]  # from outside; the standard library is free
  parts: set[str]  # of musiclm_jax


LAYERS = {
    'specs': Layer(set(), set()),
    'axes': Layer({'jax'}, set()),
    'objective': Layer({'jax', 'flax'}, {'specs', 'axes'}),
    'provenance': Layer(set(), {'__init__'}),
    'nn': Layer({'jax', 'flax', 'numpy'}, L0),
    'text': Layer({'numpy', 'sentencepiece'}, {'specs'}),
    **{name: Layer(NUMERIC, L0 | {'nn'}) for name in MODELS},
    'training': Layer(NUMERIC | {'absl', 'orbax', 'rich', 'tensorboardX'}, L0 | {'provenance'}),
    'data': Layer({'absl', 'array_record', 'msgpack', 'numpy', 'rich', 'soundfile', 'soxr'},
                  {'specs', 'text', 'provenance'}),
    # Runs from a workdir and from a bundle alike: it knows networks as functions of arrays (`generate/networks.py`).
    'generate': Layer({'jax', 'numpy', 'soundfile', 'soxr'}, {'specs', 'data', 'provenance', 'token_lm', '__init__'}),
    # A leaf: only what the base install has, and no network. `export` writes what it reads.
    'serving': Layer({'jax', 'numpy', 'safetensors'}, {'specs', 'text', 'token_lm', 'generate'}),
    'evaluation': Layer(NUMERIC | {'jinja2', 'matplotlib', 'scipy', 'sklearn', 'soundfile', 'threadpoolctl'},
                        BELOW),
    'config': Layer({'gin'}, {'config_check'}),
    'config_check': Layer({'gin'}, set()),
    'main': Layer(set(), {'__init__', 'config'}),
    '__init__': Layer(set(), {'serving'}),  # when `load` is called, not before
}
# Whatever else there is (train, extract, ...) stands at the top: it may use everything below, and
# the others there.
OTHERS = {path.stem for path in PACKAGE.iterdir()} - set(LAYERS)
TOP = Layer(NUMERIC | {'absl', 'jinja2', 'matplotlib', 'rich', 'safetensors', 'soundfile', 'soxr'},
            BELOW | OTHERS | {'evaluation', 'generate', 'serving', '__init__'})
# What generation and serving may use of the token stages: the files without networks.
OF_TOKENS = ('musiclm_jax.token_lm.sequence.', 'musiclm_jax.token_lm.draw.')
# Files with an allowance of their own.
TENSORFLOW_FILES = {'data/seqio_source.py', 'export/savedmodel.py'}


def imports(source: str) -> Iterator[tuple[str, int]]:
  """(dotted name, line) of each import of a file, those inside functions too; `from a import b` is a.b."""
  for node in ast.walk(ast.parse(source)):
    if isinstance(node, ast.Import):
      yield from ((alias.name, node.lineno) for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
      assert node.level == 0, f'line {node.lineno}: relative import; write musiclm_jax. in full'
      yield from ((f'{node.module}.{alias.name}', node.lineno) for alias in node.names)


def part_of(dotted: str) -> str:
  """'musiclm_jax.nn.conv' -> 'nn'; names of the package itself -> '__init__'."""
  name = dotted.split('.')[1] if '.' in dotted else '__init__'
  return name if (PACKAGE / name).is_dir() or (PACKAGE / f'{name}.py').is_file() else '__init__'


def violations(file: str, source: str) -> Iterator[str]:
  own = file.partition('/')[0].removesuffix('.py')
  layer = LAYERS.get(own, TOP)
  for dotted, line in imports(source):
    root = dotted.partition('.')[0]
    where = f'musiclm_jax/{file}:{line} imports {dotted}'
    if root == 'musiclm_jax':
      part = part_of(dotted)
      if part != own and part not in layer.parts:
        yield f'{where}, but {own} may import only {sorted(layer.parts)}'
      if own in ('generate', 'serving') and part == 'token_lm' and not dotted.startswith(OF_TOKENS):
        yield f'{where}, but {own} may know only {OF_TOKENS} of the stages'
    elif root in TENSORFLOW:
      if file not in TENSORFLOW_FILES:
        yield f'{where}; TensorFlow belongs in {sorted(TENSORFLOW_FILES)} and tasks/'
    elif root in ('tasks', 'tests'):
      yield f'{where}, which stands above the package'
    elif root not in sys.stdlib_module_names and root not in layer.packages:
      yield f'{where}, but {own} may use only {sorted(layer.packages)}'


# The whole package is one test case a file: a failure names the file.
@pytest.mark.parametrize('path', sorted(PACKAGE.rglob('*.py')), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_down(path):
  assert not list(violations(path.relative_to(PACKAGE).as_posix(), path.read_text()))


@pytest.mark.parametrize(('file', 'line'), [
    ('specs.py', 'import numpy'),
    ('axes.py', 'from flax import nnx'),
    ('nn/x.py', 'from musiclm_jax.codec import model'),
    ('codec/x.py', 'from musiclm_jax.mulan import model'),
    ('codec/x.py', 'from musiclm_jax.training import state'),
    ('training/x.py', 'from musiclm_jax.codec import model'),
    ('data/x.py', 'def f():\n  import jax'),
    ('data/x.py', 'import tensorflow as tf'),
    ('data/x.py', 'from musiclm_jax import axes'),
    ('text/x.py', 'import tensorflow_text'),
    ('train.py', 'import gin'),
    ('serving/x.py', 'import flax'),
    ('serving/x.py', 'from musiclm_jax.token_lm.model import TokenLM'),
    ('serving/x.py', 'from musiclm_jax.export import weights'),
    ('generate/x.py', 'from flax import nnx'),
    ('generate/x.py', 'from musiclm_jax.token_lm.sample import sample'),
    ('generate/x.py', 'from musiclm_jax.cascade import Cascade'),
])
def test_the_walk_finds_a_wrong_import(file, line):
  assert len(list(violations(file, line))) == 1


def test_importing_the_package_imports_nothing_else():
  code = ('import sys; before = set(sys.modules); import musiclm_jax, musiclm_jax.main, musiclm_jax.specs; '
          'print(*{m.partition(".")[0] for m in set(sys.modules) - before})')
  loaded = subprocess.run(
      [sys.executable, '-c', code], cwd=PACKAGE.parent, capture_output=True, text=True, check=True)
  assert set(loaded.stdout.split()) - {'musiclm_jax'} <= set(sys.stdlib_module_names)


def test_generation_needs_the_base_install_alone():
  code = ('import sys; before = set(sys.modules); from musiclm_jax.generate import files, modes; '
          'print(*{m.partition(".")[0] for m in set(sys.modules) - before})')
  loaded = subprocess.run(
      [sys.executable, '-c', code], cwd=PACKAGE.parent, capture_output=True, text=True, check=True)
  of_training = {'flax', 'optax', 'orbax', 'gin', 'soxr', 'msgpack', 'array_record', 'sklearn', *TENSORFLOW}
  assert not set(loaded.stdout.split()) & of_training


def test_every_package_is_in_the_wheel():
  setup = (PACKAGE.parent / 'setup.cfg').read_text()
  packages = setup.partition('packages =')[2].partition('package_dir')[0]
  listed = {line.strip() for line in packages.splitlines()}
  for init in PACKAGE.rglob('__init__.py'):
    name = '.'.join(init.parent.relative_to(PACKAGE.parent).parts)
    assert name in listed, f'setup.cfg: add {name} to packages'


def test_the_gin_folder_does_not_hide_the_gin_library():
  assert not (PACKAGE.parent / 'gin' / '__init__.py').exists()
  for command in (['-c', 'import gin; print(gin.__file__)'], ['-m', 'gin.config']):
    done = subprocess.run([sys.executable, *command], cwd=PACKAGE.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    if command[0] == '-c':
      assert 'site-packages' in done.stdout or 'dist-packages' in done.stdout
