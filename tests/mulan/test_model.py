"""The two towers: sizes, masks, windows of long audio, and the unit sphere."""
from __future__ import annotations

import dataclasses

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from musiclm_jax.mulan.audio_tower import TransformerTowerConfig, mask_spectrogram, patches
from musiclm_jax.mulan.model import MuLan, MuLanConfig
from musiclm_jax.mulan.objective import MuLanTraining
from musiclm_jax.mulan.text_tower import TextTower, TextTowerConfig
from musiclm_jax.mulan.tokens import MuLanTokens
from musiclm_jax.nn.spectral import MelConfig
from musiclm_jax.text.tokenizer import Tokenizer
from tests.mulan import configs


def test_patches_are_those_of_the_spectrogram():
  cfg = configs.config().audio
  x = np.random.default_rng(0).normal(size=(2, cfg.window_frames, cfg.mel.bands)).astype(np.float32)
  got = np.asarray(patches(jnp.asarray(x), cfg))
  assert got.shape == (2, cfg.time_patches * cfg.band_patches, cfg.patch_frames * cfg.patch_bands)
  for s in range(cfg.band_patches):
    for t in range(cfg.time_patches):
      first, low = t * cfg.stride_frames, s * cfg.stride_bands
      expected = x[:, first:first + cfg.patch_frames, low:low + cfg.patch_bands].reshape(2, -1)
      np.testing.assert_array_equal(got[:, s * cfg.time_patches + t], expected)


@pytest.mark.parametrize('class_tokens', [0, 1, 2])
def test_embeddings_have_length_one(class_tokens):
  cfg = configs.config(audio={'class_tokens': class_tokens}, text={'class_tokens': class_tokens})
  model, batch = configs.model(cfg), configs.batch(cfg)
  for x in (model.embed_audio(batch['audio']), model.embed_text(batch['text'])):
    assert x.shape == (6, cfg.embedding) and x.dtype == jnp.float32
    np.testing.assert_allclose(np.linalg.norm(x, axis=-1), 1.0, atol=1e-5)
  assert model.temperature == pytest.approx(0.1, rel=1e-5)


@pytest.mark.parametrize('class_tokens', [0, 1])
def test_what_lies_behind_the_length_does_not_matter(class_tokens):
  cfg = configs.config(audio={'class_tokens': class_tokens})
  model, batch = configs.model(cfg), configs.batch(cfg)
  length = np.array([480, 1000, 4800, 7201, 9600, 0], np.int32)
  noise = configs.batch(cfg, seed=1)['audio']
  behind = np.arange(cfg.audio.window_samples) >= length[:, None]
  clean = model.embed_audio(batch['audio'], length)
  np.testing.assert_array_equal(clean, model.embed_audio(np.where(behind, noise, batch['audio']), length))
  # The mask does something: zeros that count are not the same as zeros that do not.
  silent = model.embed_audio(np.where(behind, 0, batch['audio']))
  assert np.abs(silent[:3] - clean[:3]).max() > 1e-4
  np.testing.assert_allclose(silent[4], clean[4], atol=1e-6)
  assert np.isfinite(clean).all()


def test_a_short_clip_is_the_padded_and_masked_window():
  cfg = configs.config()
  model, batch = configs.model(cfg), configs.batch(cfg)
  short = batch['audio'][:, :3000]
  padded = np.pad(short, ((0, 0), (0, cfg.audio.window_samples - 3000)))
  np.testing.assert_allclose(
      model.embed_audio(short), model.embed_audio(padded, np.full(6, 3000, np.int32)), atol=1e-6)


