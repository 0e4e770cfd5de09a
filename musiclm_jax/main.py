"""The `musiclm` command: its verbs and their flags.

Each verb imports what it needs when it runs, so that `--help` is instant and a verb works without the
packages of the others. A user's mistake is one line on stderr: exit code 2 for the command line and the
configuration, 1 for everything that goes wrong later.
"""
from __future__ import annotations

import argparse
import difflib
import importlib
import logging
import os
import re
import socket
import sys
import threading
import time
import traceback
import types
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import musiclm_jax

USAGE_ERROR, FAILURE, INTERRUPTED = 2, 1, 130
SIZES = ('nano', 'tiny', 'small', 'base', 'paper')
# Packages of the extra `train`, by import name, for the message where one is missing.
TRAIN_PACKAGES = ('absl', 'array_record', 'flax', 'gin', 'jinja2', 'matplotlib', 'msgpack', 'optax', 'orbax',
                  'rich', 'scipy', 'seqio', 'sklearn', 'tensorflow', 'tensorflow_datasets',
                  'tokenizers')


class UsageError(Exception):
  """A mistake on the command line."""


class _Parser(argparse.ArgumentParser):
  """argparse with one line per error and no guessing of abbreviated flags."""

  def __init__(self, *args, **kwargs):
    formatter = argparse.RawDescriptionHelpFormatter
    super().__init__(*args, allow_abbrev=False, formatter_class=formatter, **kwargs)

  def error(self, message: str) -> NoReturn:
    raise UsageError(f'{message} (see {self.prog} --help)')

  def _check_value(self, action: argparse.Action, value: Any) -> None:
    if action.choices is not None and value not in action.choices:
      if near := difflib.get_close_matches(str(value), list(action.choices), n=1):
        raise argparse.ArgumentError(action, f'no {value!r}; did you mean {near[0]!r}?')
    super()._check_value(action, value)


def _positive(kind: Callable[[str], Any]) -> Callable[[str], Any]:
  def parse(text: str) -> Any:
    value = kind(text)
    if not value > 0:
      raise argparse.ArgumentTypeError(f'{text} is not above 0')
    return value
  parse.__name__ = f'positive {kind.__name__}'  # argparse names the type in "invalid ... value"
  return parse


def _composer_size(text: str) -> str | int:
  if text in SIZES:
    return text
  if not text.isdigit() or int(text) < 1:
    raise argparse.ArgumentTypeError(f'{text!r} is neither one of {", ".join(SIZES)} nor a number of clips')
  return int(text)


def _late(module: str, name: str) -> Callable[..., Any]:
  return getattr(importlib.import_module(f'musiclm_jax.{module}'), name)


def _given(args: argparse.Namespace, *names: str) -> dict[str, Any]:
  """The named flags that were given, so that defaults live in one place: the function that has them."""
  return {name: getattr(args, name) for name in names if getattr(args, name) is not None}


def _belongs(args: argparse.Namespace, owner: str, *names: str) -> None:
  """UsageError where one of the named flags was given, which mean something with `owner` alone."""
  for name in names:
    if getattr(args, name) not in (None, False):
      raise UsageError(f'--{name} belongs to {owner}')


def _existing(path: str, what: str) -> str:
  if not os.path.exists(path):
    raise FileNotFoundError(f'{what}: there is nothing at {path!r}')
  return path


def prepare(args: argparse.Namespace) -> None:
  if bool(args.composer) == bool(args.audio_dir):
    raise UsageError('give either --audio_dir (your music) or --composer SIZE (the built-in music)')
  if args.composer:
    _belongs(args, '--audio_dir; the built-in music is mono at 24 kHz and has its own texts', 'sample_rate', 'channels',
             'captions', 'caption_column', 'min_seconds')
    run = _late('data.prepare', 'prepare_composer')
    made = run(args.composer, args.output_dir, progress=_progress, **_given(args, 'workers', 'seed'))
    print(made.summary())
    return
  _belongs(args, '--composer; nothing is drawn for your own music', 'seed')
  _existing(args.audio_dir, '--audio_dir')
  if args.captions:
    _existing(args.captions, '--captions')
  else:
    _belongs(args, '--captions', 'caption_column')
  run = _late('data.prepare', 'prepare_folder')
  options = _given(args, 'captions', 'caption_column', 'min_seconds', 'sample_rate', 'channels', 'workers')
  print(run(args.audio_dir, args.output_dir, progress=_progress, **options).summary())


def _progress(what: str, done: int, total: int) -> None:
  if sys.stderr.isatty():
    print(f'\r{what} {done}/{total}', end='\n' if done == total else '', file=sys.stderr, flush=True)
  elif done == total:
    print(f'{what} {total}', file=sys.stderr)


def vocabulary(args: argparse.Namespace) -> None:
  for source in args.source:
    _existing(source, 'vocabulary')
  print(_late('data.vocabulary', 'train')(args.source, args.output, **_given(args, 'size', 'caption_column')))


def train(args: argparse.Namespace) -> None:
  config = importlib.import_module('musiclm_jax.config')
  experiment = config.load_experiment(
      args.gin_file, args.gin_bindings, search_paths=args.gin_search_path, allow=args.allow_import,
      provided=('dry_run', 'configuration', *(['workdir'] if args.workdir else [])))
  if args.distributed:
    _join()
  workdir = args.workdir or experiment.argument('workdir')
  configuration = experiment.operative()
  if args.dry_run:
    print(configuration)
  else:
    _late('training.workdir', 'make_writable')(workdir)
    _start_logging()
    logging.getLogger('absl').info('configuration %s, in %s/config.gin', experiment.fingerprint, workdir)
  experiment.build(workdir=workdir, dry_run=args.dry_run, configuration=configuration)


