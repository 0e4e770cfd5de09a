"""MuLan tokens: residual codes of the joint embedding (arXiv 2301.11325, section 3.1).

The same codes stand for a clip (in training) and for a text (in generation). They are fitted on frozen
embeddings, level after level, by k-means on what the levels before left over; `accumulate` runs the passes.
A text and its clip lie apart by more than the finer codes do, so texts are first moved to where least squares
expects their clips: they agree at more levels then, and nothing changes for clips.

B batch, N rows, M rows of a sample, V views of a row (audio, text), E dimensions, Q levels, K codes.
"""
from __future__ import annotations

import dataclasses
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp

from musiclm_jax.mulan.model import MuLan, MuLanConfig, unit
from musiclm_jax.nn import quantize
from musiclm_jax.objective import Batch, Fit
from musiclm_jax.specs import TokenSpec

_ALIGN = 'align'
# Of the mean variance of texts: keeps directions in which texts hardly differ from being blown up.
_RIDGE = 1e-3


class MuLanTokenizer(nnx.Module):
  """A frozen MuLan and the residual quantizer of its embeddings.

  `text_map` [E, E] and `text_shift` [E] move the embeddings of texts, before they are scaled back to length 1, to those
  that are expected of their clips; without that part of the fit they leave them as they are.
  """

  def __init__(self, config: MuLanConfig, levels: int, codebook_size: int, *, rngs: nnx.Rngs):
    self.encoder = MuLan(config, rngs=rngs)
    self.quantizer = quantize.ResidualQuantizer(levels, codebook_size, config.embedding, rngs=rngs)
    self.text_map = nnx.Variable(jnp.eye(config.embedding), axes=(None, None))
    self.text_shift = nnx.Variable(jnp.zeros((config.embedding,)), axes=(None,))

  def embed_audio(self, audio_BxN: jax.Array, length_B: jax.Array | None = None) -> jax.Array:
    """As `MuLan.embed_audio`: [B, E] of length 1."""
    return self.encoder.embed_audio(audio_BxN, length_B)

  def embed_text(self, text_BxL: jax.Array) -> jax.Array:
    """As `MuLan.embed_text`: [B, E] of length 1."""
    return self.encoder.embed_text(text_BxL)

  def tokens(self, audio_BxE: jax.Array) -> jax.Array:
    """Codes int32 [B, 1, Q] of the embeddings of clips."""
    return self.quantizer.encode(audio_BxE)[:, None]

  def text_tokens(self, text_BxE: jax.Array) -> jax.Array:
    """Codes int32 [B, 1, Q] of the embeddings of texts, which are moved to their clips first."""
    return self.tokens(self.expected_audio(text_BxE))

  def expected_audio(self, text_BxE: jax.Array) -> jax.Array:
    """Where the clips of texts with these embeddings are expected: [B, E] of length 1."""
    return _moved(text_BxE, self.text_map[...], self.text_shift[...])


