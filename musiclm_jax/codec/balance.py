"""How hard each loss pulls at the decoded audio, and losses whose pulls are in proportion to their weights.

Balancing is EnCodec's (arXiv 2210.13438, section 3.4): gradients are compared where all losses meet, at the decoder's
output, so that a weight says which share of the gradient a loss has, whatever the loss is measured in.

B batch, L losses, N all numbers of an example's decoded audio.
"""
from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

from flax import nnx
import jax
import jax.numpy as jnp

# Takes decoded audio and gives each loss by example, [B]; an example's losses depend on its own audio alone.
Terms = Callable[[jax.Array], Mapping[str, jax.Array]]


class Pulls(NamedTuple):
  """Losses and their gradients at the decoded audio.

  Attributes:
    terms: [B] of every loss.
    gradients: of each example's loss with respect to its own decoded audio, in the shape of the audio.
    sizes: [B], the Euclidean norm of each of those.
  """

  terms: dict[str, jax.Array]
  gradients: dict[str, jax.Array]
  sizes: dict[str, jax.Array]


def pulls(terms: Terms, decoded_BxN: jax.Array, names: tuple[str, ...]) -> Pulls:
  """Each loss of `names` alone, differentiated back to the decoded audio and no further.

  Nothing of the result has a gradient.

  The forward passes are one computation after compilation; what is paid is one more backward pass through the
  discriminators, which adversarial and feature loss otherwise share.
  """
  decoded_BxN = jax.lax.stop_gradient(decoded_BxN)
  found = Pulls(dict(terms(decoded_BxN)), {}, {})
  for name in names:
    _, backward = jax.vjp(lambda x, name=name: terms(x)[name], decoded_BxN)
    gradient, = backward(jnp.ones_like(found.terms[name]))
    found.gradients[name] = gradient
    found.sizes[name] = jnp.sqrt(jnp.sum(jnp.square(gradient.reshape(gradient.shape[0], -1)), axis=-1))
  return jax.tree.map(jax.lax.stop_gradient, found)


def pulled(found: Pulls, factors: Mapping[str, jax.Array | float], decoded_BxN: jax.Array) -> jax.Array:
  """0 for each example, with the gradient of sum(factor * loss): [B]."""
  direction = sum(factors[name] * gradient for name, gradient in found.gradients.items())
  product_B = jnp.sum((decoded_BxN * direction).reshape(decoded_BxN.shape[0], -1), axis=-1)
  return product_B - jax.lax.stop_gradient(product_B)


class GradientSizes(nnx.Module):
  """Moving average of the size of each loss's gradient, over the examples of the global batches.

  Both are sums with the same decay, whose quotient is an average from the first step on.
  """

  def __init__(self, losses: int):
    self.sum = nnx.Variable(jnp.zeros((losses,)), axes=(None,))
    self.examples = nnx.Variable(jnp.zeros(()), axes=())


def statistics(found: Pulls) -> dict[str, jax.Array]:
  """What one batch adds to a `GradientSizes`: sums over its examples."""
  return {'sum': jnp.stack([jnp.sum(size_B) for size_B in found.sizes.values()]),
          'examples': jnp.float32(len(next(iter(found.sizes.values()))))}


def updated(buffers: dict[str, jax.Array], sums: dict[str, jax.Array], steps: int) -> dict[str, jax.Array]:
  """The moving average with a time constant of `steps` after one more global batch."""
  return jax.tree.map(lambda old, new: (1 - 1 / steps) * old + new, buffers, sums)


def balanced(average: GradientSizes, weights: Mapping[str, float], shares: Mapping[str, float]
             ) -> dict[str, jax.Array]:
  """The factor of each loss with which, on average, its gradient has its share of the sum of the sizes.

  The sum stays what it is under `weights`, so that what does not pass through the decoder (the commitment), and
  gradient clipping, mean what they meant. Before there is an average the factors are `weights`.

  Args:
    weights: of the losses as they are, in the order of `average`.
    shares: in any unit.
  """
  weight_L = jnp.array(list(weights.values()), jnp.float32)
  share_L = jnp.array([shares[name] for name in weights], jnp.float32)
  size_L = average.sum[...] / jnp.maximum(average.examples[...], 1e-9)
  total = jnp.sum(weight_L * size_L)
  factor_L = share_L / jnp.sum(share_L) * total / jnp.maximum(size_L, 1e-12)
  factor_L = jnp.where(average.examples[...] > 0, factor_L, weight_L)
  return dict(zip(weights, factor_L))
