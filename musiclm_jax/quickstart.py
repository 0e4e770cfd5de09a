"""Everything once, small: music, networks, tokens, stages, samples, a report, a bundle to generate from.

Each step is one `musiclm` command in a process of its own, so what the quickstart does can be repeated by hand. Steps
that do not need one another run side by side, each on its share of the processors. A step that is done leaves a
marker and is skipped the next time; one that was interrupted resumes from its checkpoint.
"""
from __future__ import annotations

from collections.abc import Callable
import contextlib
import ctypes
import dataclasses
import glob
import hashlib
import importlib.util
import json
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time
import types
from typing import Any

from musiclm_jax.evaluate import BASELINES, MORE_PAIRS, PAIRS, RECORDS, TOKENS

BUNDLE = 'bundle'
_POINTS = 'token_lm/points.gin'  # texts have more of a say (docs/mulan.md)
_GRACE_SECONDS = 120.0  # for steps to save what they have, when the quickstart is stopped
_REPORT_SECONDS = 10.0  # a step shows its progress at most this often
# XLA on CPU takes and gives back large buffers in every step. With huge pages, and without returning them to the
# system each time, steps are 1.3 to 1.5 times as fast (glibc 2.35 and newer; others ignore it).
# On an accelerator two steps share its memory: neither may take most of it before it needs it.
_DEFAULTS = {'GLIBC_TUNABLES': 'glibc.malloc.hugetlb=1:glibc.malloc.mmap_threshold=33554432:'
                               'glibc.malloc.trim_threshold=4000000000',
             'XLA_PYTHON_CLIENT_PREALLOCATE': 'false'}


@dataclasses.dataclass(frozen=True)
class Step:
  """One command.

  Attributes:
    arguments: of `musiclm`. after: the steps whose results it reads.
    all_processors: whether it has all of them and not a lane's: the others wait for it anyhow.
  """

  name: str
  arguments: tuple[str, ...]
  after: tuple[str, ...] = ()
  all_processors: bool = False


class StepFailed(RuntimeError):
  """A step ended with an error, whose last line is in the message, or was killed, which says by what."""


@dataclasses.dataclass(frozen=True)
class _Running:
  """A step that was started. `begun`: when; `written`: bytes that earlier starts have left in its log."""

  process: subprocess.Popen
  lane: int
  begun: float
  written: int


def plan(root: pathlib.Path, *, audio_dir: str | None, captions: str | None, size: str, seed: int) -> list[Step]:
  """The steps in the order in which they are started where nothing else decides."""
  path = lambda *parts: str(root.joinpath(*parts))
  # Without texts of their own, recordings are described in the words of the built-in music. Captions are seldom enough
  # to learn a language from: MuLan sees built-in pairs beside them, as often.
  pairs = RECORDS if audio_dir is None else MORE_PAIRS if captions else PAIRS
  texts = str({path(RECORDS): 1, path(pairs): 1}) if captions else path(pairs)
  steps = []
  if audio_dir is None:
    steps.append(Step('prepare', ('prepare', '--composer', size, '--seed', str(seed), '--output_dir', path(RECORDS)),
                      all_processors=True))
  else:
    extra = ('--captions', captions) if captions else ()
    steps.append(Step('prepare', ('prepare', '--audio_dir', audio_dir, *extra, '--output_dir', path(RECORDS)),
                      all_processors=True))
    # After the music: where that is refused, there is no folder that would mean another way of training.
    steps.append(Step('pairs', ('prepare', '--composer', size, '--seed', str(seed), '--output_dir', path(pairs)),
                      ('prepare',), all_processors=True))
  with_pairs = tuple(step.name for step in steps)

  def train(name: str, experiment: str, after: tuple[str, ...], *overlays: str, workdir: str = '', **macros: Any
            ) -> Step:
    flags = [f'--gin.{k}={v}' for k, v in {**macros, 'SEED': seed}.items()]
    # One device: so small batches do not divide over eight, and there are two trainings at a time.
    files = (f'experiments/{experiment}.gin', f'size/{size}.gin', *overlays, 'mesh/one.gin')
    return Step(name, ('train', *(word for file in files for word in ('--gin_file', file)), *flags, '--workdir',
                       workdir or path(name)), after)

  return [
      *steps,
      train('codec', 'codec', ('prepare',), RECORDS=path(RECORDS)),
      train('mulan', 'mulan', with_pairs, RECORDS=texts),
      train('w2v_bert', 'w2v_bert', ('prepare',), RECORDS=path(RECORDS)),
      train('mulan_tokens', 'mulan_tokens', ('mulan',), RECORDS=texts, MULAN_WORKDIR=path('mulan')),
      train('untrained_w2v_bert', 'w2v_bert', ('prepare',), RECORDS=path(RECORDS), NUM_STEPS=0,
            workdir=path(BASELINES, 'w2v_bert')),
      train('semantic_tokens', 'semantic_tokens', ('w2v_bert',), RECORDS=path(RECORDS), W2V_WORKDIR=path('w2v_bert')),
      train('untrained_semantic_tokens', 'semantic_tokens', ('untrained_w2v_bert',), RECORDS=path(RECORDS),
            W2V_WORKDIR=path(BASELINES, 'w2v_bert'), workdir=path(BASELINES, 'semantic_tokens')),
      Step('extract', ('extract', '--input', path(RECORDS), '--workdir', str(root), '--output', path(TOKENS)),
           ('codec', 'mulan_tokens', 'semantic_tokens'), all_processors=True),
      train('coarse_lm', 'coarse_lm', ('extract',), _POINTS, TOKENS=path(TOKENS),
            MULAN_TOKENS_WORKDIR=path('mulan_tokens')),
      train('fine_lm', 'fine_lm', ('extract',), TOKENS=path(TOKENS)),
      train('semantic_lm', 'semantic_lm', ('extract',), _POINTS, TOKENS=path(TOKENS),
            MULAN_TOKENS_WORKDIR=path('mulan_tokens')),
      Step('report', ('evaluate', '--workdir', str(root), '--output', str(root), '--seed', str(seed)),
           ('semantic_lm', 'coarse_lm', 'fine_lm', 'untrained_semantic_tokens'), all_processors=True),
      # What weights learned from somebody's music may be used for is not for us to say. After the report, whose figures
      # are in the model card.
      Step('export', ('export', '--workdir', str(root), '--output', path(BUNDLE), '--licence',
                      'CC0-1.0' if audio_dir is None else 'unknown', '--replace'), ('report',), all_processors=True),
  ]


