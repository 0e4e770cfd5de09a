"""The residual quantizer against published implementations with the same codebooks and the same input."""
from __future__ import annotations

import random

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from musiclm_jax.nn import quantize
from musiclm_jax.nn.quantize import ResidualQuantizer

pytestmark = pytest.mark.parity

Q, K, D, B, T = 4, 16, 6, 3, 50


def noise(*shape, seed=0) -> np.ndarray:
  """Correlated features, so that codes are chosen unevenly."""
  generator = np.random.default_rng(seed)
  return (generator.normal(size=shape) @ generator.normal(size=(shape[-1], shape[-1]))).astype(np.float32)


def ours(codes_QxKxD: np.ndarray, count_QxK: np.ndarray | None = None) -> ResidualQuantizer:
  quantizer = ResidualQuantizer(Q, K, D, rngs=nnx.Rngs(0))
  count_QxK = np.ones((Q, K), np.float32) if count_QxK is None else count_QxK
  quantizer.codebook[...] = codes_QxKxD
  quantizer.count[...] = count_QxK
  quantizer.sum[...] = codes_QxKxD * count_QxK[..., None]
  return quantizer


def theirs(codes_QxKxD: np.ndarray, count_QxK: np.ndarray | None = None, **settings):
  """`vector_quantize_pytorch.ResidualVQ` with plain codebooks, straight-through gradients and no smoothing of counts,
  which ours leaves out: with it, codes would be off by about eps K / N."""
  torch = pytest.importorskip('torch')
  library = pytest.importorskip('vector_quantize_pytorch')
  given = {'decay': 0.99, 'eps': 1e-12, 'threshold_ema_dead_code': 0, 'rotation_trick': False, **settings}
  made = library.ResidualVQ(dim=D, num_quantizers=Q, codebook_size=K, quantize_dropout=True, **given)
  for level, codes in enumerate(codes_QxKxD):
    count = torch.ones(K) if count_QxK is None else torch.tensor(count_QxK[level])
    codebook = made.layers[level]._codebook
    codebook.embed.data.copy_(torch.tensor(codes)[None])
    codebook.cluster_size.data.copy_(count[None])
    codebook.embed_avg.data.copy_((torch.tensor(codes) * count[:, None])[None])
  return made


def seed_of(levels: int) -> int:
  """A seed with which their dropout keeps the first `levels` levels."""
  return next(seed for seed in range(10 ** 6) if random.Random(seed).randrange(0, Q) == levels - 1)


def buffers_of(quantizer: ResidualQuantizer) -> dict[str, jax.Array]:
  return nnx.to_pure_dict(nnx.state(quantizer))


def codebooks_of(made) -> dict[str, np.ndarray]:
  books = [layer._codebook for layer in made.layers]
  return {name: np.stack([getattr(book, field)[0].detach().numpy() for book in books])
          for name, field in (('codebook', 'embed'), ('count', 'cluster_size'), ('sum', 'embed_avg'))}


def residuals(x_BxTxD: np.ndarray, codes_QxKxD: np.ndarray, level: int) -> np.ndarray:
  """What is left of each row at that level, [B T, D]."""
  quantizer = ours(codes_QxKxD)
  indices = np.asarray(quantizer.encode(x_BxTxD))
  return (x_BxTxD - np.asarray(quantizer.decode(indices[..., :level]))).reshape(-1, D)


def test_indices_and_values_are_those_of_vector_quantize_pytorch():
  torch = pytest.importorskip('torch')
  codes, x = 0.7 * noise(Q, K, D), noise(B, T, D, seed=1)
  made = theirs(codes).eval()
  with torch.no_grad():
    values, indices, _ = made(torch.tensor(x))
  np.testing.assert_array_equal(ours(codes).encode(x), indices.numpy())
  np.testing.assert_allclose(ours(codes).quantize(x).values_BxTxD, values.numpy(), atol=1e-5)
  for levels in (1, 3):
    np.testing.assert_allclose(ours(codes).decode(indices[..., :levels].numpy()),
                               made.get_output_from_indices(indices[..., :levels]).numpy(), atol=1e-5)


def test_indices_and_values_are_those_of_encodec():
  torch = pytest.importorskip('torch')
  encodec = pytest.importorskip('transformers.models.encodec.modeling_encodec')
  transformers = pytest.importorskip('transformers')
  codes, x = 0.7 * noise(Q, K, D), noise(B, T, D, seed=1)
  config = transformers.EncodecConfig(
      codebook_size=K, codebook_dim=D, hidden_size=D, target_bandwidths=[24.0], sampling_rate=24000)
  made = encodec.EncodecResidualVectorQuantizer(config)
  for layer, level in zip(made.layers, codes):
    layer.codebook.embed.data.copy_(torch.tensor(level))
  made.layers = made.layers[:Q]
  with torch.no_grad():
    indices = made.encode(torch.tensor(x.transpose(0, 2, 1)))  # [Q, B, T]
    values = made.decode(indices)
  np.testing.assert_array_equal(ours(codes).encode(x), np.moveaxis(indices.numpy(), 0, -1)[..., :Q])
  np.testing.assert_allclose(ours(codes).decode(np.moveaxis(indices.numpy(), 0, -1)),
                             values.numpy().transpose(0, 2, 1), atol=1e-5)


