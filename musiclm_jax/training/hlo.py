"""What a compiled program does on a mesh, read from its text: messages between devices, and traffic to memory.

XLA's own cost analysis counts the body of a loop once; here everything counts as often as it runs.
"""
from __future__ import annotations

from collections.abc import Iterator, Sequence
import dataclasses
import functools
import math
import re

import numpy as np

_BYTES = {'pred': 1, 's4': 0.5, 'u4': 0.5, 's8': 1, 'u8': 1, 's16': 2, 'u16': 2, 'bf16': 2, 'f16': 2, 's32': 4,
          'u32': 4, 'f32': 4, 's64': 8, 'u64': 8, 'f64': 8, 'c64': 8, 'c128': 16}
_KINDS = ('all-reduce', 'all-gather', 'reduce-scatter', 'all-to-all', 'ragged-all-to-all', 'collective-permute',
          'collective-broadcast')
# Nothing moves to or from memory where these stand: they name, group or reinterpret what is there, or are walked into.
_FREE = frozenset(('parameter', 'constant', 'tuple', 'get-tuple-element', 'bitcast', 'while', 'conditional', 'call',
                   'after-all', 'partition-id', 'replica-id', 'iota', 'opt-barrier', 'domain', 'async-start',
                   'async-update', 'async-done', 'copy-done', 'all-gather-done', 'all-reduce-done',
                   'collective-permute-done', 'send-done', 'recv-done'))
_SHAPE = re.compile(r'\b([a-z]+[0-9]*)\[([0-9,<=]*)\](?:\{([^}]*)\})?')

_MESH_GROUPS = re.compile(r'replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(((?:[^()]|\([^()]*\))*)\))? \{([^}]*)\}')


@dataclasses.dataclass(frozen=True)
class Instruction:
  """One line of a computation: `kind` is its opcode, `shape` the type of its result as text."""

  name: str
  shape: str
  kind: str
  operands: tuple[str, ...]
  literal: str  # what stands between the parentheses
  attributes: str
  root: bool

  def called(self, *roles: str) -> tuple[str, ...]:
    """Names of the computations that it runs."""
    found = []
    for role in roles:
      for group in re.findall(rf'\b{role}=(\{{[^}}]*\}}|%?[\w.\-]+)', self.attributes):
        found += re.findall(r'%?([\w.\-]+)', group)
    return tuple(found)


@dataclasses.dataclass(frozen=True)
class Collective:
  """Messages of one kind, of one instruction.

  Attributes:
    kind: "all-reduce", "reduce-scatter", ...; a sum of which each device keeps a part is the latter, however written.
    shapes: types of its operands on one device, as text.
    operand_bytes: of them together.
    times: how often it runs in a step.
    groups: arrays [groups, devices] of places in the mesh, rows of equal length; of a permutation pairs [pairs, 2].
  """

  kind: str
  name: str
  shapes: tuple[str, ...]
  operand_bytes: float
  times: int
  groups: np.ndarray

  @property
  def group_size(self) -> int:
    return self.groups.shape[1]

  def moved(self, devices: int | None = None, operand_bytes: float | None = None) -> float:
    """Bytes that a device sends, each time, by the algorithms on a ring (which are the least there can be).

    `devices` and `operand_bytes` in place of its own tell what a part of it costs.
    """
    n = self.group_size if devices is None else devices
    size = self.operand_bytes if operand_bytes is None else operand_bytes
    if n == 1:
      return 0.0
    share = {'all-gather': n - 1.0, 'all-reduce': 2 * (n - 1) / n, 'collective-permute': 1.0,
             'collective-broadcast': 1.0}.get(self.kind, (n - 1) / n)
    return share * size

  @property
  def dims(self) -> tuple[tuple[int, ...], ...]:
    """The shape of each operand on one device."""
    return tuple(_dims(dims) for shape in self.shapes for _, dims, _ in _SHAPE.findall(shape))

  def axes(self, mesh: dict[str, int]) -> tuple[str, ...]:
    """The axes of a mesh along which it goes, its devices numbered as the mesh has them, the last axis fastest."""
    places = np.stack(np.unravel_index(self.groups, tuple(mesh.values())))
    return tuple(axis for axis, place in zip(mesh, places) if (place != place[:, :1]).any())


