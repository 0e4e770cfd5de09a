"""The one trainer: `train` for everything with a gradient, `fit` for everything that is summed over a corpus."""
from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
import contextlib
import dataclasses
import functools
import json
import math
import pathlib
from typing import Any, Protocol

from absl import logging
import jax
from jax.experimental import multihost_utils
import jax.numpy as jnp
import numpy as np

from musiclm_jax import provenance, specs
from musiclm_jax.data.prefetch import Prefetch
from musiclm_jax.objective import Fit, Media, Objective
from musiclm_jax.training import (
    accumulate, checkpoint, goodput, integrity, metrics, optimizer as optimizers, state as states, tensorboard)
from musiclm_jax.training.partition import Partitioner
from musiclm_jax.training.state import Skeleton, TrainState
from musiclm_jax.training.workdir import (
    all_or_none, check_same_everywhere, Interruption, make_writable, owned, Stopped)

_COMPUTE = ('float32', 'bfloat16', 'float16')
Batches = Callable[..., dict[str, np.ndarray]]  # (step, process_index, process_count) -> this process's rows


@dataclasses.dataclass(frozen=True)
class Cadence:
  """How often things happen.

  Attributes:
    log_every, checkpoint_every, eval_every: in steps; 0 is at the end only.
    eval_batches: held-out batches of an evaluation. keep: checkpoints kept, the newest ones, at least 1.
    alarm_after: steps until a metric at its chance level, or under its floor, raises the alarm.
    tensorboard: whether reports go to TensorBoard, too, and with each evaluation what there is to hear of the first
      `clips` examples of the held-out ones.
  """

  log_every: int = 10
  checkpoint_every: int = 500
  eval_every: int = 0
  eval_batches: int = 4
  keep: int = 2
  alarm_after: int = 500
  tensorboard: bool = False
  clips: int = 4

  def __post_init__(self):
    if self.eval_batches < 1 or self.clips < 1:
      raise ValueError(f'eval_batches and clips must be at least 1, found {self.eval_batches} and {self.clips}; set '
                       'EVAL_BATCHES = None for no evaluation, TENSORBOARD = False for no clips')
    if self.keep < 1:
      raise ValueError(f'keep must be at least 1, found {self.keep}: without a checkpoint nothing is left of the run')


class Donation(Protocol):
  """Parameters that have been read, and which they are.

  Attributes:
    assets: files that mean something to these parameters, such as the vocabulary: the new run must have the same.
    name: to call it by in messages.
  """

  content_hash: str
  assets: Mapping[str, bytes]
  name: str

  def take_over(self, params: Any, buffers: Any) -> tuple[Any, Any]:
    """Pure dicts with those that it has in their places. Raises ValueError where one is missing or does not fit."""


class Donor(Protocol):
  """Where parameters come from at the start of a run, if not from the seed.

  Attributes:
    into: the subtree of the model that they fill. frozen: whether they then stay as they are.
  """

  into: str
  frozen: bool

  def load(self) -> Donation:
    """Reads them."""


@dataclasses.dataclass(frozen=True)
class InitFrom:
  """Parameters and buffers taken over from another run.

  Attributes:
    workdir: of the other run. part: which of its subtrees ("encoder/layers"), "" for all of it.
    into, frozen: see `Donor`.
  """

  workdir: str
  part: str = ''
  into: str = ''
  frozen: bool = False

  def load(self) -> Donation:
    return _OfRun(checkpoint.load(self.workdir), self)


