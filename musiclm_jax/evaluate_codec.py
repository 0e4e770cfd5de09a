"""Measures a trained codec on a folder of audio, at each number of levels, beside Opus and answers that cost nothing.

Shapes: B clips of a batch, N samples, F frames, Q levels, K codes. Audio of a codec of several channels has them as a
last axis.
"""
from __future__ import annotations

import collections
from collections.abc import Callable, Iterator, Mapping, Sequence
import csv
import dataclasses
import io
import json
import math
import os
import pathlib
from typing import Any

from flax import nnx
import numpy as np

from musiclm_jax import transcode
from musiclm_jax.codec.model import SoundStreamConfig
from musiclm_jax.data import audio_files, records, token_counts
from musiclm_jax.data.workers import Progress
from musiclm_jax.evaluation import audio_measures, batched, codec_figures, opus, pictures, statistics, tables
from musiclm_jax.training import state as states
from musiclm_jax.training.checkpoint import Loaded

_CLIP_SECONDS = 10.0
_LEAST_SECONDS = 1.0  # shorter recordings, and shorter ends of recordings, are left out
_BATCH = 4
_OPUS_KILOBITS = (6, 12, 24)
# Entropies of fewer frames for each code come out too low.
_FRAMES_PER_CODE = 20


@dataclasses.dataclass(frozen=True)
class Row:
  """One system on all clips; means over clips, 95% intervals by bootstrap over recordings (None: too few of them).

  Attributes:
    system: codec, opus, untrained (the same network before training, with all levels), mismatched (a clip of another
      recording in place of the answer) or identity.
    levels: that were decoded. bits_per_second: of a codec, nominal: frames a second x levels x log2 of the codes; of
      Opus, the packets as they were measured. None where there are none.
    entropy_bits_per_second: frames a second x the entropy of the indices, summed over the levels: what a coder that
      knows how frequent each code is would need (first order: nothing of neighbours or other levels).
    clips: that were compared.
    si_sdr_db, mel_distance, log_spectral_distance_db: see `evaluation.audio_measures`; of several channels, the mean.
  """

  system: str
  levels: int | None
  bits_per_second: float | None
  entropy_bits_per_second: float | None
  clips: int
  si_sdr_db: float
  si_sdr_db_interval: tuple[float | None, float | None]
  mel_distance: float
  mel_distance_interval: tuple[float | None, float | None]
  log_spectral_distance_db: float

  @property
  def name(self) -> str:
    if self.system == 'codec':
      return f'codec, {self.levels} level{"s" * (self.levels > 1)}'
    if self.system == 'opus':
      return f'opus at {self.bits_per_second / 1000:.0f} kbit/s'
    return self.system


@dataclasses.dataclass(frozen=True)
class CodecEvaluation:
  """What was found.

  Attributes:
    about: of the codec, the clips and how their codes are used.
    notes: sentences about what was left out, and what is to be doubted.
    folder: where the files are.
  """

  about: Mapping[str, Any]
  rows: tuple[Row, ...]
  notes: tuple[str, ...]
  folder: pathlib.Path

  def text(self) -> str:
    a = self.about
    rate = lambda bits: tables.number(bits and bits / 1000, '{:.2f}')
    rows = tuple((row.name, rate(row.bits_per_second), rate(row.entropy_bits_per_second), f'{row.si_sdr_db:+.1f}',
                  f'{row.mel_distance:.3f}', f'{row.log_spectral_distance_db:.1f}') for row in self.rows)
    table = tables.Table(
        ('', 'kbit/s', 'entropy', 'SI-SDR (dB)', 'mel distance', 'log-spectral (dB)'), rows)
    return '\n'.join([
        f'codec {a["codec"]} of {a["run"]} at step {a["step"]}: {a["recordings"]} recordings, {a["clips"]} clips, '
        f'{a["seconds"]:,.0f} s', table.text(), *self.notes,
        f'{self.folder}: ' + ', '.join(f'codec.{kind}' for kind in ('json', 'csv', 'png'))])


@dataclasses.dataclass(frozen=True)
class _Recording:
  name: str
  path: bytes
  seconds: float