def plan(args: argparse.Namespace) -> None:
  try:
    topology = _late('chips', 'topology')(args.topology)
  except ValueError as error:
    raise UsageError(f'--topology: {error}') from None
  # Before JAX is imported: nothing runs on the accelerators of this machine, if it has any.
  os.environ['JAX_PLATFORMS'] = 'cpu'
  os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2')  # what the partitioner warns of is seen among the messages
  if not topology.is_tpu:
    flag = f'--xla_force_host_platform_device_count={topology.chips}'
    os.environ['XLA_FLAGS'] = f'{os.environ.get("XLA_FLAGS", "")} {flag}'.strip()
  config = importlib.import_module('musiclm_jax.config')
  load = lambda bindings: config.load_experiment(
      args.gin_file, bindings, search_paths=args.gin_search_path, allow=args.allow_import,
      provided=('workdir', 'dry_run', 'configuration'))
  try:
    experiment = load(args.gin_bindings)
  except config.MissingValues as missing:  # data and other runs, which a plan does not read
    experiment = load([*args.gin_bindings, *((name, 'nowhere') for name in missing.names)])
  planning = importlib.import_module('musiclm_jax.plan')
  found = planning.plan(planning.Training.of(experiment), topology)
  print(found.text())
  if args.output:
    found.write(args.output)


def _join() -> None:
  """Meets the other processes. Raises TimeoutError where nobody answers at the address that was named."""
  # Clusters that JAX knows (SLURM, GKE, TPU VMs) need no size and place; a hand-made one names them.
  options = _cluster(
      num_processes='JAX_NUM_PROCESSES', process_id='JAX_PROCESS_ID', initialization_timeout='MUSICLM_START_SECONDS',
      heartbeat_timeout_seconds='MUSICLM_HEARTBEAT_SECONDS')
  if heartbeat := options.get('heartbeat_timeout_seconds'):
    options['shutdown_timeout_seconds'] = 3 * heartbeat  # a process that is gone is named by its heartbeat, before that
  if (address := os.environ.get('JAX_COORDINATOR_ADDRESS')) and options.get('process_id', 0):
    _await(address, options.get('initialization_timeout', 300))  # JAX would abort the process with a stack trace
  importlib.import_module('jax').distributed.initialize(**options)


def _await(address: str, seconds: float) -> None:
  host, _, port = address.rpartition(':')
  if not port.isdigit():
    raise ValueError(f'JAX_COORDINATOR_ADDRESS is {address!r}: write HOST:PORT')
  deadline = time.monotonic() + seconds
  while True:
    try:
      socket.create_connection((host.strip('[]'), int(port)), timeout=5).close()
      return
    except OSError as error:
      if time.monotonic() > deadline:
        raise TimeoutError(
            f'no coordinator at {address} within {seconds:g} s ({error}): start process 0 there, or set '
            'JAX_COORDINATOR_ADDRESS to where it is; MUSICLM_START_SECONDS says how long to wait') from error
      time.sleep(0.5)


def _cluster(**variables: str) -> dict[str, int]:
  """Numbers that a launcher leaves in the environment, where it does."""
  found = {}
  for name, variable in variables.items():
    if (text := os.environ.get(variable)) is not None:
      if not text.isdecimal():
        raise ValueError(f'the environment has {variable}={text!r}, which is no whole number')
      found[name] = int(text)
  return found


def _start_logging() -> None:
  """Our own messages and everybody's warnings on stderr; Orbax reports dozens of lines a checkpoint."""
  importlib.import_module('absl.logging').set_verbosity('info')
  handler = logging.StreamHandler()
  handler.setFormatter(logging.Formatter('%(asctime)s %(message)s', '%H:%M:%S'))
  handler.addFilter(_is_news)
  logger = logging.getLogger('absl')
  logger.handlers, logger.propagate = [handler], False
  # The trainer says in one line why a save failed; Orbax's log, threads and tasks would tell it again with tracebacks.
  logging.getLogger('asyncio').setLevel(logging.CRITICAL)
  threading.excepthook = lambda found: _of_a_save(found.exc_traceback) or threading.__excepthook__(found)
  sys.unraisablehook = lambda found: _of_a_save(found.exc_traceback) or sys.__unraisablehook__(found)


def _is_news(record: logging.LogRecord) -> bool:
  if record.exc_info and 'orbax' in Path(record.pathname).parts:
    return False
  return record.levelno >= logging.WARNING or Path(record.pathname).is_relative_to(Path(__file__).parent)


def _of_a_save(raised: types.TracebackType | None) -> bool:
  """Whether it was raised in Orbax, or where TensorStore answers an event loop of Orbax that has ended."""
  frames = traceback.extract_tb(raised)
  return any('orbax' in Path(frame.filename).parts for frame in frames) or (
      bool(frames) and all('asyncio' in Path(frame.filename).parts for frame in frames))


def extract(args: argparse.Namespace) -> None:
  if named := [role for role in args.without if getattr(args, role)]:
    raise UsageError(f'--{named[0]} names a network that --without {named[0]} leaves out')
  roles = tuple(role for role in ('codec', 'semantic', 'mulan') if role not in args.without)
  places = {role: getattr(args, role) for role in roles if getattr(args, role)}
  if not args.workdir and len(places) < len(roles):
    raise UsageError('name the trained networks: --workdir for all, or ' + ' and '.join(f'--{r}' for r in roles))
  for flag in ('input', 'workdir', *roles):
    if getattr(args, flag):
      _existing(getattr(args, flag), f'--{flag}')
  cascade = _late('cascade', 'Cascade')(args.workdir or '', places)
  options = {**_cluster(process_index='JAX_PROCESS_ID', process_count='JAX_NUM_PROCESSES'),
             **_given(args, 'batch_size', 'process_index', 'process_count')}
  made = _late('extract', 'extract')(args.input, args.output, cascade, roles=roles, **options)
  if made is not None:
    print(made.summary())


