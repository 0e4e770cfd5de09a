"""Checkpoints: asynchronous saves that are whole or invisible, exact restores, and loading for use.

A step directory holds the items `params`, `buffers`, `optimizer`, `ema` (Orbax trees) and `about` with
`specs.json`: the objective as JSON, the lineage, and the files that the model needs (its assets).
"""
from __future__ import annotations

import base64
from collections.abc import Iterator, Mapping, Sequence
import contextlib
import dataclasses
import hashlib
import itertools
import json
import os
import pathlib
import re
from typing import Any

from absl import logging
from flax import nnx
import jax
import numpy as np
import orbax.checkpoint as ocp

from musiclm_jax import specs
from musiclm_jax.objective import Fit, Objective
from musiclm_jax.training import integrity, workdir as workdirs
from musiclm_jax.training.state import Skeleton, TrainState

_MARKER = '_CHECKPOINT_METADATA'  # what Orbax writes into a step when the rest of it is there
_ITEMS = {'params': 'params', 'buffers': 'buffers', 'optimizer': 'opt_state', 'ema': 'ema'}


def _directory(workdir: str | os.PathLike) -> pathlib.Path:
  return pathlib.Path(workdir).absolute() / 'checkpoints'


class SaveFailed(RuntimeError):
  """A checkpoint could not be written; the message says why."""


