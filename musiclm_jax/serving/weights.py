"""The arrays of a bundle: read from safetensors, and nothing but the arrays that its programs take."""
from __future__ import annotations

from collections.abc import Mapping
import math
from typing import Any

import jax.numpy as jnp
import numpy as np
import safetensors

from musiclm_jax.serving.bundle_format import Files, weights_file

_LENGTH = 8  # bytes before the header that say how long it is
_HEADER_LIMIT = 1 << 22
_TYPES = {'F32': np.float32, 'BF16': jnp.bfloat16, 'I8': np.int8, 'I32': np.int32}


def read(files: Files, network: str, wanted: Mapping[str, Any]) -> dict[str, np.ndarray]:
  """The arrays of a network, by name.

  Args:
    wanted: shape and dtype of each array, from the programs. Nothing is read of a file of another size.

  Raises ValueError where the file is damaged or holds other arrays.
  """
  name = weights_file(network)
  expected = sum(math.prod(a.shape) * np.dtype(a.dtype).itemsize for a in wanted.values())

  def check(first: bytes, size: int) -> None:
    header = int.from_bytes(first, 'little')
    if size < _LENGTH or header > min(_HEADER_LIMIT, size - _LENGTH):
      raise ValueError(f'{name} claims a header of {header} bytes: it is no safetensors file; do not use it')
    if size - _LENGTH - header != expected:
      raise ValueError(f'{name} has {size - _LENGTH - header} bytes of arrays, the functions take {expected}; do not '
                       'use it')

  content = bytes(files.read(name, _LENGTH, check))
  try:
    found = dict(safetensors.deserialize(content))
  except Exception as error:  # the library's own, and others for names that are no text
    cause = (str(error).splitlines() or [type(error).__name__])[0][:200]
    raise ValueError(f'{name} is no safetensors file: {cause}; do not use it') from error
  if found.keys() != wanted.keys():
    odd = min(found.keys() ^ wanted.keys())
    raise ValueError(f'{name} {"has" if odd in found else "lacks"} the array {odd[:80]!r}, unlike the functions; do '
                     'not use it')
  return {key: _array(name, key, found.pop(key), wanted[key]) for key in sorted(wanted)}


def _array(name: str, key: str, found: Mapping[str, Any], wanted: Any) -> np.ndarray:
  dtype = _TYPES.get(found['dtype'])
  if dtype is None or np.dtype(dtype) != wanted.dtype or tuple(found['shape']) != wanted.shape:
    raise ValueError(f'{name}: {key} is {found["dtype"]} {found["shape"]}, the functions take {wanted.dtype} '
                     f'{list(wanted.shape)}; do not use it')
  return np.frombuffer(found['data'], dtype).reshape(wanted.shape)
