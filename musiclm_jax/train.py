"""The one trainer: `train` for everything with a gradient, `fit` for everything that is summed over a corpus."""
from __future__ import annotations

from collections.abc import Callable
import dataclasses
import os
import pathlib
from typing import Any

from absl import logging
import jax
import jax.numpy as jnp
import numpy as np

from musiclm_jax import axes, specs
from musiclm_jax.data.prefetch import prefetch
from musiclm_jax.objective import Fit, Objective
from musiclm_jax.training import accumulate, checkpoint, metrics, optimizer as optimizers, state as states
from musiclm_jax.training.partition import Partitioner
from musiclm_jax.training.state import Skeleton, TrainState

Batches = Callable[..., dict[str, np.ndarray]]  # (step, process_index, process_count) -> this process's rows


@dataclasses.dataclass(frozen=True)
class Cadence:
  """How often things happen, in steps; 0 is never.

  Attributes:
    keep: checkpoints kept. chance_after: steps until a loss at its chance level raises the alarm.
  """

  log_every: int = 10
  checkpoint_every: int = 500
  eval_every: int = 0
  eval_batches: int = 4
  keep: int = 2
  chance_after: int = 500


@dataclasses.dataclass(frozen=True)
class InitFrom:
  """Parameters taken over from another run at the start of this one.

  Attributes:
    workdir: of the other run. part: which of its subtrees ("encoder/layers"), "" for all of it.
    into: the subtree of this model that they fill. frozen: whether they then stay as they are.
  """

  workdir: str
  part: str = ''
  into: str = ''
  frozen: bool = False


@dataclasses.dataclass(frozen=True)
class Precision:
  """float32 parameters and optimizer always; `compute` is what the networks run in on the way."""

  compute: str = 'float32'
  microbatches: int = 1
  ema_decay: float = 0.0


def train(*, objective: Objective, batches: Batches, optimizer: Any, workdir: str, num_steps: int,
          partitioner: Partitioner = Partitioner(), cadence: Cadence = Cadence(), precision: Precision = Precision(),
          eval_batches: Batches | None = None, init_from: InitFrom | str | None = None, seed: int = 0,
          stop_after: int | None = None, dry_run: bool = False) -> TrainState | None:
  """Runs, or resumes, `objective` until `num_steps` steps are done.

  A step is a function of (seed, step, state): N steps equal k steps, a restart and N - k more, bit for bit on
  one kind of device. The parameters come from this run's newest checkpoint, else from `init_from`, else from the
  seed.

  Args:
    batches: a pure function of the step. eval_batches: likewise, for the held-out metrics.
    optimizer: an `optimizer.Adam`, an optax transformation, or a mapping from group to either.
    init_from: a workdir stands for all of its parameters.
    stop_after: ends early, with a checkpoint, after this step; the schedule does not change.
    dry_run: prints what would run, and what it would read and write, and stops.

  Returns the last state (None for a dry run). Raises ValueError for what the user can put right,
  `metrics.NonFiniteLoss` where the loss of a step is not finite.
  """
  if isinstance(init_from, str):
    init_from = InitFrom(init_from)
  run = _Run(objective, optimizer, workdir, partitioner, precision, init_from, seed)
  run.check(batches, precision.microbatches)
  if dry_run:
    print(run.describe(batches, num_steps))
    return None
  make_writable(workdir)
  lineage = dict(getattr(getattr(batches, 'corpus', None), 'lineage', {}))
  if init_from is not None:
    lineage[init_from.into or 'init'] = checkpoint.load(init_from.workdir).content_hash
  checkpoints = checkpoint.Checkpoints(workdir, objective, keep=cadence.keep, lineage=lineage)
  with jax.set_mesh(partitioner.mesh), axes.constraining(partitioner.constrain):
    state = run.restore_or_create(checkpoints, batches)
    last = num_steps if stop_after is None else min(num_steps, stop_after)
    state = _loop(run, state, batches, eval_batches, checkpoints, cadence, last, num_steps)
  checkpoints.save(state)
  checkpoints.wait()
  checkpoints.close()
  return state


