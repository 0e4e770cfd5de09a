"""Which recordings have which tags: files in the layouts of published collections, and plain tables.

The layout is told by the content:

  MagnaTagATune   `annotations_final.csv`: tab-separated, a column of 0 and 1 for each tag, `clip_id` and `mp3_path`
  AudioSet        `*_segments.csv`: YouTube id, start, end, labels as machine ids; with `class_labels_indices.csv`
                  beside it, or named, for what the ids mean. Recordings are files named by the id.
  playlists       `.m3u`, `.m3u8`: the title of the list (`#PLAYLIST:`, else the file's name) is the tag of its tracks
  tables          CSV, TSV or JSON lines with `file` and `tags` (a list, or separated by commas)
"""
from __future__ import annotations

import ast
import collections
from collections.abc import Iterable, Mapping, Sequence
import contextlib
import csv
import dataclasses
import io
import os
import pathlib
from typing import Any

from musiclm_jax.data import captions

_AUDIOSET_NAMES = 'class_labels_indices.csv'
# Folders of MagnaTagATune by their first sign, as everybody splits it: 0 to b to fit, c to choose, d to f to measure.
_MTAT_FIT, _MTAT_MEASURE = set('0123456789ab'), set('def')


@dataclasses.dataclass(frozen=True)
class Tags:
  """Tags of recordings.

  Attributes:
    layout: "magnatagatune", "audioset", "playlists" or "table".
    tags: all of them, in the order of the file. by_name: those of each recording of the folder that the file names.
    fit: recordings on which a probe may be fitted; None where the layout has no such split.
    unmatched: names in the file that are no recording of the folder.
  """

  layout: str
  tags: tuple[str, ...]
  by_name: Mapping[str, frozenset[str]]
  fit: frozenset[str] | None
  unmatched: tuple[str, ...]


def read(paths: Sequence[str | os.PathLike], names: Iterable[str], *,
         meanings: str | os.PathLike | None = None) -> Tags:
  """Reads one file of tags, or several playlists, for the recordings `names` (relative to the audio folder).

  `meanings` is AudioSet's `class_labels_indices.csv`. Raises ValueError naming the file where it has none of the
  layouts, or names no recording of the folder.
  """
  names = sorted(names)
  playlists = [pathlib.Path(p) for p in paths if pathlib.Path(p).suffix.lower() in ('.m3u', '.m3u8')]
  if playlists and len(playlists) < len(paths) or len(paths) > 1 and not playlists:
    raise ValueError('give one file of tags, or several playlists')
  if playlists:
    found = _playlists(playlists)
    layout, fit = 'playlists', None
  else:
    layout, found, fit = _one_file(pathlib.Path(paths[0]), meanings)
  return _matched(layout, found, fit, names, os.fspath(paths[0]))


_Rows = list[tuple[str, list[str]]]  # (name in the file, its tags)


def _text(path: pathlib.Path) -> str:
  try:
    return path.read_text(encoding='utf-8-sig')
  except UnicodeDecodeError:
    return path.read_text(encoding='latin-1')  # .m3u is older than UTF-8


def _playlists(paths: Sequence[pathlib.Path]) -> _Rows:
  rows = []
  for path in paths:
    lines = [line.strip() for line in _text(path).splitlines()]
    title = next((line.partition(':')[2].strip() for line in lines if line.startswith('#PLAYLIST:')), path.stem)
    rows += [(line, [title]) for line in lines if line and not line.startswith('#')]
  return rows


def _one_file(path: pathlib.Path, meanings: str | os.PathLike | None):
  text = _text(path)
  first = text.lstrip().splitlines()[0] if text.strip() else ''
  if 'clip_id' in first and 'mp3_path' in first:
    return _magnatagatune(path, text)
  if any(line.lstrip('# ').startswith('YTID') for line in text.splitlines()[:5]):
    return 'audioset', _audioset(path, text, meanings), None
  rows = captions.read_table(path)
  columns = list(dict.fromkeys(c for row in rows for c in row if c is not None))
  if 'file' not in columns or 'tags' not in columns:
    raise ValueError(f'{path} has none of the known layouts: a table needs the columns "file" and "tags", and has '
                     f'{", ".join(columns) or "no rows"}')
  found = []
  for row in rows:
    # Tags without quotes around them are more fields than there are columns.
    if (more := row.get(None)) and columns[-1] != 'tags':
      raise ValueError(f'{path}: the row of {row["file"]} has more fields than columns: put quotes around its tags')
    found.append((str(row.get('file') or ''), [*_list(row.get('tags')), *(more or ())]))
  return 'table', [(name, [t for tag in tags if (t := ' '.join(str(tag).split()))]) for name, tags in found], None


