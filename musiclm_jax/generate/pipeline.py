"""Text to audio: MuLan tokens of the text, semantic, coarse and fine tokens, and the codec's decoder.

Shapes: B prompts, W windows, F frames, Q levels, N samples.
"""
from __future__ import annotations

from collections.abc import Mapping, Sequence
import dataclasses
import math
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from musiclm_jax import specs
from musiclm_jax.cascade import Cascade
from musiclm_jax.generate import windows
from musiclm_jax.generate.windows import Windows
from musiclm_jax.specs import Stage
from musiclm_jax.token_lm.sample import Sampling, sample
from musiclm_jax.token_lm.sequence import Layout
from musiclm_jax.training.checkpoint import Loaded

MAX_SECONDS = 600.0
# Temperatures of MusicLM (arXiv 2301.11325, section 4.1).
PAPER_SAMPLING = {'semantic': Sampling(1.0), 'coarse': Sampling(0.95), 'fine': Sampling(0.4)}


@dataclasses.dataclass(frozen=True)
class Settings:
  """Everything that decides a result beside the networks, the prompts and the seed.

  Attributes:
    seconds: length of the audio.
    sampling: by stage.
    mulan_levels: how many first levels of the MuLan tokens condition the stages. Tokens of a text agree with those of
      its audio at the first levels only; 0 is unconditional.
    overlap: share of a window that continues the one before, by stage; windows of the fine stage stand alone
      and are sampled side by side.
  """

  seconds: float = 10.0
  sampling: Mapping[str, Sampling] = dataclasses.field(default_factory=lambda: dict(PAPER_SAMPLING))
  mulan_levels: int = 1
  overlap: Mapping[str, float] = dataclasses.field(
      default_factory=lambda: {'semantic': 0.5, 'coarse': 0.5, 'fine': 0.0})

  def __post_init__(self):
    if not 0 < self.seconds <= MAX_SECONDS:
      raise ValueError(f'seconds must lie between 0 and {MAX_SECONDS:.0f}, found {self.seconds}')


@dataclasses.dataclass(frozen=True)
class Generated:
  """Audio float32 [B, N] in [-1, 1], the tokens it was decoded from, and how long it took."""

  audio_BxN: np.ndarray
  sample_rate: int
  tokens: dict[str, np.ndarray]
  wall_seconds: float


def text_tokens(cascade: Cascade, prompts: Sequence[str]) -> jax.Array:
  """MuLan tokens of texts, int32 [B, 1, Q]. Raises ValueError for a text that `Tokenizer.encode_prompt` refuses."""
  length = cascade.part('mulan').objective.mulan.text.length
  ids_BxL = np.stack([cascade.tokenizer.encode_prompt(p, length) for p in prompts])
  return cascade.function('mulan', 'text_tokens')(cascade.function('mulan', 'embed_text')(ids_BxL))


def generate(cascade: Cascade, prompts: Sequence[str], settings: Settings = Settings(), *, seed: int = 0) -> Generated:
  """Music for each prompt. The same seed, prompt and settings give the same audio in any batch of that prompt's
  place."""
  return from_mulan_tokens(cascade, text_tokens(cascade, prompts), settings, prompt_keys(seed, len(prompts)))


def prompt_keys(seed: int, count: int) -> jax.Array:
  """One key a prompt, from the seed and its place."""
  return jax.vmap(lambda i: jax.random.fold_in(jax.random.key(seed), i))(jnp.arange(count))