def data(args: argparse.Namespace) -> None:
  _existing(args.directory, args.action)
  _belongs(args, *({'inspect': ('duplicates', 'threshold', 'remove')}.get(args.action, ('inspect', 'delete_damaged'))))
  if args.action == 'inspect':
    found = _late('data.inspection', 'inspect')(args.directory, progress=_progress)
    print(found.text())
    if args.delete_damaged:
      found.delete_damaged()
    if advice := found.advice(deleted=args.delete_damaged):
      raise ValueError(advice)
    return
  options = _given(args, 'threshold')
  found = _late('data.duplicates', 'find')(args.directory, progress=_progress, **options)
  print(found.text())
  if args.remove and found.pairs:
    print(_late('data.duplicates', 'remove')(args.directory, found).summary())


def codec(args: argparse.Namespace) -> None:
  transcode = importlib.import_module('musiclm_jax.transcode')
  _existing(args.codec, '--codec')
  _existing(args.input, args.action)
  if args.action != 'encode' and not args.output.endswith('.wav'):
    raise UsageError(f'{args.output}: name a .wav file')
  transcoder = transcode.Transcoder(transcode.load(args.codec), denoise=args.denoise)
  run = {'encode': transcoder.encode, 'decode': transcoder.decode, 'roundtrip': transcoder.round_trip}[args.action]
  print(run(args.input, args.output, **_given(args, 'levels')).text())


def mulan(args: argparse.Namespace) -> None:
  _existing(args.mulan, '--mulan')
  _existing(args.audio_dir, '--audio_dir')
  print(_late('search', 'search')(args.mulan, args.audio_dir, args.query, progress=_progress,
                                  **_given(args, 'index', 'top')).text())


def semantic(args: argparse.Namespace) -> None:
  _existing(args.w2v, '--w2v')
  if args.records and args.records != 'builtin':
    _existing(args.records, '--records')
  study = importlib.import_module('musiclm_jax.layer_study')
  amounts = study.Amounts(decorrelate=not args.per_dimension, probes=tuple(args.probes or ()),
                          **_given(args, 'clips', 'fit_clips', 'seconds', 'codes'))
  print(study.study(args.w2v, amounts=amounts, **_given(args, 'records', 'output', 'seed')).text())


def reproduce(args: argparse.Namespace) -> None:
  _existing(args.run_dir, 'reproduce')
  result = _late('reproduce', 'reproduce')(args.run_dir, args.workdir, allow=args.allow_import, **_given(args, 'steps'))
  print(result.text())
  if not result.same:
    raise ValueError(f'{args.workdir} is not a reproduction of {args.run_dir}: {result.first_difference}')


def export(args: argparse.Namespace) -> None:
  _existing(args.workdir, '--workdir')
  for path in args.records:
    _existing(path, '--records')
  options = _given(args, 'licence', 'weights')
  if args.format == 'savedmodel':
    if args.replace:
      raise UsageError('--replace concerns bundles; a SavedModel is written where there is nothing')
    run = _late('export.bundle', 'export_savedmodel')
  else:
    run = _late('export.bundle', 'export')
    options['replace'] = args.replace
  print(run(args.workdir, args.output, records=args.records, **options).text())


def generate(args: argparse.Namespace) -> None:
  if bool(args.workdir) == bool(args.bundle):
    raise UsageError('give either --workdir (trained runs) or --bundle (what `musiclm export` wrote)')
  _existing(args.workdir or args.bundle, '--workdir' if args.workdir else '--bundle')
  request = _request(args)
  files, modes, pipeline = (
      importlib.import_module(f'musiclm_jax.generate.{m}') for m in ('files', 'modes', 'pipeline'))
  seed = modes.check_seed(args.seed or 0)
  files.check(args.output, sidecar=not args.no_sidecar)
  if args.bundle:
    networks = musiclm_jax.load(args.bundle)
  else:
    networks = _late('cascade_networks', 'CascadeNetworks')(_late('cascade', 'Cascade')(args.workdir))
  sampling = pipeline.adjusted(networks, **_given(args, 'temperature', 'guidance'))
  settings = pipeline.Settings(sampling=sampling, **_given(
      args, 'seconds', 'mulan_levels', 'block_seconds', 'story_context'))
  blocks = modes.music(networks, request, settings, seed=seed)
  about = None if args.no_sidecar else modes.about(networks, request, settings, seed)
  print(files.write(args.output, blocks, networks.sample_rate, about=about).text())


