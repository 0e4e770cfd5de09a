"""What a training would do on a machine that one does not have: its step compiled for that machine, and read.

The step is the one that `train` runs. For TPUs it is compiled by their own compiler for a description of the slice; for
GPUs, and for meshes of CPU devices, by the compiler for CPUs on as many simulated devices.
"""
from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
import contextlib
import dataclasses
import functools
import importlib.metadata
import io
import json
import logging
import math
import os
import pathlib
import re
from typing import Any

import jax
from jax.experimental import topologies
import numpy as np
import rich.console
import rich.table

from musiclm_jax import chips, provenance, train
from musiclm_jax.training import flops
from musiclm_jax.training.hlo import Collective, Program, size_of
from musiclm_jax.training.partition import Partitioner
from musiclm_jax.training.state import Skeleton

# Large products reach about this share of a chip's peak: a little under the 56 to 67% that MaxText publishes for whole
# steps of models of 16 to 128 B on a pod of v5e (its configs/v5e), because these matrices are smaller.
ATTAINABLE = 0.5
ATTAINABLE_BANDWIDTH = 0.8  # of memory: our assumption
# libtpu looks for its chips and asks the cloud about them where nobody says that there are none.
_NO_TPU_HERE = {'TPU_SKIP_MDS_QUERY': '1', 'TPU_WORKER_HOSTNAMES': 'localhost', 'TPU_WORKER_ID': '0',
                'TPU_ACCELERATOR_TYPE': 'v5litepod-1', 'ALLOW_MULTIPLE_LIBTPU_LOAD': '1'}
# How the compiler for TPUs says that a program needs so much of so much memory.
_OUT_OF_MEMORY = re.compile(r'Used ([\d.]+[KMGT]) of ([\d.]+[KMGT]) hbm|'
                            r'temporaries \(([\d.]+[KMGT])\) exceeds available HBM \(([\d.]+[KMGT])\)')
_TRIES = 5  # compilations in search of a batch that fits


class TooLarge(ValueError):
  """A step that does not fit; `needed` and `limit` in bytes a device."""

  def __init__(self, message: str, needed: float, limit: float):
    super().__init__(message)
    self.needed, self.limit = needed, limit


@dataclasses.dataclass(frozen=True)
class Training:
  """The arguments of `train.train` that its step depends on, and for how long it runs."""

  objective: Any
  optimizer: Any
  partitioner: Partitioner
  precision: train.Precision
  batch_size: int
  num_steps: int
  init_from: Any = None

  @classmethod
  def of(cls, experiment: Any) -> Training:
    """Of a configuration. Raises ValueError for one that has no gradient, and so no step."""
    if experiment.root.selector.rpartition('.')[2] != 'train':
      raise ValueError(f'{experiment.root.selector} has no training step: plan an experiment whose RUN is @train.train')
    names = ('objective', 'optimizer', 'partitioner', 'precision', 'num_steps', 'init_from')
    return cls(**{name: experiment.argument(name) for name in names}, batch_size=experiment.macro('BATCH_SIZE'))

  @property
  def rows(self) -> int:
    """What a batch must be a multiple of."""
    chunks = getattr(self.objective, 'chunks', 1)
    return self.partitioner.batch_parts * math.lcm(self.precision.microbatches, chunks)

  def on(self, topology: chips.Topology) -> Training:
    """The same on the devices of a topology. Raises ValueError where the mesh does not use all of them."""
    partitioner = dataclasses.replace(self.partitioner, devices=devices(topology))
    if (used := partitioner.mesh.size) < topology.chips:
      raise ValueError(f'mesh {_sizes(partitioner)} uses {used} of the {topology.chips} devices of {topology.name}: '
                       'choose another mesh file, or data = 0 for all that are left')
    return dataclasses.replace(self, partitioner=partitioner)

  @functools.cached_property
  def run(self) -> Any:
    """The run of `train`, not begun."""
    return train.described(objective=self.objective, optimizer=self.optimizer, partitioner=self.partitioner,
                           precision=self.precision, init_from=self.init_from)


