"""The towers against published implementations with the same random weights."""
from __future__ import annotations

import dataclasses

from flax import nnx
import jax.numpy as jnp
import numpy as np
import pytest

from musiclm_jax.mulan.audio_tower import TransformerTower
from musiclm_jax.mulan.text_tower import TextTower
from tests.mulan import configs

pytestmark = pytest.mark.parity


def _copy_linear(target, layers) -> None:
  target.w[...] = np.stack([layer.weight.detach().numpy().T for layer in layers])
  target.b[...] = np.stack([layer.bias.detach().numpy() for layer in layers])


def _copy_norm(target, layers) -> None:
  target.scale[...] = np.stack([layer.weight.detach().numpy() for layer in layers])
  target.bias[...] = np.stack([layer.bias.detach().numpy() for layer in layers])


def _randomise(torch, module) -> None:
  """Norms and biases too: freshly made ones are 1 and 0 and would hide a mistake."""
  torch.manual_seed(0)
  with torch.no_grad():
    for parameter in module.parameters():
      parameter.add_(0.3 * torch.randn_like(parameter) / parameter.shape[-1] ** 0.5)


def test_text_tower_is_bert():
  torch = pytest.importorskip('torch')
  transformers = pytest.importorskip('transformers')
  cfg = configs.config().text
  reference = transformers.BertModel(transformers.BertConfig(
      vocab_size=cfg.vocab_size, hidden_size=cfg.width, num_hidden_layers=cfg.depth,
      num_attention_heads=cfg.heads, intermediate_size=cfg.mlp_width, max_position_embeddings=1 + cfg.length),
      add_pooling_layer=False).eval()
  _randomise(torch, reference)
  class_id = cfg.vocab_size - 1  # our class token is no row of the vocabulary; theirs is this one
  tower = TextTower(cfg, rngs=nnx.Rngs(0))
  e = reference.embeddings
  words = e.word_embeddings.weight.detach().numpy()
  tower.embedding.table[...] = words
  tower.class_token[...] = words[class_id:]
  tower.position[...] = (e.position_embeddings.weight + e.token_type_embeddings.weight[0]).detach().numpy()
  tower.norm.scale[...] = e.LayerNorm.weight.detach().numpy()
  tower.norm.bias[...] = e.LayerNorm.bias.detach().numpy()
  layers, block = reference.encoder.layer, tower.transformer.layers.stack
  for name in ('query', 'key', 'value'):
    _copy_linear(getattr(block.attention, name[0]), [getattr(layer.attention.self, name) for layer in layers])
  _copy_linear(block.attention.out, [layer.attention.output.dense for layer in layers])
  _copy_norm(block.attention_norm, [layer.attention.output.LayerNorm for layer in layers])
  _copy_linear(block.feed_forward.wi, [layer.intermediate.dense for layer in layers])
  _copy_linear(block.feed_forward.wo, [layer.output.dense for layer in layers])
  _copy_norm(block.feed_forward_norm, [layer.output.LayerNorm for layer in layers])

  text = configs.batch(configs.config())['text']
  text = np.where(text == class_id, 1, text)
  ids = torch.tensor(np.concatenate([np.full((len(text), 1), class_id), text], axis=1))
  with torch.no_grad():
    expected = reference(ids, attention_mask=(ids != 0).long()).last_hidden_state[:, 0].numpy()
  assert (text == 0).any() and np.abs(expected).max() > 0.1
  np.testing.assert_allclose(tower(jnp.asarray(text)), expected, atol=1e-4)


def test_audio_tower_is_the_audio_spectrogram_transformer():
  torch = pytest.importorskip('torch')
  transformers = pytest.importorskip('transformers')
  cfg = dataclasses.replace(configs.config().audio, patch_frames=6, patch_bands=6, class_tokens=2)
  reference = transformers.ASTModel(transformers.ASTConfig(
      hidden_size=cfg.width, num_hidden_layers=cfg.depth, num_attention_heads=cfg.heads,
      intermediate_size=cfg.mlp_width, patch_size=6, frequency_stride=cfg.stride_bands,
      time_stride=cfg.stride_frames, max_length=cfg.window_frames, num_mel_bins=cfg.mel.bands)).eval()
  _randomise(torch, reference)
  tower = TransformerTower(cfg, rngs=nnx.Rngs(0))
  e = reference.embeddings
  tower.class_token[...] = torch.cat([e.cls_token, e.distillation_token], dim=1)[0].detach().numpy()
  tower.position[...] = e.position_embeddings[0].detach().numpy()
  # Their kernel is [D, 1, bands, frames]; a patch of ours has the bands innermost.
  kernel = e.patch_embeddings.projection.weight.detach().numpy()[:, 0]
  tower.patch.w[...] = kernel.transpose(2, 1, 0).reshape(-1, cfg.width)
  tower.patch.b[...] = e.patch_embeddings.projection.bias.detach().numpy()
  layers, block = reference.layers, tower.transformer.layers.stack
  for name in ('q', 'k', 'v'):
    theirs = [getattr(layer.attention, f'{name}_proj') for layer in layers]
    _copy_linear(getattr(block.attention, name), theirs)
  _copy_linear(block.attention.out, [layer.attention.o_proj for layer in layers])
  _copy_norm(block.attention_norm, [layer.layernorm_before for layer in layers])
  _copy_linear(block.feed_forward.wi, [layer.mlp.fc1 for layer in layers])
  _copy_linear(block.feed_forward.wo, [layer.mlp.fc2 for layer in layers])
  _copy_norm(block.feed_forward_norm, [layer.layernorm_after for layer in layers])
  norm = tower.transformer.final_norm
  norm.scale[...] = reference.layernorm.weight.detach().numpy()
  norm.bias[...] = reference.layernorm.bias.detach().numpy()

  mel = np.random.default_rng(0).normal(size=(3, cfg.window_frames, cfg.mel.bands)).astype(np.float32)
  with torch.no_grad():
    expected = reference(torch.tensor(mel)).pooler_output.numpy()
  assert np.abs(expected).max() > 0.1
  np.testing.assert_allclose(tower.from_spectrogram(jnp.asarray(mel)), expected, atol=1e-4)
