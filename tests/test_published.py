"""Published weights: towers become those of the published implementation, and files that do not fit are refused."""
from __future__ import annotations

import dataclasses
import pathlib

from flax import nnx
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from musiclm_jax import config, published
from musiclm_jax.mulan.audio_tower import TransformerTower, TransformerTowerConfig
from musiclm_jax.mulan.text_tower import TextTower, TextTowerConfig
from musiclm_jax.nn.spectral import MelConfig
from tests.test_gin_files import _unused

PIECES = ['[PAD]', '[UNK]', '[CLS]', '[SEP]', *(f'w{i}' for i in range(26))]
TEXT = TextTowerConfig(vocab_size=32, length=7, width=16, depth=2, heads=2, mlp_width=32)
AUDIO = TransformerTowerConfig(
    mel=MelConfig(window=480, hop=240, bands=12), seconds=0.2, patch_frames=6, patch_bands=6, stride_frames=3,
    stride_bands=3, width=16, depth=2, heads=2, mlp_width=32)


def tensors(prefix: str, parts, depth: int = 2) -> dict[str, np.ndarray]:
  """A file's block tensors, by the names of `published`, all random."""
  rng = np.random.default_rng(1)
  found = {}
  for i in range(depth):
    for place, name in parts.items():
      out, into = (32, 16) if place.endswith('wi') else (16, 32) if place.endswith('wo') else (16, 16)
      shape = (out,) if 'norm' in place else (out, into)
      found[f'{prefix}.encoder.layer.{i}.{name}.weight'] = rng.normal(size=shape).astype(np.float32)
      found[f'{prefix}.encoder.layer.{i}.{name}.bias'] = rng.normal(size=(out,)).astype(np.float32)
  return found


def bert(depth: int = 2) -> dict[str, np.ndarray]:
  rng = np.random.default_rng(0)
  draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
  e = 'bert.embeddings'
  return {f'{e}.word_embeddings.weight': draw(30, 16), f'{e}.position_embeddings.weight': draw(9, 16),
          f'{e}.token_type_embeddings.weight': draw(2, 16), f'{e}.LayerNorm.gamma': draw(16),
          f'{e}.LayerNorm.beta': draw(16), **tensors('bert', published._BERT_BLOCK, depth)}


@pytest.fixture
def files(tmp_path):
  (tmp_path / 'vocab.txt').write_text('\n'.join(PIECES))
  safetensors.numpy.save_file(bert(), tmp_path / 'bert.safetensors')
  return tmp_path


def params_of(tower) -> dict:
  return nnx.to_pure_dict(nnx.state(tower, nnx.Param))


def filled(donor, tower):
  params, buffers = donor.load().take_over({donor.into: params_of(tower)}, {})
  assert buffers == {}
  return params[donor.into]


def test_the_text_tower_gets_every_tensor_in_its_place(files):
  tower = TextTower(TEXT, rngs=nnx.Rngs(0))
  donor = published.PublishedBert(str(files / 'bert.safetensors'), str(files / 'vocab.txt'))
  found, made, before = bert(), filled(donor, tower), params_of(tower)
  words = found['bert.embeddings.word_embeddings.weight']
  np.testing.assert_array_equal(made['class_token'], words[2:3])
  np.testing.assert_array_equal(made['embedding']['table'][:30], words)
  np.testing.assert_array_equal(made['embedding']['table'][30:], before['embedding']['table'][30:])
  e = 'bert.embeddings'
  positions = found[f'{e}.position_embeddings.weight'] + found[f'{e}.token_type_embeddings.weight'][0]
  np.testing.assert_array_equal(made['position'], positions[:8])
  np.testing.assert_array_equal(made['norm']['scale'], found['bert.embeddings.LayerNorm.gamma'])
  stack = made['transformer']['layers']['stack']
  for group, part, theirs in (
      ('attention', 'q', 'attention.self.query'), ('attention', 'k', 'attention.self.key'),
      ('attention', 'v', 'attention.self.value'), ('attention', 'out', 'attention.output.dense'),
      ('feed_forward', 'wi', 'intermediate.dense'), ('feed_forward', 'wo', 'output.dense')):
    for i in range(2):
      name = f'bert.encoder.layer.{i}.{theirs}'
      np.testing.assert_array_equal(stack[group][part]['w'][i], found[f'{name}.weight'].T)
      np.testing.assert_array_equal(stack[group][part]['b'][i], found[f'{name}.bias'])
  for norm, theirs in (('attention_norm', 'attention.output.LayerNorm'), ('feed_forward_norm', 'output.LayerNorm')):
    np.testing.assert_array_equal(stack[norm]['scale'][1], found[f'bert.encoder.layer.1.{theirs}.weight'])
  shapes = lambda tree: {k: shapes(v) if isinstance(v, dict) else np.shape(v) for k, v in tree.items()}
  assert shapes(made) == shapes(before)
  assert donor.load().content_hash.startswith('published ')