def devices(topology: chips.Topology) -> tuple[Any, ...]:
  """Descriptions of a topology's TPUs, or as many simulated devices. Raises ValueError where they cannot be had."""
  if not topology.is_tpu:
    found = jax.devices('cpu')
    if len(found) < topology.chips:
      raise ValueError(f'{topology.name} needs {topology.chips} simulated devices, but this process has {len(found)}: '
                       f'set XLA_FLAGS=--xla_force_host_platform_device_count={topology.chips} before it starts')
    return tuple(found[:topology.chips])
  for name, value in _NO_TPU_HERE.items():
    os.environ.setdefault(name, value)
  options: dict[str, Any] = {'num_slices': topology.slices} if topology.slices > 1 else {}
  if math.prod(topology.shape) == 1:  # hosts have four chips where nobody says otherwise
    options['chips_per_host_bounds'] = [1, 1, 1]
  if topology.chip.config:
    options['chip_config_name'] = topology.chip.config
  try:
    return tuple(topologies.get_topology_desc(topology.slice_name, 'tpu', **options).devices)
  except (ImportError, RuntimeError, NotImplementedError) as error:
    raise ValueError(f'cannot describe {topology.name}: plans for TPUs need libtpu, pip install "musiclm_jax[tpu]" '
                     f'({str(error).splitlines()[0][:200]})') from error


def _sizes(partitioner: Partitioner) -> str:
  return ' x '.join(f'{axis} {size}' for axis, size in partitioner.mesh.shape.items() if size > 1) or 'data 1'


@dataclasses.dataclass(frozen=True)
class Compiled:
  """A compiled step: the bytes of memory that it takes on a device, its program, and whether it was made in a hurry."""

  arguments: float
  temporaries: float
  peak: float
  program: Program
  hurried: bool = False


@contextlib.contextmanager
def _hurried(topology: chips.Topology) -> Iterator[None]:
  """With the least effort of the compiler for TPUs: half the time, the same messages, a few percent more memory."""
  if not topology.is_tpu:
    yield
    return
  names = ('jax_exec_time_optimization_effort', 'jax_memory_fitting_effort')
  before = {name: getattr(jax.config, name) for name in names}
  try:
    for name in names:
      jax.config.update(name, -1.0)
    yield
  finally:
    for name, value in before.items():
      jax.config.update(name, value)


def compile_step(traced: jax.stages.Traced, topology: chips.Topology) -> Compiled:
  """In a hurry, and with the compiler's usual effort what does not fit then.

  Raises TooLarge where that does not, and ValueError where the compiler refuses it for another reason.
  """
  lowered = traced.lower()
  if topology.is_tpu:
    with _hurried(topology), contextlib.suppress(ValueError):
      return dataclasses.replace(_compiled(lowered, topology), hurried=True)
  return _compiled(lowered, topology)


def _compiled(lowered: jax.stages.Lowered, topology: chips.Topology) -> Compiled:
  try:
    done = lowered.compile()
  except jax.errors.JaxRuntimeError as error:
    if not (used := _OUT_OF_MEMORY.search(str(error))):
      reason = str(error).splitlines()[0][:300]
      raise ValueError(f'{topology.name}: its compiler refuses the step: {reason}') from error
    needed, limit = (float(value[:-1]) * 1024 ** ('KMGT'.index(value[-1]) + 1) for value in filter(None, used.groups()))
    raise TooLarge(str(error).splitlines()[0], needed, limit) from None
  memory = done.memory_analysis()
  # What is given back in place of an argument lies where the argument was.
  kept = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
  peak = kept + memory.temp_size_in_bytes
  limit = memory_of(topology)
  if not topology.is_tpu and peak > limit:
    raise TooLarge('by the program for CPUs', peak, limit)
  return Compiled(memory.argument_size_in_bytes, memory.temp_size_in_bytes, peak, Program.parse(done.as_text()))


def memory_of(topology: chips.Topology) -> float:
  """Bytes a device; of CPUs, this machine's."""
  return topology.chip.memory or os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / topology.chips


def nearest_batch(compile_batch: Callable[[int], float], *, too_large: int, needed: float, limit: float, fixed: float,
                  multiple: int, tries: int = _TRIES) -> tuple[int, int]:
  """(the largest batch found that fits, the smallest found that does not); the first is 0 where none does.

  Memory is taken to be `fixed` and a share of each row, which says where to look; `compile_batch` gives what a batch
  takes, or raises TooLarge. At most `tries` are compiled.
  """
  fits, high, last = 0, too_large, too_large
  for _ in range(tries):
    if high - fits <= multiple:
      break
    row = max(needed - fixed, 1) / last  # as the batch that was compiled last had it
    guess = int((limit - fixed) / row) // multiple * multiple
    last = min(max(guess, fits + multiple), high - multiple)
    try:
      needed = compile_batch(last)
      fits = last
    except TooLarge as error:
      needed = error.needed
      high = last
  return fits, high