class _Run:
  """What stays the same for all steps of a run: the model's skeleton, layouts and compiled functions."""

  def __init__(self, objective, optimizer, workdir, partitioner, precision, init_from, seed):
    self.objective, self.workdir, self.partitioner = objective, workdir, partitioner
    self.init_from, self.seed = init_from, seed
    self.skeleton = Skeleton.of(objective)
    self.init_key, self.run_key = jax.random.split(jax.random.key(seed))
    frozen = (init_from.into,) if init_from is not None and init_from.frozen else ()
    abstract_params = states.nnx.to_pure_dict(self.skeleton.params)
    self.optimizer = optimizers.by_group(objective, abstract_params, optimizer, frozen)
    self.create = lambda key: states.create(objective, self.optimizer, key, keep_ema=precision.ema_decay > 0)
    self.abstract = jax.eval_shape(self.create, self.init_key)
    self.shardings = partitioner.state_shardings(self.skeleton, self.abstract)
    step = states.make_step(objective, self.skeleton, self.optimizer, microbatches=precision.microbatches,
                            compute_dtype=jnp.dtype(precision.compute), ema_decay=precision.ema_decay)
    self.step = jax.jit(step, donate_argnums=0, out_shardings=(self.shardings, None))
    self.evaluate = jax.jit(lambda state, batch, key: objective.loss(
        self.skeleton.model(state.ema or state.params, state.buffers), batch, key, training=False))

  def check(self, batches: Batches, microbatches: int) -> None:
    size = batches.batch_size
    self.partitioner.check_batch(size)
    if microbatches > 1 and not self.objective.mean_over_examples:
      raise ValueError(f'the loss of {type(self.objective).__name__} is not a mean over examples: microbatches must '
                       'be 1; raise its own number of chunks to save memory')
    if size % microbatches:
      raise ValueError(f'batch {size} is not a multiple of {microbatches} microbatches')

  def describe(self, batches: Batches, num_steps: int) -> str:
    """The resolved experiment in plain lines."""
    latest = checkpoint.latest_step(self.workdir)
    sizes = {name: 0 for name in self.objective.groups}
    for leaf, label in zip(jax.tree.leaves(self.abstract.params),
                           jax.tree.leaves(states.labels(self.objective, self.abstract.params))):
      sizes[label] += leaf.size
    batch = {k: f'{v.dtype}{list(v.shape)}' for k, v in self.objective.batch_spec(batches.batch_size).items()}
    lines = [
        f'objective   {type(self.objective).__name__} {specs.fingerprint(self.objective)}',
        f'parameters  {sum(sizes.values()):,} ' + ', '.join(f'{k} {v:,}' for k, v in sizes.items()),
        f'mesh        {dict(self.partitioner.mesh.shape)}',
        f'batch       {batch}',
        f'reads       {getattr(batches, "fingerprint", batches)}',
        f'writes      {pathlib.Path(self.workdir).absolute()}',
        f'steps       {latest or 0} to {num_steps}',
        specs.to_json(self.objective),
    ]
    return '\n'.join(lines)

  def restore_or_create(self, checkpoints: checkpoint.Checkpoints, batches: Batches) -> TrainState:
    """(1) this run's newest checkpoint, (2) another run's parameters, (3) scratch: in this order."""
    described = lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s)
    targets = jax.tree.map(described, self.abstract, self.shardings)
    if (state := checkpoints.restore(targets)) is not None:
      logging.info('resuming %s at step %d', self.workdir, int(state.step))
      return state
    state = jax.jit(self.create, out_shardings=self.shardings)(self.init_key)
    take_over = lambda state: state
    if self.init_from is not None:
      loaded = checkpoint.load(self.init_from.workdir)
      take_over = lambda state: self._take_over(state, loaded)
    # A start sees the network as it will be, and changes nothing that was taken over.
    return take_over(self._data_dependent_start(take_over(state), batches))

  def _take_over(self, state: TrainState, loaded: checkpoint.Loaded) -> TrainState:
    source = self.init_from
    params = checkpoint.graft(state.params, loaded.params, part=source.part, into=source.into)
    buffers = state.buffers
    if loaded.buffers:
      buffers = checkpoint.graft(buffers, loaded.buffers, part=source.part, into=source.into)
    taken = dataclasses.replace(state, params=params, buffers=buffers, ema=params if state.ema else {})
    return jax.tree.map(lambda x, s: jnp.copy(jax.device_put(x, s)), taken, self.shardings)

  def _data_dependent_start(self, state: TrainState, batches: Batches) -> TrainState:
    """Variables from the first batch, where the objective has such a start (codebooks by k-means)."""
    if type(self.objective).start is Objective.start:
      return state
    batch = self.partitioner.global_batch(batches(0, jax.process_index(), jax.process_count()))
    start = jax.jit(lambda s, b, key: states.started(self.objective, self.skeleton, s, b, key),
                    out_shardings=self.shardings)
    return start(state, batch, jax.random.fold_in(self.init_key, 1))