class Checkpoints:
  """The checkpoints of one run. `save`, `check`, and the end of the `with` block raise `SaveFailed`.

  Raises ValueError from `restore` where the newest checkpoint is of another architecture or optimizer, naming the
  first thing that differs, and where there are checkpoints of which none can be read. One that cannot be read is set
  aside with a warning where one before it can.
  """

  def __init__(self, workdir: str | os.PathLike, objective: Objective, *, keep: int = 2,
               lineage: Mapping[str, str] | None = None, made_with: Mapping[str, Any] | None = None):
    self._made_with = dict(made_with or {})
    self._directory = _directory(workdir)
    self._objective = objective
    self._lineage = dict(lineage or {})
    options = ocp.CheckpointManagerOptions(max_to_keep=keep, cleanup_tmp_directories=True)
    handlers = {name: ocp.StandardCheckpointHandler() for name in _ITEMS}
    try:
      self._manager = ocp.CheckpointManager(
          self._directory, options=options,
          item_handlers={**handlers, 'about': ocp.JsonCheckpointHandler('specs.json')})
    except OSError as error:
      raise ValueError(f'cannot write checkpoints under {workdir}: {error.strerror}; choose another workdir') from error

  def save(self, state: TrainState) -> None:
    """Starts saving; returns once the arrays have left the device."""
    step = int(state.step)
    if step in self._manager.all_steps():
      return
    about = {
        'objective': json.loads(specs.to_json(self._objective)),
        'lineage': self._lineage,
        'made_with': self._made_with,
        'checksum_version': integrity.VERSION,
        'checksums': {name: integrity.checksums(getattr(state, field)) for name, field in _ITEMS.items()},
        'assets': {k: base64.b64encode(v).decode() for k, v in self._objective.assets().items()},
    }
    items = {name: ocp.args.StandardSave(tree) for name, field in _ITEMS.items()
             if jax.tree.leaves(tree := getattr(state, field))}
    with self._failures():
      if not self._manager.save(step, args=ocp.args.Composite(**items, about=ocp.args.JsonSave(about))):
        raise RuntimeError(f'step {step} is not above step {self._manager.latest_step()}, which is there')

  def restore(self, abstract: TrainState) -> TrainState | None:
    """The newest readable state, laid out as `abstract` says (shapes with shardings); None for a fresh run."""
    unreadable: dict[int, str] = {}
    restored = None
    for step in sorted(self._manager.all_steps(), reverse=True):
      try:
        restored, cause = self._read(step, abstract), ''
      except _OtherRun:
        raise
      except Exception as error:  # Orbax raises many kinds for a torn directory
        cause = (str(error).splitlines() or [type(error).__name__])[0][:200]
      if workdirs.all_or_none(not cause):
        break
      restored, unreadable[step] = None, cause or 'another process cannot read it'
    torn = [step for step in unreadable if step not in _whole_steps(self._directory)]
    if restored is None and len(unreadable) > len(torn):
      step, cause = next((s, c) for s, c in unreadable.items() if s not in torn)
      raise ValueError(f'no checkpoint under {self._directory} can be read; of step {step}: {cause}. Put that right, '
                       'or choose another workdir to begin anew')
    self._set_aside(unreadable)
    return restored

  def _read(self, step: int, abstract: TrainState) -> TrainState:
    about = _read_about(self._directory, step)
    if about is not None:
      _check_same(about, self._objective, self._lineage, abstract, self._directory / str(step))
    if step not in _whole_steps(self._directory):
      raise ValueError(f'its marker {_MARKER} is missing')
    if about is None:
      raise ValueError('its specs.json cannot be read')
    args = {name: ocp.args.StandardRestore(tree) for name, field in _ITEMS.items()
            if jax.tree.leaves(tree := getattr(abstract, field))}
    restored = self._manager.restore(step, args=ocp.args.Composite(**args))
    for name in args:
      _check_whole(about, name, restored[name])
    if difference := specs.first_difference(_objective(about, self._directory / str(step)), self._objective):
      logging.warning('%s goes on with other settings than it was saved with: %s (checkpoint != experiment)',
                      self._directory / str(step), difference)
    trees = {field: restored[name] if name in args else {} for name, field in _ITEMS.items()}
    return TrainState(step=jax.device_put(np.int32(step), abstract.step.sharding), **trees)

  def _set_aside(self, unreadable: Mapping[int, str]) -> None:
    """Moves steps away, so that a later save of the same step is not taken for done."""
    target = self._directory.parent / 'checkpoints_unreadable'
    for step, cause in unreadable.items():
      logging.warning('checkpoint %d under %s cannot be read (%s); it is moved to %s and the one before it is used',
                      step, self._directory, cause, target)
      if jax.process_index() == 0:
        target.mkdir(exist_ok=True)
        place = next(p for n in itertools.count() if not (p := target / (f'{step}.{n}' if n else str(step))).exists())
        (self._directory / str(step)).rename(place)
    workdirs.all_or_none(True)  # no process lists the steps before they are gone
    if unreadable:
      self._manager.reload()

  def check(self) -> None:
    """Raises what has gone wrong with the save in flight, without waiting for it."""
    with self._failures():
      self._manager.check_for_errors()

  @contextlib.contextmanager
  def _failures(self) -> Iterator[None]:
    try:
      yield
    except Exception as error:  # of many kinds, from several threads
      cause = ' '.join(str(error).split()) or type(error).__name__
      # TensorStore tells what the system said behind all that it was doing, which may be pages.
      system = re.search(r"os_error_code='(\d+)'", cause)
      cause = (f'{os.strerror(int(system[1]))}: ' if system else '') + cause[:300]
      raise SaveFailed(f'a checkpoint could not be saved under {self._directory} ({cause}); the steps there are whole: '
                       'run the same command again to go on from the newest') from error

  def __enter__(self) -> Checkpoints:
    return self

  def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
    # After an error the save in flight still becomes whole, but what it raises must not hide that error.
    try:
      with self._failures():
        self._manager.wait_until_finished()
    except SaveFailed as error:
      if kind is None:
        raise
      logging.warning('%s', error)
    finally:
      self._manager.close()


def latest_step(workdir: str | os.PathLike) -> int | None:
  """The newest whole step, without opening anything."""
  return max(_whole_steps(_directory(workdir)), default=None)


def _whole_steps(directory: pathlib.Path) -> list[int]:
  if not directory.is_dir():
    return []
  return [int(p.name) for p in directory.iterdir() if p.name.isdigit() and (p / _MARKER).exists()]


def _read_about(directory: pathlib.Path, step: int) -> dict[str, Any] | None:
  try:
    return json.loads((directory / str(step) / 'about' / 'specs.json').read_text())
  except (OSError, ValueError):
    return None


def recorded_lineage(workdir: str | os.PathLike) -> dict[str, str]:
  """What a run that has begun was made of, by its newest checkpoint that can say so; {} where none can."""
  directory = _directory(workdir)
  for step in sorted(_whole_steps(directory), reverse=True):
    about = _read_about(directory, step)
    if isinstance(found := at(about, ['lineage']), dict):
      return found
  return {}


def read_about(workdir: str | os.PathLike) -> dict[str, Any]:
  """What the newest whole checkpoint says of itself: objective, lineage, what it was made with. No arrays are read.

  Raises FileNotFoundError where there is none, ValueError where it is damaged.
  """
  return _find(workdir)[1]


