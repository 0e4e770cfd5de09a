"""A cascade from its bundle: the exported functions behind `generate.networks.Networks`, and music from them.

Only JAX and the base install are needed. Shapes: B batch, N samples, F frames, Q levels, L sequence length, T given
positions, E dimensions of MuLan's space.
"""
from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
import dataclasses
import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from musiclm_jax import specs
from musiclm_jax.generate.modes import music, Request
from musiclm_jax.generate.networks import Array
from musiclm_jax.generate.pipeline import adjusted, Settings
from musiclm_jax.generate.prompts import Prompt
from musiclm_jax.serving import weights
from musiclm_jax.serving.bundle_format import CARD, Files, function_file, MANIFEST, SPECS, VOCABULARY
from musiclm_jax.serving.program import Program
from musiclm_jax.specs import Stage, TokenSpec
from musiclm_jax.text.tokenizer import Tokenizer
from musiclm_jax.token_lm.draw import Numbers, Sampling

CODEC, SEMANTIC, MULAN, STAGE = 'codec', 'semantic', 'mulan', '{}_lm'
FUNCTIONS = {CODEC: {'encode', 'decode', 'decode_step'}, SEMANTIC: {'tokens'},
             MULAN: {'embed_text', 'embed_window', 'expected_audio', 'tokens'},
             STAGE: {'sample', 'sample_guided', 'row_nats'}}


@dataclasses.dataclass(frozen=True)
class BundleSpecs:
  """`specs.json`: the attributes of `generate.networks.Networks`, and how many tokens the text tower reads."""

  stages: Mapping[str, Stage]
  codec_spec: TokenSpec
  sample_rate: int
  channels: int
  mulan_rate: int
  mulan_window: int
  mulan_hop: int
  semantic_rate: int
  text_length: int
  mulan_levels: Mapping[str, int] = dataclasses.field(default_factory=dict)

  @property
  def functions(self) -> dict[str, set[str]]:
    """Names of the functions of each network that a bundle with these specs has."""
    found = {CODEC: FUNCTIONS[CODEC], **{STAGE.format(name): FUNCTIONS[STAGE] for name in self.stages}}
    found |= {SEMANTIC: FUNCTIONS[SEMANTIC]} if self.semantic_rate else {}
    return found | ({MULAN: FUNCTIONS[MULAN]} if self.mulan_rate else {})