@dataclasses.dataclass(frozen=True)
class _OfRun:
  loaded: checkpoint.Loaded
  source: InitFrom

  @property
  def content_hash(self) -> str:
    return self.loaded.content_hash

  @property
  def name(self) -> str:
    return str(self.source.workdir)

  @property
  def assets(self) -> Mapping[str, bytes]:
    part, theirs = map(checkpoint.keys, (self.source.part, self.loaded.objective.asset_part))
    shared = min(len(part), len(theirs))
    return self.loaded.assets if part[:shared] == theirs[:shared] else {}

  def take_over(self, params: Any, buffers: Any) -> tuple[Any, Any]:
    part, there = checkpoint.keys(self.source.part), (self.loaded.params, self.loaded.buffers)
    found = [checkpoint.at(tree, part) for tree in there]
    if not jax.tree.leaves(found):
      raise ValueError(f'the source checkpoint has no part {self.source.part!r}; it has '
                       f'{sorted({*there[0], *there[1]})}')
    # A part may have nothing that is trained (codes), or nothing else.
    return tuple(checkpoint.graft(ours, theirs, into=self.source.into) if jax.tree.leaves(theirs) else ours
                 for ours, theirs in zip((params, buffers), found))


@dataclasses.dataclass(frozen=True)
class Precision:
  """float32 parameters and optimizer always; `compute` is what the networks run in on the way.

  Attributes:
    compute: "float32", "bfloat16" or "float16".
    microbatches: parts of a batch whose gradients are taken one after another, to save memory.
    ema_decay: of the moving average of the parameters, below 1; 0 for none.
    max_skipped: how many steps in succession whose gradient is not finite are left out before the run ends. They are
      counted in the metric `skipped`. With 0 none is left out: the run ends with the loss that follows.
  """

  compute: str = 'float32'
  microbatches: int = 1
  ema_decay: float = 0.0
  max_skipped: int = 0

  def __post_init__(self):
    if self.compute not in _COMPUTE:
      raise ValueError(f'compute must be one of {", ".join(_COMPUTE)}, found {self.compute!r}')
    if self.microbatches < 1 or self.max_skipped < 0:
      raise ValueError('microbatches must be at least 1 and max_skipped at least 0, found '
                       f'{self.microbatches} and {self.max_skipped}')
    if not 0 <= self.ema_decay < 1:
      raise ValueError(f'ema_decay must be at least 0 and below 1, found {self.ema_decay}')


def train(*, objective: Objective, batches: Batches, optimizer: Any, workdir: str, num_steps: int,
          partitioner: Partitioner = Partitioner(), cadence: Cadence = Cadence(), precision: Precision = Precision(),
          eval_batches: Batches | None = None, init_from: Donor | str | Sequence[Donor] | None = None, seed: int = 0,
          data_processes: int = 0, stop_after: int | None = None, dry_run: bool = False, configuration: str = ''
          ) -> TrainState | None:
  """Runs, or resumes, `objective` until `num_steps` steps are done.

  A step is a function of (seed, step, state): N steps equal k steps, a restart and N - k more, bit for bit on
  CPUs (GPUs add in any order unless told not to: docs/training.md). The parameters come from this run's newest
  checkpoint, else from `init_from`, else from the seed.

  Args:
    batches: a pure function of the step. eval_batches: likewise, for the held-out metrics.
    optimizer: an `optimizer.Adam`, an optax transformation, or a mapping from group to either.
    init_from: a workdir stands for all of its parameters. Of several donors each has its turn, in order.
    data_processes: processes that prepare batches ahead; 0 is a thread of this one, enough where batches are read and
      not computed.
    stop_after: ends early, with a checkpoint, after this step; the schedule does not change.
    dry_run: prints what would run, and what it would read and write, and stops.
    configuration: text that starts the same run again; kept as `config.gin` and in every checkpoint.

  Returns the last state (None for a dry run). Raises ValueError for what the user can put right,
  `metrics.NonFiniteLoss` where the loss of a step, or more gradients in succession than may be, are not finite,
  `workdir.Stopped` after SIGTERM or Ctrl-C, with a checkpoint of the step that was running.
  """
  if cadence.tensorboard:
    tensorboard.check_installed()
  if num_steps < 0:
    raise ValueError(f'num_steps must be at least 0, found {num_steps}')
  wall = goodput.WallTime()
  last = num_steps if stop_after is None else min(num_steps, stop_after)
  with contextlib.ExitStack() as stack:
    with wall.lost_to('start'):
      run = _Run(objective, optimizer, workdir, partitioner, precision, init_from, seed, data_processes)
      run.check_batch(batches.batch_size)
      lineage = run.lineage(batches)
      if dry_run:
        print(run.describe(batches, num_steps))
        return None
      interruption = stack.enter_context(Interruption())
      checkpoints = stack.enter_context(run.begun(batches, lineage, configuration, keep=cadence.keep))
      state = jax.block_until_ready(run.restore_or_create(checkpoints, batches))
    with wall.reported(workdir):
      state = _loop(run, state, batches, eval_batches, checkpoints, cadence, last, wall, interruption)
      with wall.lost_to('checkpoints'):
        run.save(state, checkpoints)
  if int(state.step) < last:
    raise Stopped(interruption.signal, int(state.step))
  return state


