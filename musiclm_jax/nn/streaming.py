"""What a causal module that can run in steps offers, and the chain of such modules.

The state between steps is an explicit pytree that the caller holds; nothing is kept on the module. The full
pass is one long step from the first state, so that both are the same computation.

B batch, T input positions, U output positions, C channels.
"""
from __future__ import annotations

from collections.abc import Mapping
import fractions
import math
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp

State = Any  # a pytree of arrays


class Streamable(nnx.Module):
  """Base of causal modules on [B, T, C] that run in steps of whole blocks.

  Every implementation is held to the same contract by `tests/nn/test_streaming.py`: steps of any number of
  blocks equal the full pass; no output depends on an input of a later block, so that neither later audio nor
  the padding of a batch leaks; the measured latency is `latency`.
  """

  @property
  def block(self) -> int:
    """The input positions of a step are a multiple of this."""
    return 1

  @property
  def rate(self) -> fractions.Fraction:
    """Output positions for each input position."""
    return fractions.Fraction(1)

  @property
  def latency(self) -> int:
    """Input positions, counted from the first of a block, that the block's output waits for."""
    return self.block

  def init_state(self, batch: int, dtype: Any = jnp.float32) -> State:
    """The state before the first step: silence, the zeros that a causal convolution pads with."""
    del batch, dtype
    return ()

  def step(self, x_BxTxC: jax.Array, state: State) -> tuple[jax.Array, State]:
    """The output [B, T * rate, C'] of the next T positions, and the state after them."""
    raise NotImplementedError

  def check(self, length: int):
    """Raises ValueError where `length` positions are not whole blocks."""
    if length % self.block:
      raise ValueError(f'{type(self).__name__}: {length} positions are not a multiple of {self.block}')

  def __call__(self, x_BxTxC: jax.Array) -> jax.Array:
    """The full pass over a sequence that begins in silence."""
    self.check(x_BxTxC.shape[1])
    return self.step(x_BxTxC, self.init_state(x_BxTxC.shape[0], x_BxTxC.dtype))[0]


class Elu(Streamable):
  """The exponential linear unit."""

  def step(self, x_BxTxC, state):
    # Not expm1, which takes XLA on CPU more than twice as long. In float32 the difference loses 1e-7 at most.
    x = x_BxTxC.astype(jnp.float32)
    y = jnp.where(x > 0, x, jnp.exp(jnp.where(x > 0, 0, x)) - 1)
    return y.astype(x_BxTxC.dtype), state


class Fold(Streamable):
  """Moves `size` neighbouring positions into the channels: [B, T, C] to [B, T / size, size * C]."""

  def __init__(self, size: int):
    self.size = size

  @property
  def block(self) -> int:
    return self.size

  @property
  def rate(self) -> fractions.Fraction:
    return fractions.Fraction(1, self.size)

  def step(self, x_BxTxC, state):
    batch, length, channels = x_BxTxC.shape
    return x_BxTxC.reshape(batch, length // self.size, self.size * channels), state


class Unfold(Streamable):
  """The inverse of `Fold`."""

  def __init__(self, size: int):
    self.size = size

  @property
  def rate(self) -> fractions.Fraction:
    return fractions.Fraction(self.size)

  def step(self, x_BxTxC, state):
    batch, length, channels = x_BxTxC.shape
    return x_BxTxC.reshape(batch, length * self.size, channels // self.size), state


class Chain(Streamable):
  """Named modules one after the other."""

  def __init__(self, layers: Mapping[str, Streamable]):
    self.names = tuple(layers)
    for name, layer in layers.items():
      setattr(self, name, layer)

  @property
  def layers(self) -> list[Streamable]:
    return [getattr(self, name) for name in self.names]

  @property
  def block(self) -> int:
    block, rate = 1, fractions.Fraction(1)
    for layer in self.layers:
      # The least number of inputs of the chain that gives this layer whole blocks, too.
      block = math.lcm(block, (rate / layer.block).denominator)
      rate *= layer.rate
    return block

  @property
  def rate(self) -> fractions.Fraction:
    return math.prod((layer.rate for layer in self.layers), start=fractions.Fraction(1))

  def init_state(self, batch, dtype=jnp.float32):
    return {name: layer.init_state(batch, dtype) for name, layer in zip(self.names, self.layers)}

  def step(self, x_BxTxC, state):
    after = {}
    for name, layer in zip(self.names, self.layers):
      x_BxTxC, after[name] = layer.step(x_BxTxC, state[name])
    return x_BxTxC, after


class Residual(Streamable):
  """x + inner(x), for an inner module that keeps the shape."""

  def __init__(self, inner: Streamable):
    self.inner = inner

  @property
  def block(self) -> int:
    return self.inner.block

  def init_state(self, batch, dtype=jnp.float32):
    return self.inner.init_state(batch, dtype)

  def step(self, x_BxTxC, state):
    y_BxTxC, state = self.inner.step(x_BxTxC, state)
    return x_BxTxC + y_BxTxC, state
