"""Networks with real, untrained stages, and a codec and a MuLan that are simple functions: for tests of generation."""
from __future__ import annotations

from collections.abc import Mapping
import functools

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from musiclm_jax.mulan.model import unit
from musiclm_jax.nn.transformer import TransformerConfig
from musiclm_jax.specs import Stage, TokenSpec
from musiclm_jax.text.tokenizer import Tokenizer
from musiclm_jax.token_lm.draw import USUAL
from musiclm_jax.token_lm.model import TokenLM
from musiclm_jax.token_lm.sample import row_nats, sample_rows
from musiclm_jax.training import state as states

MULAN, SEMANTIC = TokenSpec('mulan', 8, 12), TokenSpec('semantic', 8, 1, 25)
ACOUSTIC = TokenSpec('acoustic', 8, 6, 50)
COARSE, FINE = ACOUSTIC.part('coarse', 0, 2), ACOUSTIC.part('fine', 2, 4)
STAGES = {'semantic': Stage('semantic', (MULAN,), SEMANTIC, 1.0),
          'coarse': Stage('coarse', (MULAN, SEMANTIC), COARSE, 0.4),
          'fine': Stage('fine', (COARSE,), FINE, 0.2)}
WITHOUT_SEMANTIC = {'coarse': Stage('coarse', (MULAN,), COARSE, 0.4), 'fine': STAGES['fine']}
WITHOUT_MULAN = {'semantic': Stage('semantic', (), SEMANTIC, 1.0),
                 'coarse': Stage('coarse', (SEMANTIC,), COARSE, 0.4), 'fine': STAGES['fine']}
RATE, STRIDE = 24000, 480


class StandIn:
  """As `generate.networks.Networks`.

  The codec writes its codes as samples, smoothed from frame to frame by a state. MuLan hears the mean of eight parts
  of a window. Semantic tokens count the loudness.
  """

  tokenizer = Tokenizer.load()
  codec_spec, sample_rate, channels = ACOUSTIC, RATE, 1
  semantic_rate, lineage, identity = RATE, {'codec': 'c0dec'}, 'f00d'

  def __init__(self, stages: Mapping[str, Stage] = STAGES, *, mulan: bool = True, sample_rate: int = RATE):
    self.stages, self.sample_rate, self.semantic_rate = dict(stages), sample_rate, sample_rate
    self.mulan_rate = sample_rate if mulan else 0
    self.mulan_window, self.mulan_hop = self.mulan_rate // 2, self.mulan_rate // 4
    self.sampling, self.mulan_levels = {name: USUAL[name] for name in stages}, {}
    self.sampled: list[tuple[str, int]] = []

  @functools.cache  # noqa: B019
  def model(self, name: str) -> TokenLM:
    config = TransformerConfig(width=16, depth=2, heads=2, mlp_width=16)
    return TokenLM(self.stages[name], config, rngs=nnx.Rngs(len(name)))

  def text_ids(self, prompts, name='prompt'):
    return np.stack([self.tokenizer.encode_prompt(p, 24, name) for p in prompts])

  def embed_text(self, ids_BxL):
    return unit(jnp.sin(jnp.asarray(ids_BxL, jnp.float32)[:, :8] + 0.1 * jnp.arange(8)))

  def expected_audio(self, text_BxE):
    return unit(text_BxE + 0.25)

  def embed_window(self, audio_BxN, length_B):
    heard = jnp.arange(audio_BxN.shape[1]) < jnp.asarray(length_B)[:, None]
    parts = jnp.where(heard, audio_BxN, 0).reshape(audio_BxN.shape[0], 8, -1)
    return unit(parts.mean(-1) + parts.std(-1) + 1e-3)

  def mulan_tokens(self, audio_BxE):
    scaled = jnp.asarray(audio_BxE)[:, None] * jnp.arange(1.0, 13.0)[:, None]
    return (jnp.abs(scaled).sum(-1) * 7).astype(jnp.int32)[:, None] % 8

  def semantic_tokens(self, audio_BxN, length_B):
    del length_B
    frames = audio_BxN.reshape(audio_BxN.shape[0], -1, self.semantic_rate // 25)
    return (jnp.abs(frames).mean(-1) * 40).astype(jnp.int32)[..., None] % 8

  def acoustic_tokens(self, audio_BxN):
    frames = audio_BxN.reshape(audio_BxN.shape[0], -1, self.sample_rate // 50, 1)
    return (jnp.abs(frames).mean(2) * 10 * jnp.arange(1, 7)).astype(jnp.int32) % 8

  def sample_rows(self, stage, *arrays):
    self.sampled.append((stage, arrays[0].shape[0]))
    return states.compiled(self.model(stage), sample_rows)(*arrays)

  def row_nats(self, stage, *arrays):
    return states.compiled(self.model(stage), row_nats)(*arrays)

  def decode_state(self, batch):
    return np.zeros((batch, 1), np.float32)

  def decode_step(self, codes_BxFxQ, state):
    level_BxF = np.asarray(codes_BxFxQ).sum(-1) / 64
    before_BxF = np.concatenate([state, level_BxF[:, :-1]], axis=1)
    audio = np.repeat((level_BxF + before_BxF) / 2, self.sample_rate // 50, axis=1)
    return audio.astype(np.float32), level_BxF[:, -1:].astype(np.float32)


def keys(count: int, seed: int = 0) -> jax.Array:
  return jax.random.split(jax.random.key(seed), count)