@dataclasses.dataclass(frozen=True)
class Program:
  """A compiled module.

  Attributes:
    computations: instructions by the name of their computation. entry: where it begins.
    partitions: devices that run it.
  """

  computations: dict[str, tuple[Instruction, ...]]
  entry: str
  partitions: int

  @classmethod
  def parse(cls, text: str) -> Program:
    computations: dict[str, list[Instruction]] = {}
    entry, current = '', None
    for line in text.splitlines():
      if line.endswith('{') and (head := re.match(r'\s*(ENTRY )?%?([\w.\-]+)[^=]*\(.*->', line)):
        current = computations.setdefault(head[2], [])
        entry = head[2] if head[1] else entry
      elif line.strip() == '}':
        current = None
      elif current is not None and (instruction := _instruction(line)):
        current.append(instruction)
    if not entry:
      raise ValueError('this is not the text of a compiled module: it has no ENTRY')
    partitions = re.search(r'num_partitions=(\d+)', text)
    return cls({name: tuple(lines) for name, lines in computations.items()}, entry,
               int(partitions[1]) if partitions else 1)

  @functools.cached_property
  def _types(self) -> dict[str, dict[str, str]]:
    return {name: {i.name: i.shape for i in lines} for name, lines in self.computations.items()}

  def trip_count(self, loop: Instruction) -> int | None:
    """How often the body of a loop runs; None where that is not known before it does."""
    if known := re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.attributes):
      return int(known[1])
    condition = self.computations[loop.called('condition')[0]]
    constants = [int(i.literal) for i in condition if i.kind == 'constant' and re.fullmatch(r'\d+', i.literal)]
    compares = [i for i in condition if i.kind == 'compare' and 'direction=LT' in i.attributes]
    return constants[0] if len(constants) == 1 and len(compares) == 1 else None

  @functools.cached_property
  def unknown_loops(self) -> tuple[str, ...]:
    """Loops that count once because their length is not known."""
    return tuple(i.name for _, i, _ in self._walk(self.entry, 1) if i.kind == 'while' and self.trip_count(i) is None)

  def _walk(self, computation: str, times: int, fused: bool = True) -> Iterator[tuple[str, Instruction, int]]:
    """(computation, instruction, how often it runs); `fused`: those inside fusions, too."""
    for i in self.computations.get(computation, ()):
      yield computation, i, times
      if i.kind == 'while':
        yield from self._walk(i.called('body')[0], times * (self.trip_count(i) or 1), fused)
      elif i.kind == 'conditional':
        for branch in i.called('branch_computations', 'true_computation', 'false_computation'):
          yield from self._walk(branch, times, fused)
      elif i.kind in ('call', 'async-start', 'custom-call') or (i.kind == 'fusion' and fused):
        for inner in i.called('calls', 'to_apply', 'called_computations'):
          yield from self._walk(inner, times, fused)

  @functools.cached_property
  def collectives(self) -> tuple[Collective, ...]:
    """All messages of a step, in the order of the program. Raises ValueError for groups in an unknown notation."""
    found, channels = [], set()
    for computation, i, times in self._walk(self.entry, 1):
      kind = i.kind.removesuffix('-start')
      if kind not in _KINDS:
        continue
      if computation in self._fused and (channel := re.search(r'channel_id=(\d+)', i.attributes)):
        # TPUs cut a message into fusions, with the work that hides it: the pieces have one channel.
        if channel[1] in channels:
          continue
        channels.add(channel[1])
      types = self._types[computation]
      shapes = tuple(types.get(name, '') for name in i.operands)
      if kind == 'all-reduce' and self._keeps_a_part(computation):
        kind = 'reduce-scatter'
      groups = _pairs(i.attributes) if kind == 'collective-permute' else replica_groups(i.attributes, self.partitions)
      found.append(Collective(kind, i.name, shapes, sum(map(size_of, shapes)), times, groups))
    return tuple(found)

  @functools.cached_property
  def _fused(self) -> frozenset[str]:
    return frozenset(inner for lines in self.computations.values() for i in lines if i.kind == 'fusion'
                     for inner in i.called('calls'))

  def _keeps_a_part(self, computation: str) -> bool:
    """Whether a sum stands where each device only takes its part of it: so TPUs write them."""
    return 'all-reduce-scatter' in computation and computation in self._fused and any(
        i.kind == 'dynamic-slice' for i in self.computations[computation])

  @functools.cached_property
  def traffic(self) -> float:
    """Bytes that a step reads from memory and writes to it, as the instructions stand; caches are not looked at.

    Slices count as what they are and not as the array that they are taken from. What the compiler keeps in memory on
    the chip (layouts with S(1)) does not count.
    """
    return float(sum(times * self._traffic_of(computation, i)
                     for computation, i, times in self._walk(self.entry, 1, fused=False)))

  def _traffic_of(self, computation: str, i: Instruction) -> float:
    if i.kind in _FREE:
      return 0.0
    types = self._types[computation]
    operands = [size_of(types.get(name, ''), main_only=True) for name in i.operands]
    result = size_of(i.shape, main_only=True)
    if i.kind in ('dynamic-slice', 'slice', 'gather'):
      return 2 * result
    if i.kind == 'dynamic-update-slice':
      return 2 * operands[1]
    if i.kind == 'copy-start':
      return sum(operands) + size_of(_SHAPE.search(i.shape)[0], main_only=True) if i.shape else 0.0
    if i.kind == 'fusion' and (body := self.computations.get(i.called('calls')[0])):
      return self._traffic_of_fusion(body, operands, result)
    return sum(operands) + result

  def _traffic_of_fusion(self, body: Sequence[Instruction], operands: list[float], result: float) -> float:
    by_name = {i.name: i for i in body}
    total = 0.0
    for i in body:
      if i.kind != 'parameter':
        continue
      whole = operands[int(i.literal)]
      users = [u for u in body if i.name in u.operands]
      if users and all(u.kind in ('dynamic-slice', 'slice', 'gather') for u in users):
        total += min(whole, sum(size_of(u.shape) for u in users))
      elif users and all(u.kind == 'dynamic-update-slice' and u.operands[0] == i.name for u in users):
        pass  # written in place: counted below
      else:
        total += whole
    root = next((i for i in body if i.root), None)
    while root is not None and root.kind in ('bitcast', 'copy'):
      root = by_name.get(root.operands[0])
    if root is not None and root.kind == 'dynamic-update-slice' and root.operands[1] in by_name:
      result = min(result, size_of(by_name[root.operands[1]].shape))
    return total + result