def _loop(run: _Run, state: TrainState, batches: Batches, eval_batches: Batches | None,
          checkpoints: checkpoint.Checkpoints, cadence: Cadence, last: int, num_steps: int) -> TrainState:
  first = int(state.step)
  if first >= last:
    return state
  writer = metrics.MetricsWriter(run.workdir, first)
  alarm = metrics.ChanceAlarm(cadence.chance_after)
  progress = metrics.Progress(pathlib.Path(run.workdir).name, first, last)
  feed = prefetch(batches, first, last - first, process_index=jax.process_index(), process_count=jax.process_count())
  every = lambda step, period: period > 0 and step % period == 0
  pending: tuple[int, Any] | None = None

  def settle() -> None:
    """Reads the metrics of the step before, while the device works on the next one."""
    nonlocal pending
    if pending is None:
      return
    done, values = pending
    pending = None
    metrics.check_finite(done, values['loss'])
    report = every(done, cadence.log_every) or done == last
    if report:
      flat = metrics.scalars(jax.device_get(values))
      writer.write(done, flat)
      alarm(done, flat)
    progress.update(done, f'loss {float(values["loss"]):.4f}', report=report)

  try:
    for step, batch in zip(range(first, last), feed):
      state, values = run.step(state, run.partitioner.global_batch(batch), run.run_key)
      done = step + 1
      settle()
      pending = (done, values)
      if every(done, cadence.checkpoint_every) and done < last:
        settle()  # a state is saved only after its loss was seen to be finite
        checkpoints.save(state)
      if eval_batches is not None and (every(done, cadence.eval_every) or done == last):
        writer.write(done, held_out(run, state, eval_batches, cadence.eval_batches), part='eval')
    settle()
  finally:
    progress.close()
    feed.close()
  if feed.waited_share > 0.1:
    logging.warning('training waited for data %.0f%% of the time', 100 * feed.waited_share)
  return state


def held_out(run: _Run, state: TrainState, batches: Batches, count: int) -> dict[str, float]:
  """Mean metrics over the first `count` evaluation batches, the same ones and the same masks every time."""
  total: dict[str, Any] = {}
  for i in range(count):
    batch = run.partitioner.global_batch(batches(i, jax.process_index(), jax.process_count()))
    loss, aux = run.evaluate(state, batch, jax.random.fold_in(run.run_key, i))
    for name, value in {'loss': loss, **aux.metrics}.items():
      total[name] = total.get(name, 0) + value / count
  return metrics.scalars(jax.device_get(total))


def fit(*, objective: Fit, batches: Batches, num_batches: int, workdir: str, init_from: InitFrom,
        partitioner: Partitioner = Partitioner(), save_every: int = 20, seed: int = 0, dry_run: bool = False
        ) -> TrainState | None:
  """Fits, or continues to fit, `objective` on the features of `num_batches` batches.

  Each pass over the features is a step; every `save_every` of them are saved, and an interrupted fit continues from
  there.
  """
  run = _Run(objective, optimizers.Adam(0.0), workdir, partitioner, Precision(), init_from, seed)
  passes = sum(iterations for _, iterations in objective.phases())
  if dry_run:
    print(run.describe(batches, passes))
    return None
  make_writable(workdir)
  source = checkpoint.load(init_from.workdir)
  checkpoints = checkpoint.Checkpoints(workdir, objective, lineage={init_from.into: source.content_hash})
  with jax.set_mesh(partitioner.mesh), axes.constraining(partitioner.constrain):
    state = run.restore_or_create(checkpoints, batches)
    if int(state.step) < passes:
      rows = accumulate.gather_features(
          objective, run.skeleton, state.params, state.buffers,
          (batches(i, jax.process_index(), jax.process_count()) for i in range(num_batches)), partitioner)
      writer = metrics.MetricsWriter(workdir, int(state.step))
      for phase, done, buffers, values in accumulate.run(
          objective, state.buffers, rows, partitioner, run.run_key, first=int(state.step)):
        state = dataclasses.replace(state, buffers=buffers, step=jnp.int32(done))
        writer.write(done, metrics.scalars(jax.device_get(values)), part=phase)
        if done % save_every == 0 or done == passes:
          checkpoints.save(state)
  checkpoints.wait()
  checkpoints.close()
  return state


def make_writable(workdir: str | os.PathLike) -> None:
  """Creates the directory, or says in one line why it cannot be written to."""
  path = pathlib.Path(workdir)
  try:
    path.mkdir(parents=True, exist_ok=True)
    probe = path / f'.writable_{os.getpid()}'
    probe.touch()
    probe.unlink()
  except OSError as error:
    raise ValueError(f'cannot write to the workdir {workdir}: {error.strerror}; name another one') from error
