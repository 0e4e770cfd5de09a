"""Experiments: gin files and command-line bindings, read, checked as a whole, and built.

Only this module and `main` know gin; the rest of the package takes plain values. gin itself reports neither a
macro that nothing reads nor a binding of something that is never called, and runs whatever a file imports, so
everything is checked here before anything is built: imports against an allow-list, names with a suggestion,
then a walk from the macro `RUN` over all that the run will read.
"""
from __future__ import annotations

import contextlib
import copy
import dataclasses
import hashlib
import importlib.util
import io
import re
import sys
import tokenize
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

from gin import config as gin_config
from gin import config_parser

from musiclm_jax.config_check import (
    MACRO, ConfigError, Key, Line, MissingValues, Walk, parameters_of, raise_first, suggestion)

__all__ = ['ConfigError', 'Experiment', 'MissingValues', 'gin_folder', 'load_experiment']

ALLOWED_MODULES = ('musiclm_jax', 'tasks', 'optax')
ROOT = 'RUN'
# Folders of files that many experiments share, each using a part of their lines; so does each file of the
# project that is not an experiment.
SHARED_FOLDERS = ('size', 'mesh')



def _project_folder(in_source: str, in_wheel: str) -> Path:
  """A folder beside the package in a source tree, inside the package in a wheel."""
  package = Path(__file__).resolve().parent
  source = package.parent / in_source
  return source if (package.parent / 'setup.cfg').is_file() and source.is_dir() else package / in_wheel


def gin_folder() -> Path:
  """The project's own gin files, wherever the package was installed."""
  return _project_folder('gin', 'gin_files')


def _provide_tasks() -> None:
  """Makes `tasks` importable by that name in a wheel and from any folder, and only the project's own."""
  folder = _project_folder('tasks', 'tasks')
  if 'tasks' in sys.modules or not (folder / '__init__.py').is_file():
    return
  spec = importlib.util.spec_from_file_location(
      'tasks', folder / '__init__.py', submodule_search_locations=[str(folder)])
  module = importlib.util.module_from_spec(spec)
  sys.modules['tasks'] = module
  spec.loader.exec_module(module)


def _first_line(error: BaseException) -> str:
  if isinstance(error, SyntaxError):
    return str(error.msg).splitlines()[0]
  if isinstance(error, tokenize.TokenError):
    return str(error.args[0])
  return (str(error).strip() or type(error).__name__).splitlines()[0]


def _line_number(error: BaseException, otherwise: int) -> int:
  """The line that gin names in an error, in one of its ways."""
  if isinstance(error, SyntaxError):
    return error.lineno or otherwise
  if isinstance(error, tokenize.TokenError):
    return error.args[1][0]
  found = re.search(r'line (\d+)', str(error).partition('\n')[2])
  return int(found[1]) if found else otherwise


def _display(path: Path) -> str:
  for base in (gin_folder(), Path.cwd()):
    with contextlib.suppress(ValueError):
      return str(path.relative_to(base))
  return str(path)


def _is_shared(path: Path) -> bool:
  if path.is_relative_to(gin_folder()):
    return path.relative_to(gin_folder()).parts[0] != 'experiments'
  return any(part in SHARED_FOLDERS for part in Path(_display(path)).parts[:-1])


def _public_names(value: Any) -> list[str]:
  return [name for name in dir(value) if not name.startswith('_')]


class _Blank(config_parser.ParserDelegate):
  """Parses without looking anything up."""

  def configurable_reference(self, scoped_configurable_name, evaluate):
    return None

  def macro(self, macro_name):
    return None


class _Parser(config_parser.ConfigParser):
  """gin's grammar, and `from package import a, b` as Python has it."""

  def _parse_import(self, keyword, statement_location):
    first = super()._parse_import(keyword, statement_location)
    while keyword == 'from' and self.current_token.string == ',':
      self._advance_one_token()
      module, alias = f'{first.module.rpartition(".")[0]}.{self._parse_identifier()}', None
      if self.current_token.string == 'as':
        self._advance_one_token()
        alias = self._parse_identifier()
      self._statements_queue.append(first._replace(module=module, alias=alias))
    return first


