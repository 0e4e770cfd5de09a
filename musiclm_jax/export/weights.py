"""The arrays of a network as a bundle stores them, and back to what the network computes with.

Arrays have flat names ("encoder.first.w"). Programs take them as they are stored and widen them inside, so that a
device holds the small ones between calls.

Shapes: D input width (the second last axis), F output width (the last one).
"""
from __future__ import annotations

from collections.abc import Mapping
import dataclasses
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from musiclm_jax.training.checkpoint import Loaded

# Parameters that are multiplied with: of linear layers, convolutions and output heads.
_MATRICES = ('w', 'head')
_SCALE = '.scale'
_STEPS = 127  # of int8, on either side of 0


@dataclasses.dataclass(frozen=True)
class Network:
  """A trained network with its arrays by flat name.

  Attributes:
    graphdef, treedef: put its modules together, and its arrays into a tree.
    arrays: all of them, float32 or int32.
    trained: names of the parameters; the others (codebooks, statistics) are never made smaller.
  """

  graphdef: Any
  treedef: Any
  arrays: Mapping[str, np.ndarray]
  trained: frozenset[str]

  @classmethod
  def of(cls, loaded: Loaded) -> Network:
    graphdef, state = nnx.split(loaded.model)
    leaves, treedef = jax.tree_util.tree_flatten_with_path(nnx.to_pure_dict(state))
    trained = {_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(loaded.params)}
    return cls(graphdef, treedef, {_name(path): np.asarray(leaf) for path, leaf in leaves}, frozenset(trained))

  def model(self, stored: Mapping[str, jax.Array]) -> nnx.Module:
    """The module, from arrays as `stored` makes them. Those that are not there are zeros: see `used`."""
    def leaf(name: str) -> jax.Array:
      if name in stored:
        return widened(stored, name)
      return jnp.zeros(self.arrays[name].shape, self.arrays[name].dtype)
    return nnx.merge(self.graphdef, jax.tree.unflatten(self.treedef, map(leaf, self.arrays)))

  def stored(self, kind: str, names: set[str]) -> dict[str, np.ndarray]:
    """The named arrays as one of `bundle_format.WEIGHT_KINDS`.

    "bfloat16": trained arrays of two axes and more. "int8": matrices, each column with a scale of its own, by which
    nothing is further off than 1/254 of its column's largest; other trained arrays of two axes and more in bfloat16.
    Vectors and what was not trained by gradients stay float32.
    """
    found = {}
    for name in sorted(names):
      array = self.arrays[name]
      wide = kind == 'float32' or name not in self.trained or array.ndim < 2
      if wide or array.dtype != np.float32:
        found[name] = array
      elif kind == 'int8' and name.rpartition('.')[2] in _MATRICES:
        found[name], found[name + _SCALE] = _rounded(array)
      else:
        found[name] = array.astype(jnp.bfloat16)
    return found


def _name(path: Any) -> str:
  return '.'.join(str(key.key) for key in path)


def _rounded(w_DxF: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """int8 [..., D, F] and its scales float32 [..., 1, F]."""
  scale_1xF = np.max(np.abs(w_DxF), axis=-2, keepdims=True) / np.float32(_STEPS)
  scale_1xF = np.where(scale_1xF > 0, scale_1xF, 1).astype(np.float32)
  return np.rint(w_DxF / scale_1xF).astype(np.int8), scale_1xF


def widened(stored: Mapping[str, jax.Array], name: str) -> jax.Array:
  """An array as the network computes with it."""
  array = stored[name]
  if array.dtype == jnp.int8:
    return array.astype(jnp.float32) * stored[name + _SCALE]
  return array.astype(jnp.float32) if array.dtype == jnp.bfloat16 else array
