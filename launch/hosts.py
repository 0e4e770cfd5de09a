#!/usr/bin/env python3
"""Trains on several machines without a cluster manager: starts `musiclm train` on each by ssh, and stays with them.

  launch/hosts.py --hosts hosts.txt --program /shared/musiclm/.venv/bin/musiclm -- \\
    --gin_file experiments/coarse_lm.gin --workdir /shared/runs/coarse

hosts.txt has a process a line: where ssh finds it and, if that process shall not have all devices there, their numbers.

  node1            # all devices of node1
  me@node2 0,1     # two of node2
  me@node2 2,3     # the others

What follows -- goes to `musiclm train`, with --distributed. When one process ends all are ended; Ctrl-C, or SIGTERM,
ends all with a save. More in docs/launching.md.
"""
from __future__ import annotations

import argparse
from collections.abc import Sequence
import contextlib
import dataclasses
import os
import pathlib
import re
import signal
import subprocess
import sys
import threading
import time
from typing import TextIO

import command

# No questions, and a connection that is dead is noticed: all else belongs into ~/.ssh/config.
_OPTIONS = ('-o', 'BatchMode=yes', '-o', 'ServerAliveInterval=30')
_PATIENCE = 60  # seconds that the others have to end by themselves after one has ended well
_PAUSE = float(os.environ.get('MUSICLM_PAUSE', 5))  # seconds before a new start, for the coordinator's port

# What a machine runs, as the first argument of `sh -c`; the process is the rest, after the folder and the seconds.
# There is no terminal, so nothing would notice the end of the connection: something must wait for the end of stdin.
_REMOTE = '''cd "$1" || exit; limit=$2; shift 2; exec 3<&0; "$@" </dev/null 3<&- & process=$!
(cat <&3; kill -TERM $process; while [ $limit -gt 0 ] && kill -0 $process; do sleep 1; limit=$((limit - 1)); done
kill -KILL $process) >/dev/null 2>&1 & watch=$!; exec 3<&-; wait $process; code=$?; kill $watch; exit $code'''


@dataclasses.dataclass(frozen=True)
class Place:
  """One process: where ssh finds its machine, and the numbers of its devices there ('' for all)."""
  host: str
  devices: str


def _parser() -> command.Parser:
  parser = command.Parser(prog='hosts.py', description=__doc__)
  parser.add_argument('--hosts', metavar='FILE', required=True, help='a process a line: [USER@]HOST [DEVICES]')
  parser.add_argument('--coordinator', metavar='HOST', help='the first host, as the others reach it')
  parser.add_argument('--port', metavar='N', type=command.positive, default=8476, help='free on the first host; 8476')
  parser.add_argument('--directory', metavar='DIR', help='where processes run; the same folder as here if not given')
  parser.add_argument('--save_seconds', metavar='N', type=command.positive, default=300,
                      help='how long a process that is asked to end may take to save; 300')
  parser.add_argument('--retries', metavar='N', type=command.count, default=0,
                      help='how often all are started again after one has failed; 0')
  command.add_training(parser)
  command.add_dry_run(parser)
  return parser


def places(path: str) -> list[Place]:
  """The lines of a hosts file. Raises command.Mistake for one that is not there or is empty, and for a wrong line."""
  try:
    text = pathlib.Path(path).read_text()
  except OSError as error:
    raise command.Mistake(f'--hosts {path}: {error.strerror}') from None
  found = []
  for number, line in enumerate(text.splitlines(), 1):
    words = line.partition('#')[0].split()
    if not words:
      continue
    if len(words) > 2 or words[0].startswith('-') or not re.fullmatch(r'\d+(,\d+)*', words[-1] if words[1:] else '0'):
      raise command.Mistake(f'{path}:{number}: {line.strip()!r} is not [USER@]HOST, or that and devices such as 0,1')
    found.append(Place(words[0], ''.join(words[1:])))
  if not found:
    raise command.Mistake(f'--hosts {path}: names no host')
  for place in found:
    others = [other for other in found if other is not place and other.host == place.host]
    if others and not place.devices and not all(other == place for other in others):
      raise command.Mistake(f'{path}: {place.host} has a process for all of its devices, and others')
  return found


