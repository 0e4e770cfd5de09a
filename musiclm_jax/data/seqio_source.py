"""SeqIO over record sets: the data source of the tasks, and tasks as corpora in the order of an index map.

A task owns features, vocabularies and preprocessors; which record fills which slot, crops, padding and
batching stay in `source` and `batches`. Without preprocessors the examples equal those of
`records.RecordSet`, bit for bit.

This file and `tasks/` are the only ones that import TensorFlow.
"""
from __future__ import annotations

import atexit
from collections.abc import Callable, Iterator, Mapping, Sequence
import concurrent.futures
import contextlib
import json
import os
import pathlib
import queue
import threading
from typing import Any
import weakref

import numpy as np

# JAX has set 1, and at 2 TensorFlow still calls it an error of CUDA that there is no accelerator.
if os.environ.get('TF_CPP_MIN_LOG_LEVEL', '1') == '1':
  os.environ['TF_CPP_MIN_LOG_LEVEL'] = '3'


@contextlib.contextmanager
def _silenced() -> Iterator[None]:
  """Without what C++ code writes to the standard error: TensorFlow's first lines heed no level."""
  kept = os.dup(2)
  try:
    with open(os.devnull, 'wb') as nothing:
      os.dup2(nothing.fileno(), 2)
    yield
  finally:
    os.dup2(kept, 2)
    os.close(kept)


with _silenced():
  import tensorflow as tf

  for _kind in ('GPU', 'TPU'):
    # Before TensorFlow's first operation: it would take all memory of the accelerators that JAX trains on.
    # Where the caller has already started TensorFlow, the choice was the caller's.
    with contextlib.suppress(RuntimeError, ValueError):
      tf.config.set_visible_devices([], _kind)
  import seqio

from musiclm_jax import specs  # noqa: E402
from musiclm_jax.data import records, source  # noqa: E402

# Beside its streams, an element of a task has these. `slot_seed` feeds `tf.random.stateless_*` in
# preprocessors: what they draw is then the same after a restart and for any number of hosts.
SIDE_FEATURES = {
    'texts': tf.TensorSpec([None], tf.string), 'text_kinds': tf.TensorSpec([None], tf.string),
    'facts': tf.TensorSpec([], tf.string), 'slot_seed': tf.TensorSpec([], tf.int64)}
_TIMEOUT = 120.0  # seconds for a batch, after which the preprocessors are taken to hold examples back
Preprocessor = Callable[[tf.data.Dataset], tf.data.Dataset]


def element_spec(header: records.Header) -> dict[str, tf.TensorSpec]:
  """Elements of a source: streams as recorded (int16 samples, int32 tokens [F, Q]) and `SIDE_FEATURES`."""
  if header.kind == 'audio':
    streams = {'audio': tf.TensorSpec([None, *specs.channel_axis(records.channels_of(header))], tf.int16)}
  else:
    streams = {n: tf.TensorSpec([None, s['levels']], tf.int32) for n, s in header.streams.items()}
  return {**streams, **SIDE_FEATURES}


def output_features(header: records.Header) -> dict[str, seqio.Feature]:
  """What a task over these records declares: sound, or one feature with a vocabulary a token stream."""
  if header.kind == 'audio':
    rank = 1 + len(specs.channel_axis(records.channels_of(header)))
    return {'audio': seqio.ContinuousFeature(dtype=tf.int16, rank=rank)}
  return {n: seqio.Feature(seqio.PassThroughVocabulary(s['levels'] * s['codebook_size']), add_eos=False,
                           dtype=tf.int32, rank=2) for n, s in header.streams.items()}


def to_element(example: source.Example, seed: np.uint64 | int, streams: Sequence[str]) -> dict[str, Any]:
  """An example as a dict of tensors."""
  texts = example.get('texts', [])
  facts = {k: v for k, v in example.items() if k not in streams and k != 'texts'}
  return {**{n: example[n] for n in streams}, 'texts': np.array([t['text'] for t in texts], object),
          'text_kinds': np.array([t['kind'] for t in texts], object), 'facts': json.dumps(facts),
          'slot_seed': np.uint64(seed).astype(np.int64)}


def from_element(element: Mapping[str, np.ndarray], streams: Sequence[str]) -> source.Example:
  """The inverse of `to_element`, of arrays."""
  texts = [{'kind': k.decode(), 'text': t.decode()} for k, t in zip(element['text_kinds'], element['texts'])]
  return {**json.loads(element['facts']), 'texts': texts, **{n: element[n] for n in streams}}


