"""Sizes for the tests of the semantic network: 12 mel bands, two blocks a stack."""
from __future__ import annotations

from typing import Any

from flax import nnx
import jax
import numpy as np

from musiclm_jax.nn.conformer import ConformerConfig
from musiclm_jax.nn.spectral import MelConfig
from musiclm_jax.semantic.model import W2vBertConfig
from musiclm_jax.semantic.objective import W2vBertTraining

STACK = ConformerConfig(width=16, depth=2, heads=2, mlp_width=24, kernel=3)


def encoder(**fields) -> W2vBertConfig:
  return W2vBertConfig(**{
      'mel': MelConfig(window=480, hop=240, bands=12), 'channels': 3, 'contrastive': STACK, 'masked': STACK,
      'groups': 2, 'codes': 8, 'code_width': 12, **fields})


def training(**fields) -> W2vBertTraining:
  return W2vBertTraining(**{
      'encoder': encoder(), 'seconds': 0.8, 'mask_span': 4, 'negatives': 6, 'gumbel_steps': 100, **fields})


def batch(objective: Any, size: int = 4, seed: int = 0) -> dict[str, np.ndarray]:
  """Tones that change their pitch every 0.1 s, so that features differ within a clip."""
  rng = np.random.default_rng(seed)
  samples = objective.batch_spec(size)['audio'].shape[1]
  hz = np.repeat(rng.uniform(200, 6000, (size, samples // 2400 + 1)), 2400, axis=1)[:, :samples]
  audio = 0.3 * np.sin(2 * np.pi * np.cumsum(hz, axis=1) / 24000) + rng.normal(0, 1e-3, (size, samples))
  return {'audio': audio.astype(np.float32), 'slot': np.arange(size, dtype=np.int32)}


def split(model: nnx.Module) -> tuple[Any, Any, Any]:
  graphdef, params, buffers = nnx.split(model, nnx.Param, ...)
  return graphdef, nnx.to_pure_dict(params), nnx.to_pure_dict(buffers)


def started(objective: W2vBertTraining, seed: int = 0) -> nnx.Module:
  model = objective.model(nnx.Rngs(seed))
  found = objective.start(model, batch(objective), jax.random.key(0))  # sets the mel statistics too
  for name, value in found['quantizer']['logits'].items():
    getattr(model.quantizer.logits, name)[...] = value
  return model