def _instruction(line: str) -> Instruction | None:
  head = re.match(r'\s*(ROOT )?%?([\w.\-]+) = ', line)
  if not head:
    return None
  rest = line[head.end():]
  end = _closing(rest) if rest.startswith('(') else rest.find(' ')
  shape, rest = rest[:end], rest[end:].lstrip()
  kind, _, rest = rest.partition('(')
  end = _closing('(' + rest) - 1
  literal, attributes = rest[:end - 1], rest[end:]
  names = tuple(re.findall(r'%([\w.\-]+)', literal)) if '%' in literal else tuple(
      re.findall(r'(?:^|, )(?:[^\s,]+ )?([A-Za-z_][\w.\-]*)(?=,|$)', literal))
  return Instruction(head[2], shape, kind, names, literal, attributes, bool(head[1]))


def _closing(text: str) -> int:
  """Length of what the parenthesis at the start of `text` encloses, both parentheses included."""
  depth = 0
  for place, character in enumerate(text):
    depth += (character == '(') - (character == ')')
    if not depth:
      return place + 1
  return len(text)


def _dims(text: str) -> tuple[int, ...]:
  return tuple(int(d.removeprefix('<=')) for d in text.split(',') if d)


def size_of(shape: str, *, main_only: bool = False) -> float:
  """Bytes of a type, or of all parts of a tuple; `main_only` leaves out what is kept on the chip."""
  return sum(math.prod(_dims(dims)) * _BYTES.get(kind, 0) for kind, dims, layout in _SHAPE.findall(shape)
             if not (main_only and 'S(1)' in layout))


