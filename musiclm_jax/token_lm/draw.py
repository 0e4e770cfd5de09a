"""How the next token is drawn from its logits. No network is known here, so that what is exported can use it.

Shapes: B batch, K codes.
"""
from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Numbers(NamedTuple):
  """The numbers of a `Sampling` as scalars: arguments of a compiled function, so changing them costs nothing."""

  temperature: jax.Array  # float32
  top_k: jax.Array  # int32
  top_p: jax.Array  # float32
  guidance: jax.Array  # float32


@dataclasses.dataclass(frozen=True)
class Sampling:
  """How the next token is drawn.

  Attributes:
    temperature: 0 is greedy.
    top_k: only the k likeliest codes; 0 is all. top_p: only the likeliest codes that hold this probability.
    guidance: logits are null + guidance * (conditioned - null); 1 is plain conditioning. Null hides what describes the
      music as a whole (conditions without a frame rate: the text, or a clip) and keeps what follows it in time. A
      stage that has no such condition is sampled plainly.
  """

  temperature: float = 1.0
  top_k: int = 0
  top_p: float = 1.0
  guidance: float = 1.0

  def __post_init__(self):
    if not (0 <= self.temperature < np.inf and self.top_k >= 0 and 0 < self.top_p <= 1):
      raise ValueError(f'sampling needs temperature >= 0, top_k >= 0 and 0 < top_p <= 1, found {self}')
    if not np.isfinite(self.guidance):
      raise ValueError(f'guidance must be a number, found {self.guidance}')

  @property
  def numbers(self) -> Numbers:
    return Numbers(np.float32(self.temperature), np.int32(self.top_k), np.float32(self.top_p),
                   np.float32(self.guidance))


# How the stages of MusicLM are sampled where nobody says otherwise. Temperatures: arXiv 2301.11325, section 4.1.
# Guidance is not the paper's: docs/generation.md has the table that it was chosen by.
USUAL = {'semantic': Sampling(1.0, guidance=3.0), 'coarse': Sampling(0.95, guidance=3.0), 'fine': Sampling(0.4)}


def draw(logits_BxK: jax.Array, keys_B: jax.Array, numbers: Numbers) -> jax.Array:
  """One code an example, int32 [B]; each example has its own key, so its draw is the same in any batch."""
  K = logits_BxK.shape[-1]
  temperature, top_k, top_p, _ = numbers
  scaled = logits_BxK.astype(jnp.float32) / jnp.maximum(temperature, 1e-6)

  def likeliest(scaled):
    order = -jnp.sort(-scaled, axis=-1)
    kept = jnp.where(top_k > 0, jnp.minimum(top_k, K), K)
    kth = jnp.take(order, kept - 1, axis=-1)[:, None]
    probability = jax.nn.softmax(order, axis=-1)
    # The first code past the threshold is still kept: `before` is what the likelier ones hold together.
    before = jnp.cumsum(probability, axis=-1) - probability
    nucleus = jnp.min(jnp.where(before < top_p, order, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(scaled >= jnp.maximum(kth, nucleus), scaled, -jnp.inf)

  # Sorting is the slowest part of a step on a CPU.
  scaled = jax.lax.cond((top_k > 0) | (top_p < 1), likeliest, lambda scaled: scaled, scaled)
  sampled = jax.vmap(jax.random.categorical)(keys_B, scaled)
  return jnp.where(temperature == 0, jnp.argmax(logits_BxK, axis=-1), sampled).astype(jnp.int32)
