"""Finds music by words: clips of a folder, ranked by their distance to a text in MuLan's space.

The embeddings are kept in an index, which follows the folder: files that are new or have changed are read, those that
are gone are forgotten.

Shapes: C clips, B clips at a time, N samples, E embedding.
"""
from __future__ import annotations

from collections.abc import Iterator
import dataclasses
import functools
import hashlib
import json
import os
import pathlib

import numpy as np
import safetensors
import safetensors.numpy

from musiclm_jax.data import audio_files, records
from musiclm_jax.data.workers import Progress
from musiclm_jax.mulan.model import MuLan, VOCABULARY_ASSET
from musiclm_jax.text.tokenizer import Tokenizer
from musiclm_jax.training import checkpoint, state as states
from musiclm_jax.training.checkpoint import Loaded

_BATCH = 8
_LEAST_SECONDS = 1.0  # ends of recordings that are shorter are not heard
_SAVE_EVERY = 200  # recordings: what a long first reading loses when it is stopped


@dataclasses.dataclass(frozen=True)
class Hit:
  """A recording and its clip that is nearest to the text; `score` is the cosine, from -1 to 1."""

  name: str
  start: float
  score: float


@dataclasses.dataclass(frozen=True)
class Found:
  """What a search gave: the best hits, and how many recordings and clips there are.

  Attributes:
    read, forgotten: recordings that were read for this search, or have left the index. left_out: names by reason.
  """

  hits: tuple[Hit, ...]
  recordings: int
  clips: int
  read: int
  forgotten: int
  left_out: dict[str, tuple[str, ...]]

  def text(self) -> str:
    lines = [f'{hit.score:+.3f}  {hit.name} at {hit.start:g} s' for hit in self.hits]
    lines.append(f'{self.recordings:,} recordings, {self.clips:,} clips; {self.read:,} read now'
                 + (f', {self.forgotten:,} no longer there' if self.forgotten else ''))
    return '\n'.join([*lines, *audio_files.left_out(self.left_out)])


def load(workdir: str | os.PathLike) -> Loaded:
  """The MuLan of a run, or of a folder that holds a run `mulan`. Raises ValueError where it is another network."""
  folder = checkpoint.run_in(workdir, 'mulan')
  loaded = checkpoint.load(folder)
  if not isinstance(loaded.model, MuLan):
    raise ValueError(f'{folder} holds a {type(loaded.objective).__name__}, not a MuLan')
  return loaded


def search(mulan: str | os.PathLike, audio_dir: str | os.PathLike, query: str, *,
           index: str | os.PathLike | None = None, top: int = 10, progress: Progress | None = None) -> Found:
  """The `top` recordings of a folder whose best clip is nearest to `query`.

  Args:
    mulan: the run of a trained MuLan, or a folder that holds a run `mulan`.
    audio_dir: audio files at any depth.
    index: the file that keeps the embeddings; where not given one in the run, for this folder and these parameters.

  Raises ValueError for a query without words or longer than the text tower reads, for an index of another network, and
  where there is no music that can be used.
  """
  loaded = load(mulan)
  engine = _Engine(loaded)
  text_E = engine.embed_text(query)
  path = pathlib.Path(index) if index else _place(checkpoint.run_in(mulan, 'mulan'), audio_dir, loaded.content_hash)
  if not path.parent.is_dir():
    raise FileNotFoundError(f'{path}: there is no folder {str(path.parent)!r}')
  kept = _Index.read(path, loaded.content_hash)
  return _updated(kept, engine, audio_dir, path, progress).best(text_E, top)


def _place(run: pathlib.Path, audio_dir: str | os.PathLike, content_hash: str) -> pathlib.Path:
  named = hashlib.sha256(os.fsencode(os.path.realpath(audio_dir))).hexdigest()[:16]
  (run / 'search').mkdir(exist_ok=True)
  return run / 'search' / f'{named}-{content_hash}.safetensors'