def processes(args: argparse.Namespace) -> list[command.Command]:
  """One ssh for each process."""
  all_places = places(args.hosts)
  coordinator = args.coordinator or all_places[0].host.rpartition('@')[2]
  found = []
  for index, place in enumerate(all_places):
    environment = [f'JAX_COORDINATOR_ADDRESS={coordinator}:{args.port}', f'JAX_NUM_PROCESSES={len(all_places)}',
                   f'JAX_PROCESS_ID={index}']
    if place.devices:
      environment.append(f'JAX_LOCAL_DEVICE_IDS={place.devices}')
    process = command.training(args, environment)
    # ssh joins its arguments with spaces and leaves the rest to a shell there: so this is one argument, quoted for it.
    directory = args.directory or os.getcwd()
    remote = command.quoted(['sh', '-c', _REMOTE, 'sh', directory, str(args.save_seconds), *process])
    found.append(command.Command(['ssh', '-T', *_OPTIONS, place.host, remote]))
  return found


_writing = threading.Lock()


def _write(stream: TextIO, line: bytes) -> None:
  """Writes a line, or drops it where that fails (a full disk, a closed pipe): no machine must wait for this one."""
  # A buffer of its own: what cannot be written does not stay in that of the stream, whose failure at exit is code 120.
  with _writing, contextlib.suppress(OSError), open(stream.fileno(), 'wb', closefd=False) as out:
    out.write(line)


def _tell(text: str) -> None:
  _write(sys.stderr, f'hosts.py: {text}\n'.encode())


class _Group:
  """The running processes. What they say is printed with their number in front."""

  def __init__(self, commands: Sequence[command.Command]):
    # In sessions of their own: Ctrl-C in a terminal would end the connections before anything is saved.
    self._running: list[subprocess.Popen] = []
    for each in commands:
      try:
        self._running.append(subprocess.Popen(
            each.argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True))
      except FileNotFoundError:
        self.kill()
        raise command.Mistake('ssh is not installed here; --dry_run prints what would be run') from None
    self._readers = [threading.Thread(target=self._print, args=(index, process), daemon=True)
                     for index, process in enumerate(self._running)]
    for reader in self._readers:
      reader.start()

  def _print(self, index: int, process: subprocess.Popen) -> None:
    for line in process.stdout:
      _write(sys.stdout, b'%d: %s' % (index, line if line.endswith(b'\n') else line + b'\n'))

  @property
  def codes(self) -> list[int | None]:
    """Exit codes as shells count them, None of what still runs."""
    polled = (process.poll() for process in self._running)
    return [code if code is None or code >= 0 else 128 - code for code in polled]

  def ask_to_end(self) -> None:
    """The end of stdin is the sign for each machine."""
    for process in self._running:
      if not process.stdin.closed:
        process.stdin.close()

  def ended(self, seconds: float) -> bool:
    """Waits so long for the end of all."""
    deadline = time.monotonic() + seconds
    while None in self.codes:
      if time.monotonic() > deadline:
        return False
      time.sleep(0.05)
    for reader in self._readers:
      reader.join(timeout=5)
    return True

  def kill(self) -> None:
    for process in self._running:
      if process.poll() is None:
        process.kill()


class _Stop:
  """Notes Ctrl-C and SIGTERM."""

  def __init__(self):
    self.signal = 0
    for number in (signal.SIGINT, signal.SIGTERM):
      signal.signal(number, self._note)

  def _note(self, number: int, frame: object) -> None:
    self.signal = number


def attend(commands: Sequence[command.Command], save_seconds: int, stop: _Stop) -> int:
  """Runs all until the first ends, and sees to the end of the others. Returns 0 where all ended well, else the code of
  the first that did not; 130 or 143 where this process was asked to end.
  """
  group = _Group(commands)
  while not stop.signal and all(code is None for code in group.codes):
    time.sleep(0.05)
  first = next((code for code in group.codes if code), 0)
  if not stop.signal and not first:
    group.ended(_PATIENCE)
  group.ask_to_end()
  if not group.ended(save_seconds + 10):  # the machines count for themselves: this is for one that is gone
    group.kill()
    group.ended(10)
  codes = group.codes
  if stop.signal:
    return 128 + stop.signal
  code = first or next((code for code in codes if code), 0)
  if code:
    shown = ', '.join(f'{index}: {code}' for index, code in enumerate(codes))
    _tell(f'the exit codes of the processes are {shown}')
  return code


def main(argv: Sequence[str]) -> int:
  args = _parser().parse(argv)
  commands = processes(args)
  if args.dry_run:
    return command.perform(commands, dry_run=True)
  stop = _Stop()
  for tried in range(args.retries + 1):
    code = attend(commands, args.save_seconds, stop)
    if code == 0 or code in command.FINAL or tried == args.retries:
      return code
    _tell(f'once more, {tried + 1} of {args.retries}')
    time.sleep(_PAUSE)
    if stop.signal:
      return 128 + stop.signal


if __name__ == '__main__':
  command.main(main, 'hosts.py')