def test_a_long_clip_is_the_normalised_mean_of_its_windows():
  cfg = configs.config()
  window, hop = cfg.audio.window_samples, cfg.hop_samples
  samples = window + 3 * hop + hop // 2
  model, batch = configs.model(cfg), configs.batch(cfg, samples=samples)
  assert cfg.windows(samples) == 4 and cfg.windows(window) == cfg.windows(10) == 1
  each = [model.embed_audio(batch['audio'][:, i * hop:i * hop + window]) for i in range(4)]
  expected = np.mean(each, axis=0)
  expected /= np.linalg.norm(expected, axis=-1, keepdims=True)
  np.testing.assert_allclose(model.embed_audio(batch['audio']), expected, atol=1e-5)
  # With lengths: only whole windows count, and the first one always.
  length = np.array([samples, window + hop, window + hop - 1, window, 3000, 0], np.int32)
  got = np.asarray(model.embed_audio(batch['audio'], length))
  np.testing.assert_allclose(got[0], expected[0], atol=1e-5)
  two = each[0][1] + each[1][1]
  np.testing.assert_allclose(got[1], two / np.linalg.norm(two), atol=1e-5)
  np.testing.assert_allclose(got[2:4], each[0][2:4], atol=1e-5)
  np.testing.assert_allclose(got[4], model.embed_audio(batch['audio'][4:5, :3000])[0], atol=1e-5)


def test_text_padding_and_its_width_do_not_matter():
  cfg = configs.config()
  model, text = configs.model(cfg), configs.batch(cfg)['text'].copy()
  text[:, 4:] = 0
  np.testing.assert_allclose(model.embed_text(text), model.embed_text(text[:, :4]), atol=1e-6)
  changed = text.copy()
  changed[:, 0] = text[:, 0] % (cfg.text.vocab_size - 1) + 1
  assert np.abs(model.embed_text(changed) - model.embed_text(text)).max() > 1e-4
  empty = model.embed_text(np.zeros_like(text))
  assert np.isfinite(empty).all()


def test_text_of_wrong_length_and_window_of_wrong_length_are_named():
  cfg = configs.config()
  model = configs.model(cfg)
  with pytest.raises(ValueError, match='text of 8 tokens is longer than the 7'):
    model.embed_text(jnp.ones((1, 8), jnp.int32))
  with pytest.raises(ValueError, match='windows of 9600 samples, found 9000'):
    model.audio(jnp.zeros((1, 9000)))
  with pytest.raises(ValueError, match='do not fit in a window'):
    configs.config(audio={'patch_frames': 21})
  with pytest.raises(ValueError, match='no whole number of frames of 480'):
    configs.config(audio={'seconds': 0.41})


def test_the_vocabulary_travels_with_the_model(tmp_path):
  cfg = configs.config()
  assert cfg.assets() == {'vocabulary.model': Tokenizer.load().model_bytes}
  (tmp_path / 'own.model').write_bytes(b'bytes')
  own = dataclasses.replace(cfg, vocabulary=str(tmp_path / 'own.model'))
  for objective in (MuLanTraining(own), MuLanTokens(own)):
    assert objective.assets() == {'vocabulary.model': b'bytes'}
  with pytest.raises(FileNotFoundError, match='no vocabulary file'):
    dataclasses.replace(cfg, vocabulary=str(tmp_path / 'gone.model')).assets()


def test_silent_clips_have_finite_embeddings_and_gradients():
  cfg = configs.config()
  model = MuLan(cfg, rngs=nnx.Rngs(0))
  silent = jnp.zeros((2, cfg.audio.window_samples))
  for length in (None, jnp.array([0, 10])):
    embedding = model.embed_audio(silent, length)
    np.testing.assert_allclose(jnp.linalg.norm(embedding, axis=-1), 1, atol=1e-5)
  wordless = jnp.zeros((2, cfg.text.length), jnp.int32)
  batch = {'audio': silent, 'text': wordless, 'slot': jnp.arange(2)}
  objective = MuLanTraining(cfg)
  gradient = nnx.grad(lambda m: objective.loss(m, batch, jax.random.key(0), training=True)[0])(model)
  assert all(bool(jnp.isfinite(g).all()) for g in jax.tree.leaves(gradient))