def test_the_audio_tower_gets_every_tensor_in_its_place(files):
  rng = np.random.default_rng(0)
  draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
  a, e = 'audio_spectrogram_transformer', 'audio_spectrogram_transformer.embeddings'
  bands, published_time = AUDIO.band_patches, AUDIO.time_patches + 3
  found = {f'{e}.cls_token': draw(1, 1, 16), f'{e}.distillation_token': draw(1, 1, 16),
           f'{e}.position_embeddings': draw(1, 2 + bands * published_time, 16),
           f'{e}.patch_embeddings.projection.weight': draw(16, 1, 6, 6),
           f'{e}.patch_embeddings.projection.bias': draw(16),
           f'{a}.layernorm.weight': draw(16), f'{a}.layernorm.bias': draw(16), **tensors(a, published._AST_BLOCK)}
  safetensors.numpy.save_file(found, files / 'ast.safetensors')
  tower = TransformerTower(AUDIO, rngs=nnx.Rngs(0))
  made = filled(published.PublishedAst(str(files / 'ast.safetensors'), time_patches=published_time), tower)
  np.testing.assert_array_equal(made['class_token'], found[f'{e}.cls_token'][0])
  positions = found[f'{e}.position_embeddings'][0]
  np.testing.assert_array_equal(made['position'][0], positions[0])
  # The first band's patches begin one place late, as three of them are cut off both ends.
  np.testing.assert_array_equal(made['position'][1], positions[2 + 1])
  np.testing.assert_array_equal(made['position'][1 + AUDIO.time_patches], positions[2 + published_time + 1])
  # A patch of ours has the bands innermost.
  kernel = found[f'{e}.patch_embeddings.projection.weight'][:, 0]
  np.testing.assert_array_equal(np.asarray(made['patch']['w']).reshape(6, 6, 16)[2, 5], kernel[:, 5, 2])
  np.testing.assert_array_equal(made['transformer']['final_norm']['scale'], found[f'{a}.layernorm.weight'])
  before = found[f'{a}.encoder.layer.1.layernorm_before.weight']
  np.testing.assert_array_equal(made['transformer']['layers']['stack']['attention_norm']['scale'][1], before)
  with pytest.raises(ValueError, match='no rows of 7 patches along time'):
    filled(published.PublishedAst(str(files / 'ast.safetensors'), time_patches=7), tower)


@pytest.mark.parametrize('change, message', [
    ({'bert.encoder.layer.1.output.dense.bias': None}, "has no tensor 'encoder.layer.1.output.dense.bias'"),
    ({'bert.embeddings.word_embeddings.weight': np.zeros((29, 16), np.float32)}, 'has 29 words and the vocabulary 30'),
    ({'bert.embeddings.position_embeddings.weight': np.zeros((7, 16), np.float32)}, 'has positions for 7 tokens'),
    ({'bert.embeddings.LayerNorm.gamma': np.zeros(8, np.float32)}, r'is \(8,\) and the tower wants \(16,\)'),
])
def test_a_file_that_does_not_fit_says_where(files, change, message):
  content = {name: x for name, x in {**bert(), **change}.items() if x is not None}
  safetensors.numpy.save_file(content, files / 'other.safetensors')
  donor = published.PublishedBert(str(files / 'other.safetensors'), str(files / 'vocab.txt'))
  with pytest.raises(ValueError, match=message):
    filled(donor, TextTower(TEXT, rngs=nnx.Rngs(0)))


def test_other_depths_other_files_and_other_models_are_refused(files):
  donor = published.PublishedBert(str(files / 'bert.safetensors'), str(files / 'vocab.txt'))
  with pytest.raises(ValueError, match='has 2 blocks and the tower 3'):
    filled(donor, TextTower(dataclasses.replace(TEXT, depth=3), rngs=nnx.Rngs(0)))
  with pytest.raises(ValueError, match="part 'text' of a MuLan; this model has"):
    donor.load().take_over({'codec': {}}, {})
  (files / 'broken.safetensors').write_bytes(b'not tensors')
  with pytest.raises(ValueError, match='broken.safetensors is no safetensors file'):
    filled(published.PublishedBert(str(files / 'broken.safetensors'), str(files / 'vocab.txt')),
           TextTower(TEXT, rngs=nnx.Rngs(0)))
  with pytest.raises(FileNotFoundError, match='no file of published weights'):
    published.PublishedAst(str(files / 'none.safetensors')).load()


def test_a_training_begins_with_them(files, tmp_path):
  loaded = config.load_experiment(
      ['experiments/mulan.gin', 'size/nano.gin', 'mulan/published_bert.gin'],
      [('BERT_WEIGHTS', str(files / 'bert.safetensors')), ('MULAN_VOCABULARY', str(files / 'vocab.txt')),
       ('MULAN_TEXT_WIDTH', '16'), ('MULAN_TEXT_HEADS', '2'), ('MULAN_TEXT_MLP_WIDTH', '32'),
       ('MULAN_TEXT_VOCAB', '32'), ('MULAN_TEXT_LENGTH', '7'), ('NUM_STEPS', '0'), ('partition.Partitioner.data', '1')],
      provided=('workdir', 'dry_run'))
  assert not _unused('mulan/published_bert', [loaded])
  loaded.build(workdir=str(tmp_path / 'run'), dry_run=False)
  from musiclm_jax.training import checkpoint
  run = checkpoint.load(tmp_path / 'run')
  assert run.lineage['text'].startswith('published ')
  np.testing.assert_array_equal(run.params['text']['embedding']['table'][:30],
                                bert()['bert.embeddings.word_embeddings.weight'])


