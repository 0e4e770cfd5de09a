"""Measures a trained MuLan on a folder of audio with the tags, playlists or captions that a user has of it.

Shapes: N recordings, T tags, E embedding.
"""
from __future__ import annotations

from collections.abc import Mapping, Sequence
import dataclasses
import hashlib
import json
import math
import os
import pathlib
from typing import Any

import numpy as np

from musiclm_jax import search
from musiclm_jax.data import audio_files, captions as captions_lib, records, tag_files
from musiclm_jax.data.workers import Progress
from musiclm_jax.evaluation import batched, language, tables
from musiclm_jax.mulan.model import VOCABULARY_ASSET
from musiclm_jax.text.tokenizer import Tokenizer
from musiclm_jax.training import state as states
from musiclm_jax.training.checkpoint import Loaded

_BATCH = 4
_LEAST_TO_FIT = 20  # recordings on either side of a split that is made here
_SHOWN = 12  # tags in the printed table


@dataclasses.dataclass(frozen=True)
class MuLanEvaluation:
  """What was found.

  Attributes:
    figures: what `mulan.json` holds: about the run and the folder, and sections `zero_shot`, `linear_probe`, `by_title`
      and `captions`, as far as they could be measured.
    notes: sentences about what was left out.
    folder: where the file is.
  """

  figures: Mapping[str, Any]
  notes: tuple[str, ...]
  folder: pathlib.Path

  def text(self) -> str:
    f, lines = self.figures, []
    lines.append(f'MuLan {f["mulan"]} of {f["run"]} at step {f["step"]}: {f["recordings"]} recordings')
    shown = [(key, name) for key, name in (('zero_shot', 'by its word'), ('linear_probe', 'linear probe')) if key in f]
    rows = [(name, *(tables.number(f[key][f'macro_{kind}']) for kind in ('auc', 'ap', 'share')), str(f[key]['clips']))
            for key, name in shown]
    rows += [(f'{name}, 50 tags', *(tables.number(f[key]['top_50'][f'macro_{kind}']) for kind in ('auc', 'ap')), '–',
              str(f[key]['clips'])) for key, name in shown if 'top_50' in f[key]]
    if rows:
      lines.append(tables.Table(('tags', 'AUC-ROC', 'mAP', 'mAP at chance', 'recordings'), tuple(rows)).text())
    for key, name in (('by_title', 'playlists by their titles'), ('captions', 'recordings by their captions')):
      if key in f:
        found = f[key]
        number = lambda v: f'{v:,}' if isinstance(v, int) else f'{v:.3f}'
        lines.append(f'{name}: ' + ', '.join(f'{k.replace("_", " ")} {number(v)}' for k, v in found.items()))
    if 'zero_shot' in f:
      worst_first = sorted(f['zero_shot']['tags'].items(), key=lambda row: row[1]['auc'])
      shown = [*worst_first[-_SHOWN // 2:][::-1], *worst_first[:_SHOWN // 2][::-1]] if len(
          worst_first) > _SHOWN else worst_first[::-1]
      lines.append(tables.Table(('best and worst tags', 'AUC-ROC', 'AP', 'share'), tuple(
          (name, *(tables.number(row[k]) for k in ('auc', 'ap', 'share'))) for name, row in shown)).text())
    return '\n'.join([*lines, *self.notes, f'{self.folder}: mulan.json'])


def evaluate_mulan(mulan: str | os.PathLike, audio_dir: str | os.PathLike, output: str | os.PathLike, *,
                   tags: Sequence[str | os.PathLike] = (), tag_names: str | os.PathLike | None = None,
                   captions: str | os.PathLike | None = None, caption_column: str | None = None,
                   max_seconds: float = 30.0, progress: Progress | None = None) -> MuLanEvaluation:
  """Writes `mulan.json` to `output` and returns what it holds.

  Args:
    mulan: the run of a trained MuLan, or a folder that holds a run `mulan`.
    audio_dir: audio files at any depth. A recording is the mean of its windows, one second apart, up to `max_seconds`.
    tags: one file of tags or several playlists, in the layouts of `data.tag_files`; `tag_names` is AudioSet's file of
      their names.
    captions, caption_column: a file of captions, as `musiclm prepare` reads it; without `tags` and without this the
      captions of `manifest.jsonl` files in the folder.

  Raises ValueError where there is nothing to measure.
  """
  loaded = search.load(mulan)
  usable, skipped = audio_files.sort_out(*audio_files.walk(audio_dir), 1.0, progress=progress)
  if not usable:
    raise audio_files.nothing_usable(audio_dir, skipped)
  usable.sort(key=lambda row: row[2].seconds)  # batches of like lengths
  names = [name for name, _, _ in usable]
  texts = _captions(audio_dir, names, captions, caption_column) if captions or not tags else {}
  found = tag_files.read(tags, names, meanings=tag_names) if tags else None
  if not found and not texts:
    raise ValueError(f'{audio_dir} has no captions: give --tags or --captions, or a manifest.jsonl with them')
  if found and not found.tags:
    raise ValueError(f'{tags[0]} gives no recording a tag')
  if found and found.layout == 'playlists':  # what is in none of them is there to be told apart
    found = dataclasses.replace(found, by_name={name: found.by_name.get(name, frozenset()) for name in names})
  named = set(texts) | set(found.by_name if found else ())
  chosen = [row for row in usable if row[0] in named]
  wanted = [name for name, _, _ in chosen]
  audio_NxE = _embedded(loaded, [(path, info.seconds) for _, path, info in chosen], max_seconds, progress)
  figures: dict[str, Any] = {
      'run': os.fspath(mulan), 'mulan': loaded.content_hash, 'step': loaded.step, 'audio_dir': os.fspath(audio_dir),
      'recordings': len(wanted), 'skipped': {reason: list(names) for reason, names in skipped.items()}}
  notes = audio_files.left_out(skipped)
  place = {name: i for i, name in enumerate(wanted)}
  if found:
    more, said = _tagged(loaded, found, audio_NxE, place)
    figures |= more
    notes += said
  if texts:
    figures['captions'] = _captioned(loaded, texts, audio_NxE, place)
  result = MuLanEvaluation(figures, tuple(notes), pathlib.Path(output))
  result.folder.mkdir(parents=True, exist_ok=True)
  content = json.dumps({'schema': 1, **figures, 'notes': notes}, indent=2, ensure_ascii=False) + '\n'
  with records.replacing(result.folder / 'mulan.json') as file:
    file.write(content.encode())
  return result


def _captions(audio_dir: str | os.PathLike, names: Sequence[str], captions: str | os.PathLike | None,
              column: str | None) -> dict[str, str]:
  """The first description of each recording that has one."""
  if captions:
    by_name = captions_lib.read_captions(captions, names, column).texts
  else:
    by_name = {name: facts.texts for name, facts in captions_lib.folder_facts(audio_dir, names).items()}
  described = {name: [t['text'] for t in texts if t['kind'] == 'description'] for name, texts in by_name.items()}
  return {name: found[0] for name, found in described.items() if found}


def _embedded(loaded: Loaded, files: Sequence[tuple[bytes, float]], max_seconds: float, progress: Progress | None
              ) -> np.ndarray:
  """[N, E], of length 1, of (path, seconds)."""
  config = loaded.model.config.audio
  rate, window = config.mel.sample_rate, config.window_samples
  embed = states.compiled(loaded.model, 'embed_audio')
  rows = []
  for first in range(0, len(files), _BATCH):
    part = files[first:first + _BATCH]
    # Whole windows: few lengths, so few programs, and no more than the longest of the batch needs.
    seconds = min(max_seconds, max(seconds for _, seconds in part))
    samples = max(1, math.ceil(seconds * rate / window)) * window
    clips_BxN, length_B = np.zeros((_BATCH, samples), np.float32), np.full(_BATCH, samples, np.int32)
    for row, (path, _) in enumerate(part):
      clip = audio_files.read(path, rate, min(max_seconds, samples / rate))
      clips_BxN[row, :len(clip)], length_B[row] = clip, len(clip)
    rows.append(np.asarray(embed(clips_BxN, length_B))[:len(part)])
    if progress:
      progress('recordings embedded', first + len(part), len(files))
  return np.concatenate(rows)


def _texts(loaded: Loaded, texts: Sequence[str]) -> np.ndarray:
  """[T, E], of length 1. What is longer than the text tower reads is cut, as in training."""
  tokenizer, length = Tokenizer(loaded.assets[VOCABULARY_ASSET]), loaded.model.config.text.length
  return batched.in_batches(states.compiled(loaded.model, 'embed_text'), tokenizer.encode_batch(texts, length),
                            batch_size=16)


def _tagged(loaded: Loaded, found: tag_files.Tags, audio_NxE: np.ndarray, place: Mapping[str, int]
            ) -> tuple[dict[str, Any], list[str]]:
  """Sections of the tags, and what there is to say of them."""
  order = sorted(found.by_name)
  rows = np.array([place[name] for name in order])
  labels_NxT = np.array([[tag in found.by_name[name] for tag in found.tags] for name in order])
  notes, figures = [], {'layout': found.layout}
  if found.unmatched:
    notes.append(f'{len(found.unmatched)} recordings of the tags could not be found in the folder')
  # MagnaTagATune has many tags for the same; what is published of it is of the 50 that are most frequent in all of it.
  frequent = np.argsort(-labels_NxT.sum(axis=0), kind='stable')[:50] if found.layout == 'magnatagatune' else []
  with_top = lambda figures: _with_top(figures, [found.tags[i] for i in frequent])
  tag_TxE = _texts(loaded, found.tags)
  to_fit_N = np.array([name in found.fit if found.fit is not None else _half(name) for name in order])
  # Where a collection says what to measure on, that is measured; else everything that is there.
  measured_N = ~to_fit_N if found.fit and not to_fit_N.all() else np.ones(len(order), bool)
  try:
    figures['zero_shot'] = with_top(language.zero_shot_figures(
        audio_NxE[rows[measured_N]], tag_TxE, labels_NxT[measured_N], found.tags))
  except ValueError as error:
    notes.append(f'tags by their words: {error}')
  if found.layout == 'playlists':
    has_T = labels_NxT.any(axis=0)
    figures['by_title'] = language.ranking_figures((tag_TxE @ audio_NxE[rows].T)[has_T], labels_NxT.T[has_T])
  if min(to_fit_N.sum(), (~to_fit_N).sum()) < _LEAST_TO_FIT:
    notes.append(f'no linear probe: that takes {_LEAST_TO_FIT} recordings to fit and as many others')
    return figures, notes
  if found.fit is None:
    notes.append('linear probe: fitted on a half of the recordings, by a hash of their names')
  try:
    figures['linear_probe'] = with_top(language.linear_probe_figures(
        audio_NxE[rows[to_fit_N]], labels_NxT[to_fit_N], audio_NxE[rows[~to_fit_N]], labels_NxT[~to_fit_N],
        found.tags))
  except ValueError as error:
    notes.append(f'no linear probe: {error}')
  return figures, notes


def _with_top(figures: dict[str, Any], frequent: Sequence[str]) -> dict[str, Any]:
  """With the means over those of the frequent tags that could be measured, where there are any."""
  top = [figures['tags'][tag] for tag in frequent if tag in figures['tags']]
  if not top:
    return figures
  return {**figures, 'top_50': {f'macro_{name}': float(np.mean([row[name] for row in top])) for name in ('auc', 'ap')}}


def _half(name: str) -> bool:
  return hashlib.sha256(name.encode()).digest()[0] < 128


def _captioned(loaded: Loaded, texts: Mapping[str, str], audio_NxE: np.ndarray, place: Mapping[str, int]
               ) -> dict[str, float]:
  """Each caption is to find its recording; those that share a caption are all right."""
  order = sorted(texts)
  said = [texts[name] for name in order]
  scores_NxN = _texts(loaded, said) @ audio_NxE[[place[name] for name in order]].T
  _, which_N = np.unique(said, return_inverse=True)
  same_NxN = which_N[:, None] == which_N
  return {'recordings': len(order), **language.ranking_figures(scores_NxN, same_NxN),
          'recall_at_1_chance': float(same_NxN.mean())}