class Bundle:
  """What `musiclm export` wrote, checked and ready. `musiclm_jax.load` makes one.

  Attributes: those of `generate.networks.Networks`, and
    manifest: licence, lineage, date and checksums.
    card: the model card.
    sampling: of each stage, where nothing else is asked for.
  """

  def __init__(self, path: str | os.PathLike):
    """Raises FileNotFoundError where there is nothing, ValueError, in one line, where it is not a whole bundle."""
    files = Files(path)
    self.path, self.manifest, self.identity = files.path, files.manifest, files.manifest.identity
    with files.errors():
      self.card = files.read(CARD).decode()
      self.tokenizer = Tokenizer(bytes(files.read(VOCABULARY)))
      self.sampling = _read_sampling(files.manifest.defaults)
      found = _read_specs(files.read(SPECS))
      if self.sampling.keys() != found.stages.keys():
        raise ValueError(f'the defaults in its {MANIFEST} are not those of the stages in its {SPECS}; do not use it')
      self._read_networks(files, found)
    self._text_length = found.text_length
    self.stages, self.codec_spec = found.stages, found.codec_spec
    self.sample_rate, self.channels, self.semantic_rate = found.sample_rate, found.channels, found.semantic_rate
    self.mulan_rate, self.mulan_window, self.mulan_hop = found.mulan_rate, found.mulan_window, found.mulan_hop
    self.mulan_levels = found.mulan_levels

  def _read_networks(self, files: Files, found: BundleSpecs) -> None:
    self._programs: dict[str, Program] = {}
    self._weights: dict[str, dict[str, jax.Array]] = {}
    there, wanted = files.manifest.functions, found.functions
    if {network: set(names) for network, names in there.items()} != wanted:
      raise ValueError('its functions are not those of the networks in its specs.json; do not use it')
    for network, names in there.items():
      programs = {name: Program(file := function_file(network, name), files.read(file)) for name in names}
      taken = programs[names[0]].weights
      if any(program.weights != taken for program in programs.values()):
        raise ValueError(f'the functions of {network} take different weights; do not use it')
      arrays = weights.read(files, network, taken)
      self._weights[network] = {name: jnp.asarray(arrays.pop(name)) for name in list(arrays)}
      self._programs |= {f'{network}.{name}': program for name, program in programs.items()}

  def generate(self, prompt: str | Request = Request(), *, seconds: float = 10.0, seed: int = 0,
               temperature: float = 1.0, guidance: float | None = None, **more: Any) -> np.ndarray:
    """Music, float32 [N] in [-1, 1] at `sample_rate`: what `musiclm generate` makes of the same prompt and seed.

    Args:
      prompt: a text, or any other `musiclm_jax.generate.modes.Request` (clips, mixtures, stories, continuations, gaps).
      seconds: of what is new. temperature: multiplies that of each stage. guidance: how strongly the prompt is
        followed; 1 is plain sampling.
      more: other fields of `musiclm_jax.generate.pipeline.Settings`.

    Raises ValueError for what cannot be done.
    """
    return np.concatenate(list(self.stream(prompt, seconds=seconds, seed=seed, temperature=temperature,
                                           guidance=guidance, **more)))

  def stream(self, prompt: str | Request = Request(), *, seconds: float = 10.0, seed: int = 0, temperature: float = 1.0,
             guidance: float | None = None, **more: Any) -> Iterator[np.ndarray]:
    """What `generate` returns, in blocks while later ones are still to come; `block_seconds` says how long they are."""
    request = prompt if isinstance(prompt, Request) else Request((Prompt(text=prompt),))
    return music(self, request, Settings(seconds, adjusted(self, temperature, guidance), **more), seed=seed)

  @property
  def lineage(self) -> dict[str, str]:
    return {name: content for name, content in self.manifest.lineage.items() if name in (CODEC, SEMANTIC, MULAN)}

  def _call(self, network: str, function: str, *arguments: Any) -> Any:
    if network not in self._weights:
      raise ValueError(f'the bundle {self.path} has no {network}, which this needs')
    return self._programs[f'{network}.{function}'](self._weights[network], *arguments)

  def text_ids(self, prompts: Sequence[str], name: str = 'prompt') -> np.ndarray:
    return np.stack([self.tokenizer.encode_prompt(prompt, self._text_length, name) for prompt in prompts])

  def embed_text(self, ids_BxL: Array) -> Array:
    return self._call(MULAN, 'embed_text', ids_BxL)

  def expected_audio(self, text_BxE: Array) -> Array:
    return self._call(MULAN, 'expected_audio', text_BxE)

  def embed_window(self, audio_BxN: Array, length_B: Array) -> Array:
    return self._call(MULAN, 'embed_window', audio_BxN, jnp.asarray(length_B, jnp.int32))

  def mulan_tokens(self, audio_BxE: Array) -> Array:
    return self._call(MULAN, 'tokens', audio_BxE)

  def semantic_tokens(self, audio_BxN: Array, length_B: Array) -> Array:
    return self._call(SEMANTIC, 'tokens', audio_BxN, jnp.asarray(length_B, jnp.int32))

  def acoustic_tokens(self, audio_BxN: Array) -> Array:
    return self._call(CODEC, 'encode', audio_BxN)

  def sample_rows(self, stage: str, rows_BxT: Array, null_rows_BxT: Array | None, positions_2xL: np.ndarray,
                  condition_length: int, keys_B: jax.Array, numbers: Numbers) -> Array:
    rows = (rows_BxT,) if null_rows_BxT is None else (rows_BxT, null_rows_BxT)
    return self._call(STAGE.format(stage), 'sample' if null_rows_BxT is None else 'sample_guided', *rows,
                      positions_2xL, jnp.int32(condition_length), jax.random.key_data(keys_B), tuple(numbers))

  def row_nats(self, stage: str, rows_BxL: Array, positions_2xL: np.ndarray, condition_length: int) -> Array:
    return self._call(STAGE.format(stage), 'row_nats', rows_BxL, positions_2xL, jnp.int32(condition_length))

  def decode(self, codes_BxFxQ: Array) -> Array:
    """Audio float32 [B, N] of whole streams, from any number of first levels."""
    return self._call(CODEC, 'decode', codes_BxFxQ)

  def decode_state(self, batch: int) -> Any:
    _, state = self._programs[f'{CODEC}.decode_step'].arguments
    return jax.tree.map(lambda x: jnp.zeros((batch, *x.shape[1:]), x.dtype), state)

  def decode_step(self, codes_BxFxQ: Array, state: Any) -> tuple[Array, Any]:
    return self._call(CODEC, 'decode_step', codes_BxFxQ, state)


def _read_sampling(defaults: Mapping[str, Mapping[str, float]]) -> dict[str, Sampling]:
  try:
    return {name: Sampling(**numbers) for name, numbers in defaults.items()}
  except TypeError as error:
    raise ValueError(f'{MANIFEST} has defaults that this version does not know: {error}') from error


def _read_specs(content: bytearray) -> BundleSpecs:
  try:
    found = specs.from_json(content.decode(), kinds=(BundleSpecs, Stage, TokenSpec))
    assert isinstance(found, BundleSpecs)
    assert all(isinstance(stage, Stage) and len(stage.streams) for stage in found.stages.values())
    assert isinstance(found.codec_spec, TokenSpec)
    sizes = [found.mulan_rate, found.mulan_window, found.mulan_hop, found.semantic_rate, found.text_length]
    assert all(type(size) is int and size >= 0 for size in sizes) and (all(sizes[:3]) or not any(sizes[:3]))
    assert all(type(size) is int and size > 0 for size in (found.sample_rate, found.channels))
    for name, levels in found.mulan_levels.items():
      assert type(levels) is int and 0 <= levels <= max(spec.levels for spec in found.stages[name].conditions)
  except Exception as error:  # of many kinds: the content may be anything
    raise ValueError(f'{SPECS} cannot be read: it is of another version of musiclm_jax, or damaged; export it again'
                     ) from error
  return found
