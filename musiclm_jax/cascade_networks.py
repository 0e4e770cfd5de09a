"""The trained networks of a workdir as generation asks for them (`generate.networks.Networks`)."""
from __future__ import annotations

from collections.abc import Sequence
import dataclasses
import functools
import hashlib
import json
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from musiclm_jax.cascade import Cascade, STAGES
from musiclm_jax.codec.model import CodecState, SoundStream
from musiclm_jax.mulan.model import MuLanConfig
from musiclm_jax.specs import Stage, TokenSpec
from musiclm_jax.token_lm.draw import Sampling, USUAL
from musiclm_jax.token_lm.sample import row_nats, sample_rows
from musiclm_jax.training import state as states


class CascadeNetworks:
  """Each network is loaded when it is first asked for; ValueError where a stage was trained on others' tokens."""

  def __init__(self, cascade: Cascade):
    self.cascade = cascade

  @functools.cached_property
  def stages(self) -> dict[str, Stage]:
    return {name: self.cascade.stage(name).objective.stage for name in STAGES if self.cascade.has(f'stage/{name}')}

  @property
  def codec_spec(self) -> TokenSpec:
    return self.cascade.token_spec('codec')

  @property
  def sample_rate(self) -> int:
    return self.cascade.part('codec').model.config.sample_rate

  @property
  def channels(self) -> int:
    return self.cascade.part('codec').model.config.channels

  @property
  def _mulan(self) -> MuLanConfig:
    return self.cascade.part('mulan').objective.mulan

  @property
  def mulan_rate(self) -> int:
    return self._mulan.audio.mel.sample_rate if self.cascade.has('mulan') else 0

  @property
  def mulan_window(self) -> int:
    return self._mulan.audio.window_samples if self.cascade.has('mulan') else 0

  @property
  def mulan_hop(self) -> int:
    return self._mulan.hop_samples if self.cascade.has('mulan') else 0

  @property
  def semantic_rate(self) -> int:
    return self.cascade.part('semantic').objective.encoder.mel.sample_rate if self.cascade.has('semantic') else 0

  @functools.cached_property
  def sampling(self) -> dict[str, Sampling]:
    """`draw.USUAL`, but no guidance for a stage that never saw an example without its conditions."""
    usual = {name: USUAL.get(name, Sampling()) for name in self.stages}
    return {name: sampling if self.cascade.stage(name).objective.condition_dropout
            else dataclasses.replace(sampling, guidance=1.0) for name, sampling in usual.items()}

  @functools.cached_property
  def mulan_levels(self) -> dict[str, int]:
    """All, where a stage has always seen all. To others the finer levels of a text are no help: the first."""
    return {name: spec.levels for name, stage in self.stages.items() for spec in stage.conditions
            if spec.name == 'mulan' and 'mulan' not in self.cascade.stage(name).objective.truncate}

  @property
  def lineage(self) -> dict[str, str]:
    return self.cascade.lineage

  @functools.cached_property
  def identity(self) -> str:
    """Sixteen hex digits that change whenever any network does."""
    stages = {f'stage/{name}': self.cascade.stage(name).content_hash for name in self.stages}
    return hashlib.sha256(json.dumps({**self.lineage, **stages}, sort_keys=True).encode()).hexdigest()[:16]

  def text_ids(self, prompts: Sequence[str], name: str = 'prompt') -> np.ndarray:
    length = self._mulan.text.length
    return np.stack([self.cascade.tokenizer.encode_prompt(prompt, length, name) for prompt in prompts])

  def embed_text(self, ids_BxL):
    return self.cascade.function('mulan', 'embed_text')(ids_BxL)

  def expected_audio(self, text_BxE):
    return self.cascade.function('mulan', 'expected_audio')(text_BxE)

  def embed_window(self, audio_BxN, length_B):
    return self.cascade.function('mulan', 'embed_audio')(audio_BxN, length_B)

  def mulan_tokens(self, audio_BxE):
    return self.cascade.function('mulan', 'tokens')(audio_BxE)

  def semantic_tokens(self, audio_BxN, length_B):
    return self.cascade.function('semantic', 'tokens')(audio_BxN, length_B)

  def acoustic_tokens(self, audio_BxN):
    return self.cascade.function('codec', 'encode')(audio_BxN)

  def sample_rows(self, stage: str, *arrays):
    return self._stage_function(stage, sample_rows)(*arrays)

  def row_nats(self, stage: str, *arrays):
    return self._stage_function(stage, row_nats)(*arrays)

  @functools.cache  # noqa: B019
  def _stage_function(self, stage: str, function):
    model = self.cascade.stage(stage).model
    if function is sample_rows and jax.default_backend() != 'cpu':  # half as much to read in each step
      graphdef, state = nnx.split(model)
      model = nnx.merge(graphdef, states.cast(state, jnp.bfloat16))
    return states.compiled(model, function)

  def decode_state(self, batch: int) -> Any:
    return self.cascade.part('codec').model.init_state(batch).decoder

  def decode_step(self, codes_BxFxQ, state):
    return self.cascade.function('codec', decode_step)(codes_BxFxQ, state)


def decode_step(codec: SoundStream, codes_BxFxQ, state: Any):
  """`SoundStream.decode_step` without the encoder's half of the state."""
  audio, after = codec.decode_step(codes_BxFxQ, CodecState((), state))
  return audio, after.decoder