def from_mulan_tokens(cascade: Cascade, mulan_Bx1xQ: jax.Array, settings: Settings, keys_B: jax.Array) -> Generated:
  """The cascade from MuLan tokens on, one key an example."""
  begun = time.monotonic()
  plan = plan_windows(cascade, settings)
  streams: dict[str, jax.Array] = {'mulan': jnp.asarray(mulan_Bx1xQ)}
  keep = {'mulan': jnp.full((len(mulan_Bx1xQ),), settings.mulan_levels, jnp.int32)}
  acoustic = []
  for number, (name, plan_of_stage) in enumerate(plan.items()):
    loaded = cascade.stage(name)
    stage_keys = jax.vmap(lambda key, n=number: jax.random.fold_in(key, n))(keys_B)
    codes = run_stage(loaded, streams, stage_keys, settings.sampling[name], plan_of_stage, keep)
    spec = loaded.objective.stage.target
    if spec.feature == 'acoustic':
      acoustic.append(codes)
      # Levels so far, cut to what the next stage covers.
      frames = min(a.shape[1] for a in acoustic)
      streams['acoustic'] = jnp.concatenate([a[:, :frames] for a in acoustic], axis=-1)
    else:
      streams[spec.feature] = codes
  codec = cascade.part('codec').objective.token_spec
  frames = math.ceil(settings.seconds * codec.frame_rate - 1e-6)
  audio_BxN = np.asarray(cascade.function('codec', 'decode')(streams['acoustic'][:, :frames]))
  sample_rate = round(audio_BxN.shape[1] / frames * codec.frame_rate)
  audio_BxN = np.clip(audio_BxN[:, :specs.frames_in(settings.seconds, sample_rate)], -1, 1)
  return Generated(audio_BxN, sample_rate, jax.device_get(streams), time.monotonic() - begun)


def plan_windows(cascade: Cascade, settings: Settings) -> dict[str, Windows]:
  """Windows of each stage, planned backwards: each stage covers all that the next one needs."""
  needed, plan = windows.ticks(settings.seconds), {}
  for name in ('fine', 'coarse', 'semantic'):
    plan[name] = windows.cover(cascade.stage(name).objective.stage, needed, overlap=settings.overlap[name])
    needed = plan[name].total
  return dict(reversed(plan.items()))


def run_stage(loaded: Loaded, streams: Mapping[str, jax.Array], keys_B: jax.Array, sampling: Sampling, plan: Windows,
              keep: Mapping[str, jax.Array]) -> jax.Array:
  """The stage's target over all windows, int32 [B, F, Q]."""
  stage: Stage = loaded.objective.stage
  layout = Layout(stage, plan.window / specs.TICKS_PER_SECOND)
  keep = {name: levels for name, levels in keep.items() if name in {s.name for s in stage.conditions}}
  if plan.stride >= plan.window:
    return _side_by_side(loaded.model, layout, streams, keys_B, sampling, plan, keep)
  target, done = stage.target, None
  for number, start in enumerate(plan.starts):
    window_keys = jax.vmap(lambda key, n=number: jax.random.fold_in(key, n))(keys_B)
    given = _conditions(stage, streams, start, plan.window)
    first = windows.frame(start, target)
    prefix = None if done is None else done[:, first:]
    codes = sample(loaded.model, layout, given, window_keys, sampling, keep=keep, prefix_BxFxQ=prefix)
    done = codes if done is None else jnp.concatenate([done[:, :first], codes], axis=1)
  return done


def _side_by_side(model: Any, layout: Layout, streams, keys_B, sampling: Sampling, plan: Windows, keep) -> jax.Array:
  """Independent windows as one batch: as many sequential steps as one window needs."""
  parts = [_conditions(layout.stage, streams, start, plan.window) for start in plan.starts]
  given = jax.tree.map(lambda *x: jnp.concatenate(x), *parts)
  keys = jnp.concatenate([jax.vmap(lambda key, n=n: jax.random.fold_in(key, n))(keys_B) for n in range(plan.count)])
  keep = {name: jnp.tile(levels, plan.count) for name, levels in keep.items()}
  codes = sample(model, layout, given, keys, sampling, keep=keep)
  return jnp.concatenate(jnp.split(codes, plan.count), axis=1)


def _conditions(stage: Stage, streams: Mapping[str, jax.Array], start: int, window: int) -> dict[str, jax.Array]:
  """The window's part of each condition stream; streams without a frame rate whole."""
  given = {}
  for spec in stage.conditions:
    stream = streams[spec.feature]
    if spec.frame_rate:
      first = windows.frame(start, spec)
      stream = stream[:, first:first + windows.frame(window, spec)]
    given[spec.feature] = stream
  return given
