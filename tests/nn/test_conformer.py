"""The conformer: which frames each frame sees, padding, partial stacks, and a published implementation."""
from __future__ import annotations

import dataclasses

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from musiclm_jax.nn.conformer import Conformer, ConformerBlock, ConformerConfig, depthwise_convolution

CONFIG = ConformerConfig(width=8, depth=3, heads=2, mlp_width=12, kernel=3)


def _x(batch=2, frames=10, width=8, seed=0):
  return jnp.asarray(np.random.default_rng(seed).normal(size=(batch, frames, width)), jnp.float32)


def test_depthwise_convolution_is_a_centred_correlation_of_each_channel():
  x, kernel = np.asarray(_x()), np.asarray(_x(1, 5)[0])
  y = depthwise_convolution(jnp.asarray(x), jnp.asarray(kernel))
  for channel in range(x.shape[-1]):
    expected = np.correlate(x[0, :, channel], kernel[:, channel], mode='same')
    np.testing.assert_allclose(y[0, :, channel], expected, atol=1e-5)


@pytest.mark.parametrize('width', [1, 5])
def test_gradients_of_the_depthwise_convolution_are_those_of_a_grouped_one(width):
  x, kernel, seen = _x(), _x(1, width, seed=1)[0], _x(seed=2)

  def grouped(x, kernel):
    return jax.lax.conv_general_dilated(x, kernel[:, None], (1,), 'SAME', dimension_numbers=('NWC', 'WIO', 'NWC'),
                                        feature_group_count=x.shape[-1])

  of = lambda f: jax.grad(lambda x, kernel: jnp.sum(f(x, kernel) * seen), argnums=(0, 1))(x, kernel)
  for ours, theirs in zip(of(depthwise_convolution), of(grouped)):
    np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_every_frame_sees_both_directions():
  model = Conformer(CONFIG, rngs=nnx.Rngs(0))
  seen = jax.grad(lambda x: jnp.sum(jnp.sin(model(x)[0, 5])))(_x(1))[0]
  assert np.all(np.any(np.abs(np.asarray(seen)) > 0, axis=-1))


def test_without_attention_positions_only_the_convolution_knows_the_order():
  """Rotary positions must matter: the far frames swapped change the result."""
  x = _x(1, 12)
  swapped = x.at[0, 0].set(x[0, 1]).at[0, 1].set(x[0, 0])
  differences = []
  for positions in ('none', 'rotary'):
    config = dataclasses.replace(CONFIG, depth=1, positions=positions)
    model = Conformer(config, rngs=nnx.Rngs(0))
    differences.append(float(jnp.max(jnp.abs(model(x)[0, 11] - model(swapped)[0, 11]))))
  assert differences[0] < 1e-5 < differences[1]


def test_padding_does_not_leak():
  model = Conformer(CONFIG, rngs=nnx.Rngs(0))
  x = _x(1, 10)
  valid = jnp.arange(10)[None] < 7
  polluted = jnp.where(valid[..., None], x, 1e3)
  y = model(polluted, valid_BxT=valid)
  np.testing.assert_allclose(y[:, :7], model(x[:, :7]), atol=1e-5)


def test_the_first_blocks_alone():
  model = Conformer(CONFIG, rngs=nnx.Rngs(0))
  x = _x()
  positions = jnp.arange(x.shape[1])[None]
  graphdef, state = nnx.split(model.layers.stack)
  expected = x
  for layer in range(2):
    block = nnx.merge(graphdef, jax.tree.map(lambda v, i=layer: v[i], state))
    expected = block(expected, positions)
  np.testing.assert_allclose(model(x, num_layers=2), expected, atol=1e-5)
  assert not np.allclose(model(x, num_layers=2), model(x), atol=1e-3)


def test_dropout_depends_on_the_example_only():
  model = Conformer(dataclasses.replace(CONFIG, dropout=0.3), rngs=nnx.Rngs(0))
  x, keys = _x(4), jax.random.split(jax.random.key(1), 4)
  whole = model(x, keys_B=keys)
  halves = jnp.concatenate([model(x[:2], keys_B=keys[:2]), model(x[2:], keys_B=keys[2:])])
  np.testing.assert_allclose(whole, halves, atol=1e-6)
  assert not np.allclose(whole, model(x), atol=1e-3)


