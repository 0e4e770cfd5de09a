"""Published weights for MuLan's towers: BERT and the Audio Spectrogram Transformer, from files of Hugging Face.

A file is `model.safetensors` of such a model, as it is published; nothing is downloaded here. The projections into the
joint space, and the temperature, begin as always.

V vocabulary, L positions, D width, N layers.
"""
from __future__ import annotations

from collections.abc import Callable, Mapping
import dataclasses
import pathlib
from typing import Any

import numpy as np
import safetensors.numpy

from musiclm_jax import provenance
from musiclm_jax.mulan.model import VOCABULARY_ASSET
from musiclm_jax.text import wordpiece

# Our part of a block -> its name in the file; a part is a linear map or a norm.
_BERT_BLOCK = {
    'attention/q': 'attention.self.query', 'attention/k': 'attention.self.key', 'attention/v': 'attention.self.value',
    'attention/out': 'attention.output.dense', 'attention_norm': 'attention.output.LayerNorm',
    'feed_forward/wi': 'intermediate.dense', 'feed_forward/wo': 'output.dense', 'feed_forward_norm': 'output.LayerNorm'}
_AST_BLOCK = {
    'attention/q': 'attention.attention.query', 'attention/k': 'attention.attention.key',
    'attention/v': 'attention.attention.value', 'attention/out': 'attention.output.dense',
    'attention_norm': 'layernorm_before', 'feed_forward/wi': 'intermediate.dense', 'feed_forward/wo': 'output.dense',
    'feed_forward_norm': 'layernorm_after'}
# Names that files of other versions have for the same.
_SYNONYMS = {'weight': ('weight', 'gamma'), 'bias': ('bias', 'beta')}


@dataclasses.dataclass(frozen=True)
class PublishedBert:
  """A donor (`train.Donor`) for the text tower.

  Attributes:
    file: of the weights. vocabulary: the `vocab.txt` that belongs to them, which names the row of the class token; it
      is also what MULAN_VOCABULARY should be.
    frozen: whether the tower stays as it is.
  """

  file: str
  vocabulary: str
  frozen: bool = False

  into = 'text'

  def load(self) -> _Weights:
    content = pathlib.Path(self.vocabulary).read_bytes()
    rows = wordpiece.WordPiece(content)
    return _Weights(self.file, 'bert', self.into,
                    lambda found, ours: _text_tower(found, ours, rows.id_of('[CLS]'), rows.size),
                    {VOCABULARY_ASSET: content})


@dataclasses.dataclass(frozen=True)
class PublishedAst:
  """A donor (`train.Donor`) for the audio tower, a `TransformerTowerConfig` of the same sizes.

  The positions of longer spectrograms than MuLan's are cut to the middle of time, as their authors did. Their
  spectrograms are Kaldi's, with other floors and another scale than ours: the tower has to get used to it.

  Attributes:
    file, frozen: as for `PublishedBert`.
    time_patches: of the model in the file, along time: 101 where it was trained on 1024 frames.
  """

  file: str
  frozen: bool = False
  time_patches: int = 101

  into = 'audio'

  def load(self) -> _Weights:
    return _Weights(self.file, 'audio_spectrogram_transformer', self.into,
                    lambda found, ours: _audio_tower(found, ours, self.time_patches))


class _Tensors:
  """The tensors of a file by name, with or without the prefix of a larger model."""

  def __init__(self, file: str, prefix: str):
    self.file, self.prefix = file, prefix
    try:
      self._found = safetensors.numpy.load_file(file)
    except (safetensors.SafetensorError, TypeError, KeyError) as error:
      raise ValueError(f'{file} is no safetensors file that can be read here: {error}') from None

  def __call__(self, name: str, ours: Any | None = None) -> np.ndarray:
    """The tensor, which must have the shape of `ours` where that is given."""
    *_, kind = name.split('.')
    stem = name.removesuffix(kind)
    for prefix in (f'{self.prefix}.', ''):
      for synonym in _SYNONYMS.get(kind, (kind,)):
        if (tensor := self._found.get(f'{prefix}{stem}{synonym}')) is not None:
          return self._checked(tensor.astype(np.float32), name, ours)
    raise ValueError(f'{self.file} has no tensor {name!r}: is it the file of a {self.prefix.replace("_", " ")}?')

  def _checked(self, tensor: np.ndarray, name: str, ours: Any | None) -> np.ndarray:
    if ours is not None and tensor.shape != ours.shape:
      raise ValueError(f'{name!r} of {self.file} is {tensor.shape} and the tower wants {ours.shape}: it must have the '
                       'sizes of the published model')
    return tensor

  def depth(self, layers: str) -> int:
    """How many blocks there are."""
    numbers = {name.split(f'{layers}.')[1].split('.')[0] for name in self._found if f'{layers}.' in name}
    return len(numbers)

  def blocks(self, layers: str, parts: Mapping[str, str], ours: Any) -> Any:
    """All blocks, as the stacked ones of `ours`. Their matrices are [out, in]."""
    stack = ours
    depth = stack['attention_norm']['scale'].shape[0]
    if self.depth(layers) != depth:
      raise ValueError(f'{self.file} has {self.depth(layers)} blocks and the tower {depth}')
    made = {group: dict(values) for group, values in stack.items()}
    for place, name in parts.items():
      group, _, part = place.partition('/')
      target = stack[group][part] if part else stack[group]
      names = {'w': 'weight', 'b': 'bias'} if 'w' in target else {'scale': 'weight', 'bias': 'bias'}
      filled = {}
      for ours_is, theirs_is in names.items():
        rows = [self(f'{layers}.{i}.{name}.{theirs_is}') for i in range(depth)]
        filled[ours_is] = self._checked(np.stack([row.T for row in rows]), f'{layers}.*.{name}', target[ours_is])
      if part:
        made[group][part] = filled
      else:
        made[group] = filled
    return made