def run(workdir: str, *, audio_dir: str | None = None, captions: str | None = None, size: str = 'tiny',
        seed: int = 0) -> None:
  """Runs the plan in `workdir`, or what is left of it. Raises `StepFailed` where a step fails."""
  root = pathlib.Path(workdir).absolute()
  for folder in ('steps', 'logs', 'samples'):
    (root / folder).mkdir(parents=True, exist_ok=True)
  absolute = lambda path: path and os.path.abspath(path)
  steps = plan(root, audio_dir=absolute(audio_dir), captions=absolute(captions), size=size, seed=seed)
  begun = time.monotonic()
  _Scheduler(root, steps, seed).run()
  report = json.loads((root / 'report.json').read_text())
  print(f'\n{report["bars_passed"]} of {report["bars_total"]} bars reached, in {time.monotonic() - begun:.0f} s')
  print(f'report:  {root / "report.html"}\nsamples: {root / "samples"}\nbundle:  {root / BUNDLE} (all that generation '
        f'needs)\nmore:    musiclm generate --bundle {root / BUNDLE} --prompt "slow strings in a minor key, no drums" '
        '--seconds 10 --output out.wav')


class _Scheduler:
  """Runs steps in up to two lanes, each with half of the processors.

  How many a step has is part of the plan and does not depend on what else is running: sums are made in an order that
  depends on the number of threads, and a quickstart that was stopped must end with the same numbers.
  """

  def __init__(self, root: pathlib.Path, steps: list[Step], seed: int):
    self.root, self.steps, self.seed = root, steps, seed
    self.keys: dict[str, str] = {}
    for step in steps:
      inputs = [self.keys[name] for name in step.after]
      self.keys[step.name] = hashlib.sha256(json.dumps([step.arguments, inputs]).encode()).hexdigest()[:16]
    self.done = {s.name for s in steps if self._marker(s.name).get('key') == self.keys[s.name]}
    # What follows a step that has to run again must run again too.
    for step in steps:
      if not self.done.issuperset(step.after):
        self.done.discard(step.name)
    self.processors = sorted(_processors())
    half = len(self.processors) // 2
    lanes = [self.processors[:half], self.processors[half:2 * half]] if half else [self.processors]
    # A TPU belongs to one process; a second one would train on the CPU, and say so nowhere.
    self.lanes = [self.processors] if _has_tpu() else lanes
    self.running: dict[str, _Running] = {}

  def _marker(self, name: str) -> dict[str, Any]:
    try:
      return json.loads((self.root / 'steps' / f'{name}.json').read_text())
    except (OSError, ValueError):
      return {}

  def _log(self, name: str) -> pathlib.Path:
    return self.root / 'logs' / f'{name}.log'

  def run(self) -> None:
    for name in (s.name for s in self.steps if s.name in self.done):
      print(f'{name}: done before', flush=True)
    main = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, _interrupted) if main else None
    try:
      while len(self.done) < len(self.steps):
        self._start_ready()
        self._collect()
        time.sleep(0.1)
    finally:
      running = [started.process for started in self.running.values()]
      for process in running:
        process.terminate()
      for process in running:  # they save the step at hand, and would be killed when this process ends
        with contextlib.suppress(subprocess.TimeoutExpired):
          process.wait(_GRACE_SECONDS)
      if main:
        signal.signal(signal.SIGTERM, before)

  def _start_ready(self) -> None:
    ready = [s for s in self.steps if s.name not in self.done and s.name not in self.running
             and self.done.issuperset(s.after)]
    for step in ready:
      taken = {started.lane for started in self.running.values()}
      free = [lane for lane in range(len(self.lanes)) if lane not in taken]
      if not free:
        return
      processors = self.processors if step.all_processors else self.lanes[free[0]]
      gpus = _gpus()[free[0]:free[0] + 1]  # a lane has one of its own where there are several
      own = {'CUDA_VISIBLE_DEVICES': gpus[0]} if gpus and not step.all_processors else {}
      log = self._log(step.name)
      written = log.stat().st_size if log.exists() else 0
      self.running[step.name] = _Running(self._start(step, processors, own), free[0], time.monotonic(), written)

  def _start(self, step: Step, processors: list[int], environment: dict[str, str]) -> subprocess.Popen:
    print(f'{step.name}: musiclm {" ".join(step.arguments)}', flush=True)
    process = subprocess.Popen(
        [sys.executable, '-m', 'musiclm_jax.main', *step.arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, errors='replace', preexec_fn=_in_child(processors),
        env={**_DEFAULTS, **os.environ, 'PYTHONUNBUFFERED': '1', **environment})
    threading.Thread(target=self._relay, args=(step.name, process), daemon=True).start()
    return process

  def _relay(self, name: str, process: subprocess.Popen) -> None:
    """The step's output to its log, and a line of it now and then to the terminal."""
    shown = 0.0
    with open(self._log(name), 'a', encoding='utf-8') as log:
      for line in process.stdout:
        log.write(line)
        log.flush()
        if time.monotonic() - shown > _REPORT_SECONDS and 'steps/s' in line:
          shown = time.monotonic()
          print(f'  {line.rstrip()}', flush=True)

  def _collect(self) -> None:
    for name, started in list(self.running.items()):
      code = started.process.poll()
      if code is None:
        continue
      del self.running[name]
      if code:
        time.sleep(0.5)  # the relay may still be writing
        raise StepFailed(f'step {name} {_ending(code, self._log(name), started.written)}')
      seconds = time.monotonic() - started.begun
      marker = {'key': self.keys[name], 'wall_seconds': round(seconds, 1), 'seed': self.seed}
      partial = self.root / 'steps' / f'.{name}.partial'
      partial.write_text(json.dumps(marker))
      partial.replace(self.root / 'steps' / f'{name}.json')
      self.done.add(name)
      print(f'{name}: done in {seconds:.0f} s', flush=True)
      if name == 'codec':
        self._first_sound()

  def _first_sound(self) -> None:
    """As soon as there is a codec there is something to hear."""
    code = 'import sys; from musiclm_jax.evaluate import write_round_trips; write_round_trips(sys.argv[1])'
    done = subprocess.run([sys.executable, '-c', code, str(self.root)], check=False, capture_output=True,
                          env={**_DEFAULTS, **os.environ})
    if not done.returncode:
      print(f'first sound: {self.root / "samples"} (clips, and what the codec makes of them)', flush=True)


def _ending(code: int, log: pathlib.Path, written: int) -> str:
  """What a step ended with, for a code that is not 0 and a log to which earlier starts had `written` bytes."""
  where = f'(all of it: {log})'
  if code < 0:  # a killed process says nothing itself; its last line is of its progress
    names = {s.value: s.name for s in signal.Signals}
    memory = '; out of memory?' if code == -signal.SIGKILL else ''
    return f'was killed ({names.get(-code, f"signal {-code}")}{memory}) {where}'
  text = log.read_bytes()[written:].decode(errors='replace') if log.exists() else ''
  lines = [line for line in text.splitlines() if line.strip()]
  return f'failed: {lines[-1] if lines else f"exit code {code}"} {where}'


def _interrupted(number: int, frame: types.FrameType | None) -> None:
  raise KeyboardInterrupt


def _has_tpu() -> bool:
  platforms = os.environ.get('JAX_PLATFORMS', '')
  return importlib.util.find_spec('libtpu') is not None and (not platforms or 'tpu' in platforms) and bool(
      [*glob.glob('/dev/accel[0-9]*'), *glob.glob('/dev/vfio/[0-9]*')])


def _gpus() -> list[str]:
  """The NVIDIA GPUs that may be used, as CUDA_VISIBLE_DEVICES names them."""
  if 'CUDA_VISIBLE_DEVICES' in os.environ:
    return [name for name in os.environ['CUDA_VISIBLE_DEVICES'].split(',') if name]
  return [str(i) for i in range(len(glob.glob('/dev/nvidia[0-9]*')))]


def _processors() -> set[int]:
  if hasattr(os, 'sched_getaffinity'):
    return os.sched_getaffinity(0)
  return set(range(os.cpu_count() or 1))


def _in_child(processors: list[int]) -> Callable[[], None]:
  """Keeps a step on its processors, and ends it when the quickstart is killed."""
  libc = ctypes.CDLL(None) if sys.platform == 'linux' else None

  def prepare() -> None:
    if libc is not None:
      libc.prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: no orphan goes on writing to the workdir
    if hasattr(os, 'sched_setaffinity'):
      os.sched_setaffinity(0, processors)

  return prepare
