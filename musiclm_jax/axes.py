"""Logical axis names, the constraint that model code may place, and per-example randomness.

Model code names axes; which mesh axis each one is split over is decided in `training/partition.py` alone.
"""
from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import jax
import jax.numpy as jnp

# Parameters carry `axes=(...)` metadata with these names, None for a dimension that is never split.
PARAMETER_AXES = ('layer', 'embed', 'mlp', 'heads', 'vocab', 'channel_in', 'channel_out', 'codebook')
# Activations are constrained with these.
ACTIVATION_AXES = ('batch', 'length', 'embed_activation', 'mlp_activation', 'heads_activation')


class Layout(Protocol):
  """How arrays lie on the devices of a step: the partitioner."""

  @property
  def platform(self) -> str:
    """"cpu", "gpu" or "tpu"."""

  @property
  def num_devices(self) -> int:
    """Of the mesh."""

  def constrain(self, x: jax.Array, names: tuple) -> jax.Array:
    """`x` laid out by the logical `names`."""

  def parts(self, name: str) -> int:
    """Into how many parts a logical axis is split."""

  def apart(self, f: Callable[..., jax.Array], names: Sequence[tuple], arrays: tuple[jax.Array, ...], kernel: bool
            ) -> jax.Array:
    """`f` of each device's part of arrays that are laid out by `names`; its result is laid out as the first."""


_LAYOUT: contextvars.ContextVar[Layout | None] = contextvars.ContextVar('layout', default=None)


def constrain(x: jax.Array, *names: str | None) -> jax.Array:
  """Asks that `x` be laid out by the logical `names`, one a dimension; nothing happens outside a mesh."""
  if len(names) != x.ndim:
    raise ValueError(f'{len(names)} axis names {names} for an array of shape {x.shape}')
  layout = _LAYOUT.get()
  return x if layout is None else layout.constrain(x, names)


def parts(name: str) -> int:
  """Into how many parts the logical axis `name` is split; 1 outside a mesh."""
  layout = _LAYOUT.get()
  return 1 if layout is None else layout.parts(name)


def platform() -> str:
  """What the step that is being traced will run on, "cpu", "gpu" or "tpu": not always what this process has."""
  layout = _LAYOUT.get()
  return jax.default_backend() if layout is None else layout.platform


def num_devices() -> int:
  """On how many devices the step that is being traced will run; 1 outside a mesh."""
  layout = _LAYOUT.get()
  return 1 if layout is None else layout.num_devices


def apart(f: Callable[..., jax.Array], names: Sequence[tuple], *arrays: jax.Array, kernel: bool = True) -> jax.Array:
  """f(*arrays) for what the compiler cannot split: each device calls it with its own part of them.

  `names`: how each array is laid out. The result is laid out as the first.
  `kernel`: whether there is a kernel in it, of which JAX does not know what is the same on several devices. Gradients
  of such are summed over all axes of the mesh.
  """
  layout = _LAYOUT.get()
  return f(*arrays) if layout is None else layout.apart(f, names, arrays, kernel)


@contextlib.contextmanager
def constraining(layout: Layout) -> Iterator[None]:
  """Installs the partitioner while a step is traced."""
  token = _LAYOUT.set(layout)
  try:
    yield
  finally:
    _LAYOUT.reset(token)


def example_keys(key: jax.Array, slot_B: jax.Array) -> jax.Array:
  """One key an example, from its slot in the global batch.

  All per-example randomness comes from these, so that it is the same for any number of microbatches,
  devices and hosts.
  """
  return jax.vmap(lambda slot: jax.random.fold_in(key, slot))(slot_B)


def check_dropout(rate: float) -> None:
  """Raises ValueError for a rate that `dropout` would round to nothing, or to everything."""
  if not 0 <= rate < 1 or (rate and not 0 < round(rate * 256) < 256):
    raise ValueError(f'dropout must be 0, or between 1/256 and 255/256, found {rate}')


def dropout(x_Bx_: jax.Array, rate: float, keys_B: jax.Array | None) -> jax.Array:
  """Inverted dropout with one key an example; the identity where there are no keys or the rate is 0.

  The rate is rounded to a multiple of 1/256: a random byte an element costs a quarter of a random word.
  """
  dropped = round(rate * 256)
  if keys_B is None or dropped == 0:
    return x_Bx_
  bits = jax.vmap(lambda key: jax.random.bits(key, x_Bx_.shape[1:], jnp.uint8))(keys_B)
  return jnp.where(bits >= dropped, x_Bx_ * (256 / (256 - dropped)), 0).astype(x_Bx_.dtype)