class RecordSource(seqio.DataSource):
  """A record set as a SeqIO data source; `seqio.get_dataset` and friends work on it as on any other.

  `text_kind`: only the clips that have a text of this kind.
  """

  def __init__(self, directory: str | os.PathLike, text_kind: str = ''):
    self.directory, self.text_kind = pathlib.Path(directory), text_kind
    self.manifest = records.read_manifest(directory)
    self._opened: dict[str, records.RecordSet] = {}
    counts = {split: self.manifest.records(split) for split in self.manifest.splits}
    if text_kind:
      counts = {split: len(self.examples(split)) for split, count in counts.items() if count}
      if not any(counts.values()):
        there = sorted({k for split in self._opened.values() for kinds in split.text_kinds for k in kinds})
        raise ValueError(f'no clip in {directory} has a text of kind {text_kind!r}; there are '
                         f'{", ".join(there) or "none"}')
    super().__init__(splits=[s for s, n in counts.items() if n], num_input_examples=counts,
                     performs_internal_shuffling=True)

  def record_set(self, split: str) -> records.RecordSet:
    """The records of one split. Raises as `records.RecordSet` does."""
    if split not in self._opened:
      self._opened[split] = records.RecordSet(self.directory, split)
    return self._opened[split]

  def examples(self, split: str) -> records.RecordSet | source.Subset:
    """The records of one split that this source gives."""
    held = self.record_set(split)
    if not self.text_kind:
      return held
    return source.Subset(held, np.flatnonzero([self.text_kind in kinds for kinds in held.text_kinds]))

  @property
  def supports_arbitrary_sharding(self) -> bool:
    return False

  def list_shards(self, split: str) -> Sequence[str]:
    return [s.file for s in self.record_set(split).shards]

  def get_dataset(self, split: str = 'train', shuffle: bool = True, seed: int | None = None,
                  shard_info: seqio.ShardInfo | None = None, *, sequence_length: Any = None,
                  use_cached: bool = False, num_epochs: int | None = 1) -> tf.data.Dataset:
    """The records of the shards that `shard_info` gives to this host, once, permuted by `seed`."""
    del sequence_length, use_cached, num_epochs
    held = self.record_set(split)
    numbers = range(len(held.shards)) if shard_info is None else range(
        shard_info.index, len(held.shards), shard_info.num_shards)
    indices = np.concatenate([held.shard_indices(n) for n in numbers])
    if self.text_kind:
      indices = indices[np.isin(indices, self.examples(split).indices)]
    if not len(indices):
      return tf.data.Dataset.from_generator(lambda: iter(()), output_signature=element_spec(held.header))
    chosen = int(np.random.SeedSequence().entropy % 2 ** 31) if shuffle and seed is None else int(seed or 0)
    order = source.IndexMap((len(indices),), None, chosen, len(indices))(0, np.arange(len(indices)))
    rows = indices[order.index] if shuffle else indices

    def elements() -> Iterator[dict[str, Any]]:
      for index, slot_seed in zip(rows, order.seed):
        [example] = held.fetch(np.array([index]), np.array([slot_seed]))
        yield to_element(example, slot_seed, tuple(held.header.streams))

    return tf.data.Dataset.from_generator(elements, output_signature=element_spec(held.header)).apply(
        tf.data.experimental.assert_cardinality(len(rows)))


def add_task(name: str, directory: str | os.PathLike, *, kind: str,
             preprocessors: Sequence[Preprocessor] = (), text_kind: str = '') -> seqio.Task:
  """Registers a task over a record set.

  Args:
    kind: "audio" or "tokens": what the record set must hold.
    text_kind: only clips that have a text of this kind, and of their texts only these.
    preprocessors: give exactly one element for each, keep the side features, and take randomness from
      `slot_seed`.

  Raises: FileNotFoundError or ValueError where there is no such record set.
  """
  record_source = RecordSource(directory, text_kind)
  if (held := record_source.manifest.header.kind) != kind:
    raise ValueError(f'{directory} holds {held}; the task {name!r} is for {kind}')
  return seqio.TaskRegistry.add(
      name, source=record_source, shuffle_buffer_size=None,
      preprocessors=[*([_keep_texts(text_kind)] if text_kind else ()), *preprocessors],
      output_features=output_features(record_source.manifest.header))