def _list(value: Any) -> list[str]:
  if isinstance(value, str) and value.startswith('[') and value.endswith(']'):  # a list as text, as in MusicCaps
    with contextlib.suppress(ValueError, SyntaxError):
      value = ast.literal_eval(value)
  return list(value) if isinstance(value, (list, tuple)) else str(value or '').split(',')


def _magnatagatune(path: pathlib.Path, text: str):
  delimiter = '\t' if '\t' in text.lstrip().splitlines()[0] else ','
  rows = list(csv.DictReader(io.StringIO(text, newline=''), delimiter=delimiter))
  tags = [c for c in (rows[0] if rows else {}) if c not in ('clip_id', 'mp3_path')]
  found, fit = [], set()
  for row in rows:
    if None in row or None in row.values():
      raise ValueError(f'{path}: the row of clip {row["clip_id"]} has not as many fields as there are columns')
    name = row['mp3_path']
    if name[:1] not in _MTAT_FIT | _MTAT_MEASURE:
      continue
    if name[:1] in _MTAT_FIT:
      fit.add(name)
    values = {tag: row.get(tag) for tag in tags}
    if (bad := next((v for v in values.values() if v not in ('0', '1')), None)) is not None:
      raise ValueError(f'{path}: {name} has {bad!r} where 0 or 1 is wanted')
    found.append((name, [tag for tag, value in values.items() if value == '1']))
  return 'magnatagatune', found, fit


def _audioset(path: pathlib.Path, text: str, meanings: str | os.PathLike | None) -> _Rows:
  named = pathlib.Path(meanings) if meanings else path.with_name(_AUDIOSET_NAMES)
  if not named.is_file():
    raise ValueError(f'{path} has machine ids for labels: {_AUDIOSET_NAMES} is needed beside it, or by --tag_names')
  table = csv.DictReader(io.StringIO(_text(named), newline=''))
  if not {'mid', 'display_name'} <= set(table.fieldnames or ()):
    raise ValueError(f'{named} needs the columns "mid" and "display_name"; it has {", ".join(table.fieldnames or ())}')
  meaning = {row['mid']: row['display_name'] for row in table}
  found = []
  lines = [line for line in text.splitlines() if line.strip() and not line.startswith('#')]
  for row in csv.reader(lines, skipinitialspace=True):
    if len(row) < 4:
      raise ValueError(f'{path}: {", ".join(row)} has fewer than four fields')
    if row[0] != 'YTID':
      found.append((row[0], [meaning.get(mid.strip(), mid.strip()) for mid in ','.join(row[3:]).split(',')]))
  return found


def _matched(layout: str, rows: _Rows, fit: set[str] | None, names: Sequence[str], path: str) -> Tags:
  """The rows that name a recording, as `captions.Matcher` finds it."""
  match = captions.Matcher(names)
  by_name: dict[str, set[str]] = collections.defaultdict(set)
  tags, unmatched, to_fit = dict.fromkeys(t for _, found in rows for t in found), [], set()
  for given, found in rows:
    if (name := match(given)) is None:
      unmatched.append(given)
      continue
    by_name[name].update(found)
    if fit is not None and given in fit:
      to_fit.add(name)
  if not by_name:
    raise ValueError(f'none of the {len(rows)} recordings that {path} names is in the folder; it names '
                     f'{", ".join(unmatched[:3]) or "nothing"}, the folder has {", ".join(names[:3]) or "nothing"}')
  return Tags(layout, tuple(tags), {name: frozenset(t) for name, t in by_name.items()},
              None if fit is None else frozenset(to_fit), tuple(unmatched))
