"""One run owns its workdir, and ends in an orderly way when it is asked to."""
from __future__ import annotations

from collections.abc import Iterator
import contextlib
import fcntl
import hashlib
import json
import os
import pathlib
import re
import signal
import socket
import tempfile
import threading
import types

from absl import logging
import jax
from jax.experimental import multihost_utils
import numpy as np

_LOCK = '.lock'


class Stopped(Exception):
  """The run was asked to end and did, with a checkpoint of the last step, where there was one.

  Attributes:
    exit_code: 128 + the signal's number, as shells count.
  """

  def __init__(self, number: int, step: int):
    done = f'after step {step}, which is saved' if step else 'before the first step'
    super().__init__(f'stopped by {signal.Signals(number).name} {done}; run the same command again to go on')
    self.exit_code = 128 + number


def make_writable(workdir: str | os.PathLike) -> None:
  """Creates the directory, or says in one line why it cannot be written to."""
  path = pathlib.Path(workdir)
  try:
    path.mkdir(parents=True, exist_ok=True)
    tempfile.NamedTemporaryFile(dir=path, prefix='.writable_').close()
  except OSError as error:
    raise ValueError(f'cannot write to the workdir {workdir}: {error.strerror}; name another one') from error


def all_or_none(fine: bool) -> bool:
  """Whether all processes of this run are fine. Each must ask, or the others wait for it."""
  if jax.process_count() == 1:
    return fine
  return bool(multihost_utils.process_allgather(np.array(fine)).all())


def check_same_everywhere(**facts: str) -> None:
  """Raises ValueError on all processes where one of them has another text for a fact.

  Both are named by sixteen hex digits: the text itself where it is such a digest, else its SHA-256.
  """
  if jax.process_count() == 1:
    return
  for name, text in facts.items():
    digits = text if re.fullmatch('[0-9a-f]{16}', text) else hashlib.sha256(text.encode()).hexdigest()[:16]
    digest = np.frombuffer(bytes.fromhex(digits), np.uint8)
    digests_Px8 = np.asarray(multihost_utils.process_allgather(digest))
    for index, other in enumerate(digests_Px8):
      if (other != digests_Px8[0]).any():
        first, other = (bytes(d.astype(np.uint8)).hex() for d in (digests_Px8[0], other))
        raise ValueError(f'process {index} runs with another {name} ({other}) than process 0 ({first}); start all with '
                         'the same')


@contextlib.contextmanager
def owned(workdir: str | os.PathLike) -> Iterator[None]:
  """Holds the workdir for this process. The kernel gives it back when the process ends, however it ends.

  Raises ValueError naming the owner where another run has it.
  """
  path = pathlib.Path(workdir) / _LOCK
  with open(path, 'a+', encoding='utf-8') as file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      file.seek(0)
      raise ValueError(f'{workdir} belongs to another run, {_owner(file.read())}; wait for its end, or name another '
                       'workdir') from None
    except OSError as error:  # a file system without locks
      logging.warning('%s cannot be locked (%s): take care that one run at a time uses it', workdir, error.strerror)
    file.truncate(0)
    file.write(json.dumps({'process': os.getpid(), 'host': socket.gethostname()}))
    file.flush()
    yield


def _owner(text: str) -> str:
  try:
    owner = json.loads(text)
    return f'process {owner["process"]} on {owner["host"]}'
  except (ValueError, KeyError, TypeError):
    return 'whose process is not known'


class Interruption:
  """Notes SIGTERM and the first Ctrl-C, so that a loop can end after the step at hand; a second Ctrl-C ends at once.

  Of many processes all must end after the same step: there JAX takes SIGTERM and spreads the news, and Ctrl-C is made
  one.

  Attributes:
    signal: the number of what came, 0 while nothing did.
  """

  def __init__(self):
    self.signal = 0
    self._before: dict[int, object] = {}

  def __enter__(self) -> Interruption:
    # Only the main thread may; with `jax.distributed` SIGTERM has a handler that this would replace.
    if threading.current_thread() is threading.main_thread():
      if jax.process_count() == 1:
        handlers = {signal.SIGTERM: self._note, signal.SIGINT: self._note}
      else:
        handlers = {signal.SIGINT: lambda *_: os.kill(os.getpid(), signal.SIGTERM)}
      self._before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    return self

  def __exit__(self, *exception: object) -> None:
    for number, handler in self._before.items():
      signal.signal(number, handler)

  def asked(self, step: int) -> bool:
    """Whether to end after this step; all processes of a run say the same of the same step."""
    if jax.process_count() > 1 and multihost_utils.reached_preemption_sync_point(step):
      self.signal = signal.SIGTERM
    return self.signal != 0

  def _note(self, number: int, frame: types.FrameType | None) -> None:
    if self.signal and number == signal.SIGINT:
      raise KeyboardInterrupt
    self.signal = number
    logging.warning('%s: saving after this step', signal.Signals(number).name)