def _request(args: argparse.Namespace) -> Any:
  """What the flags ask for. Raises UsageError where they do not go together."""
  texts, styles = args.prompt or [], args.style_audio or []
  ways = {'--prompt or --style_audio': bool(texts or styles), '--story': bool(args.story),
          '--unconditional': args.unconditional}
  for flag in ('story', 'continue_audio', 'continue_at', 'infill_audio', 'gap', 'style_audio'):
    if '' in (value if isinstance(value := getattr(args, flag), list) else [value]):
      raise UsageError(f'--{flag} is empty')
  chosen = [name for name, given in ways.items() if given]
  of_a_clip = args.continue_audio or args.infill_audio
  if len(chosen) > 1 or not (chosen or of_a_clip):
    raise UsageError(f'give one of {", ".join(ways)}' + (f'; found {" and ".join(chosen)}' if chosen else ''))
  for flag, needs in (('crossfade', 'story'), ('story_context', 'story'), ('continue_at', 'continue_audio'),
                      ('drop_clip', 'continue_audio'), ('gap', 'infill_audio'),
                      ('infill_audio', 'gap')):
    if getattr(args, flag) and not getattr(args, needs):
      raise UsageError(f'--{flag} needs --{needs}')
  for flag in ('continue_audio', 'story', 'seconds'):
    if args.infill_audio and getattr(args, flag):
      raise UsageError(f'--{flag} does not go with --infill_audio, which fills the gap and no more')
  if args.infill_audio and args.unconditional:
    raise UsageError('--infill_audio follows the clip where there is no prompt; --mulan_levels 0 follows nothing')
  if args.negative_prompt is not None and args.guidance == 1.0:
    raise UsageError('--negative_prompt needs --guidance G with G above 1: guidance is what leads away from it')
  weights = [1.0] * len(texts + styles) if args.weights is None else args.weights
  if len(weights) != len(texts + styles):
    raise UsageError(f'--weights: give one for each --prompt, then one for each --style_audio: {len(texts + styles)}, '
                     f'found {len(weights)}')
  for text in texts if args.negative_prompt is None else [*texts, args.negative_prompt]:
    if not text.strip():
      raise UsageError('a prompt is empty; describe the music in words')
  prompts, stories, modes, infill = (
      importlib.import_module(f'musiclm_jax.generate.{m}') for m in ('prompts', 'story', 'modes', 'infill'))
  try:
    items = [prompts.Prompt(text=t, weight=w) for t, w in zip(texts, weights)]
    items += [prompts.Prompt(audio=s, weight=w) for s, w in zip(styles, weights[len(texts):])]
    story = stories.read(args.story, **_given(args, 'crossfade')) if args.story else None
    continuation = gap = None
    if args.continue_audio:
      at = None if args.continue_at is None else stories.parse_time(args.continue_at)
      continuation = modes.Continuation(args.continue_audio, at, keep=not args.drop_clip)
    if args.infill_audio:
      begin, dash, end = args.gap.partition('-')
      if not dash:
        raise ValueError(f'{args.gap!r} is no gap; write its ends as 0:04-0:07')
      gap = infill.Gap(args.infill_audio, stories.parse_time(begin), stories.parse_time(end))
    best_of = args.best_of or (infill.CANDIDATES if gap else 1)
    return modes.Request(tuple(items), story, args.negative_prompt or '', continuation, gap, best_of)
  except ValueError as error:
    raise UsageError(str(error)) from None


def evaluate(args: argparse.Namespace) -> None:
  if sum(map(bool, (args.workdir, args.codec, args.mulan))) != 1 or bool(args.workdir) == bool(args.audio_dir):
    raise UsageError('give either --workdir (a set of trained runs), or one of --codec and --mulan with --audio_dir')
  for name in ('workdir', 'codec', 'mulan', 'audio_dir', 'captions', 'tag_names'):
    if getattr(args, name):
      _existing(getattr(args, name), f'--{name}')
  for path in args.tags or ():
    _existing(path, '--tags')
  if args.workdir:
    _belongs(args, '--audio_dir', 'max_seconds')
  of_texts = ('tags', 'tag_names', 'captions', 'caption_column')
  if not args.mulan:
    _belongs(args, '--mulan', *of_texts)
  for flag, needs in (('tag_names', 'tags'), ('caption_column', 'captions')):
    if getattr(args, flag) and not getattr(args, needs):
      raise UsageError(f'--{flag} belongs to --{needs}')
  if args.mulan and args.seed is not None:
    raise UsageError('--seed does not concern --mulan: nothing is drawn')
  if args.workdir:
    _late('evaluate', 'evaluate')(args.workdir, **_given(args, 'output', 'seed'))
  elif args.codec:
    print(_late('evaluate_codec', 'evaluate_codec')(
        args.codec, args.audio_dir, args.output or args.codec, progress=_progress,
        **_given(args, 'max_seconds', 'seed')).text())
  else:
    print(_late('evaluate_mulan', 'evaluate_mulan')(
        args.mulan, args.audio_dir, args.output or args.mulan, progress=_progress,
        **_given(args, 'max_seconds', *of_texts)).text())


def quickstart(args: argparse.Namespace) -> None:
  if args.captions and not args.audio_dir:
    raise UsageError('--captions need --audio_dir: the built-in music has its own')
  for name in ('audio_dir', 'captions'):
    if getattr(args, name):
      _existing(getattr(args, name), f'--{name}')
  options = _given(args, 'audio_dir', 'captions', 'size', 'seed')
  _late('quickstart', 'run')(args.workdir, **options)


def _add_prepare(verb: Callable[..., _Parser]) -> None:
  p = verb('prepare', prepare, 'turn music (a folder, or the built-in composer) into records', '''
examples:
  musiclm prepare --audio_dir ~/music --output_dir data/mine
  musiclm prepare --audio_dir ~/music --captions captions.csv --caption_column text --output_dir data/mine
  musiclm prepare --audio_dir ~/music --sample_rate 48000 --channels 2 --output_dir data/stereo
  musiclm prepare --composer tiny --output_dir data/built_in      # no downloads, no files needed
''')
  p.add_argument('--audio_dir', metavar='DIR', help='wav, flac, mp3, ogg files, at any depth')
  p.add_argument('--captions', metavar='FILE', help='CSV, TSV or JSON lines: file name and text')
  p.add_argument('--caption_column', metavar='NAME', help='the column that holds the text')
  p.add_argument('--min_seconds', metavar='S', type=_positive(float), help='shorter recordings are left out')
  p.add_argument('--sample_rate', metavar='HZ', type=_positive(int), help='of the records; 24000 by default')
  p.add_argument('--channels', metavar='N', type=_positive(int), help='of the records; 1 by default: the average')
  p.add_argument('--composer', metavar='SIZE', type=_composer_size,
                 help=f'built-in music: {", ".join(SIZES)}, or a number of clips to train on')
  p.add_argument('--output_dir', metavar='DIR', required=True, help='where the records go')
  p.add_argument('--workers', metavar='N', type=_positive(int), help='processes')
  p.add_argument('--seed', metavar='N', type=int, help='for --composer')


