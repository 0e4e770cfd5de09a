"""Runs before any test module is imported: CPU only, and eight devices so that meshes can be tested."""
import fcntl
import os
import signal
import time

import pytest

os.environ.setdefault('JAX_PLATFORMS', 'cpu')
# Tests spend their time in the compiler, not in what it makes. The quickstart is compiled as a user's is.
_FLAGS = {'--xla_force_host_platform_device_count': '8', '--xla_backend_optimization_level': '0'}
os.environ['XLA_FLAGS'] = ' '.join([os.environ.get('XLA_FLAGS', ''), *(
    f'{flag}={value}' for flag, value in _FLAGS.items() if flag not in os.environ.get('XLA_FLAGS', ''))]).strip()
# Started in the background of a script, Python ignores Ctrl-C, and so would every process that a test asks to stop.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
  signal.signal(signal.SIGINT, signal.default_int_handler)
os.environ.setdefault('MUSICLM_READER', 'direct')  # importing TensorFlow takes seconds; its tests name their reader


def _made_once(tmp_path_factory, name, make):
  """The folder `name`, made by `make(folder)`: by one of the workers, for all of them."""
  root = tmp_path_factory.getbasetemp()
  root = root.parent if 'PYTEST_XDIST_WORKER' in os.environ else root
  done = root / f'{name}.done'
  with open(root / f'{name}.lock', 'w') as lock:
    fcntl.flock(lock, fcntl.LOCK_EX)
    if not done.exists():
      make(root / name)
      done.touch()
  return root / name


@pytest.fixture(scope='session')
def nano_cascade(tmp_path_factory):
  """A workdir of untrained networks at size nano that belong together, which nobody may change."""
  from tests.trainings import random_cascade
  return _made_once(tmp_path_factory, 'nano_cascade', random_cascade)


@pytest.fixture(scope='session')
def nano_bundle(nano_cascade, tmp_path_factory):
  """The bundle of `nano_cascade`, which nobody may change."""
  from musiclm_jax.export import bundle
  return _made_once(tmp_path_factory, 'nano_bundle', lambda to: bundle.export(nano_cascade, to, licence='CC0-1.0'))


def pytest_runtest_setup(item):
  """Tests that would begin after $TESTS_UNTIL (seconds since 1970) are skipped: `.ci/run` has an end on any machine."""
  del item
  if time.time() > float(os.environ.get('TESTS_UNTIL', 'inf')):
    pytest.skip('no time left')