def test_mask_spectrogram_masks_bands_and_frames_with_the_widths_asked_for():
  cfg = dataclasses.replace(
      configs.config().audio, time_masks=1, time_mask_frames=4, band_masks=1, band_mask_bands=3)
  x = jnp.ones((200, cfg.window_frames, cfg.mel.bands))
  keys = jax.random.split(jax.random.key(0), 200)
  y = np.asarray(mask_spectrogram(x, keys, cfg))
  frames = (y == 0).all(axis=2).sum(axis=1)
  bands = (y == 0).all(axis=1).sum(axis=1)
  assert set(frames) == {0, 1, 2, 3, 4} and set(bands) == {0, 1, 2, 3}
  # Every place can be reached, both ends included.
  assert (y == 0).any(axis=(0, 2)).all() and (y == 0).any(axis=(0, 1)).all()
  none = dataclasses.replace(cfg, time_masks=0, band_masks=0)
  np.testing.assert_array_equal(mask_spectrogram(x, keys, none), x)


def test_spectrogram_masks_and_dropout_only_with_keys():
  cfg = configs.config(
      audio={'time_masks': 1, 'time_mask_frames': 10, 'dropout': 0.3}, text={'dropout': 0.3})
  model, batch = configs.model(cfg), configs.batch(cfg)
  keys = jax.random.split(jax.random.key(0), 6)
  masked = model.embed_window(batch['audio'], None, keys)
  assert np.abs(masked - model.embed_audio(batch['audio'])).max() > 1e-3
  assert np.abs(model.embed_text(batch['text'], keys) - model.embed_text(batch['text'])).max() > 1e-3
  # One example's masks depend on its own key alone.
  np.testing.assert_allclose(masked[2:4], model.embed_window(batch['audio'][2:4], None, keys[2:4]), atol=1e-6)


def test_bfloat16_parameters_give_float32_embeddings_close_to_the_exact_ones():
  cfg = configs.config()
  model, batch = configs.model(cfg), configs.batch(cfg)
  graphdef, params, rest = nnx.split(model, nnx.Param, ...)
  half = nnx.merge(graphdef, jax.tree.map(lambda x: x.astype(jnp.bfloat16), params), rest)
  for name, data in (('embed_audio', batch['audio']), ('embed_text', batch['text'])):
    got, exact = getattr(half, name)(data), getattr(model, name)(data)
    assert got.dtype == jnp.float32
    assert np.sum(np.asarray(got) * np.asarray(exact), axis=-1).min() > 0.99


def _block(width: int, mlp_width: int) -> int:
  """Four attention matrices, two feed-forward ones, their biases, two layer norms."""
  return 4 * width**2 + 4 * width + 2 * width * mlp_width + mlp_width + width + 4 * width


def test_paper_size_parameter_counts():
  # BERT-base with its published vocabulary of 30,522: 108,891,648 without the pooler, of which 2 x 768 are
  # segment embeddings that this tower folds into the positions.
  text = TextTowerConfig(vocab_size=30522 - 1, length=511, width=768, depth=12, heads=12, mlp_width=3072)
  tower = nnx.eval_shape(lambda: TextTower(text, rngs=nnx.Rngs(0)))
  expected = 30522 * 768 + 512 * 768 + 2 * 768 + 12 * _block(768, 3072)
  assert configs.parameters(tower) == expected == 108_891_648 - 2 * 768
  # AST with 128 bands, 1024 frames, 16 x 16 patches every 10, class and distillation token: 86,187,264.
  audio = TransformerTowerConfig(
      mel=MelConfig(window=600, hop=240, bands=128, fft_size=2048), seconds=10.24, patch_frames=16,
      patch_bands=16, stride_frames=10, stride_bands=10, width=768, depth=12, heads=12, mlp_width=3072,
      class_tokens=2)
  assert (audio.time_patches, audio.band_patches) == (101, 12)
  model = nnx.eval_shape(lambda: MuLan(MuLanConfig(audio, text), rngs=nnx.Rngs(0)))
  expected = 256 * 768 + 768 + (2 + 101 * 12 + 2) * 768 + 12 * _block(768, 3072) + 2 * 768
  assert configs.parameters(model.audio) == expected == 86_187_264
  assert configs.parameters(model) == 86_187_264 + 108_890_112 + 2 * 768 * 128 + 1
