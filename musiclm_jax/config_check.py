"""The checks that gin does not make: what a run reads, and what was written in vain. For `config` alone."""
from __future__ import annotations

import dataclasses
import difflib
import inspect
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from gin import config as gin_config

MACRO = 'gin.macro'
Key = tuple[str, str, str]  # scope, complete selector, parameter


class ConfigError(ValueError):
  """A mistake in a gin file or on the command line; the message is one line for the user."""


class MissingValues(ConfigError):
  """Macros that the user must give; `names` lists them."""

  def __init__(self, message: str, names: Sequence[str]):
    super().__init__(message)
    self.names = tuple(names)


@dataclasses.dataclass(frozen=True)
class Line:
  """One binding as it was written."""

  file: str  # path for people, '' for the command line
  number: int
  name: str  # 'NUM_STEPS' or 'specs.Stage.seconds'
  key: Key
  shared: bool
  comment: str

  @property
  def where(self) -> str:
    return f'{self.file}:{self.number}' if self.file else f'--gin.{self.name}'


def suggestion(name: str, known: Iterable[str]) -> str:
  """'; did you mean X?' with the nearest known name, or nothing."""
  by_lower = {k.lower(): k for k in known}
  near = difflib.get_close_matches(name.lower(), list(by_lower), n=1, cutoff=0.6)
  return f'; did you mean {by_lower[near[0]]!r}?' if near else ''


def parameters_of(configurable) -> dict[str, inspect.Parameter]:
  try:
    return dict(inspect.signature(configurable.wrapped).parameters)
  except (TypeError, ValueError):  # builtins without a signature
    return {}


def _references(value: Any) -> Iterator[gin_config.ConfigurableReference]:
  if isinstance(value, gin_config.ConfigurableReference):
    yield value
  elif isinstance(value, dict):
    for item in (*value.keys(), *value.values()):
      yield from _references(item)
  elif isinstance(value, (list, tuple)):
    for item in value:
      yield from _references(item)


class Walk:
  """Marks what a run reads, starting at its root, as gin would look it up."""

  def __init__(self, lines: list[Line], provided: Sequence[str]):
    self.line_of = {line.key: line for line in lines}  # the last one wins, as in gin
    self.macros = {line.key[0] for line in lines if line.key[1] == MACRO}
    self.provided = provided
    self.used: set[Key] = set()
    self.given: set[Key] = set()  # what would be used if the caller did not give it
    self.undefined: list[str] = []
    self.required: dict[str, str] = {}
    self.errors: list[str] = []
    self._visited: set[tuple] = set()

  def configurable(self, reference, scopes: list[str], *, root: bool = False) -> None:
    scopes = reference.scopes or scopes
    selector = reference.configurable.selector
    if (mark := (selector, tuple(scopes), reference.evaluate)) in self._visited:
      return
    self._visited.add(mark)
    bound: dict[str, Key] = {}
    for depth in range(len(scopes) + 1):  # an inner scope overrides an outer one
      scope = '/'.join(scopes[:depth])
      for parameter in gin_config._CONFIG.get((scope, selector), {}):
        bound[parameter] = (scope, selector, parameter)
    parameters = parameters_of(reference.configurable)
    for parameter, key in bound.items():
      if root and parameter in self.provided:
        without = Walk(list(self.line_of.values()), ())
        without.value(gin_config._CONFIG[key[:2]][parameter], scopes, key)
        self.given |= {key, *without.used}
        continue
      self.used.add(key)
      value = gin_config._CONFIG[key[:2]][parameter]
      self.value(value, scopes, key)
      if parameter in parameters:
        self._check_type(key, value, parameters[parameter], reference.configurable.name)
    if reference.evaluate or root:
      self._check_complete(reference, {*bound, *(self.provided if root else ())}, parameters, root)

  def value(self, value: Any, scopes: list[str], key: Key) -> None:
    for reference in _references(value):
      name = '/'.join(reference.scopes)
      if reference.configurable.selector == 'gin.constant':
        if gin_config._CONSTANTS[name] is gin_config.REQUIRED:
          line = self.line_of[key]
          self.required[line.name] = line.comment
      elif reference.configurable.selector == MACRO:
        macro = (name, MACRO, 'value')
        if macro not in self.line_of:
          self.undefined.append(name)
          self.errors.append(f'{self.line_of[key].where}: no macro {name!r}{suggestion(name, self.macros)}')
        elif macro not in self.used:
          self.used.add(macro)
          # gin evaluates what a macro holds inside a scope of the macro's name.
          self.value(gin_config._CONFIG[macro[:2]]['value'], reference.scopes, macro)
      else:
        self.configurable(reference, scopes)

  def _check_complete(self, reference, bound: set[str], parameters, root: bool) -> None:
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    missing = [name for name, p in parameters.items()
               if p.default is p.empty and p.kind in kinds and name not in bound]
    if 'workdir' in missing and root:
      self.errors.append('--workdir is needed: where this run keeps its checkpoints and metrics')
    elif missing:
      self.errors.append(f'{reference.selector} needs a value for {", ".join(missing)}: bind '
                         f'{reference.selector}.{missing[0]} in the experiment')

  def _check_type(self, key: Key, value: Any, parameter: inspect.Parameter, owner: str) -> None:
    while isinstance(value, gin_config.ConfigurableReference) and value.configurable.selector == MACRO:
      key = ('/'.join(value.scopes), MACRO, 'value')
      if key not in self.line_of:
        return
      value = gin_config._CONFIG[key[:2]]['value']
    if isinstance(value, gin_config.ConfigurableReference):
      return
    annotation = parameter.annotation
    annotation = annotation if isinstance(annotation, str) else getattr(annotation, '__name__', '')
    kinds = [kind.strip() for kind in annotation.split('|')]
    simple = {'int': int, 'float': (int, float), 'bool': bool, 'str': str, 'None': type(None), 'tuple': tuple}
    expected = [simple.get(kind.partition('[')[0]) for kind in kinds]
    if None in expected or (value is None and parameter.default is None):
      return
    fits = any(isinstance(value, kind) and (isinstance(value, bool) <= (kind is bool)) for kind in expected)
    if not fits:
      self.errors.append(f'{self.line_of[key].where}: {owner}.{parameter.name} takes {annotation}, '
                         f'not {value!r}')


def raise_first(walks: Sequence[Walk | None], lines: Sequence[Line], names: str) -> None:
  """Raises ConfigError for the first mistake, given the walks after each file and after the command line."""
  last = walks[-1]
  # What a later file or the command line put out of use was no mistake where it was written.
  used = set().union(*(walk.used | walk.given for walk in walks if walk))
  known = [*last.undefined, *(line.name for line in lines if line.key in used)]
  # Misspelt names come first: a misspelt required macro looks like a missing one as well.
  for line in lines:
    if line.key in (used if line.file else last.used | last.given) or line.shared:
      continue
    if line.key[1] == MACRO:
      near = suggestion(line.name, (name for name in known if name != line.name))
      raise ConfigError(f'{line.where}: nothing in this experiment uses {line.name}{near}')
    owner = line.name.rpartition('.')[0]
    raise ConfigError(f'{line.where}: nothing uses {line.name}: this experiment does not reach {owner}')
  if last.errors:
    raise ConfigError(last.errors[0])
  if last.required:
    listed = ', '.join(f'{name} ({comment})' if comment else name for name, comment in last.required.items())
    example = next(iter(last.required))
    raise MissingValues(f'{names} needs values for {listed}: give --gin.{example}=...', list(last.required))
