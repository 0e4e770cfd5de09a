"""The state of a run as pure dictionaries, and the pure function that makes one step of it."""
from __future__ import annotations

from collections.abc import Callable
import dataclasses
import functools
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
import optax

from musiclm_jax.objective import Aux, Batch, Objective

Tree = Any  # a nested dict of arrays


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
  """Everything that a step changes.

  Attributes:
    step: int32 scalar, the number of steps taken.
    params, buffers: pure dicts of the model's `Param`s and of its other variables.
    opt_state: the optimizer's.
    ema: a moving average of the parameters, empty where none is kept.
  """

  step: jax.Array
  params: Tree
  buffers: Tree
  opt_state: Tree
  ema: Tree


@dataclasses.dataclass(frozen=True)
class Skeleton:
  """A model without its arrays: how to put it together, and what its variables look like.

  Attributes:
    graphdef: the static half of the module.
    params, buffers: nnx States of abstract variables, whose metadata `axes` name their dimensions.
  """

  graphdef: Any
  params: Any
  buffers: Any

  @classmethod
  def of(cls, objective: Objective) -> Skeleton:
    abstract = nnx.eval_shape(lambda: objective.model(nnx.Rngs(0)))
    return cls(*nnx.split(abstract, nnx.Param, ...))

  def model(self, params: Tree, buffers: Tree) -> nnx.Module:
    return nnx.merge(self.graphdef, params, buffers)

  def axes(self) -> tuple[Tree, Tree]:
    """Logical axes of params and buffers, as pure dicts of tuples."""
    return tuple(_axes_of(state) for state in (self.params, self.buffers))

  def count(self) -> int:
    return sum(v.size for v in jax.tree.leaves(nnx.to_pure_dict(self.params)))


def _axes_of(state: Any) -> Tree:
  tree: Tree = {}
  for path, variable in nnx.to_flat_state(state):
    node = tree
    for name in path[:-1]:
      node = node.setdefault(name, {})
    axes = variable.get_metadata().get('axes', (None,) * len(variable.shape))
    if len(axes) != len(variable.shape):
      raise ValueError(f'{"/".join(map(str, path))}: axes {axes} for shape {variable.shape}')
    node[path[-1]] = tuple(axes)
  return tree


def split_model(model: nnx.Module) -> tuple[Tree, Tree]:
  """Pure dicts of a model's parameters and buffers."""
  _, params, buffers = nnx.split(model, nnx.Param, ...)
  return nnx.to_pure_dict(params), nnx.to_pure_dict(buffers)


def labels(objective: Objective, params: Tree) -> Tree:
  """The group name of each parameter, in the tree of the parameters."""
  def label(path, _):
    name = objective.group(tuple(str(getattr(k, 'key', k)) for k in path))
    if name not in objective.groups:
      raise ValueError(f'parameter {jax.tree_util.keystr(path)} is in group {name!r}, not one of {objective.groups}')
    return name
  return jax.tree_util.tree_map_with_path(label, params)


def create(objective: Objective, optimizer: optax.GradientTransformation, key: jax.Array, *,
           keep_ema: bool) -> TrainState:
  """A fresh state; jit it with output shardings so that no device ever holds the whole of it."""
  params, buffers = split_model(objective.model(nnx.Rngs(key)))
  ema = jax.tree.map(jnp.copy, params) if keep_ema else {}
  return TrainState(jnp.zeros((), jnp.int32), params, buffers, optimizer.init(params), ema)


def started(objective: Objective, skeleton: Skeleton, state: TrainState, batch: Batch, key: jax.Array) -> TrainState:
  """A fresh state after the objective's data-dependent start; an average of the parameters starts from there too."""
  found = dict(jax.tree_util.tree_leaves_with_path(
      objective.start(skeleton.model(state.params, state.buffers), batch, key)))
  params, buffers = (jax.tree_util.tree_map_with_path(found.pop, tree) for tree in (state.params, state.buffers))
  if found:
    raise ValueError(f'the start of {type(objective).__name__} names variables that the model does not have')
  ema = jax.tree.map(jnp.copy, params) if state.ema else {}
  return dataclasses.replace(state, params=params, buffers=buffers, ema=ema)


def cast(tree: Tree, dtype: Any) -> Tree:
  """Floating leaves in `dtype`; the gradient flows back in the original precision."""
  return jax.tree.map(lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree)


def _strided(batch: Batch, parts: int) -> Batch:
  """[B, ...] -> [parts, B / parts, ...], row i to part i mod parts, so that each part spans all devices."""
  return jax.tree.map(lambda x: jnp.moveaxis(x.reshape((-1, parts, *x.shape[1:])), 1, 0), batch)


def gradients(objective: Objective, skeleton: Skeleton, state: TrainState, batch: Batch, key: jax.Array, *,
              microbatches: int, compute_dtype: Any) -> tuple[jax.Array, Aux, Tree]:
  """Loss, metrics and statistics, and the gradient, of one step's whole batch.

  Microbatches never change a loss: losses and metrics are means over examples, statistics are sums.
  """
  def loss_fn(params, batch):
    model = skeleton.model(cast(params, compute_dtype), state.buffers)
    loss, aux = objective.loss(model, batch, key, training=True)
    return loss.astype(jnp.float32), aux

  value_and_grad = jax.value_and_grad(loss_fn, has_aux=True)
  if microbatches == 1:
    (loss, aux), grads = value_and_grad(state.params, batch)
    return loss, aux, grads

  def add(total, batch):
    return jax.tree.map(jnp.add, total, value_and_grad(state.params, batch)), ()

  parts = _strided(batch, microbatches)
  first = jax.tree.map(lambda x: x[0], parts)
  rest = jax.tree.map(lambda x: x[1:], parts)
  ((loss, aux), grads), _ = jax.lax.scan(add, value_and_grad(state.params, first), rest)
  mean = lambda tree: jax.tree.map(lambda x: x / microbatches, tree)
  return loss / microbatches, Aux(mean(aux.metrics), aux.statistics), mean(grads)


