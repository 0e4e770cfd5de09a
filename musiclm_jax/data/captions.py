"""What is known about recordings beside their sound: captions, titles, artists, licences."""
from __future__ import annotations

import collections
from collections.abc import Iterable, Mapping
import csv
import dataclasses
import io
import json
import os
import pathlib
from typing import Any
import unicodedata

# The description of a recording is in the first of these that a file has; `--caption_column` names another.
CAPTION_COLUMNS = ('caption', 'text')
FOLDER_MANIFEST = 'manifest.jsonl'
_LICENCE = {'licence': ('licence', 'license'), 'licence_url': ('licence_url', 'license_url'),
            'source_url': ('source_url', 'url'), 'attribution': ('attribution',), 'title': ('title',)}


@dataclasses.dataclass(frozen=True)
class Facts:
  """What a folder or a caption file says of one recording."""

  artist: str = ''
  source: Mapping[str, str] = dataclasses.field(default_factory=dict)
  texts: tuple[Mapping[str, str], ...] = ()


@dataclasses.dataclass(frozen=True)
class Captions:
  """Texts by recording.

  Attributes:
    texts: by the recording's name relative to the audio folder.
    unmatched: file names in the caption file that are no recording of the folder.
  """

  texts: Mapping[str, tuple[Mapping[str, str], ...]]
  unmatched: tuple[str, ...]


def read_table(path: str | os.PathLike) -> list[dict[str, Any]]:
  """Rows of a .jsonl, .json (a list), .csv or .tsv file. Raises ValueError naming the file and the line.

  A row of a table with more cells than the header has those under None.
  """
  path = pathlib.Path(path)
  try:
    content = path.read_text(encoding='utf-8-sig')
  except UnicodeDecodeError as error:
    raise ValueError(f'{path} is not UTF-8 text: {error}') from None
  rows: list[dict[str, Any]] = []
  if path.suffix.lower() in ('.csv', '.tsv'):
    delimiter = '\t' if path.suffix.lower() == '.tsv' else ','
    try:
      for row in csv.DictReader(io.StringIO(content, newline=''), delimiter=delimiter, strict=True):
        rows.append(row)
    except csv.Error as error:  # a quote that nothing closes takes in all that follows
      raise ValueError(f'{path}, row {len(rows) + 1}, is not one of a table ({error}): is a quote (") not closed? One '
                       'inside of a text is written twice') from None
    return rows
  try:
    if content.lstrip().startswith('['):
      rows = json.loads(content)
    else:
      for number, line in enumerate(content.split('\n'), 1):  # noqa: B007
        if line.strip():
          rows.append(json.loads(line))
  except json.JSONDecodeError as error:
    place = f'line {error.lineno}' if content.lstrip().startswith('[') else f'line {number}'
    raise ValueError(f'{path}, {place}, is not JSON: {error.msg}') from None
  for number, row in enumerate(rows, 1):
    if not isinstance(row, dict):
      raise ValueError(f'{path}: row {number} is not a JSON object')
  return rows


def _words(value: Any) -> str:
  """A cell as text: a list of tags is joined by commas."""
  if isinstance(value, (list, tuple)):
    return ', '.join(_words(v) for v in value if v is not None)
  # JSON may have half of a surrogate pair, which is no character.
  return '' if value is None else ' '.join(str(value).encode('utf-8', 'replace').decode().split())


class Matcher:
  """Finds the recordings of a folder by the names that other files give them.

  A name is the whole relative name, or a longer path that ends with it; else its last part, where only one recording
  has that; with or without the extension, and in any normal form of Unicode.
  """

  def __init__(self, names: Iterable[str]):
    self._names = set(names)
    self._lookup: dict[str, set[str]] = collections.defaultdict(set)
    for name in self._names:
      whole = _composed(name)
      last = whole.rpartition('/')[2]
      for key in {whole, whole.rpartition('.')[0], last, last.rpartition('.')[0]}:
        self._lookup[key].add(name)

  def __call__(self, given: str) -> str | None:
    parts = [p for p in given.replace('\\', '/').split('/') if p not in ('', '.', '..')]
    for first in range(len(parts)):
      end = '/'.join(parts[first:])
      if end in self._names:
        return end
      if len(found := self._lookup.get(_composed(end), ())) == 1:
        return next(iter(found))
    return None


