"""What generation asks of trained networks; a workdir and an exported bundle both offer it.

Arrays go in and come out, so nothing here knows how a network is made. Results may be arrays of JAX or of NumPy.

Shapes: B batch, N samples, F frames, Q levels, L sequence length, T given positions, E dimensions of MuLan's space.
"""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import jax
import numpy as np

from musiclm_jax.specs import Stage, TokenSpec
from musiclm_jax.token_lm.draw import Numbers, Sampling

Array = jax.Array | np.ndarray


class Networks(Protocol):
  """The networks of one cascade.

  Attributes:
    stages: the token stages by name; which ones there are decides what can be generated.
    codec_spec: the acoustic tokens, of all levels.
    sample_rate, channels: of the codec's audio.
    mulan_rate, mulan_window, mulan_hop: the sample rate that MuLan hears, the samples of one window of it, and the
      distance between windows of a longer clip; 0 where there is no MuLan.
    semantic_rate: the sample rate that the semantic tokenizer hears; 0 where there is none.
    sampling: how each stage is sampled where nothing else is asked for.
    mulan_levels: how many first levels of the MuLan tokens a stage is shown then; one that is not named, the first.
    lineage: content hash of each network that makes tokens, by role.
    identity: one hash of all networks, for the provenance of what they generate.
  """

  stages: Mapping[str, Stage]
  codec_spec: TokenSpec
  sample_rate: int
  channels: int
  mulan_rate: int
  mulan_window: int
  mulan_hop: int
  semantic_rate: int
  sampling: Mapping[str, Sampling]
  mulan_levels: Mapping[str, int]
  lineage: Mapping[str, str]
  identity: str

  def text_ids(self, prompts: Sequence[str], name: str = 'prompt') -> np.ndarray:
    """Token ids of texts, int32 [B, L]; ValueError, with the `name`, for one that `Tokenizer.encode_prompt` refuses."""

  def embed_text(self, ids_BxL: Array) -> Array:
    """MuLan embeddings of texts, float32 [B, E] of length 1."""

  def expected_audio(self, text_BxE: Array) -> Array:
    """Where MuLan's tokenizer expects the clips of texts with these embeddings, float32 [B, E] of length 1."""

  def embed_window(self, audio_BxN: Array, length_B: Array) -> Array:
    """MuLan embeddings [B, E] of length 1 of clips of N = `mulan_window` samples at `mulan_rate`; the rest behind the
    first `length_B` samples is padding."""

  def mulan_tokens(self, audio_BxE: Array) -> Array:
    """Codes int32 [B, 1, Q] of the embeddings of clips."""

  def semantic_tokens(self, audio_BxN: Array, length_B: Array) -> Array:
    """Semantic tokens int32 [B, F, 1] of mono audio at `semantic_rate`; those behind `length_B` samples mean
    nothing."""

  def acoustic_tokens(self, audio_BxN: Array) -> Array:
    """Acoustic tokens int32 [B, F, Q] of whole frames of audio at `sample_rate`, which begins in silence."""

  def sample_rows(self, stage: str, rows_BxT: Array, null_rows_BxT: Array | None, positions_2xL: np.ndarray,
                  condition_length: int, keys_B: jax.Array, numbers: Numbers) -> Array:
    """Codes int32 [B, L - T] of a stage, as `token_lm.sample.sample_rows`."""

  def row_nats(self, stage: str, rows_BxL: Array, positions_2xL: np.ndarray, condition_length: int) -> Array:
    """Cross-entropy of each row given those before it, float32 [B, L], as `token_lm.sample.row_nats`."""

  def decode_state(self, batch: int) -> Any:
    """The state of a decoder whose stream begins in silence: a pytree."""

  def decode_step(self, codes_BxFxQ: Array, state: Any) -> tuple[Array, Any]:
    """Audio float32 [B, N] (or [B, N, channels]) of the next frames of a stream, from any number of first levels, and
    the state after them."""