def described(*, objective: Objective, optimizer: Any, partitioner: Partitioner, precision: Precision,
              init_from: Any = None) -> _Run:
  """A run that is looked at and never begun (`trace`, `state_bytes`); its mesh may be a description of devices."""
  return _Run(objective, optimizer, '', partitioner, precision, init_from, seed=0)


class _Run:
  """What stays the same for all steps of a run: the model's skeleton, layouts and compiled functions."""

  def __init__(self, objective, optimizer, workdir, partitioner, precision, init_from, seed, data_processes=0):
    self.data_processes = data_processes
    self.objective, self.workdir, self.partitioner = objective, workdir, partitioner
    init_from = InitFrom(init_from) if isinstance(init_from, str) else init_from
    self.donors = (() if init_from is None else tuple(init_from) if isinstance(init_from, (list, tuple)) else
                   (init_from,))
    self.seed = seed
    self.skeleton = Skeleton.of(objective)
    self.init_key, self.run_key = jax.random.split(jax.random.key(seed))
    frozen = tuple(donor.into for donor in self.donors if donor.frozen)
    abstract_params = states.nnx.to_pure_dict(self.skeleton.params)
    self.optimizer = optimizers.by_group(objective, abstract_params, optimizer, frozen)
    self.create = lambda key: states.create(objective, self.optimizer, key, keep_ema=precision.ema_decay > 0)
    self.abstract = jax.eval_shape(self.create, self.init_key)
    self.shardings = partitioner.state_shardings(self.skeleton, self.abstract)
    step = states.make_step(objective, self.skeleton, self.optimizer, microbatches=precision.microbatches,
                            compute_dtype=jnp.dtype(precision.compute), ema_decay=precision.ema_decay,
                            skip_nonfinite=precision.max_skipped > 0)
    self.max_skipped, self.microbatches = precision.max_skipped, precision.microbatches
    self.step = states.jitted_step(step, partitioner.platform, out_shardings=(self.shardings, None))
    # What comes out is read on the host: each process needs the whole of it.
    self.evaluate = jax.jit(lambda state, batch, key: objective.loss(
        self.model(state), batch, key, training=False), out_shardings=partitioner.replicated)
    self.media = jax.jit(self._media, static_argnames='clips', out_shardings=partitioner.replicated)

  def model(self, state: TrainState) -> states.nnx.Module:
    """The network as it is evaluated."""
    return self.skeleton.model(state.ema or state.params, state.buffers)

  def _media(self, state: TrainState, batch: Any, clips: int) -> Media | None:
    parts = self.partitioner.batch_parts
    rows = -(-clips // parts) * parts  # the mesh wants equal shares
    media = self.objective.media(self.model(state), jax.tree.map(lambda x: x[:rows], batch))
    return jax.tree.map(lambda x: x[:clips], media)

  @functools.cached_property
  def donations(self) -> tuple[Donation, ...]:
    return tuple(donor.load() for donor in self.donors)

  def donor_lineage(self) -> dict[str, str]:
    """Where the parameters came from; of a run that has begun, what is recorded, also where no donor is named any more.

    What a donor has done since does not concern such a run.
    """
    if checkpoint.latest_step(self.workdir) is not None:
      return checkpoint.recorded_lineage(self.workdir)
    return {donor.into or 'init': donation.content_hash for donor, donation in zip(self.donors, self.donations)}

  def lineage(self, batches: Batches) -> dict[str, str]:
    """What made the examples, and where the parameters came from.

    Raises ValueError where a run that begins would mix two versions of a network.
    """
    tokens, donors = getattr(getattr(batches, 'corpus', None), 'lineage', {}), self.donor_lineage()
    if checkpoint.latest_step(self.workdir) is None:  # one that has begun is compared with how it began
      for role, content in donors.items():
        if tokens.get(role, content) != content:
          raise ValueError(f'the tokens are those of {role} {tokens[role]}, and this is to start from {role} '
                           f'{content}: name the run that made them')
    return {**donors, **tokens}

  def save(self, state: TrainState, checkpoints: checkpoint.Checkpoints) -> None:
    """Saves a state that is fit to be saved: finite, and the same on all devices that hold copies."""
    used = {'params': state.params, 'buffers': state.buffers, 'ema': state.ema}
    integrity.check_finite(used, int(state.step))
    integrity.check_replicas(used, int(state.step), self.workdir)
    checkpoints.save(state)

  @contextlib.contextmanager
  def begun(self, batches: Batches, lineage: dict[str, str], configuration: str, **options: Any
            ) -> Iterator[checkpoint.Checkpoints]:
    """The workdir taken into possession, the mesh set, and the checkpoints, whose last save is whole at the end."""
    with contextlib.ExitStack() as stack:
      check_same_everywhere(code=provenance.code_digest(), configuration=configuration)
      problem = None
      try:
        make_writable(self.workdir)
        if jax.process_index() == 0:
          stack.enter_context(owned(self.workdir))
      except ValueError as error:
        problem = error
      # Without this the others would wait for a process that has given up.
      if not all_or_none(problem is None):
        raise problem or ValueError(f'another process of this run cannot use {self.workdir}; its own message says why')
      made_with = provenance.made_with(
          configuration=configuration, data=getattr(batches, 'fingerprint', ''), seed=self.seed)
      checkpoints = stack.enter_context(checkpoint.Checkpoints(
          self.workdir, self.objective, lineage=lineage, made_with=made_with, **options))
      stack.enter_context(self.partitioner.active())
      self.configuration = configuration
      yield checkpoints

  def trace(self, batch_size: int) -> jax.stages.Traced:
    """The step for a batch of this size, ready to be lowered. Raises ValueError where the mesh does not divide it."""
    self.check_batch(batch_size)
    laid_out = lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
    batch = {name: laid_out(rows, self.partitioner.of_rows)
             for name, rows in self.objective.batch_spec(batch_size).items()}
    with self.partitioner.active():
      return self.step.trace(jax.tree.map(laid_out, self.abstract, self.shardings), batch,
                             laid_out(self.run_key, self.partitioner.replicated))

  @property
  def state_bytes(self) -> int:
    """Of the state, on each device."""
    size = lambda x, sharding: math.prod(sharding.shard_shape(x.shape)) * x.dtype.itemsize
    return sum(jax.tree.leaves(jax.tree.map(size, self.abstract, self.shardings)))

  def check_batch(self, size: int) -> None:
    if self.microbatches > 1 and not self.objective.mean_over_examples:
      raise ValueError(f'the loss of {type(self.objective).__name__} is not a mean over examples: microbatches must '
                       'be 1; raise its own number of chunks to save memory')
    self.partitioner.check_batch(size, self.microbatches)

  def describe(self, batches: Batches, num_steps: int) -> str:
    """The resolved experiment: its settings, then what it comes to in a few plain lines.

    Raises what a run would raise where the parameters that it starts from cannot be read.
    """
    started_from = self.donor_lineage()
    latest = checkpoint.latest_step(self.workdir)
    sizes = {name: 0 for name in self.objective.groups}
    for leaf, label in zip(jax.tree.leaves(self.abstract.params),
                           jax.tree.leaves(states.labels(self.objective, self.abstract.params))):
      sizes[label] += leaf.size
    batch = {k: f'{v.dtype}{list(v.shape)}' for k, v in self.objective.batch_spec(batches.batch_size).items()}
    lines = [
        specs.to_json(self.objective),
        f'objective   {type(self.objective).__name__} {specs.fingerprint(self.objective)}',
        f'parameters  {sum(sizes.values()):,} ' + ', '.join(f'{k} {v:,}' for k, v in sizes.items()),
        f'mesh        {dict(self.partitioner.mesh.shape)}',
        f'batch       {batch}',
        f'reads       {getattr(batches, "fingerprint", batches)}',
        *(f'starts from {role} {content}' for role, content in started_from.items()),
        f'writes      {pathlib.Path(self.workdir).absolute()}',
        f'steps       {latest or 0} to {num_steps}',
    ]
    return '\n'.join(lines)

  def restore_or_create(self, checkpoints: checkpoint.Checkpoints, batches: Batches) -> TrainState:
    """(1) this run's newest checkpoint, (2) another run's parameters, (3) scratch: in this order."""
    state = self._restored(checkpoints)
    if state is None:
      state = self._created(batches)
    self.__dict__.pop('donations', None)  # what was taken from them are copies: the rest need not stay in memory
    if self.configuration and jax.process_index() == 0:  # not before: a run that is refused leaves the file as it was
      partial = pathlib.Path(self.workdir, 'config.gin.partial')
      partial.write_text(self.configuration)
      partial.replace(partial.with_suffix(''))
    return state

  def _restored(self, checkpoints: checkpoint.Checkpoints) -> TrainState | None:
    described = lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s)
    targets = jax.tree.map(described, self.abstract, self.shardings)
    if (state := checkpoints.restore(targets)) is not None:
      logging.info('resuming %s at step %d', self.workdir, int(state.step))
    return state

  def _created(self, batches: Batches) -> TrainState:
    state = self._take_over(jax.jit(self.create, out_shardings=self.shardings)(self.init_key))
    if type(self.objective).start is Objective.start:
      return state
    # The start sees the network as it will be, and changes nothing that was taken over.
    return self._take_over(_of_one_device(self._data_dependent_start(state, batches)))

  def _take_over(self, state: TrainState) -> TrainState:
    if not self.donors:
      return state
    params, buffers = state.params, state.buffers
    for donation in self.donations:
      checkpoint.check_assets(donation.assets, self.objective.assets(), donation.name)
      params, buffers = donation.take_over(params, buffers)
    taken = dataclasses.replace(state, params=params, buffers=buffers, ema=params if state.ema else {})
    return jax.tree.map(_laid_out, taken, self.shardings)

  def _data_dependent_start(self, state: TrainState, batches: Batches) -> TrainState:
    """Variables from the first batches (codebooks by k-means)."""
    first = [self.partitioner.global_batch(batches(step, jax.process_index(), jax.process_count()))
             for step in range(self.objective.start_batches(batches.batch_size))]

    def start(state, first, key):
      # Batch after batch, not process after process: the order of rows is that of one process.
      batch = {name: jnp.concatenate([batch[name] for batch in first]) for name in first[0]}
      return states.started(self.objective, self.skeleton, state, batch, key)

    start = jax.jit(start, out_shardings=self.shardings)
    return start(state, first, jax.random.fold_in(self.init_key, 1))