def _keep_texts(kind: str) -> Preprocessor:
  """Of each clip's texts only those of one kind."""

  def keep_texts(dataset: tf.data.Dataset) -> tf.data.Dataset:
    def keep(element):
      kept = element['text_kinds'] == kind
      return {**element, **{n: tf.boolean_mask(element[n], kept) for n in ('texts', 'text_kinds')}}
    return dataset.map(keep)

  keep_texts.__name__ = f'keep_{kind}'  # a task's fingerprint has the names of its preprocessors
  return keep_texts


class TaskCorpus:
  """One split of a SeqIO task over a record set, as a corpus: records in, preprocessed examples out.

  Raises, on first use: ValueError where a preprocessor drops, adds, reorders or holds back elements, or draws
  random numbers from elsewhere than `slot_seed`; training could not be resumed or spread over hosts with one
  of these.
  """

  def __init__(self, task: seqio.Task, split: str):
    if not isinstance(task.source, RecordSource):
      raise ValueError(f'the task {task.name!r} does not read a record set')
    self.task = task
    self.split = split
    self.records = task.source.examples(split)
    self._streams = tuple(self.manifest.header.streams)
    self._lock = threading.Lock()
    self._pipeline: _Pipeline | None = None

  def __len__(self) -> int:
    return len(self.records)

  @property
  def fingerprint(self) -> str:
    """That of the records, where no preprocessor changes them: such a run may go on without TensorFlow."""
    steps = [seqio.utils.function_name(p) for p in self.task.preprocessors]
    return source.digest(['task', self.records.fingerprint, steps]) if steps else self.records.fingerprint

  @property
  def manifest(self) -> records.Manifest:
    return self.records.manifest

  @property
  def lineage(self) -> Mapping[str, str]:
    return self.records.lineage

  @property
  def durations(self) -> np.ndarray:
    return self.records.durations

  @property
  def text_kinds(self) -> list[tuple[str, ...]]:
    only = self.task.source.text_kind
    return [tuple(k for k in kinds if k == only) if only else kinds for kinds in self.records.text_kinds]

  def __getitem__(self, index: int) -> source.Example:
    if not 0 <= index < len(self):
      raise IndexError(f'record {index} of {len(self)}')
    [example] = self.fetch(np.array([index]), np.zeros(1, np.uint64))
    if 'audio' in example and example['audio'].dtype == np.int16:
      example['audio'] = records.from_pcm(example['audio'])
    return example

  def fetch(self, indices: np.ndarray, seeds: np.ndarray) -> list[source.Example]:
    """The preprocessed examples; audio is int16 unless a preprocessor made it float."""
    with self._lock:
      if self._pipeline is None:
        self._pipeline = self._start(int(indices[0]))
      return self._run(self._pipeline, indices, seeds)

  def _run(self, pipeline: _Pipeline, indices: np.ndarray, seeds: np.ndarray) -> list[source.Example]:
    examples = self.records.fetch(indices, seeds)
    found = pipeline([to_element(e, s, self._streams) for e, s in zip(examples, seeds)])
    for element, seed in zip(found, seeds, strict=True):
      if np.asarray(element['slot_seed']).shape or np.int64(element['slot_seed']).astype(np.uint64) != seed:
        raise ValueError(f'the preprocessors of the task {self.task.name!r} change the order of the elements')
    return [from_element(element, self._streams) for element in found]

  def _start(self, index: int) -> _Pipeline:
    """Checks the preprocessors, as far as one record tells, and starts them."""
    spec = element_spec(self.manifest.header)
    endless = tf.data.Dataset.from_generator(lambda: iter(()), output_signature=spec).apply(
        tf.data.experimental.assert_cardinality(tf.data.INFINITE_CARDINALITY))
    result = self._preprocessed(endless)
    if int(result.cardinality()) != tf.data.INFINITE_CARDINALITY:
      raise ValueError(f'the preprocessors of the task {self.task.name!r} must give exactly one element for '
                       'each record; leave records out when the record set is written')
    if lost := [n for n in (*self._streams, *SIDE_FEATURES) if n not in result.element_spec]:
      raise ValueError(f'the preprocessors of the task {self.task.name!r} lose the feature {lost[0]!r}')
    pipeline = _Pipeline(self._preprocessed, spec, self.task.name)
    if self.task.preprocessors:
      first, second = self._run(pipeline, np.array([index, index]), np.array([7, 7], np.uint64))
      if any(not np.array_equal(first[n], second[n]) for n in first):
        pipeline.close()
        raise ValueError(f'the preprocessors of the task {self.task.name!r} draw random numbers that are not '
                         'determined by the feature "slot_seed"')
    return pipeline

  def _preprocessed(self, dataset: tf.data.Dataset) -> tf.data.Dataset:
    return self.task.preprocess_postcache(self.task.preprocess_precache(dataset), sequence_length=None)

  def __reduce__(self):
    # Without preprocessors the records are the examples, and another process needs no TensorFlow to read them.
    if not self.task.preprocessors:
      return records.RecordSet, (self.task.source.directory, self.split)
    kind = self.task.source.text_kind
    if not kind or [seqio.utils.function_name(p) for p in self.task.preprocessors] != [_keep_texts(kind).__name__]:
      raise ValueError(f'the task {self.task.name!r} has preprocessors, which other processes do not know: '
                       'set DATA_PROCESSES=0')
    return _reopened, (self.task.name, self.task.source.directory, kind, self.split)