class _Engine:
  """The two towers, compiled for clips and texts of one shape."""

  def __init__(self, loaded: Loaded):
    self._loaded = loaded
    config = loaded.model.config
    self.rate, self.window = config.audio.mel.sample_rate, config.audio.window_samples
    self._audio = states.compiled(loaded.model, 'embed_window')
    self._text = states.compiled(loaded.model, 'embed_text')

  def embed_text(self, query: str) -> np.ndarray:
    tokenizer, longest = Tokenizer(self._loaded.assets[VOCABULARY_ASSET]), self._loaded.model.config.text.length
    return np.asarray(self._text(tokenizer.encode_prompt(query, longest, 'query')[None]))[0]

  def embed_file(self, path: bytes) -> tuple[np.ndarray, np.ndarray]:
    """(embeddings [c, E], beginnings in seconds [c]) of a recording's consecutive windows."""
    embeddings, starts = [], []
    for clips_BxN, length_B, start_B in self._batches(path):
      embedding_BxE = np.asarray(self._audio(clips_BxN, length_B))
      embeddings.append(embedding_BxE[:len(start_B)])
      starts += start_B
    if not starts:
      raise audio_files.AudioFault('silent', 'there is no sound in it')
    return np.concatenate(embeddings), np.array(starts)

  def _batches(self, path: bytes) -> Iterator[tuple[np.ndarray, np.ndarray, list[float]]]:
    """Windows side by side, always as many; the beginnings are those of the ones that count."""
    clips_BxN, length_B = np.zeros((_BATCH, self.window), np.float32), np.full(_BATCH, self.window, np.int32)
    held: list[float] = []
    for number, clip in enumerate(audio_files.segments(path, self.window / self.rate, self.rate)):
      if (number and len(clip) < _LEAST_SECONDS * self.rate) or np.abs(clip).max() < audio_files.SILENCE:
        continue
      row = len(held)
      clips_BxN[row], length_B[row] = 0, len(clip)
      clips_BxN[row, :len(clip)] = clip
      held.append(number * self.window / self.rate)
      if len(held) == _BATCH:
        yield clips_BxN, length_B, held
        held = []
    if held:
      yield clips_BxN, length_B, held


