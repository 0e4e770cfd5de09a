"""Which TPUs there are: generations, topologies, hosts; by the names of GKE and of Cloud TPU."""
from __future__ import annotations

import dataclasses
import re

import command

from musiclm_jax import chips as hardware


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
    return hardware.FLAT if self.flat else hardware.boxes(self.most)


GENERATIONS = {
    'v4': Generation('tpu-v4-podslice', 'v4', 'tpu-ubuntu2204-base', False, 4096, 2, 4),
    'v5e': Generation('tpu-v5-lite-podslice', 'v5litepod', 'v2-alpha-tpuv5-lite', True, 256, 1, 8),
    'v5p': Generation('tpu-v5p-slice', 'v5p', 'v2-alpha-tpuv5', False, 6144, 2, 4),
    'v6e': Generation('tpu-v6e-slice', 'v6e', 'v2-alpha-tpuv6e', True, 256, 1, 8),
    'tpu7x': Generation('tpu7x', '', '', False, 9216, 2, 4),
}


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
    nearest = hardware.nearest(topology, known)
    raise command.Mistake(f'{name} has no topology {topology!r}; the nearest one is {nearest}')
  total = hardware.count(topology)
  each = chips_per_host or min(total, 4)
  if each not in (1, 4, 8) or total % each:
    raise command.Mistake(f'{each} chips a host do not make up the {total} of {topology}; a host has 1, 4 or 8')
  if each == 8 and not (generation(name).flat and total == 8):
    raise command.Mistake('only a slice of 2x4 of v5e or v6e can be one host with 8 chips')
  if each == 1 and total > 1:
    raise command.Mistake(f'a host with one chip is a slice of its own, not a part of {topology}')
  return total // each, each


def of_accelerator(accelerator: str) -> tuple[str, int]:
  """Generation and TPU VMs of an accelerator type such as v5litepod-16. Raises command.Mistake, naming the nearest."""
  known = {}
  for name, kind in GENERATIONS.items():
    for size in {hardware.count(topology) for topology in kind.topologies} if kind.vm else ():
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
