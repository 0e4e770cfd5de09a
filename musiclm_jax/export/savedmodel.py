"""The same functions as TensorFlow SavedModels, one a network, for servers that run TensorFlow and no JAX.

Needs the extra `savedmodel`; where the models are used, TensorFlow alone.
"""
from __future__ import annotations

from collections.abc import Mapping
import os
from typing import Any

import jax
from jax.experimental import jax2tf
import tensorflow as tf

from musiclm_jax.export.functions import Function, is_leaf, PLATFORMS, used
from musiclm_jax.export.weights import Network


def write(place: str | os.PathLike, network: Network, functions: Mapping[str, Function], kind: str) -> None:
  """A SavedModel in `place` with the functions as methods; they hold their weights, which are `kind`.

  `tf.saved_model.load(place).decode(tokens)`: arguments are those of the bundle's functions without the weights.
  """
  module = tf.Module()
  stored = network.stored(kind, used(network, functions))
  module.weights = {name: tf.Variable(array, trainable=False, name=name) for name, array in stored.items()}
  for name, function in functions.items():
    setattr(module, name, _method(module.weights, network, function))
  tf.saved_model.save(module, os.fspath(place))


def _method(weights: Mapping[str, tf.Variable], network: Network, function: Function) -> tf.types.experimental.Callable:
  run = jax2tf.convert(
      lambda stored, *arguments: function.run(network.model(stored), *arguments),
      polymorphic_shapes=[None, *jax.tree.map(_shape, function.arguments, is_leaf=is_leaf)],
      polymorphic_constraints=function.where, with_gradient=False, native_serialization_platforms=PLATFORMS)
  signature = jax.tree.map(_spec, function.arguments, is_leaf=is_leaf)
  return tf.function(lambda *arguments: run(dict(weights), *arguments), input_signature=signature, autograph=False)


def _shape(leaf: tuple[Any, ...]) -> str:
  return f'({", ".join(map(str, leaf[1:]))})'


def _spec(leaf: tuple[Any, ...]) -> tf.TensorSpec:
  dtype, *dimensions = leaf
  return tf.TensorSpec([d if isinstance(d, int) else None for d in dimensions], tf.dtypes.as_dtype(dtype))
