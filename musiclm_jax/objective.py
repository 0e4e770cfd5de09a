"""The contract between the trainer and everything that can be trained.

An objective is a frozen dataclass: a model's configuration together with its loss. It is written to
`specs.json` beside each checkpoint and rebuilds the model from there, so no configuration language is
needed to sample or serve.
"""
from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

from flax import nnx
import jax

Batch = dict[str, jax.Array]  # leading axis B; always holds `slot` int32 [B], the place in the global batch


class Aux(NamedTuple):
  """What a loss returns beside the scalar.

  Attributes:
    metrics: scalars for the log, each a mean over the examples of the (micro)batch. Metrics of an objective may
      come with a bar, of which the trainer warns: `x_chance` is the value of `x` at which nothing has been learned,
      `x_floor` one under which something has collapsed.
    statistics: a pytree of sums over the examples, added over microbatches and over the mesh, then handed
      to `Objective.update` once a step; in evaluation added over the batches, too, then handed to
      `Objective.evaluated`. Empty for most objectives.
  """

  metrics: dict[str, jax.Array]
  statistics: Any = ()


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Media:
  """What a network makes of some examples, for the ear.

  Attributes:
    audio: float32 [B, N], or [B, N, C] of C channels, by name, all of one shape; row b of each belongs to example b.
    sample_rate: in Hz.
  """

  audio: dict[str, jax.Array]
  sample_rate: int = dataclasses.field(metadata={'static': True})


class Objective:
  """Base of all objectives. Subclasses are frozen dataclasses and override what differs.

  Class attributes:
    mean_over_examples: whether the loss is a mean of per-example terms. If not (contrastive losses), the
      trainer refuses to split the batch and the objective saves memory by chunking inside itself.
    groups: names of the parameter groups, each with its own optimizer and its own gradient clipping.
    asset_part: the part of the model, as in `train.InitFrom`, to which the files of `assets` belong.
  """

  mean_over_examples: bool = True
  groups: tuple[str, ...] = ('model',)
  asset_part: str = ''

  def model(self, rngs: nnx.Rngs) -> nnx.Module:
    """Builds the network with fresh parameters."""
    raise NotImplementedError

  def batch_spec(self, batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and dtypes of a batch, `slot` included; what `data/` must deliver."""
    raise NotImplementedError

  def loss(self, model: nnx.Module, batch: Batch, key: jax.Array, *, training: bool) -> tuple[jax.Array, Aux]:
    """The scalar to minimise. Per-example randomness comes from `axes.example_keys(key, batch['slot'])`."""
    raise NotImplementedError

  def start_batches(self, batch_size: int) -> int:
    """How many batches of that size `start` asks for."""
    del batch_size
    return 1

  def start(self, model: nnx.Module, batch: Batch, key: jax.Array) -> Any:
    """What a data-dependent start changes: a pure dict of any of the model's variables.

    Called once, before step 0 of a fresh run, with the rows of its first `start_batches` as one batch.
    """
    del model, batch, key
    return {}

  def update(self, buffers: Any, statistics: Any, key: jax.Array) -> tuple[Any, dict[str, jax.Array]]:
    """New buffers and metrics from the statistics of one whole step."""
    del statistics, key
    return buffers, {}

  def evaluated(self, statistics: Any) -> dict[str, jax.Array]:
    """Held-out metrics that are no mean over batches (perplexities), from the statistics of all evaluation batches.

    They take the place of metrics of the loss that have the same names.
    """
    del statistics
    return {}

  def media(self, model: nnx.Module, batch: Batch) -> Media | None:
    """What there is to hear of the examples of an evaluation batch; None for nothing."""
    del model, batch
    return None

  def group(self, path: tuple[str, ...]) -> str:
    """The group of the parameter at `path`, one of `groups`."""
    del path
    return self.groups[0]

  def active(self) -> dict[str, bool]:
    """Groups whose loss weight is zero are not updated at all: Adam moves on a zero gradient."""
    return {name: True for name in self.groups}

  def assets(self) -> dict[str, bytes]:
    """Files that the model needs beside its parameters (a vocabulary), stored in each checkpoint."""
    return {}


class Fit(Objective):
  """An objective without gradients: statistics of frozen features, summed over a corpus (`accumulate`).

  `model` builds the frozen network together with the buffers to be fitted; its parameters come from another
  run. Features are computed once; then each phase sums `statistics` over all rows and calls `fitted` with the
  sums, as often as the phase says.
  """

  def features(self, model: nnx.Module, batch: Batch) -> jax.Array:
    """Rows [N, D] float32 to fit on, from one batch."""
    raise NotImplementedError

  def counted(self, batch: dict[str, Any]) -> Any:
    """Which of those rows are no padding, bool [N], told from this process's batch alone; None for all."""
    del batch

  def phases(self) -> tuple[tuple[str, int], ...]:
    """(name, iterations) of each phase in order."""
    raise NotImplementedError

  def begin(self, buffers: Any, sample_MxD: jax.Array, phase: str, key: jax.Array) -> Any:
    """Buffers at the start of a phase, from a uniform sample of the rows."""
    del sample_MxD, phase, key
    return buffers

  def statistics(self, buffers: Any, rows_NxD: jax.Array, weight_N: jax.Array, phase: str) -> Any:
    """A pytree of sums over the rows, each row counted `weight` times (0 for padding)."""
    raise NotImplementedError

  def fitted(self, buffers: Any, statistics: Any, phase: str) -> tuple[Any, dict[str, jax.Array]]:
    """New buffers and metrics from the sums over all rows."""
    raise NotImplementedError