@dataclasses.dataclass(frozen=True)
class _Batch:
  """Clips, each of its own number of samples with zeros behind, the recording of each (its number), and for each the
  beginning of another recording."""

  audio_BxN: np.ndarray
  samples_B: np.ndarray
  recording_B: np.ndarray
  other_BxN: np.ndarray


def evaluate_codec(codec: str | os.PathLike, audio_dir: str | os.PathLike, output: str | os.PathLike, *,
                   max_seconds: float = math.inf, seed: int = 0, progress: Progress | None = None) -> CodecEvaluation:
  """Writes `codec.json`, `codec.csv` and `codec.png` to `output` and returns what they hold.

  Recordings are cut into clips of 10 s, which are coded one by one; memory does not grow with their number or length.
  For a codec of one channel they are averaged, one of two takes stereo as it is; other rates are resampled. Files that
  cannot be used are left out and named in the notes.

  Args:
    codec: the run of a trained codec, or a folder that holds a run `codec`.
    audio_dir: audio files at any depth.
    max_seconds: of each recording, from its beginning.
    seed: of the untrained network.
    progress: called with (what, done, total).

  Raises:
    FileNotFoundError: no such folder, or no checkpoint.
    ValueError: nothing that could be measured (with counts by reason), or another kind of network.
  """
  if max_seconds < _LEAST_SECONDS:
    raise ValueError(f'{max_seconds:g} s of each recording are too few: at least {_LEAST_SECONDS:g} s are needed')
  loaded = transcode.load(codec)
  config = loaded.model.config
  usable, skipped = audio_files.sort_out(
      *audio_files.walk(audio_dir), _LEAST_SECONDS, config.channels, progress=progress)
  if not usable:
    raise audio_files.nothing_usable(audio_dir, skipped)
  recordings = [_Recording(name, path, info.seconds) for name, path, info in usable]
  # No longer than the longest recording, and whole frames.
  stride, rate = config.stride, config.sample_rate
  seconds = min(_CLIP_SECONDS, max_seconds, max(r.seconds for r in recordings))
  samples = math.ceil(seconds * rate / stride) * stride
  measured = _Measured(loaded, seed, with_opus=not opus.missing())
  total = sum(math.ceil(min(r.seconds, max_seconds) / seconds) for r in recordings)
  done = 0
  for batch in _batches(_clips(recordings, samples, config, max_seconds, skipped), samples):
    measured.add(batch)
    done += len(batch.samples_B)
    if progress:
      progress('clips measured', min(done, total - 1), total)
  if progress:
    progress('clips measured', total, total)
  if not measured.clips:
    raise audio_files.nothing_usable(audio_dir, skipped)
  about = {
      'run': os.fspath(codec), 'codec': loaded.content_hash, 'step': loaded.step, 'sample_rate': rate,
      'audio_dir': os.fspath(audio_dir), 'recordings': len(set(measured.recordings)), 'clips': measured.clips,
      'seconds': measured.seconds, 'clip_seconds': samples / rate, 'skipped': dict(skipped),
      'opus': '' if opus.missing() else opus.version(), **codec_figures.code_figures(measured.counts_QxK)}
  notes = _notes(about, skipped, len(recordings))
  result = CodecEvaluation(about, measured.rows(), notes, pathlib.Path(output))
  _write(result)
  return result


def _clips(recordings: Sequence[_Recording], samples: int, config: SoundStreamConfig, max_seconds: float,
           skipped: dict[str, list[str]]) -> Iterator[tuple[np.ndarray, int, np.ndarray]]:
  """(clip [n], number of its recording, beginning [n'] of the recording before it, cyclically)."""
  rate = config.sample_rate
  pieces = lambda of: audio_files.segments(of.path, samples / rate, rate, config.channels)
  for number, recording in enumerate(recordings):
    other = next(pieces(recordings[number - 1]))
    left, count = max_seconds * rate, 0
    for clip in pieces(recording):
      clip = clip[:round(min(left, samples))]
      if len(clip) < _LEAST_SECONDS * rate:
        break
      left -= len(clip)
      # Silence, or direct current: there is no sound to compare.
      if np.std(clip, axis=0).max() >= audio_files.SILENCE:
        count += 1
        yield clip, number, other
    if not count:
      skipped['silent'].append(recording.name)