def reference(make, folder: pathlib.Path):
  """A published model with random weights, norms and biases too, and its file."""
  torch = pytest.importorskip('torch')
  torch.manual_seed(0)
  model = make(pytest.importorskip('transformers')).eval()
  with torch.no_grad():
    for parameter in model.parameters():
      parameter.add_(0.3 * torch.randn_like(parameter) / parameter.shape[-1] ** 0.5)
  model.save_pretrained(folder)
  return torch, model, str(folder / 'model.safetensors')


def with_params(tower, params):
  graph, _, rest = nnx.split(tower, nnx.Param, ...)
  state = nnx.state(tower, nnx.Param)
  nnx.replace_by_pure_dict(state, params)
  return nnx.merge(graph, state, rest)


@pytest.mark.parity
@pytest.mark.parametrize('size', ['small', pytest.param('default', marks=pytest.mark.slow)])
def test_the_text_tower_is_bert(tmp_path, size):
  small = {'vocab_size': 30, 'hidden_size': 16, 'num_hidden_layers': 2, 'num_attention_heads': 2,
           'intermediate_size': 32, 'max_position_embeddings': 8}
  torch, model, file = reference(lambda t: t.BertModel(
      t.BertConfig(**(small if size == 'small' else {})), add_pooling_layer=False), tmp_path)
  c = model.config
  pieces = PIECES + [f'more{i}' for i in range(c.vocab_size - len(PIECES))]
  (tmp_path / 'vocab.txt').write_text('\n'.join(pieces))
  sizes = TextTowerConfig(vocab_size=c.vocab_size + 2, length=c.max_position_embeddings - 1, width=c.hidden_size,
                          depth=c.num_hidden_layers, heads=c.num_attention_heads, mlp_width=c.intermediate_size)
  tower = TextTower(sizes, rngs=nnx.Rngs(0))
  tower = with_params(tower, filled(published.PublishedBert(file, str(tmp_path / 'vocab.txt')), tower))
  rng = np.random.default_rng(0)
  ids = rng.integers(3, c.vocab_size, (3, min(sizes.length, 40)))
  ids[1, 3:] = 0
  given = torch.tensor(np.concatenate([np.full((3, 1), 2), ids], axis=1))
  with torch.no_grad():
    expected = model(given, attention_mask=(given != 0).long()).last_hidden_state[:, 0].numpy()
  assert np.abs(expected).max() > 0.1
  np.testing.assert_allclose(tower(jnp.asarray(ids)), expected, atol=1e-4)


@pytest.mark.parity
@pytest.mark.parametrize('size', ['small', pytest.param('default', marks=pytest.mark.slow)])
def test_the_audio_tower_is_the_audio_spectrogram_transformer(tmp_path, size):
  small = {'hidden_size': 16, 'num_hidden_layers': 2, 'num_attention_heads': 2, 'intermediate_size': 32,
           'patch_size': 6, 'frequency_stride': 3, 'time_stride': 3, 'max_length': 20, 'num_mel_bins': 12}
  torch, model, file = reference(lambda t: t.ASTModel(t.ASTConfig(**(small if size == 'small' else {}))), tmp_path)
  c = model.config
  sizes = TransformerTowerConfig(
      mel=MelConfig(window=480, hop=240, bands=c.num_mel_bins, fft_size=2048), seconds=c.max_length / 100,
      patch_frames=c.patch_size, patch_bands=c.patch_size, stride_frames=c.time_stride, stride_bands=c.frequency_stride,
      width=c.hidden_size, depth=c.num_hidden_layers, heads=c.num_attention_heads, mlp_width=c.intermediate_size,
      class_tokens=2)
  tower = TransformerTower(sizes, rngs=nnx.Rngs(0))
  tower = with_params(tower, filled(published.PublishedAst(file, time_patches=sizes.time_patches), tower))
  mel = np.random.default_rng(0).normal(size=(2, sizes.window_frames, sizes.mel.bands)).astype(np.float32)
  with torch.no_grad():
    expected = model(torch.tensor(mel)).pooler_output.numpy()
  assert np.abs(expected).max() > 0.1
  np.testing.assert_allclose(tower.from_spectrogram(jnp.asarray(mel)), expected, atol=1e-4)
  # Fewer frames: the middle of the positions along time; and MuLan's one class token.
  fewer = dataclasses.replace(sizes, seconds=(sizes.patch_frames + 1 * sizes.stride_frames) / 100, class_tokens=1)
  assert fewer.time_patches == 2
  shorter = filled(published.PublishedAst(file, time_patches=sizes.time_patches),
                   TransformerTower(fewer, rngs=nnx.Rngs(0)))
  whole = np.asarray(model.embeddings.position_embeddings.detach()[0])
  first = 2 + (sizes.time_patches - 2) // 2
  np.testing.assert_array_equal(shorter['position'][:3], whole[[0, first, first + 1]])
