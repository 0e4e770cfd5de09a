"""Which accelerators there are: what a chip can do, and in which numbers and shapes they are joined.

The only place with figures of hardware. Sources, read in November 2026: the pages of Cloud TPU on each generation
(docs.cloud.google.com/tpu/docs/v4, v5e, v5p, v6e) for TPUs; NVIDIA's data sheets of H100 SXM, H200 SXM and ConnectX-7
for GPUs. A link is what one side of a chip sends in one direction: the published bandwidth between chips, which counts
all sides and both directions, divided by two and by the number of sides.
"""
from __future__ import annotations

from collections.abc import Iterable
import dataclasses
import difflib
import itertools
import math
import re

GIB = 2 ** 30
FLAT = ('1x1', '2x2', '2x4', '4x4', '4x8', '8x8', '8x16', '16x16')
_SMALL_CUBES = ('2x2x1', '2x2x2', '2x2x4', '2x4x4', '4x4x4')


@dataclasses.dataclass(frozen=True)
class Chip:
  """One kind of accelerator; rates in operations or bytes a second.

  Attributes:
    title: how people call it. peak: bfloat16 products, dense; 0 where nothing is claimed.
    memory: bytes. bandwidth: of the memory.
    link: one direction of one link to a neighbour (TPU), or of all links inside a node (GPU).
    network: what a chip's share of its host's network sends to another slice or node.
    sides: of a slice of TPUs, 2 or 3; 0 for what is joined in nodes.
    most: chips of the largest slice, or of a node. config: how libtpu calls a chip whose cores act as one device.
  """

  title: str
  peak: float
  memory: float
  bandwidth: float
  link: float
  network: float
  sides: int
  most: int
  config: str = ''


CHIPS = {
    # 400 GB/s between chips, 4 sides; two network cards of 100 Gbit/s for 8 chips.
    'v5e': Chip('TPU v5e', 197e12, 16 * GIB, 819e9, 50e9, 3.1e9, 2, 256),
    # 800 GB/s, 4 sides. The page states no network: four times that of v5e is assumed.
    'v6e': Chip('TPU v6e', 918e12, 32 * GIB, 1638e9, 100e9, 12.5e9, 2, 256),
    # 1,200 GB/s, 6 sides. The network, 200 Gbit/s for the 4 chips of a host, is assumed.
    'v5p': Chip('TPU v5p', 459e12, 95 * GIB, 2765e9, 100e9, 6.2e9, 3, 6144),
    # 600 GB/s, 6 sides; the network as above.
    'v4': Chip('TPU v4', 275e12, 32 * GIB, 1228e9, 50e9, 6.2e9, 3, 4096, 'megacore'),
    # NVLink 900 GB/s in both directions; a card of 400 Gbit/s for each GPU.
    'h100': Chip('H100 SXM', 989e12, 80e9, 3350e9, 450e9, 50e9, 0, 8),
    'h200': Chip('H200 SXM', 989e12, 141e9, 4800e9, 450e9, 50e9, 0, 8),
    # A mesh on CPU devices: what is sent can be counted, how fast it would be cannot be said.
    'cpu': Chip('CPU', 0, 0, 0, 0, 0, 0, 4096),
}


@dataclasses.dataclass(frozen=True)
class Topology:
  """Chips of one kind and how they are joined: `slices` slices (or nodes) of `shape`."""

  name: str
  kind: str
  shape: tuple[int, ...]
  slices: int = 1

  @property
  def chip(self) -> Chip:
    return CHIPS[self.kind]

  @property
  def chips(self) -> int:
    return math.prod(self.shape) * self.slices

  @property
  def is_tpu(self) -> bool:
    return self.chip.sides > 0

  @property
  def slice_name(self) -> str:
    """One slice of it, as libtpu calls it; it wants three sides where chips make boxes."""
    return f'{self.kind}:{"x".join(map(str, self.shape))}'

  @property
  def ring(self) -> float:
    """Bytes a second that a chip sends along one side of a slice: both ways round where the ends are joined."""
    joined = all(side == 16 for side in self.shape) if self.chip.sides == 2 else all(side >= 4 for side in self.shape)
    return self.chip.link * (2 if self.is_tpu and joined else 1)


def boxes(most: int) -> tuple[str, ...]:
  """Shapes of slices with three sides, up to `most` chips: beyond 4x4x4 they are made of whole cubes of that size."""
  sides = range(4, most // 16 + 1, 4)
  larger = [(a, b, c) for a, b in itertools.combinations_with_replacement(sides, 2) if a * b * b <= most
            for c in range(b, most // (a * b) + 1, 4) if a * b * c > 64]
  return (*_SMALL_CUBES, *('x'.join(map(str, box)) for box in sorted(larger, key=math.prod)))


def count(shape: str) -> int:
  """Chips of a shape such as 4x4."""
  return math.prod(map(int, shape.split('x')))


def nearest(shape: str, known: Iterable[str]) -> str:
  """The known shape that is most like another: by the number of chips, then by how alike the names are."""
  alike = lambda other: difflib.SequenceMatcher(None, shape, other).ratio()
  if not re.fullmatch(r'\d+(x\d+)*', shape) or not count(shape):
    return max(known, key=alike)
  return min(known, key=lambda other: (abs(math.log(count(other) / count(shape))), -alike(other)))


def topology(name: str) -> Topology:
  """`v5e:4x4`, `v5e:16x16*4` (four slices), `h100:8`, `h100:8x4` (four nodes), `cpu:8`.

  Raises ValueError that names the nearest one for what there is not.
  """
  kind, _, rest = name.partition(':')
  if kind not in CHIPS:
    near = difflib.get_close_matches(kind.lower(), CHIPS, n=1)
    raise ValueError(f'there is no chip {kind!r}{f"; did you mean {near[0]!r}?" if near else ""} '
                     f'(topologies begin with {", ".join(f"{k}:" for k in CHIPS)})')
  chip = CHIPS[kind]
  if not chip.sides:
    return _nodes(name, kind, rest)
  shape, star, slices = rest.partition('*')
  known = FLAT if chip.sides == 2 else boxes(chip.most)
  if shape not in known or (star and not re.fullmatch('[1-9][0-9]*', slices)):
    again = nearest(shape, known)
    raise ValueError(f'there is no topology {name!r}; the nearest is {kind}:{again}'
                     f'{f" (several slices: {kind}:{again}*2)" if star else ""}')
  return Topology(name, kind, tuple(map(int, shape.split('x'))), int(slices or 1))


def _nodes(name: str, kind: str, rest: str) -> Topology:
  chip = CHIPS[kind]
  known = [str(n) for n in range(1, chip.most + 1)] if kind == 'cpu' else ['1', '2', '4', '8']
  each, times, nodes = rest.partition('x')
  if each in known and (not times or (re.fullmatch('[1-9][0-9]*', nodes) and kind != 'cpu')):
    if not times or each == known[-1]:
      return Topology(name, kind, (int(each),), int(nodes or 1))
  total = count(rest) if re.fullmatch(r'\d+(x\d+)*', rest) else 0
  if kind != 'cpu' and total > chip.most:
    near = f'{chip.most}x{max(1, round(total / chip.most))}'
  else:
    near = nearest(rest, known)
  raise ValueError(f'there is no topology {name!r}; the nearest is {kind}:{near}')