def replica_groups(attributes: str, partitions: int) -> np.ndarray:
  """The groups of a collective, int [groups, devices], from any of the notations that XLA has.

  Raises ValueError for one that is none of them.
  """
  if iota := re.search(r'replica_groups=\[(\d+),(\d+)\]<=(\[[\d,]+\](?:T\([\d,]+\))?)', attributes):
    return _iota(iota[3]).reshape(int(iota[1]), int(iota[2]))
  if mesh := _MESH_GROUPS.search(attributes):
    return _along_axes(*mesh.groups())
  if listed := re.search(r'replica_groups=\{((?:\{[\d,]*\},?)*)\}', attributes):
    groups = [[int(d) for d in group.split(',')] for group in re.findall(r'\{([\d,]+)\}', listed[1])]
    if not groups:  # all of them
      return np.arange(partitions)[None]
    if len({len(group) for group in groups}) > 1:
      raise ValueError(f'the groups of a collective differ in size: {listed[0][:200]}')
    return np.array(groups)
  stated = re.search(r'replica_groups=.{0,100}', attributes)
  raise ValueError(f'cannot read the groups of a collective: {stated[0] if stated else attributes[:100]!r}')


def _iota(text: str) -> np.ndarray:
  """Numbers counted up in the shape [a,b,...], its axes then in the order T(...)."""
  dims, _, order = text.strip('[)').partition(']')
  places = np.arange(math.prod(map(int, dims.split(',')))).reshape([int(d) for d in dims.split(',')])
  return places.transpose([int(d) for d in order.removeprefix('T(').split(',')]) if order else places


def _along_axes(axes: str, device_ids: str | None, chosen: str) -> np.ndarray:
  """Groups along the `chosen` axes of a mesh; "x":(2)4 is the part of 4 of axis x that comes after a part of 2."""
  sizes = {name: int(size) for name, size in re.findall(r"'?(\w+)'?=(\d+)", axes)}
  places = np.arange(math.prod(sizes.values()))
  if device_ids:
    places = _iota(device_ids) if device_ids.startswith('[') else np.array([int(d) for d in device_ids.split(',')])
  cuts: dict[str, set[int]] = {name: {1, size} for name, size in sizes.items()}
  parts: list[tuple[str, int, int]] = []
  for name, before, size in re.findall(r"'?(\w+)'?(?::\((\d+)\)(\d+))?", chosen):
    first, length = (int(before), int(size)) if before else (1, sizes[name])
    cuts[name] |= {first, first * length}
    parts.append((name, first, first * length))
  dims, inside = [], []  # every axis as the pieces into which it is cut, and which of them the groups go along
  for name in sizes:
    steps = sorted(cuts[name])
    for first, last in zip(steps, steps[1:] or steps):
      dims.append(last // first)
      inside.append(any(n == name and a <= first and last <= b for n, a, b in parts))
  order = sorted(range(len(dims)), key=lambda d: inside[d])
  return places.reshape(dims).transpose(order).reshape(-1, math.prod(d for d, i in zip(dims, inside) if i))


def _pairs(attributes: str) -> np.ndarray:
  stated = re.search(r'source_target_pairs=\{((?:\{\d+,\d+\},?)*)\}', attributes)
  if not stated:
    raise ValueError(f'cannot read the pairs of a permutation: {attributes[:100]!r}')
  pairs = np.array([[int(d) for d in pair] for pair in re.findall(r'\{(\d+),(\d+)\}', stated[1])], dtype=int)
  return pairs.reshape(-1, 2)