@pytest.mark.parametrize('levels', range(1, Q + 1))
def test_dropped_levels_commitment_and_gradient(levels):
  torch = pytest.importorskip('torch')
  codes, x = 0.7 * noise(Q, K, D), noise(B, T, D, seed=1)
  given = torch.tensor(x, requires_grad=True)
  values, indices, losses = theirs(codes, commitment_weight=1.0).train()(
      given, rand_quantize_dropout_fixed_seed=seed_of(levels), freeze_codebook=True)
  assert (indices[..., levels:] == -1).all() and (indices[..., :levels] >= 0).all()
  losses.sum().backward()
  used = jnp.full((B,), levels)
  out = ours(codes).quantize(x, levels_B=used)
  np.testing.assert_array_equal(out.indices_BxTxQ[..., :levels], indices[..., :levels].numpy())
  np.testing.assert_allclose(out.values_BxTxD, values.detach().numpy(), atol=1e-5)
  np.testing.assert_allclose(jnp.mean(out.commitment_B), losses.sum().item(), rtol=1e-5)
  gradient = jax.grad(lambda y: jnp.mean(ours(codes).quantize(y, levels_B=used).commitment_B))(x)
  np.testing.assert_allclose(gradient, given.grad.numpy(), atol=1e-6)


@pytest.mark.parametrize('decay', [0.99, 0.8])
def test_the_moving_average_over_steps(decay):
  torch = pytest.importorskip('torch')
  codes = 0.7 * noise(Q, K, D)
  made, buffers = theirs(codes, decay=decay).train(), buffers_of(ours(codes))
  graphdef, _ = nnx.split(ours(codes))
  for step in range(5):
    x = noise(B, T, D, seed=step + 1)
    with torch.no_grad():
      _, indices, _ = made(torch.tensor(x), rand_quantize_dropout_fixed_seed=seed_of(Q))
    out = nnx.merge(graphdef, buffers).quantize(
        x, slot_B=jnp.arange(B), batch_size=B, key=jax.random.key(step))
    np.testing.assert_array_equal(out.indices_BxTxQ, indices.numpy())
    buffers, metrics = quantize.ema_update(buffers, out.statistics, decay=decay, dead_code_share=0.0)
    assert not np.any(metrics['restarts'])
    for name, value in codebooks_of(made).items():
      np.testing.assert_allclose(buffers[name], value, rtol=2e-4, atol=2e-5, err_msg=f'{name} at step {step}')


def test_dead_codes_are_replaced_by_residuals_of_their_level():
  """The same codes are dead in both, at SoundStream's threshold of 2; both take rows of this batch, as they are at
  that level, and give them a start; no other code is touched."""
  torch = pytest.importorskip('torch')
  codes, x = 0.7 * noise(Q, K, D), noise(B, T, D, seed=1)
  count = np.full((Q, K), 30.0, np.float32)  # so that 0.1 of the mean is above 2, where the absolute count rules
  for level, code in ((0, 3), (0, 9), (2, 5)):
    count[level, code] = 0.5
    codes[level, code] += 100.0  # nobody chooses it
  made = theirs(codes, count, threshold_ema_dead_code=2).train()
  out = ours(codes, count).quantize(x, slot_B=jnp.arange(B), batch_size=B, key=jax.random.key(0))
  buffers, metrics = quantize.ema_update(buffers_of(ours(codes, count)), out.statistics, decay=0.99)
  # Ours start with the mean count of their level, where theirs is a setting.
  for level, layer in enumerate(made.layers):
    mean = np.mean(0.99 * count[level] + 0.01 * np.asarray(out.statistics['count'][level]))
    layer._codebook.reset_cluster_size = float(mean)
  torch.manual_seed(0)
  with torch.no_grad():
    made(torch.tensor(x), rand_quantize_dropout_fixed_seed=seed_of(Q))
  expected = codebooks_of(made)
  dead = count < 2
  np.testing.assert_allclose(metrics['restarts'], dead.mean(axis=1))
  np.testing.assert_allclose(buffers['count'], expected['count'], rtol=1e-5)
  np.testing.assert_allclose(np.asarray(buffers['codebook'])[~dead], expected['codebook'][~dead], rtol=1e-4, atol=1e-5)
  for level, code in np.argwhere(dead):
    rows = residuals(x, codes, level)
    for found in (np.asarray(buffers['codebook']), expected['codebook']):
      assert np.abs(rows - found[level, code]).sum(axis=1).min() < 1e-4
  np.testing.assert_allclose(np.asarray(buffers['sum'])[dead],
                             np.asarray(buffers['codebook'])[dead] * np.asarray(buffers['count'])[dead][:, None],
                             rtol=1e-5)
