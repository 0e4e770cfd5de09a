"""Runs before any test module is imported: CPU only, and eight devices so that meshes can be tested."""
import os

os.environ['JAX_PLATFORMS'] = 'cpu'
if '--xla_force_host_platform_device_count' not in os.environ.get('XLA_FLAGS', ''):
  os.environ['XLA_FLAGS'] = os.environ.get('XLA_FLAGS', '') + ' --xla_force_host_platform_device_count=8'
os.environ.setdefault('MUSICLM_READER', 'direct')  # importing TensorFlow takes seconds; its tests name their reader
