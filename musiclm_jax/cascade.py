"""The trained networks of one workdir as a whole: where each one lies, and that they belong together."""
from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
import functools
import os
import pathlib
from typing import Any

import jax.numpy as jnp
import numpy as np

from musiclm_jax import specs
from musiclm_jax.mulan.model import VOCABULARY_ASSET
from musiclm_jax.nn.quantize import perplexity
from musiclm_jax.text.tokenizer import Tokenizer
from musiclm_jax.training import checkpoint, state as states
from musiclm_jax.training.checkpoint import Loaded

TOKENIZERS = {'codec': 'codec', 'semantic': 'semantic_tokens', 'mulan': 'mulan_tokens'}
STAGES = {'semantic': 'semantic_lm', 'coarse': 'coarse_lm', 'fine': 'fine_lm'}


class Cascade:
  """Lazily loaded parts of a workdir, each in the folder that `TOKENIZERS` and `STAGES` name.

  Args:
    workdir: of a quickstart, or any folder with those names in it.
    places: other folders for some parts, by role ("codec", "semantic", "mulan", "stage/coarse").
  """

  def __init__(self, workdir: str | os.PathLike, places: Mapping[str, str | os.PathLike] | None = None):
    root = pathlib.Path(workdir)
    self.places = {role: root / name for role, name in TOKENIZERS.items()}
    self.places |= {f'stage/{role}': root / name for role, name in STAGES.items()}
    self.places |= {role: pathlib.Path(place) for role, place in (places or {}).items() if place}

  def has(self, role: str) -> bool:
    """Whether it was trained."""
    return checkpoint.latest_step(self.places[role]) is not None

  @functools.cache
  def part(self, role: str) -> Loaded:
    """Raises FileNotFoundError where it was not trained yet."""
    return checkpoint.load(self.places[role])

  @functools.cache
  def function(self, role: str, method: str | Callable[..., Any], *, parallel: bool = False) -> Callable[..., Any]:
    """A method of the network, or a function `(model, *arrays)`, compiled; `parallel` splits the rows of its arguments
    over this process's devices."""
    return states.compiled(self.part(role).model, method, parallel=parallel)

  @property
  def lineage(self) -> dict[str, str]:
    """Content hash of each trained network that makes tokens."""
    return {role: self.part(role).content_hash for role in TOKENIZERS if self.has(role)}

  def networks(self, roles: Iterable[str] = tuple(TOKENIZERS)) -> dict[str, dict[str, Any]]:
    """What made the networks that make tokens, by role, and how evenly each uses its own codes."""
    return {role: self._network(role) for role in roles}

  def _network(self, role: str) -> dict[str, Any]:
    loaded = self.part(role)
    used_Q = perplexity(jnp.asarray(loaded.buffers['quantizer']['count']))
    return {'feature': self.token_spec(role).feature, 'content': loaded.content_hash, 'step': loaded.step,
            'made_with': loaded.made_with, 'perplexity': [round(float(p), 1) for p in used_Q]}

  def token_spec(self, role: str) -> specs.TokenSpec:
    return self.part(role).objective.token_spec

  @functools.cached_property
  def tokenizer(self) -> Tokenizer:
    """The text tokenizer that MuLan was trained with."""
    return Tokenizer(self.part('mulan').assets[VOCABULARY_ASSET])

  def stage(self, name: str) -> Loaded:
    """A token stage; ValueError where it was trained on tokens of other networks than those in this workdir."""
    loaded = self.part(f'stage/{name}')
    for role, there in loaded.lineage.items():
      here = self.lineage.get(role, there)
      if there != here:
        raise ValueError(f'the {name} stage in {self.places[f"stage/{name}"]} was trained on tokens of {role} {there}, '
                         f'but {self.places[role]} is {here}: extract again and train the stage on those tokens')
    if loaded.objective.points and self.has('mulan'):
      ours, theirs = loaded.buffers['mulan']['codebook'], self.part('mulan').buffers['quantizer']['codebook']
      if not np.array_equal(ours, theirs):
        raise ValueError(f'the {name} stage in {self.places[f"stage/{name}"]} hears points that are not those of '
                         f'{self.places["mulan"]}: train it again with --gin_file token_lm/points.gin')
    return loaded
