"""Optimizers: Adam with a schedule as one frozen record, and one optimizer for each parameter group."""
from __future__ import annotations

from collections.abc import Mapping
import dataclasses
from typing import Any

import jax
import optax

from musiclm_jax.objective import Objective
from musiclm_jax.training.state import labels


# Biases and scales of norms, which have a second axis where layers are stacked.
_VECTORS = ('b', 'bias', 'scale')


def _matrices(params: Any) -> Any:
  """Which parameters weight decay acts on."""
  return jax.tree_util.tree_map_with_path(
      lambda path, p: p.ndim > 1 and getattr(path[-1], 'key', None) not in _VECTORS, params)


@dataclasses.dataclass(frozen=True)
class Adam:
  """Adam with decoupled weight decay (arXiv 1711.05101), gradient clipping and a learning rate schedule.

  Attributes:
    learning_rate: peak.
    warmup_steps: linear from 0.
    decay_steps: steps from the start to the end of the decay: a length of its own, never the number of
      steps of the run, so that a longer run or a debug run does not change the schedule.
    schedule: "constant", "cosine" (to `final_share` of the peak) or "inverse_sqrt".
    weight_decay: on matrices only, not on biases and the scales of norms.
    clip_norm: bound on the global norm of the group's gradient; 0 for none.
  """

  learning_rate: float
  warmup_steps: int = 0
  decay_steps: int = 0
  schedule: str = 'constant'
  final_share: float = 0.0
  b1: float = 0.9
  b2: float = 0.999
  epsilon: float = 1e-8
  weight_decay: float = 0.0
  clip_norm: float = 1.0

  def rate(self) -> optax.Schedule:
    peak, warmup = self.learning_rate, self.warmup_steps
    if self.schedule == 'constant':
      after = optax.constant_schedule(peak)
    elif self.schedule == 'cosine':
      if self.decay_steps <= warmup:
        raise ValueError(f'decay_steps {self.decay_steps} must exceed warmup_steps {warmup}')
      after = optax.cosine_decay_schedule(peak, self.decay_steps - warmup, self.final_share)
    elif self.schedule == 'inverse_sqrt':
      scale = max(warmup, 1)
      after = lambda count: peak * (scale / (count + scale)) ** 0.5
    else:
      raise ValueError(f'schedule must be "constant", "cosine" or "inverse_sqrt", found {self.schedule!r}')
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), after], [warmup]) if warmup else after

  def transform(self) -> optax.GradientTransformation:
    return optax.chain(
        optax.clip_by_global_norm(self.clip_norm) if self.clip_norm else optax.identity(),
        optax.scale_by_adam(self.b1, self.b2, self.epsilon),
        optax.add_decayed_weights(self.weight_decay, _matrices) if self.weight_decay else optax.identity(),
        optax.scale_by_learning_rate(self.rate()))


def by_group(objective: Objective, params: Any, optimizer: Any, frozen: tuple[str, ...] = ()
             ) -> optax.GradientTransformation:
  """One transformation that treats each group on its own, its gradient clipping too.

  Args:
    optimizer: an `Adam`, an optax transformation, or a mapping from group to either.
    frozen: path prefixes ("encoder", "encoder/layers"; "" for all) of parameters that stay as they are.

  Groups whose loss weight is zero, and frozen parameters, are not updated at all: Adam moves on zero gradients.
  """
  given = optimizer if isinstance(optimizer, Mapping) else {name: optimizer for name in objective.groups}
  if set(given) != set(objective.groups):
    raise ValueError(f'optimizer is given for the groups {sorted(given)}, but the objective has {objective.groups}')
  active = objective.active()
  transforms = {name: (o.transform() if hasattr(o, 'transform') else o) if active[name] else optax.set_to_zero()
                for name, o in given.items()}
  tree = labels(objective, params)
  if frozen:
    transforms['frozen'] = optax.set_to_zero()
    prefixes = [tuple(prefix.split('/')) if prefix else () for prefix in frozen]

    def relabel(path, label):
      keys = tuple(str(getattr(k, 'key', k)) for k in path)
      return 'frozen' if any(keys[:len(p)] == p for p in prefixes) else label

    tree = jax.tree_util.tree_map_with_path(relabel, tree)
  return optax.multi_transform(transforms, tree)