def _composed(name: str) -> str:
  return unicodedata.normalize('NFC', name)


def row_texts(row: Mapping[str, Any], caption_column: str | None) -> tuple[dict[str, str], ...]:
  """The texts of a row, each with its kind: the description, the tags, the label."""
  column = caption_column or next((c for c in CAPTION_COLUMNS if c in row), None)
  found = [('description', row.get(column) if column else None), ('tags', row.get('tags')),
           ('label', row.get('label'))]
  return tuple({'kind': kind, 'text': _words(value)} for kind, value in found if _words(value))


def _facts(row: Mapping[str, Any]) -> Facts:
  known = {name: next((_words(row[k]) for k in keys if row.get(k)), '') for name, keys in _LICENCE.items()}
  return Facts(_words(row.get('artist')), {k: v for k, v in known.items() if v}, row_texts(row, None))


def folder_facts(audio_dir: str | os.PathLike, names: Iterable[str]) -> dict[str, Facts]:
  """What the `manifest.jsonl` files in the folder and below say, by recording.

  Each names its files relative to itself, in the column `file`. Raises ValueError where one has no such
  column.
  """
  names = set(names)
  found: dict[str, Facts] = {}
  folders = {folder for name in names for folder in pathlib.PurePosixPath(name).parents}
  for folder in sorted(folders, key=lambda f: (-len(f.parts), f)):  # the nearest manifest speaks first
    path = pathlib.Path(audio_dir) / folder / FOLDER_MANIFEST
    if not path.is_file():
      continue
    for row in read_table(path):
      if not isinstance(row.get('file'), str):
        raise ValueError(f'{path} has a row without "file"; its columns are {", ".join(row)}')
      name = os.path.normpath(folder / row['file']).replace(os.sep, '/')
      if name in names and name not in found:
        found[name] = _facts(row)
  return found


def read_captions(path: str | os.PathLike, names: Iterable[str],
                  caption_column: str | None = None) -> Captions:
  """Matches a caption file to the recordings `names` (relative to the audio folder).

  A row has `file` and `caption` (or `text`, or `caption_column`), and may have `tags`. Several rows may
  describe one file. `Matcher` says how files are matched.

  Raises: ValueError where the columns are missing, naming those found, or where no row matches a recording.
  """
  names = sorted(names)
  rows = read_table(path)
  columns = list(dict.fromkeys(c for row in rows for c in row if c is not None))
  wanted = (caption_column,) if caption_column else CAPTION_COLUMNS
  if 'file' not in columns or not any(c in columns for c in wanted):
    raise ValueError(f'{path} needs the columns "file" and {" or ".join(repr(c) for c in wanted)}; it has '
                     f'{", ".join(columns) or "no rows"}. Name the column of the text with --caption_column')
  match = Matcher(names)
  texts: dict[str, list[Mapping[str, str]]] = collections.defaultdict(list)
  unmatched = []
  for row in rows:
    file = str(row.get('file') or '')
    if None in row:
      raise ValueError(f'{path}: the row of {file!r} has more fields than the header: put quotes around a text with '
                       'commas')
    if (name := match(file)) is not None:
      texts[name].extend(t for t in row_texts(row, caption_column) if t not in texts[name])
    else:
      unmatched.append(file)
  if not texts:
    raise ValueError(f'none of the {len(rows)} rows of {path} names a recording of the folder; it names '
                     f'{", ".join(unmatched[:3]) or "nothing"}, the folder has {", ".join(names[:3])}')
  return Captions({name: tuple(t) for name, t in texts.items()}, tuple(unmatched))