def test_recomputing_activations_changes_nothing():
  x = _x()
  gradients = []
  for remat in (False, True):
    model = Conformer(dataclasses.replace(CONFIG, remat=remat, attention_block=4 if remat else 0), rngs=nnx.Rngs(0))
    gradients.append(jax.grad(lambda x, m=model: jnp.sum(jnp.sin(m(x))))(x))
  np.testing.assert_allclose(*gradients, atol=1e-4)


@pytest.mark.parametrize('change, message', [
    ({'kernel': 4}, 'odd'), ({'positions': 't5'}, 'positions'), ({'depth': 0}, 'depth 0'),
    ({'heads': 0}, 'heads must be at least 1'), ({'heads': 3}, 'width 8 is not a multiple of 3 heads$'),
    ({'dropout': 1.5}, 'dropout must be'), ({'attention_block': -1}, 'attention_block'),
    ({'attention': 'x'}, 'attention')])
def test_settings_that_cannot_work_are_refused(change, message):
  with pytest.raises(ValueError, match=message):
    dataclasses.replace(CONFIG, **change)


@pytest.mark.parity
def test_block_is_the_one_of_wav2vec2_conformer():
  torch = pytest.importorskip('torch')
  transformers = pytest.importorskip('transformers')
  from transformers.models.wav2vec2_conformer import modeling_wav2vec2_conformer as reference_module

  class ChannelNorm(torch.nn.LayerNorm):
    """Layer norm over the channels of [B, C, T], in place of their batch norm."""

    def forward(self, x):
      return super().forward(x.transpose(1, 2)).transpose(1, 2)

  torch.manual_seed(0)
  settings = transformers.Wav2Vec2ConformerConfig(
      hidden_size=8, num_attention_heads=2, intermediate_size=12, conv_depthwise_kernel_size=3, hidden_act='silu',
      position_embeddings_type=None, attn_implementation='eager')
  reference = reference_module.Wav2Vec2ConformerEncoderLayer(settings)
  reference.conv_module.batch_norm = ChannelNorm(8)
  with torch.no_grad():
    for parameter in reference.parameters():
      parameter.add_(0.2 * torch.randn_like(parameter))
  reference.eval()

  block = ConformerBlock(dataclasses.replace(CONFIG, positions='none'), rngs=nnx.Rngs(0))

  def linear(target, source):
    target.w[...] = source.weight.detach().numpy().reshape(source.weight.shape[:2]).T
    if source.bias is not None:
      target.b[...] = source.bias.detach().numpy()

  def norm(target, source):
    target.scale[...], target.bias[...] = source.weight.detach().numpy(), source.bias.detach().numpy()

  for ours, theirs in ((block.feed_forward_1, reference.ffn1), (block.feed_forward_2, reference.ffn2)):
    linear(ours.wi, theirs.intermediate_dense)
    linear(ours.wo, theirs.output_dense)
  for name in ('q', 'k', 'v', 'out'):
    linear(getattr(block.attention, name), getattr(reference.self_attn, f'linear_{name}'))
  linear(block.convolution.expand, reference.conv_module.pointwise_conv1)
  linear(block.convolution.project, reference.conv_module.pointwise_conv2)
  block.convolution.depthwise[...] = reference.conv_module.depthwise_conv.weight.detach().numpy()[:, 0].T
  norm(block.convolution.norm, reference.conv_module.batch_norm)
  norm(block.feed_forward_1_norm, reference.ffn1_layer_norm)
  norm(block.attention_norm, reference.self_attn_layer_norm)
  norm(block.convolution_norm, reference.conv_module.layer_norm)
  norm(block.feed_forward_2_norm, reference.ffn2_layer_norm)
  norm(block.final_norm, reference.final_layer_norm)

  x = np.asarray(_x(2, 11))
  expected = reference(torch.from_numpy(x)).detach().numpy()
  np.testing.assert_allclose(block(jnp.asarray(x), jnp.arange(11)[None]), expected, atol=1e-4)