def _add_vocabulary(verb: Callable[..., _Parser]) -> None:
  p = verb('vocabulary', vocabulary, 'train a text vocabulary (SentencePiece) for MuLan', '''
examples:
  musiclm vocabulary data/mine --size 8000 --output mine.model
  musiclm train --gin_file experiments/mulan.gin --gin.MULAN_VOCABULARY=mine.model --gin.MULAN_TEXT_VOCAB=8064 ...
''')
  p.add_argument('source', metavar='SOURCE', nargs='+',
                 help='records with texts, caption files (CSV, TSV, JSON lines), or .txt files with a text a line')
  p.add_argument('--size', metavar='N', type=_positive(int), help='pieces at most; 8000 by default')
  p.add_argument('--caption_column', metavar='NAME', help='the column of caption files that holds the text')
  p.add_argument('--output', metavar='FILE', required=True, help='the vocabulary')


def _add_gin_flags(p: _Parser) -> None:
  p.add_argument('--gin_file', metavar='FILE', action='append', required=True,
                 help='repeatable, in order; found in --gin_search_path, here, or among the files that ship')
  p.add_argument('--gin_search_path', metavar='DIR', action='append', default=[], help='repeatable')
  p.add_argument('--allow_import', metavar='MODULE', action='append', default=[],
                 help='a module that gin files may import (they can run its code); repeatable')


def _add_train(verb: Callable[..., _Parser]) -> None:
  p = verb('train', train, 'train any network from a gin experiment; run again to resume', '''
Any macro or binding of the experiment can be set on the command line; text needs no quotes:
  --gin.NUM_STEPS=1000   --gin.RECORDS=data/mine   --gin.specs.Stage.seconds=2.0

examples:
  musiclm train --gin_file experiments/codec.gin --gin.RECORDS=data/mine --workdir runs/codec
  musiclm train --gin_file experiments/coarse_lm.gin --gin_file size/paper.gin --workdir runs/coarse --dry_run
''')
  _add_gin_flags(p)
  p.add_argument('--workdir', metavar='DIR', help='checkpoints, metrics and logs')
  p.add_argument('--dry_run', action='store_true', help='check, print what would run, write nothing')
  p.add_argument('--distributed', action='store_true', help='one of many processes (jax.distributed)')


def _add_plan(verb: Callable[..., _Parser]) -> None:
  p = verb('plan', plan, 'what a training would do on a machine that is not here', '''
Compiles the training step for a topology and prints its memory, messages, predicted time and cost. Exit code 1, with
the nearest batch that fits, where the memory of a device is too small. TPUs need the extra `tpu`; GPUs are simulated.
Gin files and bindings are those of `musiclm train`; no data is read.

topologies:
  v5e:4x4  v5e:16x16  v6e:8x8  v5p:4x4x4     a slice of TPUs
  v5e:16x16*2                                two slices, joined by the network of the data centre
  h100:8  h200:8  h100:8x4                   a node of 8 GPUs; four nodes
  cpu:8                                      CPU devices: messages and memory only

examples:
  musiclm plan --gin_file experiments/codec.gin --gin_file size/paper.gin --gin_file mesh/v5e_16.gin --topology v5e:4x4
  musiclm plan --gin_file experiments/mulan.gin --gin_file mesh/gpu_8.gin --topology h100:8 --output plan.json
''')
  _add_gin_flags(p)
  p.add_argument('--topology', metavar='NAME', required=True, help='the machine to plan for')
  p.add_argument('--output', metavar='FILE', help='the same as JSON')


def _add_extract(verb: Callable[..., _Parser]) -> None:
  p = verb('extract', extract, 'write the tokens of prepared records, with frozen networks', '''
example:
  musiclm extract --input data/mine --workdir runs --output data/mine_tokens
''')
  p.add_argument('--input', metavar='DIR', required=True, help='records from `musiclm prepare`')
  p.add_argument('--workdir', metavar='DIR', help='holds the runs codec, semantic_tokens and mulan_tokens')
  p.add_argument('--codec', metavar='DIR', help='the run of a trained codec, where it lies elsewhere')
  p.add_argument('--semantic', metavar='DIR', help='likewise, of a fitted semantic tokenizer')
  p.add_argument('--mulan', metavar='DIR', help='likewise, of fitted MuLan tokens')
  p.add_argument('--without', nargs='+', choices=('semantic', 'mulan'), default=(),
                 help='tokens that no stage will need: mulan for those of AudioLM')
  p.add_argument('--output', metavar='DIR', required=True, help='where the token records go')
  p.add_argument('--batch_size', metavar='N', type=_positive(int), help='clips at a time on each device')
  p.add_argument('--process_index', metavar='I', type=int,
                 help='which of --process_count processes this is, from 0; they share the shards and need no network')
  p.add_argument('--process_count', metavar='N', type=_positive(int))


def _add_data(verb: Callable[..., _Parser]) -> None:
  p = verb('data', data, 'look after prepared records and tokens', '''
actions:
  inspect      reads every byte: checksums, counts, token ranges, use of the codes; lists what to make again
  duplicates   held-out clips that also sound in the training music, by their semantic tokens

examples:
  musiclm data inspect data/mine_tokens
  musiclm data inspect data/mine_tokens --delete_damaged    # then run the command that made it again
  musiclm data duplicates data/mine_tokens --remove
''')
  p.add_argument('action', metavar='ACTION', choices=('inspect', 'duplicates'), help='inspect or duplicates')
  p.add_argument('directory', metavar='DIR', help='a record set')
  p.add_argument('--delete_damaged', action='store_true', help='inspect: delete shards that are not what they were')
  p.add_argument('--threshold', metavar='X', type=_positive(float), help='duplicates: share of a clip that must agree')
  p.add_argument('--remove', action='store_true', help='duplicates: take those clips out of the held-out split')


