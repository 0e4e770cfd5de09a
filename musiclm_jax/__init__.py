"""MusicLM and its family in JAX: train, sample, evaluate and serve text-to-music models."""

from __future__ import annotations

import os
import typing

if typing.TYPE_CHECKING:
  from musiclm_jax.serving.bundle import Bundle

__version__ = '0.1.0'


def load(path: str | os.PathLike) -> Bundle:
  """The bundle that `musiclm export` wrote, checked and ready: `load(path).generate('slow piano', seconds=10, seed=7)`.

  Raises FileNotFoundError where there is nothing at `path`, ValueError where it is not a whole bundle.
  """
  from musiclm_jax.serving.bundle import Bundle  # now, so that importing the package imports nothing else
  return Bundle(path)
