"""Writes the bundle of a workdir: every function that generation asks for, the weights, and what they are."""
from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
import contextlib
import dataclasses
import datetime
import importlib
import os
import pathlib
import shutil
from typing import Any

import jax
import safetensors.numpy

import musiclm_jax
from musiclm_jax import provenance, specs
from musiclm_jax.cascade import Cascade
from musiclm_jax.cascade_networks import CascadeNetworks
from musiclm_jax.evaluate import MORE_PAIRS, PAIRS, TOKENS
from musiclm_jax.export import card, functions
from musiclm_jax.export.weights import Network
from musiclm_jax.serving import bundle as serving
from musiclm_jax.serving.bundle import Bundle, BundleSpecs
from musiclm_jax.serving.bundle_format import (
    CARD, described, Files, function_file, is_name, Manifest, MANIFEST, SPECS, VOCABULARY, WEIGHT_KINDS, weights_file)
from musiclm_jax.text.tokenizer import Tokenizer
from musiclm_jax.training.checkpoint import Loaded


@dataclasses.dataclass(frozen=True)
class Written:
  """A bundle in its place; `fresh` is False where the same one was there before."""

  path: pathlib.Path
  bytes: int
  fresh: bool

  def text(self) -> str:
    return f'{self.path}: {self.bytes / 1e6:.1f} MB' + ('' if self.fresh else ', of the same networks as before')


def export(workdir: str | os.PathLike, output: str | os.PathLike, *, licence: str = '', weights: str = 'float32',
           records: Sequence[str | os.PathLike] = (), replace: bool = False) -> Written:
  """Exports the cascade of a workdir.

  The bundle is whole or not there: it is written beside `output`, loaded once, and renamed.

  Args:
    licence: of the weights.
    weights: one of `WEIGHT_KINDS`.
    records: record sets that the networks were trained on; those that a quickstart leaves in its workdir by default.
    replace: whether another bundle in `output` makes way, and one whose manifest is damaged. Nothing but a bundle
      does. One of the same networks with damaged files always does.

  Raises ValueError where the model card would have empty fields, the networks do not belong together, or `output`
  holds something else.
  """
  output = pathlib.Path(os.path.realpath(output))
  there = _there(output, damaged=replace)
  ready = _ready(workdir, licence, weights, records)
  lineage = {name: loaded.content_hash for name, (loaded, _) in ready.networks.items()}
  known = there and there.manifest
  same = known is not None and (known.licence, known.weights, known.lineage, known.made_with) == (
      licence, weights, lineage, ready.made_with) and described(ready.files).items() <= known.files.items()
  if same and _intact(there):
    return Written(output, _size(known), fresh=False)
  if known is not None and not (same or replace):
    raise ValueError(f'{output} holds a bundle of other networks, or exported otherwise: name another output, or give '
                     '--replace')
  with _beside(output) as place:
    files = _write(place, ready.files)
    for name, (loaded, functions_of) in ready.networks.items():
      files |= _write(place, _exported(name, loaded, functions_of, weights))
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec='seconds')
    manifest = Manifest(licence, now, ready.made_with, weights, lineage, ready.sampling, files)
    _write(place, {MANIFEST: manifest.to_bytes()})
    Bundle(place)  # what is there now is what anybody will load
    _put(place, output)
  return Written(output, _size(manifest), fresh=True)


def export_savedmodel(workdir: str | os.PathLike, output: str | os.PathLike, *, licence: str = '',
                      weights: str = 'float32', records: Sequence[str | os.PathLike] = ()) -> Written:
  """As `export`, but a TensorFlow SavedModel for each network, beside specs, vocabulary and model card.

  Raises ValueError, as `export` does, and where there is anything in `output`.
  """
  output = pathlib.Path(os.path.realpath(output))
  if _there(output) is not None:
    raise ValueError(f'{output} holds a bundle: name another output')
  ready = _ready(workdir, licence, weights, records)
  savedmodel = importlib.import_module('musiclm_jax.export.savedmodel')  # needs TensorFlow, which nothing else does
  with _beside(output) as place:
    _write(place, ready.files)
    for name, (loaded, functions_of) in ready.networks.items():
      savedmodel.write(place / name, Network.of(loaded), functions_of(loaded.model), weights)
    size = sum(path.stat().st_size for path in place.rglob('*') if path.is_file())
    _put(place, output)
  return Written(output, size, fresh=True)


FunctionsOf = Callable[[Any], dict[str, functions.Function]]


@dataclasses.dataclass(frozen=True)
class _Ready:
  """A cascade that may be exported: its networks by name, with what is exported of them, and the files about them."""

  networks: Mapping[str, tuple[Loaded, FunctionsOf]]
  sampling: Mapping[str, dict[str, float]]
  files: Mapping[str, bytes]
  made_with: Mapping[str, str]


