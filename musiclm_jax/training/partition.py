"""The only file that knows devices: the mesh, and which logical axis is split over which mesh axis."""
from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
import contextlib
import dataclasses
import functools
import math
from typing import Any

import jax
from jax.experimental import mesh_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec
import numpy as np

from musiclm_jax import axes
from musiclm_jax.training.state import Skeleton, TrainState

MESH_AXES = ('data', 'fsdp', 'tensor', 'sequence')

# Logical axis -> mesh axes. Parameters: the width of the residual stream is split over fsdp, everything that is
# computed in parallel (heads, hidden units, vocabulary rows, codes, output channels) over tensor.
RULES: tuple[tuple[str, tuple[str, ...]], ...] = (
    ('layer', ()),
    ('embed', ('fsdp',)),
    ('mlp', ('tensor',)),
    ('heads', ('tensor',)),
    ('vocab', ('tensor',)),
    ('channel_in', ('fsdp',)),
    ('channel_out', ('tensor',)),
    ('codebook', ('tensor',)),
    ('batch', ('data', 'fsdp')),
    ('length', ('sequence',)),
    ('embed_activation', ()),
    ('mlp_activation', ('tensor',)),
    ('heads_activation', ('tensor',)),
)


@dataclasses.dataclass(frozen=True)
class Partitioner:
  """Mesh sizes and the rule table.

  Attributes:
    data, fsdp, tensor, sequence: devices along each mesh axis. 0 for `data` means all that are left.
    rules: pairs (logical axis, mesh axes).
    devices: those to make the mesh of, real ones or a description of some; None for all that there are.
  """

  data: int = 0
  fsdp: int = 1
  tensor: int = 1
  sequence: int = 1
  rules: tuple[tuple[str, tuple[str, ...]], ...] = RULES
  devices: tuple[Any, ...] | None = None

  def __post_init__(self):
    for name in MESH_AXES:
      if (size := getattr(self, name)) < (least := 0 if name == 'data' else 1):
        raise ValueError(f'mesh axis {name} must be at least {least}, found {size}')
    known = set(axes.PARAMETER_AXES) | set(axes.ACTIVATION_AXES)
    seen = set()
    for logical, mesh_axes in self.rules:
      if logical in seen:
        raise ValueError(f'partition rules name {logical!r} twice')
      if logical not in known:
        raise ValueError(f'partition rules name {logical!r}, which is not a logical axis: {sorted(known)}')
      if unknown := set(mesh_axes) - set(MESH_AXES):
        raise ValueError(f'partition rule {logical!r} names {sorted(unknown)}; mesh axes are {MESH_AXES}')
      seen.add(logical)

  @property
  def _there(self) -> list[Any]:
    return jax.devices() if self.devices is None else list(self.devices)

  @functools.cached_property
  def mesh(self) -> Mesh:
    fixed = self.fsdp * self.tensor * self.sequence
    devices = self._there
    total = len(devices)
    data = self.data or total // fixed
    if data < 1 or data * fixed > total:
      raise ValueError(
          f'mesh data {data} x fsdp {self.fsdp} x tensor {self.tensor} x sequence {self.sequence} needs '
          f'{max(data, 1) * fixed} devices, but there are {total}')
    sizes = (data, self.fsdp, self.tensor, self.sequence)
    if math.prod(sizes) < total:
      return Mesh(np.array(devices[:math.prod(sizes)]).reshape(sizes), MESH_AXES)
    return Mesh(_arranged(sizes, devices), MESH_AXES)

  def _spec(self, names: tuple, shape: tuple[int, ...], what: str) -> PartitionSpec:
    """Mesh axes of each dimension; a mesh axis that is taken or of size 1 is left out, a single entry never split."""
    table, sizes = dict(self.rules), dict(self.mesh.shape)
    taken: set[str] = set()
    entries = []
    for name, length in zip(names, shape):
      if name is not None and name not in table:
        raise ValueError(f'{what}: no partition rule for the logical axis {name!r}')
      mesh_axes = tuple(a for a in table.get(name, ()) if sizes[a] > 1 and a not in taken and length > 1)
      parts = math.prod(sizes[a] for a in mesh_axes)
      if length % parts:
        raise ValueError(
            f'{what}: axis {name!r} has {length} entries, which {" x ".join(mesh_axes)} = {parts} does not divide; '
            f'choose a size that is a multiple of {parts} or a smaller mesh axis')
      taken.update(mesh_axes)
      entries.append(mesh_axes if len(mesh_axes) > 1 else mesh_axes[0] if mesh_axes else None)
    return PartitionSpec(*entries)

  def _sharding(self, names: tuple, shape: tuple[int, ...], what: str) -> NamedSharding:
    return NamedSharding(self.mesh, self._spec(names, shape, what))

  @property
  def replicated(self) -> NamedSharding:
    return NamedSharding(self.mesh, PartitionSpec())

  @property
  def of_rows(self) -> NamedSharding:
    """Of arrays whose first axis is the rows of a batch."""
    return NamedSharding(self.mesh, PartitionSpec(('data', 'fsdp')))

  def state_shardings(self, skeleton: Skeleton, abstract: TrainState) -> TrainState:
    """Shardings of a whole state. Optimizer slots follow the parameter whose path ends theirs."""
    by_path: dict[tuple, tuple] = {}

    def variables(tree, names_tree, prefix):
      def one(path, leaf):
        keys = tuple(str(getattr(k, 'key', k)) for k in path)
        names = functools.reduce(lambda node, k: node[getattr(k, 'key', k)], path, names_tree)
        sharding = self._sharding(names, leaf.shape, '/'.join(keys))
        if prefix == 'params':
          by_path[keys] = (leaf.shape, sharding)
        return sharding
      return jax.tree_util.tree_map_with_path(one, tree)

    params_axes, buffers_axes = skeleton.axes()
    params = variables(abstract.params, params_axes, 'params')
    buffers = variables(abstract.buffers, buffers_axes, 'buffers')

    def slot(path, leaf):
      keys = tuple(str(getattr(k, 'key', getattr(k, 'name', getattr(k, 'idx', k)))) for k in path)
      for start in range(len(keys)):
        if keys[start:] in by_path and by_path[keys[start:]][0] == leaf.shape:
          return by_path[keys[start:]][1]
      return self.replicated

    opt_state = jax.tree_util.tree_map_with_path(slot, abstract.opt_state)
    ema = params if abstract.ema else {}
    return TrainState(self.replicated, params, buffers, opt_state, ema)

  @contextlib.contextmanager
  def active(self) -> Iterator[None]:
    """Steps are traced in here: on this mesh, with this partitioner's answers to `axes`."""
    with jax.set_mesh(self.mesh), axes.constraining(self):
      yield

  def constrain(self, x: jax.Array, names: tuple) -> jax.Array:
    """What `axes.constrain` does inside a step."""
    return jax.lax.with_sharding_constraint(x, self._sharding(names, x.shape, 'activation'))

  def parts(self, name: str) -> int:
    """Into how many parts the logical axis `name` is split."""
    return math.prod(self.mesh.shape[axis] for axis in dict(self.rules)[name])

  @property
  def platform(self) -> str:
    return self.mesh.devices.flat[0].platform

  @property
  def num_devices(self) -> int:
    return self.mesh.size

  def apart(self, f: Callable[..., jax.Array], names: Sequence[tuple], arrays: tuple[jax.Array, ...], kernel: bool
            ) -> jax.Array:
    """What `axes.apart` does inside a step."""
    specs = tuple(self._spec(of, x.shape, 'activation') for of, x in zip(names, arrays, strict=True))
    return jax.shard_map(f, mesh=self.mesh, in_specs=specs, out_specs=specs[0], check_vma=not kernel)(*arrays)

  @property
  def batch_parts(self) -> int:
    """Into how many parts the rows of a batch are dealt."""
    return self.mesh.shape['data'] * self.mesh.shape['fsdp']

  def check_batch(self, batch_size: int, microbatches: int = 1) -> None:
    """Raises ValueError where the mesh cannot share out the rows of a batch, or of each of its microbatches."""
    parts = self.batch_parts
    if batch_size % (multiple := parts * microbatches):
      factors, sizes = ('', '') if microbatches == 1 else (' x microbatches', f'{parts} x {microbatches} = ')
      raise ValueError(f'batch {batch_size} is not a multiple of data x fsdp{factors} = {sizes}{multiple}; choose a '
                       f'multiple of {multiple}')
    idle = {d.process_index for d in self._there} - {d.process_index for d in self.mesh.devices.flat}
    if idle:
      sizes = ' x '.join(f'{axis} {size}' for axis, size in self.mesh.shape.items())
      raise ValueError(f'mesh {sizes} uses {self.mesh.devices.size} of the {len(self._there)} devices, none of process '
                       f'{", ".join(map(str, sorted(idle)))}: choose another mesh file, or data = 0 for all that are '
                       'left, or start fewer processes')
    # Rows are dealt to processes: those of one part of the batch must all lie with one of them.
    process = np.vectorize(lambda device: device.process_index, otypes=[int])(self.mesh.devices).reshape(parts, -1)
    if (process != process[:, :1]).any():
      raise ValueError(f'the {process.shape[1]} devices of tensor x sequence share the rows of a batch and must belong '
                       'to one process: start one process for several devices, or choose smaller mesh axes')

  def global_batch(self, local: dict[str, np.ndarray]) -> dict[str, Any]:
    """This process's rows as its part of one global array, split over data and fsdp."""
    return {name: jax.make_array_from_process_local_data(self.of_rows, rows) for name, rows in local.items()}


def _arranged(sizes: tuple[int, ...], devices: list[Any]) -> np.ndarray:
  """Devices in the shape of the mesh, neighbours of the network beside one another.

  Where slices (or nodes of GPUs) are joined by a slower network, only `data` crosses it, if its size allows that.
  """
  slices = len({getattr(device, 'slice_index', 0) or 0 for device in devices})
  data, *inner = sizes
  if slices == 1:
    return mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
  if data % slices:
    return np.array(devices).reshape(sizes)
  return mesh_utils.create_hybrid_device_mesh((data // slices, *inner), (slices, 1, 1, 1), devices,
                                              allow_split_physical_axes=True)