def _of_one_device(state: TrainState) -> TrainState:
  """With what one device made on all that hold copies: of the same rows each may make something else, since GPUs add in
  any order. Of several processes' arrays those are left that no process has as a whole."""
  there, tree = jax.tree.flatten((state.params, state.buffers, state.ema))
  hosts = [np.asarray(x) if x.is_fully_addressable or x.sharding.is_fully_replicated else None for x in there]
  if jax.process_count() > 1:
    hosts = multihost_utils.broadcast_one_to_all(hosts)
  params, buffers, ema = tree.unflatten(
      [x if host is None else _put(np.asarray(host), x.sharding) for x, host in zip(there, hosts)])
  return dataclasses.replace(state, params=params, buffers=buffers, ema=ema)


def _put(host: np.ndarray, sharding: jax.sharding.Sharding) -> jax.Array:
  return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])


def _laid_out(x: jax.Array | np.ndarray, sharding: jax.sharding.Sharding) -> jax.Array:
  """A copy with this layout. What comes from a donor lies on one device of each process, or on the host."""
  if isinstance(x, jax.Array) and x.sharding.is_equivalent_to(sharding, x.ndim):
    return jnp.copy(x)
  return _put(np.asarray(x), sharding)


def _loop(run: _Run, state: TrainState, batches: Batches, eval_batches: Batches | None,
          checkpoints: checkpoint.Checkpoints, cadence: Cadence, last: int, wall: goodput.WallTime,
          interruption: Interruption) -> TrainState:
  """The state after the last step."""
  first = wall.first = wall.last = int(state.step)
  writer = metrics.MetricsWriter(run.workdir, first, tensorboard=cadence.tensorboard)
  wall.again = writer.forgotten
  if first >= last:
    return state
  alarm, held_out_alarm = (metrics.BarAlarm(cadence.alarm_after, held_out=held_out) for held_out in (False, True))
  skipped = metrics.SkippedSteps(run.max_skipped)
  progress = metrics.Progress(pathlib.Path(run.workdir).name, first, last)
  feed = Prefetch(batches, first, last - first, process_index=jax.process_index(), process_count=jax.process_count(),
                  processes=run.data_processes)
  every = lambda step, period: period > 0 and step % period == 0
  waits = metrics.WaitAlarm()
  pending: tuple[int, Any] | None = None

  def settle() -> None:
    """Reads the metrics of the step before, while the device works on the next one."""
    nonlocal pending
    if pending is None:
      return
    done, values = pending
    pending = None
    metrics.check_finite(done, values['loss'], lambda: _keep_batch(run, batches, done))
    if 'skipped' in values:
      skipped(done, values['skipped'])
    checkpoints.check()  # a save that failed ends the run now, not at the next save
    report = every(done, cadence.log_every) or done == last
    if report:
      flat = metrics.scalars(jax.device_get(values))
      if 'skipped' in flat:  # of all steps since the last report, so that the lines of a run add up
        flat['skipped'] = skipped.report()
      writer.write(done, flat)
      alarm(done, flat)
      if waits(feed.waited_share):
        logging.warning('step %d: training waited for data %.0f%% of the time since step %d; DATA_PROCESSES, now %d, '
                        'says how many processes prepare batches', done, 100 * feed.waited_share,
                        max(first, done - cadence.log_every), run.data_processes)
      feed.reset_wait()
    progress.update(done, f'loss {float(values["loss"]):.4f}', report=report)

  try:
    for step in range(first, last):
      with wall.lost_to('data'):
        batch = next(feed)
      with wall.lost_to('compilation') if step == first else contextlib.nullcontext():
        state, values = run.step(state, run.partitioner.global_batch(batch), run.run_key)
      done = wall.last = step + 1
      settle()
      pending = (done, values)
      # All lines of a step are written before it is saved: a run that goes on from there has them.
      if eval_batches is not None and (every(done, cadence.eval_every) or done == last):
        jax.block_until_ready(values)
        with wall.lost_to('evaluation'):
          measured = held_out(run, state, eval_batches, cadence.eval_batches)
          writer.write(done, measured, part='eval')
          # Where each text stands with the wrong clip, training learns the pairs by heart, and only this tells.
          held_out_alarm(done, measured)
          if cadence.tensorboard:
            _write_media(run, state, eval_batches, writer, cadence.clips)
      if every(done, cadence.checkpoint_every) and done < last:
        settle()
        with wall.lost_to('checkpoints'):
          run.save(state, checkpoints)
      if interruption.asked(done):
        break
    settle()
  finally:
    progress.close()
    feed.close()
    writer.close()
  return state