def _add_codec(verb: Callable[..., _Parser]) -> None:
  p = verb('codec', codec, 'recordings to compressed files and back, with a trained codec', '''
actions:
  encode       an audio file to a compressed one
  decode       a compressed file to .wav, with all of its levels or the first few
  roundtrip    an audio file to .wav, through the codec

examples:
  musiclm codec encode song.flac song.mlc --codec runs/codec --levels 4
  musiclm codec decode song.mlc song.wav --codec runs/codec
''')
  p.add_argument('action', metavar='ACTION', choices=('encode', 'decode', 'roundtrip'),
                 help='encode, decode or roundtrip')
  p.add_argument('input', metavar='IN')
  p.add_argument('output', metavar='OUT')
  p.add_argument('--codec', metavar='DIR', required=True, help='the run of a trained codec')
  p.add_argument('--levels', metavar='N', type=_positive(int), help='levels of the quantizer; all by default')
  p.add_argument('--denoise', action='store_true', help='take noise out, with a codec that was trained for it')


def _add_mulan(verb: Callable[..., _Parser]) -> None:
  p = verb('mulan', mulan, 'find music by words, with a trained MuLan', '''
actions:
  search       the recordings of a folder whose best clip is nearest to a text; their embeddings are kept in an index

example:
  musiclm mulan search "warm strings, no drums" --audio_dir ~/music --mulan runs/mulan
''')
  p.add_argument('action', metavar='ACTION', choices=('search',), help='search')
  p.add_argument('query', metavar='TEXT')
  p.add_argument('--mulan', metavar='DIR', required=True, help='the run of a trained MuLan')
  p.add_argument('--audio_dir', metavar='DIR', required=True, help='wav, flac, mp3, ogg files, at any depth')
  p.add_argument('--index', metavar='FILE', help='where the embeddings are kept; in the run if not given')
  p.add_argument('--top', metavar='N', type=_positive(int), help='recordings shown; 10 by default')


def _add_semantic(verb: Callable[..., _Parser]) -> None:
  p = verb('semantic', semantic, 'choose the layer that semantic tokens are made from', '''
actions:
  layers       clusters of every layer of a w2v-BERT: what their tokens tell of the music, as a table and a plot,
               beside the network before training and k-means of log-mel

example:
  musiclm semantic layers --w2v runs/w2v_bert --records data/mine
''')
  p.add_argument('action', metavar='ACTION', choices=('layers',), help='layers')
  p.add_argument('--w2v', metavar='DIR', required=True, help='the run of a trained w2v-BERT')
  p.add_argument('--records', metavar='DIR', help='music from `musiclm prepare`; default: builtin')
  p.add_argument('--output', metavar='DIR', help='where layers.json and layers.png go; the run if not given')
  p.add_argument('--codes', metavar='K', type=_positive(int),
                 help='clusters a layer; as many as the network has targets if not given')
  p.add_argument('--per_dimension', action='store_true',
                 help='divide each dimension by its own deviation, as AudioLM does, and decorrelate none')
  p.add_argument('--clips', metavar='N', type=_positive(int), help='held-out clips to ask; default: 400')
  p.add_argument('--fit_clips', metavar='N', type=_positive(int), help='clips to fit clusters on; default: 1000')
  p.add_argument('--seconds', metavar='S', type=_positive(float), help='of each clip at most; default: 10')
  p.add_argument('--probes', metavar='NAME', nargs='+', help='only these, as tempo meter; default: all')
  p.add_argument('--seed', metavar='N', type=int)


def _add_reproduce(verb: Callable[..., _Parser]) -> None:
  p = verb('reproduce', reproduce, 'run a finished run again and compare, bit for bit', '''
example:
  musiclm reproduce runs/codec --workdir runs/codec_again --steps 200
''')
  p.add_argument('run_dir', metavar='RUN', help='the workdir of a run')
  p.add_argument('--workdir', metavar='DIR', required=True, help='where the repetition goes')
  p.add_argument('--steps', metavar='N', type=_positive(int), help='compare the first N steps only')
  p.add_argument('--allow_import', metavar='MODULE', action='append', default=[], help='as for train; repeatable')


def _add_export(verb: Callable[..., _Parser]) -> None:
  p = verb('export', export, 'one folder with all that generation needs, to use and to give away', '''
The functions are StableHLO for CPU, CUDA and TPU; to generate from the folder, `pip install musiclm_jax` is enough.

examples:
  musiclm export --workdir runs --output runs/bundle --licence CC-BY-4.0
  musiclm export --workdir runs --output small --licence CC-BY-4.0 --weights int8
''')
  p.add_argument('--workdir', metavar='DIR', required=True, help='the folder that holds the trained runs')
  p.add_argument('--output', metavar='DIR', required=True, help='where the bundle goes; there may be nothing yet')
  p.add_argument('--licence', metavar='NAME', help='of the weights: an SPDX identifier, as CC-BY-4.0')
  p.add_argument('--weights', metavar='KIND', choices=('float32', 'bfloat16', 'int8'),
                 help='float32 (the default), bfloat16 or int8')
  p.add_argument('--records', metavar='DIR', action='append', default=[],
                 help='what the networks were trained on, for the model card; found in a quickstart; repeatable')
  p.add_argument('--format', metavar='FORMAT', choices=('bundle', 'savedmodel'), default='bundle',
                 help='bundle (the default), or savedmodel: one TensorFlow SavedModel for each network')
  p.add_argument('--replace', action='store_true', help='an older bundle in --output makes way')