class _Reader:
  """Reads files and bindings into gin's global configuration, and remembers each line."""

  def __init__(self, search_paths: Sequence[Path], allowed: Sequence[str]):
    self.search_paths = [*search_paths, Path.cwd(), gin_folder()]
    self.allowed = allowed
    self.lines: list[Line] = []
    self.imports: dict[str, config_parser.ImportStatement] = {}

  def find(self, name: str, where: str = '') -> Path:
    for folder in self.search_paths:
      if (path := folder / name).is_file():
        return path.resolve()
    known = [str(p.relative_to(gin_folder())) for p in sorted(gin_folder().rglob('*.gin'))]
    for folder in self.search_paths[:-1]:
      known += [p.name for p in folder.glob('*.gin')]
    near = suggestion(name, known) or suggestion(Path(name).stem, [Path(k).stem for k in known])
    folders = ', '.join(str(folder) for folder in dict.fromkeys(self.search_paths))
    raise ConfigError(f'{where + ": " if where else ""}no gin file {name!r}{near or f" in {folders}"}')

  def check(self, path: Path, within: tuple[Path, ...] = ()) -> None:
    """Walks a file and its includes, running nothing: syntax, imports, missing files."""
    if path in within:
      raise ConfigError(f'{_display(path)} includes itself')
    for statement in self._statements(path.read_text(), _display(path), _Blank()):
      where = f'{_display(path)}:{statement.location.line_num}'
      if isinstance(statement, config_parser.IncludeStatement):
        self.check(self.find(statement.filename, where), (*within, path))
      elif isinstance(statement, config_parser.ImportStatement):
        module = statement.module
        if module.partition('.')[0] != '__gin__' and not self._is_allowed(module):
          raise ConfigError(
              f'{where}: {module!r} may not be imported from a gin file; --allow_import '
              f'{module.partition(".")[0]} permits it if you trust this file')

  def read(self, path: Path) -> None:
    """Binds a file, its includes in place."""
    self._read_text(path.read_text(), _display(path), shared=_is_shared(path))

  def read_bindings(self, bindings: Sequence[tuple[str, str]]) -> None:
    """Binds command-line pairs, with the names that the files imported."""
    for name, value in bindings:
      self._read_text(f'{name} = {_quoted(name, value)}', '', shared=False)

  def _is_allowed(self, module: str) -> bool:
    return any(module == name or module.startswith(name + '.') for name in self.allowed)

  def _statements(self, text: str, file: str, delegate) -> Iterator[Any]:
    number, parser = 1, None
    try:
      parser = _Parser(io.StringIO(text), delegate)
      while statement := parser.parse_statement():
        number = statement.location.line_num
        yield statement
      return
    except ConfigError as e:
      # gin wraps what the delegate raises and appends the place of the reference.
      number, message = _line_number(e, number), _first_line(e)
    except Exception as e:
      number, message = _line_number(e, number), _first_line(e)
      source = text.splitlines()[min(number, len(text.splitlines())) - 1]
      if 'gin.REQUIRED' in source:
        message = 'a required value is written %gin.REQUIRED'
    where = f'{file}:{number}' if file else f'--gin.{text.partition(" = ")[0]}'
    raise ConfigError(f'{where}: {message}')

  def _read_text(self, text: str, file: str, *, shared: bool) -> None:
    source, seen = text.splitlines(), {}
    with gin_config._parse_scope() as context:
      if not file:
        context._enable_dynamic_registration()
        for statement in self.imports.values():
          context.process_import(statement)
      for statement in self._statements(text, file, _Delegate(self)):
        number = statement.location.line_num
        where = f'{file}:{number}' if file else f'--gin.{text.partition(" = ")[0]}'
        try:
          if isinstance(statement, config_parser.BindingStatement):
            line = self._bind(statement, file, source, shared)
            if line.key in seen:
              raise ConfigError(f'{line.name} was already bound in line {seen[line.key]} of this file')
            seen[line.key] = number
          elif isinstance(statement, config_parser.BlockDeclaration):
            self.resolve(statement.selector)
          elif isinstance(statement, config_parser.IncludeStatement):
            self.read(self.find(statement.filename))
          else:
            self._import(context, statement)
        except ConfigError as e:
          # An included file has named its own line already.
          if isinstance(statement, config_parser.IncludeStatement):
            raise
          raise ConfigError(f'{where}: {_first_line(e)}') from e
      gin_config._IMPORTS.update(context.imports)

  def _import(self, context, statement) -> None:
    if statement.module.partition('.')[0] == 'tasks':
      _provide_tasks()
    try:
      context.process_import(statement)
    except ImportError as e:
      missing = getattr(e, 'name', '') or ''
      if missing and not self._is_allowed(missing):
        raise  # a package that is not installed, which is not the file's fault
      raise ConfigError(f'cannot import {statement.module!r} ({_first_line(e)}); gin files import modules, '
                        'not the names inside them') from e
    except (ValueError, SyntaxError) as e:
      raise ConfigError(_first_line(e)) from e
    if not statement.module.startswith('__gin__.'):
      self.imports[statement.bound_name()] = statement

  def _bind(self, statement, file: str, source: list[str], shared: bool) -> Line:
    scope, selector, parameter, value, location = statement
    if not parameter:  # a macro
      scope, name = '/'.join(filter(None, (scope, selector))), '/'.join(filter(None, (scope, selector)))
      key = (scope, MACRO, 'value')
      gin_config.bind_parameter((scope, MACRO, 'value'), value)
    else:
      configurable = self.resolve(selector)
      name = (f'{scope}/' if scope else '') + f'{selector}.{parameter}'
      if not gin_config._might_have_parameter(configurable.wrapper, parameter):
        known = parameters_of(configurable)
        raise ConfigError(f'{selector} has no parameter {parameter!r}{suggestion(parameter, known)}')
      key = (scope, configurable.selector, parameter)
      gin_config.bind_parameter((scope, selector, parameter), value)
    line = Line(file, location.line_num, name, key, shared, _comment(source, location.line_num))
    self.lines.append(line)
    return line

  def resolve(self, selector: str):
    """The configurable that `selector` names in the file being read; ConfigError where there is none."""
    context = gin_config._parse_context()
    if not context._dynamic_registration:
      # gin would look among what other files have registered by now.
      raise ConfigError(
          f'{selector!r} needs "from __gin__ import dynamic_registration" at the top of the file')
    try:
      configurable = context.get_configurable(selector)
    except NameError:
      name = selector.partition('.')[0]
      raise ConfigError(
          f'nothing named {name!r} is imported{suggestion(name, context._symbol_table)}') from None
    except AttributeError:
      names = selector.split('.')
      value, so_far = context._symbol_table[names[0]], names[0]
      for name in names[1:]:
        if not hasattr(value, name):
          raise ConfigError(f'{so_far} has no {name!r}{suggestion(name, _public_names(value))}') from None
        value, so_far = getattr(value, name), f'{so_far}.{name}'
      raise
    except (TypeError, ValueError) as e:
      raise ConfigError(f'{selector} cannot be configured: {_first_line(e)}') from e
    # A chain of attributes leaves the allowed modules (`prepare.subprocess.run`), so ask the target itself.
    home = getattr(configurable.wrapped, '__module__', None) or ''
    if not self._is_allowed(home) and home.partition('.')[0] != 'gin':
      raise ConfigError(f'{selector} comes from {home!r}, which a gin file may not use; --allow_import '
                        f'{home.partition(".")[0]} permits it if you trust this file')
    return configurable