def _ready(workdir: str | os.PathLike, licence: str, weights: str, records: Sequence[str | os.PathLike]) -> _Ready:
  """Raises ValueError, before anything takes time, where it may not be exported."""
  if weights not in WEIGHT_KINDS:
    raise ValueError(f'weights must be one of {", ".join(WEIGHT_KINDS)}, found {weights!r}')
  root = pathlib.Path(workdir)
  sets = records or [place for name in (TOKENS, PAIRS, MORE_PAIRS) if (place := root / name).is_dir()]
  data = [row for place in sets for row in card.data_of(place)]
  card.check(licence, data)
  cascade = Cascade(workdir)
  networks = _networks(cascade)
  described_by = _specs(cascade)
  made_with = {'musiclm_jax': musiclm_jax.__version__, 'code': provenance.code_digest(), 'jax': jax.__version__}
  parts = [card.Part(name, loaded.step, sum(x.size for x in jax.tree.leaves(loaded.params)), loaded.content_hash)
           for name, (loaded, _) in networks.items()]
  # Networks that read no texts have no vocabulary of their own; a bundle always has one.
  tokenizer = cascade.tokenizer if described_by.mulan_rate else Tokenizer.load()
  files = {
      SPECS: specs.to_json(described_by).encode(),
      VOCABULARY: tokenizer.model_bytes,
      CARD: card.write(licence=licence, data=data, parts=parts, report=card.figures_of(root), weights=weights,
                       made_with=made_with).encode(),
  }
  sampling = {name: dataclasses.asdict(usual) for name, usual in CascadeNetworks(cascade).sampling.items()}
  return _Ready(networks, sampling, files, made_with)


def _networks(cascade: Cascade) -> dict[str, tuple[Loaded, FunctionsOf]]:
  """Each network of the cascade by its name in the bundle, and what is exported of it.

  Raises FileNotFoundError where there is no codec or no stage, ValueError where they do not belong together.
  """
  found = {serving.CODEC: (cascade.part('codec'), functions.of_codec)}
  for role, of in ((serving.SEMANTIC, functions.of_semantic), (serving.MULAN, functions.of_mulan)):
    if cascade.has(role):
      found[role] = cascade.part(role), of
  stages = CascadeNetworks(cascade).stages
  if not stages:
    cascade.stage('semantic')  # says where it would be
  return found | {serving.STAGE.format(name): (cascade.stage(name), functions.of_stage) for name in stages}


def _specs(cascade: Cascade) -> BundleSpecs:
  networks = CascadeNetworks(cascade)
  shared = {f.name: getattr(networks, f.name) for f in dataclasses.fields(BundleSpecs) if f.name != 'text_length'}
  text_length = cascade.part('mulan').objective.mulan.text.length if networks.mulan_rate else 0
  return BundleSpecs(**shared, text_length=text_length)


def _exported(name: str, loaded: Loaded, functions_of: FunctionsOf, kind: str
              ) -> dict[str, bytes]:
  """Files of one network."""
  programs, arrays = functions.exported(Network.of(loaded), functions_of(loaded.model), kind)
  files = {function_file(name, function): program for function, program in programs.items()}
  return files | {weights_file(name): safetensors.numpy.save(arrays)}


def _there(output: pathlib.Path, damaged: bool = False) -> Files | None:
  """The bundle in `output`; None where there is nothing, or, with `damaged`, a bundle that cannot be read.

  Raises ValueError where there is something else, or nothing can be written.
  """
  if not output.parent.is_dir():
    raise FileNotFoundError(f'there is no folder {str(output.parent)!r}')
  if not os.access(output.parent, os.W_OK):
    raise ValueError(f'{output.parent} cannot be written to: name another output')
  if not os.path.lexists(output) or (output.is_dir() and not any(output.iterdir())):
    return None
  try:
    return Files(output)
  except (ValueError, FileNotFoundError) as error:
    names = [path.relative_to(output).as_posix() for path in output.rglob('*') if not path.is_dir()]
    if not output.is_dir() or MANIFEST not in names or not all(map(is_name, names)):
      raise ValueError(f'{output} holds something that is not a bundle: name another output') from None
    if damaged:
      return None
    raise ValueError(f'{error}; --replace does so in its place') from None


def _intact(there: Files) -> bool:
  try:
    for name in there.manifest.files:
      there.read(name)
  except (OSError, ValueError):
    return False
  return True


def _size(manifest: Manifest) -> int:
  return sum(size for size, _ in manifest.files.values())


def _write(place: pathlib.Path, files: Mapping[str, bytes]) -> dict[str, tuple[int, str]]:
  """Writes the files and returns what a manifest says of them."""
  for name, content in files.items():
    path = place / name
    path.parent.mkdir(exist_ok=True)
    with open(path, 'xb') as file:
      file.write(content)
      file.flush()
      os.fsync(file.fileno())
  return described(files)


def _put(place: pathlib.Path, output: pathlib.Path) -> None:
  """Moves the folder to where it belongs; a bundle that is there makes way."""
  if os.path.lexists(output) and any(output.iterdir()):
    old = output.with_name(f'.{output.name}.old')
    shutil.rmtree(old, ignore_errors=True)
    os.rename(output, old)
    os.rename(place, output)
    shutil.rmtree(old)
  else:
    os.rename(place, output)  # onto an empty folder, if there is one


@contextlib.contextmanager
def _beside(output: pathlib.Path) -> Iterator[pathlib.Path]:
  """A folder on the same disk, which does not outlive an error."""
  place = output.with_name(f'.{output.name}.partial')
  shutil.rmtree(place, ignore_errors=True)  # of an export that was killed
  place.mkdir()
  try:
    yield place
  finally:
    shutil.rmtree(place, ignore_errors=True)