def _keep_batch(run: _Run, batches: Batches, step: int) -> pathlib.Path | None:
  """Writes down which examples the batch of a step had."""
  if not hasattr(batches, 'examples') or jax.process_index():
    return None
  rows = [{k: v for k, v in example.items() if isinstance(v, (str, int, float))}
          for example in batches.examples(step - 1)]
  path = pathlib.Path(run.workdir) / f'batch_of_step_{step}.json'
  path.write_text(json.dumps(rows, indent=1))
  return path


def held_out(run: _Run, state: TrainState, batches: Batches, count: int) -> dict[str, float]:
  """Metrics over the first `count` evaluation batches, the same ones and the same masks every time."""
  evaluate = lambda batch, key: run.evaluate(state, run.partitioner.global_batch(batch), key)
  rows = (batches(i, jax.process_index(), jax.process_count()) for i in range(count))
  return metrics.held_out(run.objective, evaluate, rows, run.run_key)


def _write_media(run: _Run, state: TrainState, batches: Batches, writer: metrics.MetricsWriter, clips: int) -> None:
  """What there is to hear of the first held-out examples, the same ones every time, and its spectrograms."""
  from musiclm_jax.evaluation import pictures  # matplotlib is slow to load, and few runs draw
  batch = run.partitioner.global_batch(batches(0, jax.process_index(), jax.process_count()))
  media = jax.device_get(run.media(state, batch, clips=clips))
  if media is not None:
    writer.write_media(int(state.step), media, pictures.spectrograms)