def make_step(objective: Objective, skeleton: Skeleton, optimizer: optax.GradientTransformation, *,
              microbatches: int = 1, compute_dtype: Any = jnp.float32, ema_decay: float = 0.0,
              skip_nonfinite: bool = False
              ) -> Callable[[TrainState, Batch, jax.Array], tuple[TrainState, dict[str, jax.Array]]]:
  """The training step: a pure function of (state, batch, the run's key).

  With `skip_nonfinite`, a step whose gradient or statistics are not finite changes nothing but the step number, and
  the metric `skipped` is 1.
  """

  def step(state: TrainState, batch: Batch, run_key: jax.Array):
    # The step's randomness depends on (seed, step) alone, which is what makes a resumed run exact.
    loss_key, update_key = jax.random.split(jax.random.fold_in(run_key, state.step))
    loss, aux, grads = gradients(objective, skeleton, state, batch, loss_key, microbatches=microbatches,
                                 compute_dtype=compute_dtype)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    buffers, update_metrics = objective.update(state.buffers, aux.statistics, update_key)
    ema = jax.tree.map(lambda e, p: ema_decay * e + (1 - ema_decay) * p, state.ema, params) if state.ema else {}
    metrics = {'loss': loss, **aux.metrics, **update_metrics, **_norms(objective, grads)}
    after = TrainState(state.step + 1, params, buffers, opt_state, ema)
    if skip_nonfinite:
      fine = _finite((grads, aux.statistics))
      unchanged = dataclasses.replace(state, step=after.step)
      after = jax.tree.map(lambda new, old: jnp.where(fine, new, old), after, unchanged)
      metrics['skipped'] = 1.0 - fine
    return after, metrics

  return step


def jitted_step(step: Callable[..., Any], platform: str, **options: Any) -> Callable[..., Any]:
  """A step of `make_step`, to be compiled with what makes it faster on a platform; it takes the state over.

  LLVM leaves the widest vectors of a CPU unused, for the sake of code that seldom needs them. Where there are none, one
  becomes two.
  """
  compiler_options = {'xla_cpu_prefer_vector_width': 512} if platform == 'cpu' else {}
  return jax.jit(step, donate_argnums=0, compiler_options=compiler_options, **options)


def _finite(tree: Tree) -> jax.Array:
  """Whether all numbers are finite."""
  leaves = [x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.inexact)]
  return jnp.stack([jnp.all(jnp.isfinite(x)) for x in leaves]).all()


def _norms(objective: Objective, grads: Tree) -> dict[str, jax.Array]:
  """Global gradient norm of each group, before clipping."""
  squares = {name: jnp.zeros(()) for name in objective.groups}
  for grad, label in zip(jax.tree.leaves(grads), jax.tree.leaves(labels(objective, grads))):
    squares[label] += jnp.sum(jnp.square(grad.astype(jnp.float32)))
  return {f'gradient_norm_{name}': jnp.sqrt(square) for name, square in squares.items()}


def compiled(model: Any, method: str | Callable[..., Any], *, parallel: bool = False, **fixed: Any
             ) -> Callable[..., Any]:
  """`model.<method>` as one jitted function of arrays, with the keyword arguments `fixed` held constant.

  With `parallel`, each of this process's devices takes an equal share of the rows (the first axis) of every argument
  and computes what it would compute alone; the results have all rows.

  `method` may also be a function `(model, *arrays)`. The parameters are arguments of the compiled function
  and not constants in it, so that compiling stays quick. Anything that is not an `nnx.Module` (a stand-in
  in a test, a model that compiles itself) is called as it is.
  """
  if not isinstance(model, nnx.Module):
    call = functools.partial(method, model) if callable(method) else getattr(model, method)
    return functools.partial(call, **fixed)
  graphdef, state = nnx.split(model)
  state = nnx.to_pure_dict(state)
  parallel = parallel and jax.local_device_count() > 1
  if parallel:
    state = jax.device_put(state, jax.sharding.NamedSharding(_devices(), jax.P()))
  run = _jitted(graphdef, method, tuple(sorted(fixed.items())), parallel)
  return lambda *arrays: run(state, *arrays)


@functools.cache
def _devices() -> jax.sharding.Mesh:
  return jax.sharding.Mesh(jax.local_devices(), ('rows',))


@functools.lru_cache(maxsize=16)
def _jitted(graphdef: nnx.GraphDef, method: str | Callable[..., Any], fixed: tuple, parallel: bool
            ) -> Callable[..., Any]:
  """One program for all models of one architecture: the trained and the untrained one share it."""

  def run(state: Any, *arrays: jax.Array) -> Any:
    model = nnx.merge(graphdef, state)
    call = functools.partial(method, model) if callable(method) else getattr(model, method)
    return call(*arrays, **dict(fixed))

  if not parallel:
    return jax.jit(run)
  # Not a partitioned program: each device runs the one that a single device would, so the numbers are the same.
  rows = lambda state, *arrays: jax.shard_map(
      run, mesh=_devices(), in_specs=(jax.P(), *(jax.P('rows') for _ in arrays)), out_specs=jax.P('rows'),
      check_vma=False)(state, *arrays)
  return jax.jit(rows)
