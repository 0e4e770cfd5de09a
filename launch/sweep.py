#!/usr/bin/env python3
"""Trains once for each line of a file of gin overrides, by any launcher or on this machine.

  launch/sweep.py rates.txt --workdir /shared/runs/rates -- \\
    launch/slurm.py --name {name} --nodes 2 --time 8:00:00 -- --gin_file experiments/coarse_lm.gin
  launch/sweep.py rates.txt --workdir runs/rates -- musiclm train --gin_file experiments/coarse_lm.gin

rates.txt has a run a line: the arguments that it has beyond the others, as in a shell, perhaps after a name of its own.

  # comments and empty lines are left out
  low: --gin.LM_LEARNING_RATE=1e-4
  --gin.LM_LEARNING_RATE=3e-4 --gin.SEED=2

What follows the first -- is started for each, one after the other, with the overrides and --workdir WORKDIR/NAME at its
end and NAME for {name}. Started again, it leaves out what was started with success. More in docs/launching.md.
"""
from __future__ import annotations

from collections.abc import Sequence
import dataclasses
import hashlib
import json
import pathlib
import re
import shlex
import sys

import command


@dataclasses.dataclass(frozen=True)
class Run:
  """One line of a sweep.

  Attributes:
    name: the last part of its workdir, and {name} of the command.
    overrides: arguments of `musiclm train`.
    where: file and line, for messages.
  """
  name: str
  overrides: tuple[str, ...]
  where: str


def _parser() -> command.Parser:
  parser = command.Parser(prog='sweep.py', description=__doc__)
  parser.add_argument('file', metavar='FILE', help='a run a line: [NAME:] ARGUMENTS')
  parser.add_argument('--workdir', metavar='DIR', required=True, help='the folder that holds the workdirs of the runs')
  parser.add_argument('--only', metavar='NAME', action='append', default=[], help='these runs; repeatable')
  parser.add_argument('--again', action='store_true', help='also what was started with success')
  command.add_dry_run(parser)
  return parser


def runs(path: str) -> list[Run]:
  """The lines of a sweep. Raises command.Mistake, naming the line, for one that cannot be read or is there twice."""
  try:
    text = pathlib.Path(path).read_text()
  except (OSError, UnicodeDecodeError) as error:
    raise command.Mistake(f'{path}: {getattr(error, "strerror", None) or error}') from None
  found: dict[str, Run] = {}
  for number, line in enumerate(text.splitlines(), 1):
    where = f'{path}:{number}'
    if line.lstrip().startswith('#'):
      continue
    named = re.match(r'\s*([^\s:="\'-][^\s:="\']*):(?:\s|$)', line)
    try:
      words = shlex.split(line[named.end():] if named else line)
    except ValueError as error:
      raise command.Mistake(f'{where}: {str(error).lower()}') from None
    if not words and not named:
      continue
    if words and not words[0].startswith('--'):
      raise command.Mistake(f'{where}: {words[0]!r} is no argument of `musiclm train`; write [NAME:] --gin.NAME=VALUE')
    if any(word.startswith('#') for word in words):
      raise command.Mistake(f'{where}: comments have lines of their own')
    if '--workdir' in words or any(word.startswith('--workdir=') for word in words):
      raise command.Mistake(f'{where}: each run has its own --workdir already')
    run = Run(named[1] if named else _name(words), tuple(words), where)
    # What folders, SLURM and Kubernetes all take.
    if not re.fullmatch(r'[a-z0-9]([-a-z0-9]*[a-z0-9])?', run.name):
      raise command.Mistake(f'{where}: the name {run.name!r} has more than lower case letters, digits and hyphens')
    if run.name in found:
      raise command.Mistake(f'{where}: {run.name} is in {found[run.name].where}, too')
    found[run.name] = run
  if not found:
    raise command.Mistake(f'{path}: there is no run in it')
  return list(found.values())