def _add_generate(verb: Callable[..., _Parser]) -> None:
  p = verb('generate', generate, 'text in, music out', '''
examples:
  musiclm generate --workdir runs --prompt "slow piano in a minor key" --seconds 10 --output piano.wav
  musiclm generate --bundle runs/bundle --prompt "slow piano in a minor key" --output piano.wav
  musiclm generate --workdir runs --prompt "a flute" --style_audio mine.wav --weights 1 2 --output both.wav
  musiclm generate --workdir runs --story "0:00 calm piano, 0:15 add drums" --seconds 30 --output story.flac
  musiclm generate --workdir runs --continue_audio mine.wav --prompt "with drums" --seconds 20 --output longer.wav
  musiclm generate --workdir runs --infill_audio mine.wav --gap 0:04-0:07 --output mended.wav
''')
  p.add_argument('--workdir', metavar='DIR', help='the folder that holds the trained runs')
  p.add_argument('--bundle', metavar='DIR', help='or what `musiclm export` wrote')
  p.add_argument('--output', metavar='FILE', required=True,
                 help='a .wav, .flac or .ogg file; where it comes from goes beside it, into a .json')
  p.add_argument('--prompt', metavar='TEXT', action='append', help='what the music is to be; repeatable: a mixture')
  p.add_argument('--style_audio', metavar='FILE', action='append',
                 help='a clip that the music is to be like; repeatable, and beside --prompt')
  p.add_argument('--weights', metavar='W', type=float, nargs='+',
                 help='of the mixture: one for each --prompt, then one for each --style_audio; default: all equal')
  p.add_argument('--story', metavar='TEXT', help='texts in turn, "0:00 calm piano, 0:15 add drums", or a .txt of them')
  p.add_argument('--crossfade', metavar='S', type=_positive(float),
                 help='with --story: seconds over which one text becomes the next; default: at once')
  p.add_argument('--story_context', metavar='S', type=float,
                 help='with --story: seconds of what was played before that a new text hears; default: none; more is '
                      'smoother and follows the text less')
  p.add_argument('--unconditional', action='store_true', help='no description at all')
  p.add_argument('--negative_prompt', metavar='TEXT', help='what guidance leads away from; default: no text at all')
  p.add_argument('--continue_audio', metavar='FILE', help='a clip to go on from; it stands in front of the result')
  p.add_argument('--continue_at', metavar='TIME', help='with --continue_audio: from there on; default: its end')
  p.add_argument('--drop_clip', action='store_true', help='with --continue_audio: write only what is new')
  p.add_argument('--infill_audio', metavar='FILE', help='a clip of which a part is made anew')
  p.add_argument('--gap', metavar='FROM-TO', help='with --infill_audio: that part, as 0:04-0:07')
  p.add_argument('--best_of', metavar='N', type=_positive(int),
                 help='make N, keep the one that MuLan finds closest to the prompt; default: 1. Of a gap: the one that '
                      'joins best; default: 4')
  p.add_argument('--seconds', metavar='S', type=_positive(float), help='length of what is new; default: 10')
  p.add_argument('--seed', metavar='N', type=int, help='another one, another piece; default: 0')
  p.add_argument('--temperature', metavar='X', type=_positive(float),
                 help='multiplies that of each stage; default: 1, lower is tamer')
  p.add_argument('--guidance', metavar='G', type=float,
                 help='how strongly the description is followed, in the stages that hear it; 1: plain sampling, '
                      'which is faster; default: 3')
  p.add_argument('--mulan_levels', metavar='N', type=int,
                 help='how many levels of the description are heard; default: as many as the stages have learned to')
  p.add_argument('--block_seconds', metavar='S', type=_positive(float),
                 help='audio is made in blocks of this length; shorter: the first comes sooner, the last later')
  p.add_argument('--no_sidecar', action='store_true', help='no .json beside the audio')


def _add_evaluate(verb: Callable[..., _Parser]) -> None:
  p = verb('evaluate', evaluate, 'measure a set of trained runs and write a report, or one network on any music', '''
examples:
  musiclm evaluate --workdir runs --output runs/report
  musiclm evaluate --codec runs/codec --audio_dir ~/music --output runs/codec_on_my_music
  musiclm evaluate --mulan runs/mulan --audio_dir ~/music --captions captions.csv
  musiclm evaluate --mulan runs/mulan --audio_dir magnatagatune --tags annotations_final.csv
''')
  p.add_argument('--workdir', metavar='DIR', help='the folder that holds the trained runs')
  p.add_argument('--codec', metavar='DIR', help='the run of a trained codec: each number of levels, beside Opus')
  p.add_argument('--mulan', metavar='DIR', help='the run of a trained MuLan: tags, playlists, captions')
  p.add_argument('--audio_dir', metavar='DIR', help='with these: wav, flac, mp3, ogg files, at any depth')
  p.add_argument('--max_seconds', metavar='S', type=_positive(float), help='with these: of each recording')
  p.add_argument('--tags', metavar='FILE', nargs='+',
                 help='with --mulan: MagnaTagATune, AudioSet, a table with "file" and "tags", or .m3u playlists')
  p.add_argument('--tag_names', metavar='FILE', help="with --mulan: AudioSet's class_labels_indices.csv")
  p.add_argument('--captions', metavar='FILE', help='with --mulan: CSV, TSV or JSON lines: file name and text')
  p.add_argument('--caption_column', metavar='NAME', help='with --mulan: the column that holds the text')
  p.add_argument('--output', metavar='DIR', help='where the report goes; the workdir, or the run, if not given')
  p.add_argument('--seed', metavar='N', type=int)


def _add_quickstart(verb: Callable[..., _Parser]) -> None:
  p = verb('quickstart', quickstart, 'everything once, small: data, networks, music, a report', '''
examples:
  musiclm quickstart                                     # the built-in music, tiny networks, a laptop
  musiclm quickstart --audio_dir ~/music --captions captions.csv --workdir runs/mine
''')
  p.add_argument('--workdir', metavar='DIR', default='quickstart', help='default: ./quickstart')
  p.add_argument('--audio_dir', metavar='DIR', help='your music instead of the built-in')
  p.add_argument('--captions', metavar='FILE', help='with --audio_dir: CSV, TSV or JSON lines: file name and text')
  p.add_argument('--size', metavar='SIZE', choices=SIZES, help=f'{", ".join(SIZES)}; default: tiny')
  p.add_argument('--seed', metavar='N', type=int, help='of everything that is drawn; default: 0')


