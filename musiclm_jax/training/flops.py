"""Floating-point operations of a function, counted in its jaxpr.

XLA's own cost analysis counts the body of a scan once, so a stack of layers looks like one layer; here a body counts as
often as it runs.
"""
from __future__ import annotations

from collections.abc import Callable, Iterator
import math
from typing import Any

import jax
from jax.extend import core


def flops(function: Callable[..., Any], *arguments: Any) -> float:
  """Multiplications and additions of matrix products, convolutions and FFTs; what is elementwise is left out.

  `arguments` may be `jax.ShapeDtypeStruct`s: nothing is computed. A branch counts as its most expensive case. Raises
  ValueError for a loop whose length is not known before it runs.
  """
  return of_jaxpr(jax.make_jaxpr(function)(*arguments).jaxpr)


def of_jaxpr(jaxpr: core.Jaxpr) -> float:
  """Those of a function that has been traced."""
  return sum(_of_equation(equation) for equation in jaxpr.eqns)


def _of_equation(equation: core.JaxprEqn) -> float:
  name, params = equation.primitive.name, equation.params
  if name == 'dot_general':
    ((left, _), _) = params['dimension_numbers']
    contracted = math.prod(equation.invars[0].aval.shape[d] for d in left)
    return 2.0 * equation.outvars[0].aval.size * contracted
  if name == 'conv_general_dilated':
    kernel = equation.invars[1].aval.shape
    features = kernel[params['dimension_numbers'].rhs_spec[0]]
    # Each output needs the kernel's weights of one output feature. A transposed convolution (dilated input) reads
    # zeros between the samples, which no implementation multiplies.
    return 2.0 * equation.outvars[0].aval.size * math.prod(kernel) / features / math.prod(params['lhs_dilation'])
  if name == 'fft':
    length = math.prod(params['fft_lengths'])
    rows = max(v.aval.size for v in (*equation.invars, *equation.outvars)) / length
    return 2.5 * rows * length * math.log2(length)  # of real input
  if name == 'scan':
    return params['length'] * of_jaxpr(params['jaxpr'].jaxpr)
  if name == 'shard_map':  # the body sees the share of one device
    body = params['jaxpr']
    return of_jaxpr(body) * equation.outvars[0].aval.size / body.outvars[0].aval.size
  if name == 'pallas_call':  # a kernel: as it says itself, or as it stands for each place of its grid
    stated = params['cost_estimate']
    return float(stated.flops) if stated else math.prod(params['grid_mapping'].grid) * of_jaxpr(params['jaxpr'])
  if name == 'cond':
    return max(of_jaxpr(branch.jaxpr) for branch in params['branches'])
  if name == 'while':
    inner = of_jaxpr(params['body_jaxpr'].jaxpr)
    if inner:
      raise ValueError('a loop of unknown length has products in its body; count one of its passes instead')
    return 0.0
  return sum(of_jaxpr(inner) for inner in _inner(params))


def _inner(params: dict[str, Any]) -> Iterator[core.Jaxpr]:
  for value in params.values():
    for item in value if isinstance(value, (tuple, list)) else (value,):
      if isinstance(item, core.ClosedJaxpr):
        yield item.jaxpr
      elif isinstance(item, core.Jaxpr):
        yield item
