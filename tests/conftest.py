"""Runs before any test module is imported: CPU only, and eight devices so that meshes can be tested."""
import os

os.environ['JAX_PLATFORMS'] = 'cpu'
# Tests spend their time in the compiler, not in what it makes. Commands that tests start as processes are compiled
# as a user's are.
_FLAGS = {'--xla_force_host_platform_device_count': '8', '--xla_backend_optimization_level': '0'}
os.environ['XLA_FLAGS'] = ' '.join([os.environ.get('XLA_FLAGS', ''), *(
    f'{flag}={value}' for flag, value in _FLAGS.items() if flag not in os.environ.get('XLA_FLAGS', ''))]).strip()
os.environ.setdefault('MUSICLM_READER', 'direct')  # importing TensorFlow takes seconds; its tests name their reader