def _parser() -> _Parser:
  parser = _Parser(prog='musiclm', description=musiclm_jax.__doc__, epilog='''
start here:
  musiclm quickstart                 # a small system end to end, with a report
  musiclm VERB --help                # flags and examples of a verb
''')
  parser.add_argument('--version', action='version', version=f'musiclm {musiclm_jax.__version__}')
  parser.add_argument('--traceback', action='store_true', help='full errors; also MUSICLM_TRACEBACK=1')
  verbs = parser.add_subparsers(dest='verb', metavar='VERB', title='verbs')

  def verb(name: str, run: Callable[[argparse.Namespace], None], summary: str, examples: str) -> _Parser:
    p = verbs.add_parser(name, help=summary, description=summary, epilog=examples)
    p.add_argument('--traceback', action='store_true', default=argparse.SUPPRESS, help=argparse.SUPPRESS)
    p.set_defaults(run=run)
    return p

  for add in (_add_prepare, _add_vocabulary, _add_train, _add_plan, _add_extract, _add_data, _add_codec, _add_semantic,
              _add_mulan, _add_export, _add_generate, _add_evaluate, _add_reproduce, _add_quickstart):
    add(verb)
  return parser


def _split_bindings(argv: Sequence[str]) -> tuple[list[str], list[tuple[str, str]]]:
  """Takes `--gin.NAME=VALUE` out of the arguments: argparse cannot know the names."""
  rest, bindings = [], []
  for argument in argv:
    if not argument.startswith('--gin.'):
      rest.append(argument)
      continue
    name, equals, value = argument.removeprefix('--gin.').partition('=')
    if not equals or not name:
      raise UsageError(f'{argument}: write --gin.NAME=VALUE')
    bindings.append((name, value))
  return rest, bindings


def parse(argv: Sequence[str]) -> argparse.Namespace:
  """The command line, without running it; the launchers check with this what they will start. Raises UsageError."""
  rest, bindings = _split_bindings(argv)
  args = _parser().parse_args(rest)
  if args.verb is None:
    raise UsageError('no verb: prepare, vocabulary, train, plan, extract, data, codec, semantic, mulan, export, '
                     'generate, evaluate, reproduce, quickstart (see musiclm --help)')
  if bindings and args.verb not in ('train', 'plan'):
    raise UsageError(f'--gin.{bindings[0][0]} belongs to `musiclm train` and `musiclm plan`')
  args.gin_bindings = bindings
  return args


def _explain(error: BaseException) -> tuple[int, str, bool]:
  """Exit code, one line, and whether the user can have caused it (else it is a fault of this program)."""
  text = ' '.join(line.strip() for line in str(error).strip().splitlines()[:1]) or type(error).__name__
  if isinstance(error, UsageError):
    return USAGE_ERROR, text, True
  kinds = {kind.__name__ for kind in type(error).__mro__}  # by name: their modules may not be importable
  if 'ConfigError' in kinds:
    return USAGE_ERROR, text, True
  if kinds & {'StepFailed', 'NonFiniteLoss', 'NonFinite', 'ReplicasDiffer', 'SaveFailed', 'WorkerLost'}:
    return FAILURE, text, True
  if 'Stopped' in kinds:
    return error.exit_code, text, True
  if isinstance(error, KeyboardInterrupt):
    return INTERRUPTED, 'interrupted', True
  if isinstance(error, ImportError):
    missing = (error.name or '').partition('.')[0]
    if missing in TRAIN_PACKAGES:
      return FAILURE, f'this needs the package {missing!r}: pip install "musiclm_jax[train]"', True
  if isinstance(error, OSError):
    if error.filename is not None:
      text = f'{error.filename}: {error.strerror}'
    return FAILURE, text, True
  if isinstance(error, ValueError):
    return FAILURE, text, _raised_here(error)
  return FAILURE, f'{type(error).__name__.removesuffix("Proxy")}: {text}', False


def _raised_here(error: BaseException) -> bool:
  """Whether a ValueError is one of our own sentences rather than a fault deep inside a library."""
  if type(error.__cause__).__name__ == '_RemoteTraceback':  # it crossed from another process, as text
    files = re.findall(r'^  File "(.+?)", line ', str(error.__cause__), re.MULTILINE)
  else:
    files = [frame.filename for frame in traceback.extract_tb(error.__traceback__)]
  return bool(files) and Path(files[-1]).is_relative_to(Path(__file__).parent)


def _show_warning(message, category, filename, lineno, file=None, line=None) -> None:
  """Our own warnings are for users: a line without the place in the code. Others as Python shows them."""
  text = (f'musiclm: warning: {message}\n' if Path(filename).is_relative_to(Path(__file__).parent) else
          warnings.formatwarning(message, category, filename, lineno, line))
  print(text, end='', file=file or sys.stderr, flush=True)


def main(argv: Sequence[str] | None = None) -> NoReturn:
  """Runs the command and exits with its code."""
  argv = sys.argv[1:] if argv is None else list(argv)
  warnings.showwarning = _show_warning
  show = '--traceback' in argv or os.environ.get('MUSICLM_TRACEBACK', '') not in ('', '0')
  try:
    args = parse(argv)
    args.run(args)
  except (Exception, KeyboardInterrupt) as error:
    code, text, expected = _explain(error)
    if show or not expected:
      traceback.print_exception(error)
    print(f'musiclm: error: {text}', file=sys.stderr)
    if type(error).__name__ == 'SaveFailed':
      # Orbax's threads wait for parts of that save that will never come, and would hold the process for five minutes.
      sys.stdout.flush()
      sys.stderr.flush()
      os._exit(code)
    sys.exit(code)
  sys.exit(0)


if __name__ == '__main__':
  main()