@dataclasses.dataclass(frozen=True)
class _Weights:
  """What a donor gives: see `train.Donation`."""

  file: str
  prefix: str
  into: str
  fill: Callable[[_Tensors, Any], Any]
  assets: Mapping[str, bytes] = dataclasses.field(default_factory=dict)

  def __post_init__(self):
    if not pathlib.Path(self.file).is_file():
      raise FileNotFoundError(f'no file of published weights {self.file}')

  @property
  def name(self) -> str:
    return self.file

  @property
  def content_hash(self) -> str:
    return f'published {provenance.hash_file(self.file)[:16]}'

  def take_over(self, params: Any, buffers: Any) -> tuple[Any, Any]:
    if self.into not in params:
      raise ValueError(f'published weights fill the part {self.into!r} of a MuLan; this model has {sorted(params)}')
    return {**params, self.into: self.fill(_Tensors(self.file, self.prefix), params[self.into])}, buffers


def _text_tower(found: _Tensors, ours: Any, class_row: int, rows: int) -> Any:
  words_VxD = found('embeddings.word_embeddings.weight')
  table = ours['embedding']['table']
  if len(words_VxD) < rows:
    raise ValueError(f'{found.file} has {len(words_VxD)} words and the vocabulary {rows}: they do not belong together')
  words_VxD = words_VxD[:rows]  # further ones are filling
  if table.shape[0] < rows or table.shape[1] != words_VxD.shape[1]:
    raise ValueError(f'the words of {found.file} are {words_VxD.shape}; the text tower has rows for {table.shape}')
  positions_LxD = (found('embeddings.position_embeddings.weight')
                   + found('embeddings.token_type_embeddings.weight')[0])  # there is one segment
  places = ours['position'].shape[0]
  if len(positions_LxD) < places:
    raise ValueError(f'{found.file} has positions for {len(positions_LxD)} tokens, and the text tower reads {places}')
  norm = 'embeddings.LayerNorm'
  return {
      **ours, 'class_token': _rows_of(words_VxD[class_row:class_row + 1], ours['class_token']),
      'embedding': {'table': np.concatenate([words_VxD, np.asarray(table)[rows:]])},
      'position': _rows_of(positions_LxD[:places], ours['position']),
      'norm': {'scale': found(f'{norm}.weight', ours['norm']['scale']),
               'bias': found(f'{norm}.bias', ours['norm']['bias'])},
      'transformer': _with_blocks(ours, found.blocks('encoder.layer', _BERT_BLOCK, _stack(ours)))}


def _audio_tower(found: _Tensors, ours: Any, time_patches: int) -> Any:
  if 'patch' not in ours:
    raise ValueError('published weights of a spectrogram transformer do not fit another audio tower')
  kernel_DxBxF = found('embeddings.patch_embeddings.projection.weight')[:, 0]  # [D, bands, frames]
  positions_LxD = found('embeddings.position_embeddings')[0]
  classes = ours['class_token'].shape[0]
  tokens_CxD = np.concatenate([found('embeddings.cls_token')[0], found('embeddings.distillation_token')[0]])
  published = len(tokens_CxD)
  grid = positions_LxD[published:]
  if len(grid) % time_patches or classes > published:
    raise ValueError(f'{found.file} has {len(grid)} positions, which are no rows of {time_patches} patches along time')
  bands = len(grid) // time_patches
  wanted = (ours['position'].shape[0] - classes) // bands
  if wanted > time_patches or wanted * bands != ours['position'].shape[0] - classes:
    raise ValueError(f'{found.file} has {bands} x {time_patches} positions (bands x time), and the audio tower wants '
                     f'{ours["position"].shape[0] - classes}')
  first = (time_patches - wanted) // 2
  grid = grid.reshape(bands, time_patches, -1)[:, first:first + wanted].reshape(bands * wanted, -1)
  norm = ours['transformer']['final_norm']
  filled = _with_blocks(ours, found.blocks('encoder.layer', _AST_BLOCK, _stack(ours)))
  return {
      **ours, 'class_token': _rows_of(tokens_CxD[:classes], ours['class_token']),
      'patch': {'w': _rows_of(kernel_DxBxF.transpose(2, 1, 0).reshape(-1, len(kernel_DxBxF)), ours['patch']['w']),
                'b': found('embeddings.patch_embeddings.projection.bias', ours['patch']['b'])},
      'position': _rows_of(np.concatenate([positions_LxD[:classes], grid]), ours['position']),
      'transformer': {**filled, 'final_norm': {'scale': found('layernorm.weight', norm['scale']),
                                               'bias': found('layernorm.bias', norm['bias'])}}}


def _rows_of(rows: np.ndarray, ours: Any) -> np.ndarray:
  if rows.shape != ours.shape:
    raise ValueError(f'the published model has {rows.shape} where the tower has {ours.shape}: they must have one size')
  return np.ascontiguousarray(rows)


def _stack(tower: Any) -> Any:
  return tower['transformer']['layers']['stack']


def _with_blocks(tower: Any, stack: Any) -> Any:
  return {**tower['transformer'], 'layers': {**tower['transformer']['layers'], 'stack': stack}}