def _find(workdir: str | os.PathLike, step: int | None = None) -> tuple[pathlib.Path, dict[str, Any]]:
  """The directory of the newest (or the named) step, and what it says of itself."""
  directory = _directory(workdir)
  step = latest_step(workdir) if step is None else step
  if step is None or not (directory / str(step)).is_dir():
    raise FileNotFoundError(f'no checkpoint under {directory}; train it first, or name the right workdir')
  about = _read_about(directory, step)
  if about is None:
    raise ValueError(f'{directory / str(step)} has no readable specs.json; delete that step to use the one before')
  return directory / str(step), about


def _check_whole(about: dict[str, Any], item: str, tree: Any) -> None:
  """Raises ValueError naming the first array that is not what was saved."""
  version = about.get('checksum_version', 1)  # the first had no number
  for name, value in integrity.checksums(tree, version).items():
    if about['checksums'][item][name] != value:
      raise ValueError(f'{item}/{name} is not what was saved: its checksum differs')


def check_assets(there: Mapping[str, bytes], here: Mapping[str, bytes], where: str) -> None:
  """Raises ValueError where a file that both have is another one there: ids would mean other words."""
  for name in sorted(there.keys() & here.keys()):
    if there[name] != here[name]:
      raise _OtherRun(f'{where} has another {name} than this experiment (SHA-256 {_sha256(there[name])} and '
                      f'{_sha256(here[name])}); set the file that it was trained with (MULAN_VOCABULARY), or choose '
                      'another workdir')


def _sha256(content: bytes) -> str:
  return hashlib.sha256(content).hexdigest()[:12]


class _OtherRun(ValueError):
  """A checkpoint of something else: no fault of the checkpoint's."""


def _check_same(about: dict[str, Any], objective: Objective, lineage: Mapping[str, str], abstract: TrainState,
                where: pathlib.Path) -> None:
  """Refuses a checkpoint of other arrays or of other tokens. Fields that leave the arrays as they are may change."""
  for role, there in about['lineage'].items():
    if (here := lineage.get(role, there)) != there:
      raise _OtherRun(f'{where} was trained with {role} {there}, but this run has {role} {here}; '
                       'choose another workdir')
  saved = _objective(about, where)
  if type(saved) is not type(objective):
    raise _OtherRun(f'{where} holds a {type(saved).__name__}, but this experiment is a {type(objective).__name__}; '
                     'choose another workdir')
  if isinstance(objective, Fit) and (difference := _of_another_fit(saved, objective)):
    raise _OtherRun(f'{where} was fitted otherwise: {difference} (checkpoint != experiment); choose another workdir or '
                    'the old configuration')
  skeletons = [Skeleton.of(o) for o in (saved, objective)]
  shapes = [{jax.tree_util.keystr(k): v.shape for tree in (s.params, s.buffers)
             for k, v in jax.tree_util.tree_leaves_with_path(nnx.to_pure_dict(tree))} for s in skeletons]
  if shapes[0] != shapes[1]:
    difference = specs.first_difference(saved, objective) or 'the network itself has changed'
    raise _OtherRun(f'{where} is a checkpoint of another architecture: {difference} (checkpoint != experiment); '
                    'choose another workdir or the old configuration')
  check_assets(_assets(about), objective.assets(), str(where))
  for item, field in _ITEMS.items():
    there = set(about['checksums'][item])
    here = {integrity.name_of(path) for path, _ in jax.tree_util.tree_leaves_with_path(getattr(abstract, field))}
    if there != here:
      kind = 'moving average of the parameters' if item == 'ema' else item
      raise _OtherRun(f'{where} has another {kind} than this experiment ({len(there)} arrays, here {len(here)}; the '
                      f'first that differs is {min(there ^ here)}); choose another workdir or the old configuration')


def _of_another_fit(saved: Fit, fit: Fit) -> str | None:
  """The first field that makes another fit: any but how often it goes over the rows."""
  if hasattr(saved, 'iterations'):
    saved = dataclasses.replace(saved, iterations=fit.iterations)
  return specs.first_difference(saved, fit)


def _objective(about: Mapping[str, Any], where: pathlib.Path) -> Objective:
  try:
    return specs.from_json(json.dumps(about['objective']))
  except ValueError as error:
    raise _OtherRun(f'{where}: {error}; train it again, in another workdir') from None


