"""The residual audio tower: its size, that examples are independent, and what lies behind a clip."""
from __future__ import annotations

import dataclasses

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from musiclm_jax.mulan import objective
from musiclm_jax.mulan.resnet import ResNetTower, ResNetTowerConfig
from musiclm_jax.nn.spectral import MelConfig
from tests.mulan import configs

SMALL = ResNetTowerConfig(
    mel=MelConfig(window=480, hop=240, bands=16), seconds=0.64, channels=4, blocks=(1, 2), groups=2,
    time_masks=1, time_mask_frames=8)


@pytest.fixture(scope='module')
def tower():
  made = ResNetTower(SMALL, rngs=nnx.Rngs(0))
  for path, module in nnx.iter_modules(made):  # blocks begin as their shortcuts; these are further
    if path and path[-1] == 'norm':
      module.scale[...] = jnp.linspace(0.5, 1.5, module.scale[...].size)
  return made


@pytest.fixture(scope='module')
def mel():
  return jax.random.normal(jax.random.key(0), (3, SMALL.window_frames, SMALL.mel.bands))


def test_at_the_papers_size_it_is_resnet_50():
  config = ResNetTowerConfig(mel=MelConfig(window=600, hop=240, bands=64, fft_size=1024), seconds=10.0)
  assert (config.window_frames, config.width) == (1000, 2048)
  shapes = nnx.eval_shape(lambda: config.tower(nnx.Rngs(0)))
  # `ResNetModel` of transformers has 23,508,032, with three channels in its first convolution.
  assert configs.parameters(shapes) == 23_508_032 - 2 * 7 * 7 * 64
  out = jax.eval_shape(lambda m, x: m.from_spectrogram(x), shapes, jax.ShapeDtypeStruct((2, 1000, 64), jnp.float32))
  assert out.shape == (2, 2048)


def test_an_example_does_not_depend_on_those_beside_it(tower, mel):
  together = tower.from_spectrogram(mel)
  alone = jnp.concatenate([tower.from_spectrogram(row[None]) for row in mel])
  np.testing.assert_allclose(together, alone, atol=1e-5)
  assert np.abs(together[0] - together[1]).max() > 1e-2


def test_what_lies_behind_a_clip_does_not_count(tower, mel):
  length_B = jnp.array([1, 20, SMALL.window_frames]) * SMALL.mel.hop
  behind_BxF = jnp.arange(SMALL.window_frames) >= jnp.array([1, 20, SMALL.window_frames])[:, None]
  expected = tower.from_spectrogram(mel, length_B)
  np.testing.assert_allclose(tower.from_spectrogram(jnp.where(behind_BxF[..., None], 7.0, mel), length_B), expected,
                             atol=1e-5)
  changed = tower.from_spectrogram(jnp.where(behind_BxF[..., None], mel, mel + 1.0 * jnp.arange(16)), length_B)
  assert (np.abs(changed - expected).max(axis=1) > 1e-3).all()
  # All frames valid is the same as no length.
  np.testing.assert_allclose(expected[2], tower.from_spectrogram(mel)[2], atol=1e-5)


def test_training_reaches_every_parameter_and_chunks_change_nothing():
  base = configs.config()
  audio = dataclasses.replace(SMALL, time_masks=0)
  cfg = dataclasses.replace(base, audio=audio)
  given = {name: jnp.asarray(x) for name, x in configs.batch(cfg, 4).items()}

  def gradient(chunks):
    training = objective.MuLanTraining(cfg, chunks=chunks)
    graph, params, rest = nnx.split(training.model(nnx.Rngs(0)), nnx.Param, ...)
    loss = lambda p: training.loss(nnx.merge(graph, p, rest), given, jax.random.key(0), training=True)[0]
    value, grads = jax.jit(jax.value_and_grad(loss))(params)
    return value, nnx.to_pure_dict(grads)

  (loss, grads), (chunked_loss, chunked) = gradient(1), gradient(2)
  np.testing.assert_allclose(loss, chunked_loss, rtol=1e-5)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), grads, chunked)
  silent = [jax.tree_util.keystr(path) for path, g in jax.tree_util.tree_leaves_with_path(grads['audio'])
            if not np.abs(g).max() > 0]
  # Where a block begins as its shortcut, its own convolutions wait for the first step.
  assert all("['narrow']" in name or "['middle']" in name or "['widen']['convolution']" in name for name in silent)
  assert any("['widen']['norm']['scale']" in jax.tree_util.keystr(path)
             for path, g in jax.tree_util.tree_leaves_with_path(grads['audio']) if np.abs(g).max() > 0)


def test_impossible_sizes_are_refused():
  with pytest.raises(ValueError, match='6 channels cannot be split into 4 groups'):
    dataclasses.replace(SMALL, channels=6, groups=4)
  with pytest.raises(ValueError, match='every stage needs a block'):
    dataclasses.replace(SMALL, blocks=(1, 0))