@dataclasses.dataclass(frozen=True)
class Row:
  """Collectives of one kind along the same axes: bytes that a device sends in a step, and the seconds it takes.

  `largest` is the size of the largest operand, in bytes, and `of` its type.
  """

  kind: str
  axes: tuple[str, ...]
  count: int
  moved: float
  seconds: float
  largest: float
  of: str


def _cost(collective: Collective, topology: chips.Topology, node_of: np.ndarray) -> tuple[float, float]:
  """Bytes and seconds of one run. Between nodes a message goes in parts, each device's own, after a sum inside them."""
  nodes = node_of[collective.groups]
  apart = max(len(set(group)) for group in nodes.tolist()) if nodes.size else 1
  inside = max(1, collective.group_size // apart)
  size = collective.operand_bytes
  if collective.kind == 'collective-permute':
    fast, slow = (0.0, size) if apart > 1 else (size, 0.0)
  elif collective.kind == 'all-gather':
    fast, slow = collective.moved(inside, size * apart), collective.moved(apart, size)
  else:
    fast, slow = collective.moved(inside, size), collective.moved(apart, size / inside)
  chip = topology.chip
  return fast + slow, (fast / topology.ring + slow / chip.network) if chip.link else 0.0


def rows_of(program: Program, topology: chips.Topology, mesh: jax.sharding.Mesh) -> list[Row]:
  """The program's collectives by kind and axes, the longest first."""
  flat = mesh.devices.reshape(-1)
  node_of = np.array([getattr(d, 'slice_index', 0) or 0 for d in flat] if topology.is_tpu else
                     [i // math.prod(topology.shape) for i in range(len(flat))])
  found: dict[tuple, list] = {}
  for c in program.collectives:
    axes = c.axes(dict(mesh.shape))
    if not axes:  # between a device and itself
      continue
    moved, seconds = _cost(c, topology, node_of)
    sums = found.setdefault((c.kind, axes), [0, 0.0, 0.0, 0.0, ''])
    sums[0] += c.times
    sums[1] += c.times * moved
    sums[2] += c.times * seconds
    for size, shape in ((size_of(shape), shape.partition('{')[0]) for shape in c.shapes):
      if size > sums[3]:
        sums[3:] = size, shape
  rows = [Row(kind, axes, *sums) for (kind, axes), sums in found.items()]
  return sorted(rows, key=lambda row: (-row.seconds, -row.moved))


def scattered_share(program: Program, mesh: jax.sharding.Mesh) -> float | None:
  """Of the bytes that are summed along fsdp: the share of which each device receives only its part; None without fsdp.

  They are gradients, but for a few scalars.
  """
  if mesh.shape['fsdp'] == 1:
    return None
  total = {'all-reduce': 0.0, 'reduce-scatter': 0.0}
  for c in program.collectives:
    if c.kind in total and 'fsdp' in c.axes(dict(mesh.shape)):
      total[c.kind] += c.times * c.operand_bytes
  return total['reduce-scatter'] / max(sum(total.values()), 1.0)


@dataclasses.dataclass(frozen=True)
class Plan:
  """`figures` is what the JSON file holds: plain numbers, names and lists."""

  figures: Mapping[str, Any]

  def text(self) -> str:
    f = self.figures
    console = rich.console.Console(file=io.StringIO(), width=110)
    facts = rich.table.Table(box=None, show_header=False, pad_edge=False)
    for name, value in _facts(f):
      facts.add_row(name, value)
    console.print(facts)
    table = rich.table.Table(title='messages of a step, on each device', title_justify='left')
    for name in ('kind', 'along', 'number', 'sent', 'largest operand', 'time'):
      table.add_column(name, justify='left' if name in ('kind', 'along') else 'right')
    for row in f['collectives']:
      time = f'{1000 * row["seconds"]:.2f} ms' if f['step_seconds'] else '–'
      table.add_row(row['kind'], ' x '.join(row['axes']), f'{row["count"]:,}', _bytes(row['moved']),
                    row['of'], time)
    if f['collectives']:
      console.print(table)
    for line in f['assumptions']:
      console.print(f'- {line}')
    return console.file.getvalue().rstrip()

  def write(self, path: str | os.PathLike) -> None:
    pathlib.Path(path).write_text(json.dumps(self.figures, indent=1) + '\n')


def _bytes(value: float) -> str:
  for unit, size in (('GiB', 2 ** 30), ('MiB', 2 ** 20), ('KiB', 2 ** 10)):
    if value >= size:
      return f'{value / size:,.2f} {unit}'
  return f'{value:.0f} B'


def _facts(f: Mapping[str, Any]) -> list[tuple[str, str]]:
  m, scattered = f['memory'], f['scattered_share']
  lines = [
      ('topology', f'{f["topology"]}: {f["chips"]} x {f["chip"]}'),
      ('mesh', ' x '.join(f'{k} {v}' for k, v in f['mesh'].items())),
      ('batch', f'{f["batch_size"]}, {f["batch_size"] / f["batch_parts"]:g} a part'),
      ('parameters', f'{f["parameters"]:,}'),
      ('memory', f'{_bytes(m["peak"])} of {_bytes(m["limit"])}: {_bytes(m["arguments"])} of state and batch, '
                 f'{_bytes(m["temporaries"])} in between' + ('' if m['by_its_compiler'] else ' (estimate)')),
      ('fits', 'yes'),
      ('gradients', 'every device holds all parameters' if scattered is None else
       f'{100 * scattered:.0f}% of what is summed along fsdp is reduce-scattered'),
      ('operations', f'{f["flops"]:.3g} a step, three forward passes; {f["computed_flops"]:.3g} as it is traced'),
  ]
  ms = lambda name: f'{1000 * f[f"{name}_seconds"]:,.1f}'
  if f['step_seconds']:
    lines += [
        ('step', f'{ms("step")} ms: compute {ms("compute")}, memory {ms("memory")}, messages {ms("collective")}; '
                 f'{ms("hidden")} if all of them could go on at once'),
        ('share of compute', f'{100 * f["compute_share"]:.0f}%, {100 * f["mfu"]:.0f}% of peak'),
        ('recipe', f'{f["num_steps"]:,} steps: {f["hours"]:,.0f} hours, {f["chip_hours"]:,.0f} chip-hours')]
  return lines


def plan(training: Training, topology: chips.Topology) -> Plan:
  """Compiles the step for a topology and says what it does.

  Raises ValueError where the mesh or the batch does not divide, and, with the nearest batch that fits, where the batch
  is too large.
  """
  logging.getLogger('jax._src.xla_bridge').setLevel(logging.ERROR)  # that there is no TPU here is known
  here = training.on(topology)
  batch = here.batch_size
  traced = here.run.trace(batch)
  try:
    compiled = compile_step(traced, topology)
  except TooLarge as error:
    raise _advice(here, topology, error) from None
  mesh = here.partitioner.mesh
  rows = rows_of(compiled.program, topology, mesh)
  work, computed = _operations(here, batch), flops.of_jaxpr(traced.jaxpr.jaxpr)
  figures = {
      'code': provenance.code_digest(), 'jax': jax.__version__, 'libtpu': _version('libtpu') if topology.is_tpu else '',
      'topology': topology.name, 'chip': topology.chip.title, 'chips': topology.chips,
      'objective': type(here.objective).__name__, 'parameters': Skeleton.of(here.objective).count(),
      'mesh': {axis: size for axis, size in mesh.shape.items()}, 'batch_size': batch,
      'batch_parts': here.partitioner.batch_parts, 'num_steps': here.num_steps,
      'compute_dtype': here.precision.compute, 'microbatches': here.precision.microbatches,
      'memory': {'arguments': compiled.arguments, 'temporaries': compiled.temporaries, 'peak': compiled.peak,
                 'limit': memory_of(topology), 'by_its_compiler': topology.is_tpu}, 'hurried': compiled.hurried,
      'fits': True, 'collectives': [{**dataclasses.asdict(row), 'axes': list(row.axes)} for row in rows],
      'unknown_loops': list(compiled.program.unknown_loops),
      'scattered_share': scattered_share(compiled.program, mesh), 'flops': work, 'computed_flops': computed,
      **_times(compiled.program, topology, rows, work, computed, here.num_steps),
      'assumptions': _assumptions(topology, compiled)}
  return Plan(figures)


def _version(package: str) -> str:
  try:
    return importlib.metadata.version(package)
  except importlib.metadata.PackageNotFoundError:  # it lies where TPU_LIBRARY_PATH says
    return 'unknown'


def _operations(training: Training, batch_size: int) -> float:
  """Of a step without recomputation: the products of a forward pass, and twice as many backward."""
  skeleton = Skeleton.of(training.objective)
  params, buffers = (train.states.nnx.to_pure_dict(tree) for tree in (skeleton.params, skeleton.buffers))
  key = jax.eval_shape(lambda: jax.random.key(0))
  forward = lambda p, b, batch, key: training.objective.loss(skeleton.model(p, b), batch, key, training=True)[0]
  return 3 * flops.flops(forward, params, buffers, training.objective.batch_spec(batch_size), key)


def _times(program: Program, topology: chips.Topology, rows: Sequence[Row], work: float, computed: float, steps: int
           ) -> dict[str, float]:
  chip = topology.chip
  if not chip.peak:
    return dict.fromkeys(('compute_seconds', 'memory_seconds', 'collective_seconds', 'step_seconds', 'hidden_seconds',
                          'compute_share', 'mfu', 'hours', 'chip_hours'), 0.0)
  compute = computed / topology.chips / (chip.peak * ATTAINABLE)
  memory = program.traffic / (chip.bandwidth * ATTAINABLE_BANDWIDTH) if topology.is_tpu else 0.0
  collective = sum(row.seconds for row in rows)
  step = max(compute, memory) + collective
  return {'compute_seconds': compute, 'memory_seconds': memory, 'collective_seconds': collective, 'step_seconds': step,
          'hidden_seconds': max(compute, memory, collective),
          'compute_share': compute / step, 'mfu': work / topology.chips / chip.peak / step,
          'hours': steps * step / 3600, 'chip_hours': steps * step / 3600 * topology.chips}


def _assumptions(topology: chips.Topology, compiled: Compiled) -> list[str]:
  chip, program = topology.chip, compiled.program
  lines = []
  if compiled.hurried:
    lines.append('Compiled with the least effort of the compiler: a run takes a few percent less memory.')
  if not topology.is_tpu:
    lines.append('Compiled for CPUs: messages and memory are an estimate, and more than the compiler for this chip '
                 'would need: sums are not scattered, and 16-bit numbers may count as 32-bit.')
  if chip.peak:
    lines += [
        f'Products reach {100 * ATTAINABLE:.0f}% of {chip.peak / 1e12:g} TFLOP/s and are shared equally by all chips.',
        'Memory reaches '
        f'{100 * ATTAINABLE_BANDWIDTH:.0f}% of {chip.bandwidth / 1e9:,g} GB/s.' if topology.is_tpu else
        'Traffic to memory is not estimated.',
        f'A message goes along one side of the slice at {topology.ring / 1e9:g} GB/s.' if topology.is_tpu else
        f'A message goes at {chip.link / 1e9:g} GB/s inside a node.']
    if topology.slices > 1:
      lines.append(f'Between slices or nodes each chip has {chip.network / 1e9:g} GB/s.')
    lines.append('No message is hidden behind compute; latency, waiting and input are left out.')
  if program.unknown_loops:
    lines.append(f'{len(program.unknown_loops)} loops of unknown length count once.')
  return lines


def _advice(training: Training, topology: chips.Topology, error: TooLarge) -> ValueError:
  """The message for a batch that is too large, after a search for one that is not."""
  batch, multiple = training.batch_size, training.rows

  def compile_batch(size: int) -> float:
    with _hurried(topology):
      return _compiled(training.run.trace(size).lower(), topology).peak

  fits, over = nearest_batch(compile_batch, too_large=batch, needed=error.needed, limit=error.limit,
                             fixed=training.run.state_bytes, multiple=multiple)
  what = f'batch {batch} needs {_bytes(error.needed)} a device, {topology.chip.title} has {_bytes(error.limit)}'
  if not fits:
    return ValueError(f'{what}; no batch that was tried fits, down to {over}: split parameters further (fsdp, tensor), '
                      'recompute more (remat, chunks), or use MICROBATCHES')
  known = f'{over} does not' if over - fits <= multiple else f'between it and {over} nothing was tried'
  return ValueError(f'{what}; the nearest batch that fits is {fits} ({known}): --gin.BATCH_SIZE={fits}, or the same '
                    'batch in MICROBATCHES')

