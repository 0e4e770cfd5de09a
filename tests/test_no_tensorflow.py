"""Where TensorFlow is not installed, everything but its one reader is imported, and a network trains."""
from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

TENSORFLOW = {'tensorflow', 'tensorflow_datasets', 'tensorflow_text', 'seqio', 't5', 'clu', 'keras'}

# Runs in a fresh interpreter: this one may have imported TensorFlow for other tests.
BLOCK = f'''
import sys

class Without:
  """A finder that does not find TensorFlow and what needs it, as if they were not installed."""
  names = {TENSORFLOW!r}

  def __init__(self, finder):
    self.finder = finder

  def find_spec(self, name, path=None, target=None):
    return None if name.partition('.')[0] in self.names else self.finder.find_spec(name, path, target)

  def __getattr__(self, name):
    return getattr(self.finder, name)

sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
'''


def run(code: str, tmp_path: Path, block: str = BLOCK) -> str:
  environment = {**os.environ, 'JAX_PLATFORMS': 'cpu', 'PYTHONPATH': str(ROOT), 'XLA_FLAGS': ''}
  done = subprocess.run([sys.executable, '-c', block + textwrap.dedent(code)], cwd=tmp_path, env=environment,
                        capture_output=True, text=True, timeout=600)
  assert done.returncode == 0, done.stderr[-4000:]
  return done.stdout


def test_the_block_blocks(tmp_path):
  assert 'absent' in run('''
      try:
        import seqio
      except ModuleNotFoundError:
        print('absent')
  ''', tmp_path)


def test_every_module_imports(tmp_path):
  out = run('''
      import importlib, pkgutil, musiclm_jax
      names = [m.name for m in pkgutil.walk_packages(musiclm_jax.__path__, 'musiclm_jax.')]
      for name in names:
        if name not in ('musiclm_jax.data.seqio_source', 'musiclm_jax.export.savedmodel'):
          importlib.import_module(name)
      print(len(names), 'tensorflow' in sys.modules)
  ''', tmp_path)
  count, tensorflow = out.split()
  assert int(count) > 20 and tensorflow == 'False'


def test_no_module_imports_tensorflow_unasked(tmp_path):
  """With TensorFlow at hand, too: its import costs seconds and memory, and claims accelerators."""
  out = run('''
      import importlib, pkgutil, sys, musiclm_jax
      for module in pkgutil.walk_packages(musiclm_jax.__path__, 'musiclm_jax.'):
        if module.name not in ('musiclm_jax.data.seqio_source', 'musiclm_jax.export.savedmodel'):
          importlib.import_module(module.name)
      print('tensorflow' in sys.modules)
  ''', tmp_path, block='')
  assert out.strip() == 'False'


def test_one_step_from_synthetic_batches(tmp_path):
  out = run('''
      import numpy as np
      from musiclm_jax import config, train
      from musiclm_jax.training import optimizer
      experiment = config.load_experiment(
          ['experiments/fine_lm.gin', 'size/nano.gin'], [('TOKENS', 'unused')], provided=('workdir',))
      objective = experiment.argument('objective')

      class Synthetic:
        batch_size, fingerprint = 4, 'synthetic'
        def __call__(self, step, process_index=0, process_count=1):
          batch = {k: np.zeros(s.shape, s.dtype) for k, s in objective.batch_spec(self.batch_size).items()}
          return {**batch, 'slot': np.arange(self.batch_size, dtype=np.int32)}

      state = train.train(objective=objective, batches=Synthetic(), optimizer=optimizer.Adam(1e-3),
                          workdir='work', num_steps=1)
      print(int(state.step))
  ''', tmp_path)
  assert out.split()[-1] == '1'


def test_one_step_of_the_built_in_music(tmp_path):
  """The whole path of `musiclm train`: gin, records composed on the fly, MuLan."""
  run('''
      from musiclm_jax import main
      main.main(['train', '--gin_file', 'experiments/mulan.gin', '--gin_file', 'size/nano.gin',
                 '--gin.NUM_STEPS=1', '--workdir', 'work'])
  ''', tmp_path)
  assert (tmp_path / 'work' / 'metrics.jsonl').exists()
