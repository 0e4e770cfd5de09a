"""Noise for a codec that also denoises (SoundStream, arXiv 2107.03312, section III-F).

B batch, N samples (of all channels).
"""
from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from musiclm_jax import axes


class Noisy(NamedTuple):
  """What the codec hears, what it is to make of it, and whether it was asked to denoise.

  Attributes:
    heard, target: in the shape of the music.
    denoise: bool [B].
  """

  heard_BxN: jax.Array
  target_BxN: jax.Array
  denoise_B: jax.Array


def add_noise(music_BxN: jax.Array, noise_BxN: jax.Array, key: jax.Array, slot_B: jax.Array, *, noisy_share: float,
              gains_db: tuple[float, float]) -> Noisy:
  """Noise in `noisy_share` of the examples, and every other example to be denoised, with or without noise in it.

  The noise is scaled to the peak of the music, then by a gain in decibels that is drawn evenly between `gains_db`: the
  paper's mixing of peak-normalised crops. The target is the music where the example is to be denoised, else what is
  heard. So music without noise is to be left as it is, whatever is asked for.
  """

  def draw(example_key):
    noisy_key, denoise_key, gain_key = jax.random.split(example_key, 3)
    return (jax.random.uniform(noisy_key) < noisy_share, jax.random.bernoulli(denoise_key),
            jax.random.uniform(gain_key, minval=gains_db[0], maxval=gains_db[1]))

  noisy_B, denoise_B, gain_B = jax.vmap(draw)(axes.example_keys(key, slot_B))
  rows = lambda x_B: x_B.reshape(-1, *(1,) * (music_BxN.ndim - 1))
  peak_B = lambda x: jnp.max(jnp.abs(x.reshape(x.shape[0], -1)), axis=-1)
  scale_B = peak_B(music_BxN) / jnp.maximum(peak_B(noise_BxN), 1e-6) * 10 ** (gain_B / 20)
  heard_BxN = music_BxN + rows(jnp.where(noisy_B, scale_B, 0.0)) * noise_BxN
  return Noisy(heard_BxN, jnp.where(rows(denoise_B), music_BxN, heard_BxN), denoise_B)