@dataclasses.dataclass(frozen=True)
class _Index:
  """Embeddings of clips, and the files they are from.

  Attributes:
    files: (name, size, time of change in nanoseconds) of each recording. recording_C: which one a clip is from.
    left_out: names of files that cannot be used, by reason; they are tried again by every search.
  """

  content_hash: str
  files: tuple[tuple[str, int, int], ...]
  embedding_CxE: np.ndarray
  recording_C: np.ndarray
  start_C: np.ndarray
  left_out: dict[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
  read_now: int = 0
  forgotten: int = 0

  @classmethod
  def empty(cls, content_hash: str) -> _Index:
    return cls(content_hash, (), np.zeros((0, 0), np.float32), np.zeros(0, np.int64), np.zeros(0))

  @classmethod
  def read(cls, path: pathlib.Path, content_hash: str) -> _Index:
    """What is there; nothing where there is no file. ValueError where it is another network's, or no index."""
    if not path.exists():
      return cls.empty(content_hash)
    try:
      with safetensors.safe_open(path, 'np') as file:
        about = json.loads((file.metadata() or {})['about'])
        arrays = [file.get_tensor(name) for name in ('embedding', 'recording', 'start')]
        files = tuple((name, size, changed) for name, size, changed in about['files'])
        made_by = about['mulan']
    except (safetensors.SafetensorError, KeyError, ValueError, OSError) as error:
      raise ValueError(f'{path} is no search index, or a damaged one ({error}): delete it, or name another --index'
                       ) from None
    if made_by != content_hash:
      raise ValueError(f'{path} was made by MuLan {made_by}, this is {content_hash}: name another --index, or delete '
                       'it')
    return cls(content_hash, files, *arrays)

  def write(self, path: pathlib.Path) -> None:
    about = json.dumps({'mulan': self.content_hash, 'files': self.files})
    with records.replacing(path) as file:
      file.write(safetensors.numpy.save(
          {'embedding': self.embedding_CxE, 'recording': self.recording_C, 'start': self.start_C}, {'about': about}))

  def without(self, keep: set[tuple[str, int, int]]) -> _Index:
    """Only what is known of the files in `keep`."""
    order = [i for i, file in enumerate(self.files) if file in keep]
    place = {old: new for new, old in enumerate(order)}
    rows = np.isin(self.recording_C, order)
    return dataclasses.replace(
        self, files=tuple(self.files[i] for i in order), embedding_CxE=self.embedding_CxE[rows],
        recording_C=np.array([place[int(i)] for i in self.recording_C[rows]], np.int64), start_C=self.start_C[rows],
        forgotten=len({name for name, *_ in self.files} - {name for name, *_ in keep}))

  def best(self, text_E: np.ndarray, top: int) -> Found:
    score_C = self.embedding_CxE @ text_E
    order_C = np.argsort(-score_C, kind='stable')
    _, first = np.unique(self.recording_C[order_C], return_index=True)
    chosen = order_C[np.sort(first)][:top]
    name = lambda c: self.files[int(self.recording_C[c])][0]
    hits = tuple(Hit(name(c), float(self.start_C[c]), float(score_C[c])) for c in chosen)
    return Found(hits, len(self.files), len(score_C), self.read_now, self.forgotten, self.left_out)


def _updated(kept: _Index, engine: _Engine, audio_dir: str | os.PathLike, path: pathlib.Path,
             progress: Progress | None) -> _Index:
  """The index of the folder as it is now, which is also written. ValueError where there is no music: an index is not
  forgotten because a disk is not there."""
  paths, unsupported = audio_files.walk(audio_dir)
  there: dict[tuple[str, int, int], bytes] = {}
  left_out: dict[str, list[str]] = {audio_files.NOT_SUPPORTED: list(unsupported)} if unsupported else {}
  for name, file in paths:
    try:
      status = os.stat(file)
    except OSError as error:
      left_out.setdefault(f'unreadable ({error.strerror})', []).append(name)
      there |= {before: file for before in kept.files if before[0] == name}
      continue
    there[name, status.st_size, status.st_mtime_ns] = file
  current = kept.without(set(there))
  known = set(current.files)
  wanted = [file for file in there if file not in known]
  new: list[tuple[tuple[str, int, int], np.ndarray, np.ndarray]] = []
  # What is known of the index so far, with the new recordings behind it.
  joined = functools.partial(_joined, current)
  for done, file in enumerate(wanted, 1):
    try:
      new.append((file, *engine.embed_file(there[file])))
    except audio_files.AudioFault as fault:
      left_out.setdefault(fault.reason, []).append(file[0])
    except OSError as error:
      left_out.setdefault(f'unreadable ({error.strerror})', []).append(file[0])
    if done % _SAVE_EVERY == 0:
      joined(new).write(path)
    if progress:
      progress('recordings read', done, len(wanted))
  made = dataclasses.replace(joined(new), left_out={reason: tuple(names) for reason, names in left_out.items()})
  if not len(made.embedding_CxE):
    raise audio_files.nothing_usable(audio_dir, made.left_out)
  if new or len(current.files) < len(kept.files):
    made.write(path)
  return made


def _joined(current: _Index, new: list[tuple[tuple[str, int, int], np.ndarray, np.ndarray]]) -> _Index:
  if not new:
    return current
  files, embeddings, starts = zip(*new)
  recording = np.repeat(np.arange(len(current.files), len(current.files) + len(files)), [len(s) for s in starts])
  known = [current.embedding_CxE] if len(current.embedding_CxE) else []
  return dataclasses.replace(
      current, files=(*current.files, *files), embedding_CxE=np.concatenate([*known, *embeddings]),
      recording_C=np.concatenate([current.recording_C, recording]), start_C=np.concatenate([current.start_C, *starts]),
      read_now=len(files))
