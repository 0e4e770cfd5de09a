"""What the launchers share: their command lines, the `musiclm train` that all of them start, doing it or printing it.

Only Python's own library is needed, so that a launcher runs where nothing is installed. Commands are lists of arguments
from end to end; text is made of them only for a shell on another machine (`quoted`) and for a person to read.
"""
from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
import dataclasses
import difflib
import pathlib
import re
import shlex
import signal
import subprocess
import sys
from typing import NoReturn

ROOT = pathlib.Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
  sys.path.insert(0, str(ROOT))  # for what of the package needs no other: its parser, its table of chips
USAGE_ERROR, FAILURE = 2, 1
# Exit codes of `musiclm train` after which the same command would only do the same again, or was told not to go on:
# a mistake on the command line or in a gin file, Ctrl-C, SIGTERM.
FINAL = (2, 130, 143)

quoted = shlex.join


class Mistake(Exception):
  """A mistake of the user, told in one line."""


@dataclasses.dataclass(frozen=True)
class Command:
  """Something to run: its arguments, and what it reads on stdin."""
  argv: Sequence[str]
  stdin: str | None = None


class Parser(argparse.ArgumentParser):
  """argparse with a line for each mistake, no guessing of abbreviated flags, and `--` before what the trainer gets."""

  def __init__(self, *args, **kwargs):
    super().__init__(*args, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **kwargs)

  def error(self, message: str) -> NoReturn:
    raise Mistake(f'{message} (see {self.prog} --help)')

  def parse(self, argv: Sequence[str]) -> argparse.Namespace:
    """Attribute `after` holds what follows the first `--`."""
    split = argv.index('--') if '--' in argv else len(argv)
    args, rest = self.parse_known_args(argv[:split])
    if rest:
      name = rest[0].partition('=')[0]
      if name in ('--gin_file', '--workdir') or name.startswith('--gin.'):
        raise Mistake(f'{name} belongs to `musiclm train`: put it after --')
      flags = [flag for p in (self, *self._actions_of(args)) for flag in p._option_string_actions]
      what = f'unknown flag {rest[0]}{nearest(name, flags)}'
      raise Mistake(f'{what if name.startswith("-") else rest[0] + " was not expected"} (see {self.prog} --help)')
    args.after = list(argv[split + 1:])
    return args

  def _actions_of(self, args: argparse.Namespace) -> list[argparse.ArgumentParser]:
    """The parser of the action that was given, where this one has actions."""
    return [a.choices[args.action] for a in self._actions if isinstance(a, argparse._SubParsersAction)]


def nearest(name: str, known: Sequence[str]) -> str:
  """'; did you mean X?', or nothing where nothing is near."""
  bare = {other.lstrip('-'): other for other in known}  # dashes are alike in all flags
  name = name.lstrip('-')
  found = difflib.get_close_matches(name, bare, n=5)
  best = next((other for other in found if other[0] == name[0]), found[0] if found else None)
  return f'; did you mean {bare[best]}?' if best else ''


def positive(text: str) -> int:
  """A whole number above 0, for argparse."""
  if not text.isascii() or not text.isdigit() or int(text) < 1:
    raise argparse.ArgumentTypeError(f'{text!r} is not a whole number above 0')
  return int(text)


def count(text: str) -> int:
  """A whole number, 0 or more, for argparse."""
  return 0 if text == '0' else positive(text)


def assignment(text: str) -> str:
  """NAME=VALUE of the environment, for argparse."""
  if not re.fullmatch(r'[A-Za-z_][A-Za-z0-9_]*=.*', text, re.DOTALL):
    raise argparse.ArgumentTypeError(f'{text!r} is not NAME=VALUE')
  return text


def add_training(parser: argparse.ArgumentParser, program: str = 'musiclm') -> None:
  """The flags of everything that starts a training."""
  parser.add_argument('--program', metavar='PATH', default=program, help='the musiclm command, as it is found there')
  parser.add_argument('--env', metavar='NAME=VALUE', type=assignment, action='append', default=[],
                      help='for the environment of each process; repeatable')


def add_dry_run(parser: argparse.ArgumentParser) -> None:
  parser.add_argument('--dry_run', action='store_true', help='print exactly what would be done, and do nothing')


def training(args: argparse.Namespace, environment: Sequence[str] = ()) -> list[str]:
  """The command of one process: [env NAME=VALUE...] musiclm train --distributed and what came after `--`.

  Raises Mistake where `musiclm train` would refuse these arguments: better now than after a day in a queue.
  """
  _check(args.after)
  variables = [*environment, *args.env]
  flag = [] if '--distributed' in args.after else ['--distributed']
  return [*(['env', *variables] if variables else []), args.program, 'train', *flag, *args.after]


def _check(arguments: Sequence[str]) -> str:
  if not arguments:
    raise Mistake('what to train is missing: put the arguments of `musiclm train` after --')
  if arguments[0] in ('musiclm', 'train'):
    raise Mistake(f'after -- come the arguments of `musiclm train`, without {arguments[0]!r}')
  from musiclm_jax import main  # the parser alone: needs no package
  try:
    workdir = main.parse(['train', *arguments]).workdir
  except main.UsageError as error:
    raise Mistake(f'after --: {error}') from None
  if not workdir:
    raise Mistake('after --: --workdir is missing; a run that is started again finds itself by it')
  return workdir


def workdir(args: argparse.Namespace) -> str:
  """The --workdir among the trainer's arguments. Raises Mistake like `training`."""
  return _check(args.after)


def perform(commands: Sequence[Command], dry_run: bool) -> int:
  """Runs the commands until one fails, or prints them, each as a line for a shell. Returns the exit code."""
  for command in commands:
    if dry_run:
      print(quoted(command.argv))
      continue
    code = run(command)
    if code:
      return code
  return 0


def run(command: Command) -> int:
  """Returns the exit code as shells count. Ctrl-C and SIGTERM are for what runs: a trainer saves then."""
  try:
    process = subprocess.Popen(command.argv, stdin=None if command.stdin is None else subprocess.PIPE, text=True)
  except FileNotFoundError:
    raise Mistake(f'{command.argv[0]} is not installed here; --dry_run prints what would be run') from None
  # A terminal sends Ctrl-C to both. Sent on, it would be the second, which does not wait for the save.
  handlers = {signal.SIGINT: lambda *_: None, signal.SIGTERM: lambda *_: process.terminate()}
  before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
  try:
    process.communicate(command.stdin)
  finally:
    for number, handler in before.items():
      signal.signal(number, handler)
  return process.returncode if process.returncode >= 0 else 128 - process.returncode


def main(run: Callable[[Sequence[str]], int], name: str) -> NoReturn:
  """Runs a launcher and exits with its code."""
  try:
    sys.exit(run(sys.argv[1:]))
  except Mistake as error:
    print(f'{name}: error: {error}', file=sys.stderr)
    sys.exit(USAGE_ERROR)
