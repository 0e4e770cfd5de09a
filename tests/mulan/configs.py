"""Sizes for the tests of MuLan: a window of 0.4 s, 6 x 2 overlapping patches."""
from __future__ import annotations

import dataclasses

from flax import nnx
import jax
import numpy as np

from musiclm_jax.mulan.audio_tower import TransformerTowerConfig
from musiclm_jax.mulan.model import MuLan, MuLanConfig
from musiclm_jax.mulan.text_tower import TextTowerConfig
from musiclm_jax.nn.spectral import MelConfig


def config(audio: dict | None = None, text: dict | None = None, **fields) -> MuLanConfig:
  mel = MelConfig(window=480, hop=480, bands=12)
  audio_config = TransformerTowerConfig(
      mel=mel, seconds=0.4, patch_frames=5, patch_bands=8, stride_frames=3, stride_bands=4, width=16, depth=2,
      heads=2, mlp_width=32)
  text_config = TextTowerConfig(vocab_size=50, length=7, width=16, depth=2, heads=2, mlp_width=32)
  return MuLanConfig(
      dataclasses.replace(audio_config, **(audio or {})), dataclasses.replace(text_config, **(text or {})),
      **{'embedding': 8, 'hop_seconds': 0.1, **fields})


def model(cfg: MuLanConfig, seed: int = 0) -> MuLan:
  return MuLan(cfg, rngs=nnx.Rngs(seed))


def batch(cfg: MuLanConfig, size: int = 6, seed: int = 0, samples: int = 0) -> dict[str, np.ndarray]:
  rng = np.random.default_rng(seed)
  length = rng.integers(1, cfg.text.length + 1, size)
  text = rng.integers(1, cfg.text.vocab_size, (size, cfg.text.length))
  return {
      'audio': rng.normal(0, 0.1, (size, samples or cfg.audio.window_samples)).astype(np.float32),
      'text': np.where(np.arange(cfg.text.length) < length[:, None], text, 0).astype(np.int32),
      'slot': np.arange(size, dtype=np.int32),
  }


def parameters(module: nnx.Module) -> int:
  return sum(x.size for x in jax.tree.leaves(nnx.to_pure_dict(nnx.state(module, nnx.Param))))