def _batches(clips: Iterator[tuple[np.ndarray, int, np.ndarray]], samples: int) -> Iterator[_Batch]:
  held: list[tuple[np.ndarray, int, np.ndarray]] = []
  whole = lambda rows: np.stack([audio_measures.fit_length(row, samples, axis=0) for row in rows])
  pack = lambda: _Batch(whole([c for c, _, _ in held]), np.array([len(c) for c, _, _ in held]),
                        np.array([n for _, n, _ in held]), whole([np.resize(o, c.shape) for c, _, o in held]))
  for clip in clips:
    held.append(clip)
    if len(held) == _BATCH:
      yield pack()
      held = []
  if held:
    yield pack()


class _Measured:
  """The distances of all clips so far, by system."""

  def __init__(self, loaded: Loaded, seed: int, *, with_opus: bool):
    self.config = loaded.model.config
    self.spec = loaded.objective.token_spec
    self.recordings: list[int] = []
    self.seconds = 0.0
    self.counts_QxK = np.zeros((self.spec.levels, self.spec.codebook_size), np.int64)
    self._found: dict[str, list[audio_measures.Distances]] = collections.defaultdict(list)
    self._opus_bits = collections.Counter()
    self._kilobits = _OPUS_KILOBITS if with_opus else ()
    self._codec = _Codec(loaded.model)
    self._untrained = _Codec(loaded.objective.model(nnx.Rngs(seed)))

  @property
  def clips(self) -> int:
    return len(self.recordings)

  def add(self, batch: _Batch) -> None:
    audio_BxN, levels, channels = batch.audio_BxN, self.spec.levels, self.config.channels
    # Every channel is a clip, and a clip has the mean over those of its channels that sound.
    apart = lambda x: np.moveaxis(x.reshape(*x.shape[:2], channels), 2, 1).reshape(-1, x.shape[1])
    samples_R = np.repeat(batch.samples_B, channels)
    deviations_R = [np.std(clip_N[:n]) for clip_N, n in zip(apart(audio_BxN), samples_R)]
    sounds_BxC = (np.array(deviations_R) >= audio_files.SILENCE).reshape(-1, channels)

    def compare(system: str, estimate_BxN: np.ndarray) -> None:
      found = audio_measures.distances(apart(audio_BxN), apart(estimate_BxN), samples_R,
                                       sample_rate=self.config.sample_rate)
      self._found[system].append(audio_measures.Distances(
          *(x.reshape(-1, channels).mean(axis=1, where=sounds_BxC) for x in found)))

    codes_BxFxQ = self._codec.encode(audio_BxN)
    for q in range(1, levels + 1):
      compare(f'codec {q}', self._codec.decode(codes_BxFxQ[..., :q]))
    compare('untrained', self._untrained.decode(self._untrained.encode(audio_BxN)))
    for kilobits in self._kilobits:
      decoded = [opus.round_trip(clip[:n], self.config.sample_rate, kilobits)
                 for clip, n in zip(audio_BxN, batch.samples_B)]
      self._opus_bits[kilobits] += sum(bits for _, bits in decoded)
      compare(f'opus {kilobits}',
              np.stack([audio_measures.fit_length(audio, audio_BxN.shape[1], axis=0) for audio, _ in decoded]))
    compare('mismatched', batch.other_BxN)
    compare('identity', audio_BxN)
    self.recordings += batch.recording_B.tolist()
    self.seconds += float(batch.samples_B.sum()) / self.config.sample_rate
    for codes_FxQ, n in zip(codes_BxFxQ, batch.samples_B):
      self.counts_QxK += token_counts.level_counts(
          codes_FxQ[:math.ceil(n / self.config.stride)], self.spec.codebook_size)

  def rows(self) -> tuple[Row, ...]:
    """In the order of the bitrate, then what has none. With one recording there is no mismatched one."""
    entropy_Q = np.cumsum(token_counts.entropy(self.counts_QxK)) / math.log(2) * self.spec.frame_rate
    levels = range(1, self.spec.levels + 1)
    nominal = lambda q: self.spec.bitrate * q / self.spec.levels
    rows = [self._row(f'codec {q}', q, nominal(q), float(entropy_Q[q - 1])) for q in levels]
    rows += [self._row(f'opus {k}', None, self._opus_bits[k] / self.seconds) for k in self._kilobits]
    rows += [self._row('untrained', self.spec.levels, nominal(self.spec.levels))]
    if len(set(self.recordings)) > 1:
      rows.append(self._row('mismatched'))
    return (*rows, self._row('identity'))

  def _row(self, system: str, levels: int | None = None, bits: float | None = None,
           entropy: float | None = None) -> Row:
    sdr, mel, spectral = (np.concatenate(values) for values in zip(*self._found[system]))
    interval = lambda values: tuple(statistics.bootstrap_interval(values, np.array(self.recordings)).bounds)
    return Row(system.partition(' ')[0], levels, bits, entropy, len(sdr), float(sdr.mean()), interval(sdr),
               float(mel.mean()), interval(mel), float(spectral.mean()))


