"""A function of a bundle: StableHLO that was serialised by `jax.export`, checked, and compiled for each new shape."""
from __future__ import annotations

from collections.abc import Mapping
import re
from typing import Any

import jax
from jax import export

# Checks of shapes, which vanish in the compiler. Any other call leads out of the program, to code of the machine.
_CALLS = {'shape_assertion'}
_CALL = re.compile(r'(?:custom_call @|call_target_name = )(?:"((?:[^"\\]|\\.)*)"|([^\s("]+))')


class Program:
  """`program(weights, *arguments)`; `weights` is a dict of the arrays that `Program.weights` describes.

  Attributes:
    weights: shape and dtype of each array of the first argument, by name.
    arguments: trees of shape and dtype of the others; open dimensions are expressions.
  """

  def __init__(self, name: str, content: bytearray):
    """Raises ValueError where the content is not a program that computes and nothing else."""
    try:
      found = export.deserialize(content)
      module = found.mlir_module()
      arguments, keywords = jax.tree.unflatten(found.in_tree, found.in_avals)
      self.weights, *self.arguments = arguments
      plain = isinstance(self.weights, Mapping) and not keywords and found.nr_devices == 1
      plain = plain and not found.ordered_effects and not found.unordered_effects
      plain = plain and all(type(size) is int for array in self.weights.values() for size in array.shape)
    except Exception as error:  # of many kinds: the content may be anything
      raise ValueError(f'{name} cannot be read by JAX {jax.__version__}: it is of a later version, or damaged; export '
                       'it again, or fetch it again') from error
    if (platform := export.default_export_platform()) not in found.platforms:
      raise ValueError(f'{name} is for {", ".join(found.platforms)}, and JAX computes on {platform} here: set '
                       'JAX_PLATFORMS=cpu')
    calls = {quoted or bare for quoted, bare in _CALL.findall(module)} - _CALLS
    if calls or not plain:
      what = f'calls {min(calls)[:80]!r} on the machine' if calls else 'is no plain function'
      raise ValueError(f'{name} {what}, which no function of a bundle does; do not use it')
    # Neither weights nor lengths are part of the program: it is compiled once for each shape.
    self._run = jax.jit(found.call)

  def __call__(self, weights: Mapping[str, jax.Array], *arguments: Any) -> Any:
    return self._run(weights, *arguments)