class _Delegate(gin_config.ParserDelegate):
  """gin's own, with our errors and the check of origins."""

  def __init__(self, reader: _Reader):
    super().__init__()
    self._reader = reader

  def configurable_reference(self, scoped_selector, evaluate):
    self._reader.resolve(scoped_selector.rpartition('/')[2])
    return super().configurable_reference(scoped_selector, evaluate)


def _comment(source: list[str], number: int) -> str:
  """What the file says about a line: the comment at its end, or the one just above."""
  if number > len(source):
    return ''
  at_end = re.search(r'#\s*([^\'"]*)$', source[number - 1])
  above = re.match(r'\s*#\s*(.*)$', source[number - 2]) if number > 1 else None
  found = at_end or above
  return found[1].strip() if found else ''


def _quoted(name: str, value: str) -> str:
  """A command-line value as gin text: itself if it is a literal, a reference or a macro, else a string."""
  if value.lower() in ('true', 'false', 'none') and value not in ('True', 'False', 'None'):
    raise ConfigError(f'--gin.{name}={value}: write {value.capitalize()}, or \'"{value}"\' for the text')
  text = f'value = {value}\n'
  try:
    parser = config_parser.ConfigParser(text, _Blank())
    parser.parse_statement()
    if parser.parse_statement() is None:
      return value
  except Exception as e:
    if value[:1] in ('@', '%', '[', '(', '{', '"', "'"):
      raise ConfigError(f'--gin.{name}={value}: not a gin value ({_first_line(e)})') from e
  return repr(value)


