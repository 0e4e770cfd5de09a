"""Which TPUs there are: generations, topologies, hosts; by the names of GKE and of Cloud TPU."""
from __future__ import annotations

from collections.abc import Iterable
import dataclasses
import difflib
import itertools
import math
import re

import command

_FLAT = ('1x1', '2x2', '2x4', '4x4', '4x8', '8x8', '8x16', '16x16')
_SMALL_CUBES = ('2x2x1', '2x2x2', '2x2x4', '2x4x4', '4x4x4')


@dataclasses.dataclass(frozen=True)
class Generation:
  """One kind of TPU.

  Attributes:
    gke: the value of GKE's label cloud.google.com/gke-tpu-accelerator.
    vm: how accelerator types begin in the Cloud TPU API, '' where there are only GKE's.
    runtime: the software that is on its TPU VMs.
    flat: whether its chips make a rectangle; the others make boxes.
    most: chips of the largest slice.
    units: what accelerator types count for each chip: 2 TensorCores, or the chip.
    whole: chips of the largest slice that is a single TPU VM.
  """
  gke: str
  vm: str
  runtime: str
  flat: bool
  most: int
  units: int
  whole: int

  @property
  def topologies(self) -> tuple[str, ...]:
    if self.flat:
      return _FLAT
    # Beyond 4x4x4 a slice is made of whole cubes of that size; sides are named in order.
    sides = range(4, self.most // 16 + 1, 4)
    boxes = [(a, b, c) for a, b in itertools.combinations_with_replacement(sides, 2) if a * b * b <= self.most
             for c in range(b, self.most // (a * b) + 1, 4) if a * b * c > 64]
    return (*_SMALL_CUBES, *('x'.join(map(str, box)) for box in sorted(boxes, key=math.prod)))


GENERATIONS = {
    'v4': Generation('tpu-v4-podslice', 'v4', 'tpu-ubuntu2204-base', False, 4096, 2, 4),
    'v5e': Generation('tpu-v5-lite-podslice', 'v5litepod', 'v2-alpha-tpuv5-lite', True, 256, 1, 8),
    'v5p': Generation('tpu-v5p-slice', 'v5p', 'v2-alpha-tpuv5', False, 6144, 2, 4),
    'v6e': Generation('tpu-v6e-slice', 'v6e', 'v2-alpha-tpuv6e', True, 256, 1, 8),
    'tpu7x': Generation('tpu7x', '', '', False, 9216, 2, 4),
}


def chips(topology: str) -> int:
  return math.prod(map(int, topology.split('x')))


def generation(name: str) -> Generation:
  """Raises command.Mistake for a name that is not one."""
  if name not in GENERATIONS:
    raise command.Mistake(f'{name!r} is no TPU that is known here{command.nearest(name, GENERATIONS)} '
                          f'(there are {", ".join(GENERATIONS)})')
  return GENERATIONS[name]


def hosts(name: str, topology: str, chips_per_host: int | None) -> tuple[int, int]:
  """Hosts of one slice and chips of each, on GKE.

  Raises command.Mistake for a topology that this TPU does not have, naming the nearest one, and for a number of chips
  that does not fit.
  """
  known = generation(name).topologies
  if topology not in known:
    raise command.Mistake(f'{name} has no topology {topology!r}; the nearest one is {_nearest(topology, known)}')
  total = chips(topology)
  each = chips_per_host or min(total, 4)
  if each not in (1, 4, 8) or total % each:
    raise command.Mistake(f'{each} chips a host do not make up the {total} of {topology}; a host has 1, 4 or 8')
  if each == 8 and not (generation(name).flat and total == 8):
    raise command.Mistake('only a slice of 2x4 of v5e or v6e can be one host with 8 chips')
  if each == 1 and total > 1:
    raise command.Mistake(f'a host with one chip is a slice of its own, not a part of {topology}')
  return total // each, each


def _nearest(topology: str, known: Iterable[str]) -> str:
  """By the number of chips, then by how alike the names are."""
  alike = lambda other: difflib.SequenceMatcher(None, topology, other).ratio()
  if not re.fullmatch(r'\d+(x\d+)+', topology) or not chips(topology):
    return max(known, key=alike)
  return min(known, key=lambda other: (abs(math.log(chips(other) / chips(topology))), -alike(other)))


def of_accelerator(accelerator: str) -> tuple[str, int]:
  """Generation and TPU VMs of an accelerator type such as v5litepod-16. Raises command.Mistake, naming the nearest."""
  known = {}
  for name, kind in GENERATIONS.items():
    for size in {chips(topology) for topology in kind.topologies} if kind.vm else ():
      known[f'{kind.vm}-{size * kind.units}'] = name, 1 if size <= kind.whole else size // 4
  if accelerator in known:
    return known[accelerator]
  found = re.fullmatch(r'(.+)-(\d+)', accelerator)
  if found and found[1] in GENERATIONS and (vm := GENERATIONS[found[1]].vm) not in ('', found[1]):
    raise command.Mistake(f'accelerator types of {found[1]} begin with {vm}: {vm}-{found[2]}')
  same = [other for other in known if found and other.rpartition('-')[0] == found[1]]
  near = min(same, key=lambda other: abs(int(other.rpartition('-')[2]) - int(found[2]))) if same else ''
  hint = f'; the nearest one is {near}' if near else command.nearest(accelerator, known)
  raise command.Mistake(f'there is no accelerator type {accelerator!r}{hint}')