class _Codec:
  """A network compiled once for all numbers of levels: only the sum of their codes depends on it."""

  def __init__(self, model: nnx.Module):
    self._encode: Callable = states.compiled(model, 'encode')
    self._values: Callable = states.compiled(model.quantizer, 'decode')
    self._decode: Callable = states.compiled(model, 'decode_latents')

  def encode(self, audio_BxN: np.ndarray) -> np.ndarray:
    return batched.in_batches(self._encode, audio_BxN, batch_size=_BATCH)

  def decode(self, codes_BxFxQ: np.ndarray) -> np.ndarray:
    return batched.in_batches(lambda codes: self._decode(self._values(codes)), codes_BxFxQ, batch_size=_BATCH)


def _notes(about: Mapping[str, Any], skipped: Mapping[str, Sequence[str]], recordings: int) -> tuple[str, ...]:
  notes = audio_files.left_out(skipped)
  if missing := opus.missing():
    notes.append(f'no rows for Opus: {" and ".join(missing)} not found (Debian: apt-get install opus-tools)')
  if recordings == 1:
    notes.append('no row for a mismatched clip: that takes a second recording')
  frames, codes = about['perplexity_frames'], about['codebook_size']
  if frames < _FRAMES_PER_CODE * codes:
    notes.append(f'entropy: {frames:,} frames are few for {codes:,} codes, and what it would be with many is higher')
  return tuple(notes)


def _write(result: CodecEvaluation) -> None:
  result.folder.mkdir(parents=True, exist_ok=True)
  rows = [dataclasses.asdict(row) for row in result.rows]
  flat = []
  for row in rows:
    split = {f'{key}_{end}': row[f'{key}_interval'][i] for key in ('si_sdr_db', 'mel_distance')
             for i, end in enumerate(('low', 'high'))}
    flat.append({key: value for key, value in row.items() if not key.endswith('_interval')} | split)
  text = io.StringIO(newline='')
  table = csv.DictWriter(text, list(flat[0]), lineterminator='\n')
  table.writeheader()
  table.writerows(flat)
  content = {'schema': 1, **result.about, 'rows': rows, 'notes': list(result.notes)}
  files = {'codec.json': (json.dumps(content, indent=2, ensure_ascii=False) + '\n').encode(),
           'codec.csv': text.getvalue().encode(), 'codec.png': _picture(result.rows)}
  for name, made in files.items():
    with records.replacing(result.folder / name) as file:
      file.write(made)


def _picture(rows: Sequence[Row]) -> bytes:
  of = lambda system: [row for row in rows if row.system == system]
  values = lambda row: (row.si_sdr_db, row.mel_distance, row.log_spectral_distance_db)
  curves = {
      name: ([rate(row) / 1000 for row in of(system)], list(zip(*map(values, of(system)))))
      for name, system, rate in (
          ('codec', 'codec', lambda row: row.bits_per_second),
          ('codec, by entropy', 'codec', lambda row: max(row.entropy_bits_per_second, 1.0)),
          ('Opus', 'opus', lambda row: row.bits_per_second)) if of(system)}
  lines = {name: values(row) for name in ('untrained', 'mismatched') for row in of(name)}
  return pictures.rate_distortion(curves, lines, ('SI-SDR (dB)', 'mel distance', 'log-spectral distance (dB)'))