@dataclasses.dataclass(frozen=True)
class Experiment:
  """A checked configuration. gin's state is global, so each method first puts this one in force."""

  files: tuple[str, ...]
  lines: tuple[Line, ...]
  used: frozenset[Key]
  root: gin_config.ConfigurableReference
  _bindings: dict[tuple[str, str], dict[str, Any]]
  _imports: frozenset

  def build(self, **arguments: Any) -> Any:
    """Calls what `RUN` names, with the bindings in effect; `arguments` win over bindings."""
    self._install(without=arguments)
    return self.root.scoped_configurable_fn(**arguments)

  def argument(self, parameter: str) -> Any:
    """The value that `RUN` would get for a parameter (the objective, say), built now."""
    self._install()
    with gin_config.config_scope(list(self.root.scopes) or None):
      bindings = gin_config.get_bindings(self.root.configurable.wrapped, resolve_references=False)
      if parameter not in bindings:
        raise ConfigError(f'{self.root.selector}.{parameter} is not bound')
      return copy.deepcopy(bindings[parameter])  # gin builds references while they are copied

  def macro(self, name: str) -> Any:
    """The value of a macro, built now."""
    self._install()
    values = gin_config._CONFIG.get((name, MACRO))
    if values is None:
      raise ConfigError(f'no macro {name!r}')
    with gin_config.config_scope(name.split('/')):
      return copy.deepcopy(values['value'])

  def operative(self) -> str:
    """All that the run reads, as gin text that gives the same run."""
    self._install()
    return gin_config._config_str(self._used_bindings(), max_line_length=110)

  @property
  def fingerprint(self) -> str:
    """Sixteen hex digits of everything that the run reads; lines that nothing uses do not change it."""
    text = [f'{scope}/{selector}.{name}={value!r}'
            for (scope, selector), values in self._used_bindings().items() for name, value in values.items()]
    return hashlib.sha256('\n'.join(sorted(text)).encode()).hexdigest()[:16]

  def _used_bindings(self) -> dict[tuple[str, str], dict[str, Any]]:
    kept = {key: {name: value for name, value in values.items() if (*key, name) in self.used}
            for key, values in self._bindings.items()}
    return {key: values for key, values in kept.items() if values}

  def _install(self, without: Collection[str] = ()) -> None:
    gin_config.clear_config()
    gin_config._CONFIG.update({key: dict(values) for key, values in self._bindings.items()})
    for (_, selector), values in gin_config._CONFIG.items():
      if selector == self.root.configurable.selector:
        # gin evaluates a binding even where the caller gives the argument, and fails if it cannot.
        for name in without:
          values.pop(name, None)
    gin_config._IMPORTS.update(self._imports)
    gin_config._set_config_is_locked(True)  # bindings are read while tracing: none may change after this


def load_experiment(
    gin_files: Sequence[str],
    bindings: Sequence[tuple[str, str]] = (),
    *,
    search_paths: Sequence[str | Path] = (),
    allow: Sequence[str] = (),
    provided: Sequence[str] = ('workdir',),
) -> Experiment:
  """Reads files in order, then the bindings, and checks the whole; later values override earlier ones.

  Args:
    gin_files: paths, or names below `search_paths`, the current folder or the project's gin folder.
    bindings: (name, value) pairs from the command line; a value that is no gin literal is taken as text.
    allow: top-level modules that files may import beside `ALLOWED_MODULES`.
    provided: parameters of `RUN` that the caller of `build` will give; their bindings are not looked at.

  Raises:
    ConfigError: with one line that names the file and line, what is wrong and the nearest known name;
      `MissingValues` for required macros.
  """
  if not gin_files:
    raise ConfigError('no experiment: give --gin_file, for example --gin_file experiments/coarse_lm.gin')
  gin_config.clear_config()
  reader = _Reader([Path(p) for p in search_paths], (*ALLOWED_MODULES, *allow))
  paths = [reader.find(str(name)) for name in gin_files]
  for path in paths:
    reader.check(path)
  walks = []
  for path in paths:
    reader.read(path)
    walks.append(_walk(reader, provided))
  if bindings:
    reader.read_bindings(bindings)
    walks.append(_walk(reader, provided))

  names = ', '.join(_display(path) for path in paths)
  if walks[-1] is None:
    raise ConfigError(f'{names}: no line "{ROOT} = @train.train"; is one of the files an experiment?')
  raise_first(walks, reader.lines, names)
  return Experiment(
      files=tuple(str(path) for path in paths), lines=tuple(reader.lines), used=frozenset(walks[-1].used),
      root=gin_config._CONFIG[ROOT, MACRO]['value'],
      _bindings={key: dict(values) for key, values in gin_config._CONFIG.items()},
      _imports=frozenset(gin_config._IMPORTS))


def _walk(reader: _Reader, provided: Sequence[str]) -> Walk | None:
  root = gin_config._CONFIG.get((ROOT, MACRO), {}).get('value')
  if not isinstance(root, gin_config.ConfigurableReference) or root.configurable.selector == MACRO:
    return None
  walk = Walk(reader.lines, provided)
  walk.used.add((ROOT, MACRO, 'value'))
  walk.configurable(root, [], root=True)
  return walk