def fit(*, objective: Fit, batches: Batches, num_batches: int, workdir: str, init_from: InitFrom,
        partitioner: Partitioner = Partitioner(), save_every: int = 20, seed: int = 0, data_processes: int = 0,
        dry_run: bool = False, configuration: str = '') -> TrainState | None:
  """Fits, or continues to fit, `objective` on the features of `num_batches` batches.

  Each pass over the features is a step; every `save_every` of them are saved, and an interrupted fit continues from
  there. `data_processes` is that of `train`.
  """
  if jax.process_count() > 1:
    raise ValueError('a fit runs in one process, on all of its devices: start it once, without --distributed')
  run = _Run(objective, optimizers.Adam(0.0), workdir, partitioner, Precision(), init_from, seed)
  run.check_batch(batches.batch_size)
  passes = sum(iterations for _, iterations in objective.phases())
  if dry_run:
    print(run.describe(batches, passes))
    return None
  lineage = run.donor_lineage()
  with Interruption() as interruption, run.begun(batches, lineage, configuration) as checkpoints:
    state = run.restore_or_create(checkpoints, batches)
    if int(state.step) < passes:
      with Prefetch(batches, 0, num_batches, processes=data_processes) as ahead:
        rows = accumulate.gather_features(
            objective, run.skeleton, state.params, state.buffers, _until_asked(ahead, interruption, int(state.step)),
            partitioner, num_batches=num_batches, seed=seed)
      writer = metrics.MetricsWriter(workdir, int(state.step))
      for phase, done, buffers, values in accumulate.run(
          objective, state.buffers, rows, partitioner, run.run_key, first=int(state.step)):
        state = dataclasses.replace(state, buffers=buffers, step=jnp.int32(done))
        writer.write(done, metrics.scalars(jax.device_get(values)), part=phase)
        stop = interruption.asked(done) and done < passes
        if done % save_every == 0 or done == passes or stop:
          integrity.check_finite(state.buffers, done)
          checkpoints.save(state)
        if stop:
          break
  if int(state.step) < passes:
    raise Stopped(interruption.signal, int(state.step))
  return state


def _until_asked(batches: Iterable[Any], interruption: Interruption, step: int) -> Iterator[Any]:
  """The batches of a fit, which are no steps: it may end between any two of them."""
  for batch in batches:
    if interruption.signal:
      raise Stopped(interruption.signal, step)
    yield batch