@dataclasses.dataclass(frozen=True)
class MuLanTokens(Fit):
  """Fits the codes of a trained MuLan on a corpus.

  Attributes:
    seconds: length of the clips it is fitted on; longer than the tower's window means averaged windows.
    iterations: Lloyd passes over the corpus a level.
    fit_on: "audio" as in the paper, or "both": each clip and its text count one row each.
    align: whether texts are moved to their clips first; batches then need texts.

  Under the defaults a text and its clip agree about as often as under any others, and the codes are those of clips
  alone, as in the paper: docs/mulan.md has the table.
  """

  mulan: MuLanConfig
  levels: int = 12
  codebook_size: int = 1024
  seconds: float = 10.0
  iterations: int = 10
  fit_on: str = 'audio'
  align: bool = True

  asset_part = 'encoder/text'

  def __post_init__(self):
    if self.fit_on not in ('audio', 'both'):
      raise ValueError(f'MuLan tokens: fit_on must be "audio" or "both", found {self.fit_on!r}')

  @property
  def token_spec(self) -> TokenSpec:
    return TokenSpec(name='mulan', codebook_size=self.codebook_size, levels=self.levels)

  @property
  def _views(self) -> int:
    """Embeddings a row: the text's is needed for its codes or for where it is moved."""
    return 2 if self.align or self.fit_on == 'both' else 1

  def model(self, rngs: nnx.Rngs) -> MuLanTokenizer:
    return MuLanTokenizer(self.mulan, self.levels, self.codebook_size, rngs=rngs)

  def assets(self) -> dict[str, bytes]:
    return self.mulan.assets()

  def batch_spec(self, batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
    samples = round(self.seconds * self.mulan.audio.mel.sample_rate)
    spec = {
        'audio': jax.ShapeDtypeStruct((batch_size, samples), jnp.float32),
        'slot': jax.ShapeDtypeStruct((batch_size,), jnp.int32),
    }
    if self._views == 2:
      spec['text'] = jax.ShapeDtypeStruct((batch_size, self.mulan.text.length), jnp.int32)
    return spec

  def features(self, model: MuLanTokenizer, batch: Batch) -> jax.Array:
    """One row a clip, [B, V * E]: its embedding, followed by its text's where that is needed."""
    views = [model.encoder.embed_audio(batch['audio'], batch.get('length'))]
    if self._views == 2:
      views.append(model.encoder.embed_text(batch['text']))
    return jnp.concatenate(views, axis=-1)

  def phases(self) -> tuple[tuple[str, int], ...]:
    levels = tuple((f'level_{level + 1}', self.iterations) for level in range(self.levels))
    return ((_ALIGN, 1), *levels) if self.align else levels

  def _residual(self, buffers: Any, rows_NxVE: jax.Array, level: int) -> tuple[jax.Array, int]:
    """What the levels before `level` left of the rows to fit on, [N * views, E], and the views a row."""
    x_NxVxE = rows_NxVE.reshape(rows_NxVE.shape[0], self._views, -1)
    used = [x_NxVxE[:, 0]]
    if self.fit_on == 'both':
      used.append(_moved(x_NxVxE[:, 1], buffers['text_map'], buffers['text_shift']))
    x_NxE = jnp.stack(used, axis=1).reshape(-1, x_NxVxE.shape[-1])
    subtract = lambda x_NxE, codes_KxE: (x_NxE - codes_KxE[quantize.nearest(x_NxE, codes_KxE)], ())
    x_NxE, _ = jax.lax.scan(subtract, x_NxE, buffers['quantizer']['codebook'][:level])
    return x_NxE, len(used)

  def begin(self, buffers: Any, sample_MxD: jax.Array, phase: str, key: jax.Array) -> Any:
    if phase == _ALIGN:
      return buffers
    level = _level(phase)
    residual_MxE, _ = self._residual(buffers, sample_MxD, level)
    codes_KxE = quantize.spread_rows(residual_MxE, self.codebook_size, key)
    return _with_codes(buffers, level, codes_KxE, jnp.ones((self.codebook_size,)))

  def statistics(
      self, buffers: Any, rows_NxD: jax.Array, weight_N: jax.Array, phase: str) -> dict[str, jax.Array]:
    if phase == _ALIGN:
      products_DxD = jnp.matmul(rows_NxD.T * weight_N, rows_NxD, precision=jax.lax.Precision.HIGHEST)
      sum_D = jnp.matmul(weight_N, rows_NxD, precision=jax.lax.Precision.HIGHEST)
      return {'rows': weight_N.sum(), 'sum': sum_D, 'products': products_DxD}
    level = _level(phase)
    residual_NxE, used = self._residual(buffers, rows_NxD, level)
    weight_N = jnp.repeat(weight_N, used)
    codes_KxE = buffers['quantizer']['codebook'][level]
    index_N = quantize.nearest(residual_NxE, codes_KxE)
    count_K, sum_KxE = quantize.code_sums(residual_NxE, index_N, self.codebook_size, weight_N)
    error_N = jnp.sum(jnp.square(residual_NxE - codes_KxE[index_N]), axis=-1)
    return {'count': count_K, 'sum': sum_KxE, 'error': error_N @ weight_N}

  def fitted(self, buffers: Any, statistics: Any, phase: str) -> tuple[Any, dict[str, jax.Array]]:
    """New buffers; metrics of a level are `error` (mean squared distance to the codes) and `perplexity`.

    Those of the phase that moves texts: `gap`, the distance between the means of both kinds before, and `explained`,
    the share of the clips' variance that their texts tell, of the pairs that the move is fitted on.
    """
    if phase == _ALIGN:
      mean_2xE = (statistics['sum'] / statistics['rows']).reshape(2, -1)
      width = mean_2xE.shape[1]
      covariance_DxD = statistics['products'] / statistics['rows'] - jnp.outer(mean_2xE, mean_2xE)
      texts_ExE, both_ExE = covariance_DxD[width:, width:], covariance_DxD[width:, :width]
      ridge_ExE = (_RIDGE * jnp.trace(texts_ExE) / width + 1e-9) * jnp.eye(width)
      map_ExE = jnp.linalg.solve(texts_ExE + ridge_ExE, both_ExE)
      explained = jnp.sum(map_ExE * both_ExE) / jnp.maximum(jnp.trace(covariance_DxD[:width, :width]), 1e-9)
      metrics = {'gap': jnp.linalg.norm(mean_2xE[0] - mean_2xE[1]), 'explained': explained}
      shift_E = mean_2xE[0] - jnp.matmul(mean_2xE[1], map_ExE, precision=jax.lax.Precision.HIGHEST)
      return {**buffers, 'text_map': map_ExE, 'text_shift': shift_E}, metrics
    level, count_K = _level(phase), statistics['count']
    codes_KxE = quantize.lloyd_step(buffers['quantizer']['codebook'][level], count_K, statistics['sum'])
    metrics = {
        'error': statistics['error'] / jnp.maximum(count_K.sum(), 1e-9),
        'perplexity': quantize.perplexity(count_K),
    }
    return _with_codes(buffers, level, codes_KxE, count_K), metrics


def _moved(text_BxE: jax.Array, map_ExE: jax.Array, shift_E: jax.Array) -> jax.Array:
  return unit(jnp.matmul(text_BxE, map_ExE, precision=jax.lax.Precision.HIGHEST) + shift_E)


def _level(phase: str) -> int:
  return int(phase.removeprefix('level_')) - 1


def _with_codes(buffers: Any, level: int, codes_KxE: jax.Array, count_K: jax.Array) -> Any:
  """Buffers with one level's codes replaced; counts and sums follow, as `ema_update` leaves them."""
  quantizer = buffers['quantizer']
  new = {'codebook': codes_KxE, 'count': count_K, 'sum': codes_KxE * count_K[:, None]}
  return {**buffers, 'quantizer': {name: quantizer[name].at[level].set(value) for name, value in new.items()}}