def _name(overrides: Sequence[str]) -> str:
  """Of what the overrides say, so that it stays when lines come and go; a hash tells apart what letters do not."""
  said = re.sub(r'[^a-z0-9]+', '-', ' '.join(word.removeprefix('--gin.') for word in overrides).lower()).strip('-')
  digest = hashlib.sha256('\0'.join(overrides).encode()).hexdigest()[:6]
  return f'{said[:24].rstrip("-")}-{digest}'.strip('-')


class _Record:
  """What was started, a JSON object a line, beside the sweep's file: workdirs may be where this machine cannot look."""

  def __init__(self, path: str):
    self._path = pathlib.Path(f'{path}.started.jsonl')
    lines = self._path.read_text().splitlines() if self._path.exists() else []
    try:
      self._runs = {entry['workdir']: entry for entry in map(json.loads, lines)}
    except (ValueError, KeyError, TypeError):
      raise command.Mistake(f'{self._path} is damaged; move it away to start all runs (they go on where they were)'
                            ) from None

  def started(self, run: Run, workdir: str) -> bool:
    """Raises command.Mistake where that workdir was begun with other overrides: it would go on with these."""
    entry = self._runs.get(workdir)
    if entry and entry['overrides'] != list(run.overrides):
      raise command.Mistake(f'{run.where}: {run.name} was begun with {command.quoted(entry["overrides"])}; give other '
                            'overrides another name')
    return bool(entry) and entry['code'] == 0

  def add(self, run: Run, workdir: str, code: int | None) -> None:
    with self._path.open('a') as file:
      file.write(json.dumps({'workdir': workdir, 'overrides': list(run.overrides), 'code': code}) + '\n')


def _command(run: Run, workdir: str, template: Sequence[str]) -> command.Command:
  filled = [word.replace('{name}', run.name) for word in template]
  return command.Command([*filled, *run.overrides, '--workdir', workdir])


def _check(template: Sequence[str]) -> None:
  if not template:
    raise command.Mistake('what to start is missing: put a launcher, or musiclm train, with its arguments after --')
  if pathlib.PurePath(template[0]).suffix == '.py' and '--' not in template:
    raise command.Mistake(f'{template[0]} takes what goes to the trainer after a -- of its own: ... -- --gin_file FILE')
  if '--workdir' in template:
    raise command.Mistake('--workdir belongs before --: each run gets a folder in it')


def main(argv: Sequence[str]) -> int:
  args = _parser().parse(argv)
  _check(args.after)
  all_runs, record = runs(args.file), _Record(args.file)
  if unknown := set(args.only) - {run.name for run in all_runs}:
    name = min(unknown)
    raise command.Mistake(f'{args.file} has no run {name!r}{command.nearest(name, [run.name for run in all_runs])}')
  chosen = [(run, f'{args.workdir.rstrip("/") or "/"}/{run.name}') for run in all_runs
            if not args.only or run.name in args.only]
  chosen = [(run, workdir) for run, workdir in chosen if not record.started(run, workdir) or args.again]
  if args.dry_run:
    return command.perform([_command(run, workdir, args.after) for run, workdir in chosen], dry_run=True)
  return _start(chosen, args.after, record)


def _start(chosen: Sequence[tuple[Run, str]], template: Sequence[str], record: _Record) -> int:
  failed = []
  for run, workdir in chosen:
    each = _command(run, workdir, template)
    print(f'sweep.py: {command.quoted(each.argv)}', file=sys.stderr, flush=True)
    record.add(run, workdir, None)  # also of a run that is killed: its workdir has begun
    code = command.run(each)
    record.add(run, workdir, code)
    if code in command.FINAL:  # asked to stop, or a mistake that the next would have, too
      return code
    if code:
      failed.append(run.name)
  if failed:
    print(f'sweep.py: {len(failed)} of {len(chosen)} failed: {", ".join(failed)}', file=sys.stderr)
  return command.FAILURE if failed else 0


if __name__ == '__main__':
  command.main(main, 'sweep.py')