class _Pipeline:
  """A running tf.data pipeline that is fed on demand: as many elements out as were put in, in order.

  Building a pipeline costs tens of milliseconds, so one is kept; feeding it by a queue leaves the order of
  examples, and going back or ahead in it, to the caller.
  """

  def __init__(self, preprocess: Preprocessor, spec: Mapping[str, tf.TensorSpec], name: str):
    self._name = name
    waiting: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
    dataset = tf.data.Dataset.from_generator(lambda: iter(waiting.get, None), output_signature=dict(spec))
    self._waiting, self._ended = waiting, False
    self._elements = iter(preprocess(dataset).as_numpy_iterator())
    self._thread = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix='seqio')
    # A pipeline that still waits for its queue when the interpreter ends would hang it.
    reference = weakref.ref(self)
    atexit.register(lambda: (pipeline := reference()) and pipeline.close())
    weakref.finalize(self, waiting.put, None)

  def __call__(self, elements: Sequence[dict[str, Any]]) -> list[dict[str, np.ndarray]]:
    for element in elements:
      self._waiting.put(element)
    try:
      # In a thread of its own, because a preprocessor that waits for more elements would block for ever.
      return self._thread.submit(lambda: [next(self._elements) for _ in elements]).result(_TIMEOUT)
    except concurrent.futures.TimeoutError:
      self.close(wait=False)
      raise ValueError(f'the preprocessors of the task {self._name!r} hold elements back (do they shuffle, '
                       'batch or filter?)') from None
    except StopIteration:
      raise ValueError(f'the preprocessors of the task {self._name!r} end early') from None

  def close(self, *, wait: bool = True) -> None:
    """Ends the pipeline and, where asked to, waits until it has ended. Safe to call twice.

    A thread of TensorFlow that still runs Python code while the interpreter ends waits for it for ever.
    """
    if self._ended:
      return
    self._ended = True
    self._waiting.put(None)
    self._thread.shutdown(wait=wait)
    if wait:
      for _ in self._elements:
        pass


def open_task(name: str, split: str) -> TaskCorpus | source.Mixture:
  """A registered task, or a registered mixture with its rates, as what `batches` reads.

  Raises: ValueError where the name is not registered or the split has no records.
  """
  if name in seqio.MixtureRegistry.names():
    mixture = seqio.MixtureRegistry.get(name)
    tasks = [t for t in mixture.tasks if split in t.splits]
    if not tasks:
      raise ValueError(f'no task of the mixture {name!r} has examples of the split {split!r}')
    return source.Mixture(tuple(TaskCorpus(t, split) for t in tasks), tuple(mixture.get_rate(t) for t in tasks))
  if name not in seqio.TaskRegistry.names():
    known = ', '.join([*seqio.TaskRegistry.names(), *seqio.MixtureRegistry.names()])
    raise ValueError(f'no task or mixture is registered as {name!r}; there are {known or "none"}')
  return TaskCorpus(seqio.TaskRegistry.get(name), split)


def _reopened(name: str, directory: str | os.PathLike, text_kind: str, split: str) -> TaskCorpus:
  """A task over the texts of one kind in a process that has not registered it."""
  if name not in seqio.TaskRegistry.names():
    add_task(name, directory, kind='audio', text_kind=text_kind)
  return TaskCorpus(seqio.TaskRegistry.get(name), split)


def open_records(directory: str | os.PathLike, split: str) -> TaskCorpus:
  """A record set through a task without preprocessors, registered under its place and content."""
  manifest = records.read_manifest(directory)
  place = source.digest([os.path.abspath(directory), manifest.fingerprint])
  name = f'records_{place}'
  if name not in seqio.TaskRegistry.names():
    add_task(name, directory, kind=manifest.header.kind)
  return TaskCorpus(seqio.TaskRegistry.get(name), split)