def _assets(about: Mapping[str, Any]) -> dict[str, bytes]:
  return {name: base64.b64decode(content) for name, content in about['assets'].items()}


@dataclasses.dataclass(frozen=True)
class Loaded:
  """A trained model, ready to use.

  Attributes:
    objective: what it was trained with; rebuilds the model.
    model: the module with its parameters (their moving average where one was kept).
    params, buffers: the same as pure dicts.
    step: where it comes from.
    content_hash: changes whenever a parameter, a buffer or the specification does; the lineage of tokens.
    assets, lineage, made_with: as saved.
  """

  objective: Objective
  model: nnx.Module
  params: Any
  buffers: Any
  step: int
  content_hash: str
  assets: dict[str, bytes]
  lineage: dict[str, str]
  made_with: dict[str, Any]


def content_hash(specification: Any, *trees: Any) -> str:
  """Sixteen hex digits over the specification, as it was saved, and every array (name, dtype, shape, bytes).

  As it was saved: what a later version adds to it, with a value that changes nothing, must not part tokens from the
  networks that made them.
  """
  digest = hashlib.sha256(json.dumps(specification, indent=2, sort_keys=True).encode())
  for tree in trees:
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
      array = np.asarray(leaf)
      digest.update(f'{jax.tree_util.keystr(path)}{array.dtype}{array.shape}'.encode())
      digest.update(array.tobytes())
  return digest.hexdigest()[:16]


def load(workdir: str | os.PathLike, step: int | None = None) -> Loaded:
  """Loads the newest (or the named) checkpoint of a run for use, without its optimizer.

  Raises FileNotFoundError where there is none, ValueError where it is damaged.
  """
  place, about = _find(workdir, step)
  objective = _objective(about, place)
  skeleton = Skeleton.of(objective)
  params_item = 'ema' if (place / 'ema').is_dir() else 'params'
  trees = {}
  device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  for item, state in ((params_item, skeleton.params), ('buffers', skeleton.buffers)):
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), nnx.to_pure_dict(state))
    try:
      trees[item] = ocp.StandardCheckpointer().restore(place / item, abstract) if jax.tree.leaves(abstract) else {}
    except ValueError as error:
      raise ValueError(f'{place / item} does not hold the arrays of the network that its specs.json describes; was it '
                       'made by another version of musiclm_jax? Then train it again') from error
    try:
      _check_whole(about, item, trees[item])
    except ValueError as error:
      raise ValueError(f'{place}: {error}; delete that step to use the one before') from None
  params, buffers = trees[params_item], trees['buffers']
  return Loaded(objective, skeleton.model(params, buffers), params, buffers, int(place.name),
                content_hash(about['objective'], params, buffers), _assets(about), about['lineage'], about['made_with'])


def run_in(workdir: str | os.PathLike, name: str) -> pathlib.Path:
  """`workdir`, or the run `name` in it where it is no run itself but holds one."""
  folder = pathlib.Path(workdir)
  return folder / name if latest_step(folder) is None and (folder / name).is_dir() else folder


def at(tree: Any, path: Sequence[Any]) -> Any | None:
  """What nested mappings have at a path of keys; None where they have nothing there."""
  for key in path:
    if not isinstance(tree, Mapping) or key not in tree:
      return None
    tree = tree[key]
  return tree


def keys(part: str) -> list[str]:
  """The path of a part ("encoder/layers"); "" is all, the path of no keys."""
  return part.split('/') if part else []


def graft(tree: Any, donor: Any, *, into: str = '') -> Any:
  """`tree` with the subtree at `into` ("encoder/layers"; "" is all) replaced by the same variables of `donor`.

  Raises ValueError naming the first variable that is missing or has another shape.
  """
  if into:
    name, _, rest = into.partition('/')
    if name not in tree:
      raise ValueError(f'this model has no part {into!r}; it has {sorted(tree)}')
    return {**tree, name: graft(tree[name], donor, into=rest)}

  def one(path, ours):
    if (theirs := at(donor, [key.key for key in path])) is None:
      raise ValueError(f'the source checkpoint has no {jax.tree_util.keystr(path)}')
    if theirs.shape != ours.shape:
      raise ValueError(f'{jax.tree_util.keystr(path)} is {theirs.shape} in the source checkpoint and {ours.shape} here')
    return theirs

  return jax.tree_util.tree_map_with_path(one, tree)
