"""MuLan's figures: does a text find its clip, and do both get the same tokens?

N pairs of clip and text, T samples, L text length, E embedding, Q levels.
"""
from __future__ import annotations

from collections.abc import Sequence
import functools
from typing import Any

import numpy as np

from musiclm_jax.data import token_counts
from musiclm_jax.evaluation import batched, statistics
from musiclm_jax.training import state as states


def embed(
    model: Any, audio_NxT: np.ndarray, text_NxL: np.ndarray, *, batch_size: int = 32,
) -> tuple[np.ndarray, np.ndarray]:
  """Unit embeddings of clips and of texts, float32 [N, E] each, in batches of one shape."""
  audio_NxE = batched.in_batches(
      states.compiled(model, 'embed_audio'), np.asarray(audio_NxT, np.float32), batch_size=batch_size)
  return audio_NxE, embed_texts(model, text_NxL, batch_size=batch_size)


def embed_texts(model: Any, text_NxL: np.ndarray, *, batch_size: int = 32) -> np.ndarray:
  """Unit embeddings of texts given as token ids, float32 [N, E]."""
  return batched.in_batches(
      states.compiled(model, 'embed_text'), np.asarray(text_NxL, np.int32), batch_size=batch_size)


def retrieval_figures(
    scores_NxN: np.ndarray, *, pools: Sequence[int] = (64, 200), prefix: str = '', seed: int = 0,
    relevant_NxN: np.ndarray | None = None) -> dict[str, float]:
  """Recall at 1 and 10 in random pools; the first pool size gives the names without a suffix.

  `relevant` as for `statistics.recall_in_pools`. Pools larger than the number of pairs are left out, so that their
  bars read as not measured.
  """
  figures = {}
  for pool in pools:
    if pool > len(scores_NxN):
      continue
    suffix = '' if pool == pools[0] else f'_of_{pool}'
    recall = statistics.recall_in_pools(scores_NxN, pool=pool, ks=(1, 10), seed=seed, relevant_NxN=relevant_NxN)
    figures |= {f'{prefix}recall_at_{k}{suffix}': value for k, value in recall.items()}
  return figures


def mulan_figures(
    audio_NxE: np.ndarray, text_NxE: np.ndarray, *, texts_N: Sequence[str] | None = None,
    tokens: tuple[np.ndarray, np.ndarray] | None = None, unknown_text_NxE: np.ndarray | None = None,
    oracle_NxN: np.ndarray | None = None, pools: Sequence[int] = (64, 200), seed: int = 0) -> dict[str, Any]:
  """Figures of section `mulan` of the report, from embeddings of held-out pairs.

  Args:
    audio_NxE, text_NxE: unit embeddings; text i describes clip i (long descriptions, unseen templates).
    texts_N: the texts themselves: clips that share one are all right for it. By default all differ.
    tokens: RVQ tokens [N, Q] (or [N, 1, Q]) of the clips and of the texts, in this order.
    unknown_text_NxE: texts of the same clips that use synonyms which training never saw.
    oracle_NxN: scores of an oracle that reads attributes (`statistics.attribute_agreement`).
  """
  figures: dict[str, Any] = {'pairs': len(audio_NxE)}
  _, which_N = np.unique(np.arange(len(audio_NxE)) if texts_N is None else np.asarray(texts_N), return_inverse=True)
  same_NxN = which_N[:, None] == which_N
  scores_NxN = text_NxE @ audio_NxE.T
  recall = functools.partial(retrieval_figures, pools=pools, seed=seed, relevant_NxN=same_NxN)
  figures |= recall(scores_NxN)
  others = (same_NxN.sum() - len(same_NxN)) / max(1, len(same_NxN) * (len(same_NxN) - 1))
  for pool in pools:
    suffix = '' if pool == pools[0] else f'_of_{pool}'
    figures[f'recall_at_1_chance{suffix}'] = float(1 + others * (pool - 1)) / pool
  if unknown_text_NxE is not None:
    figures |= recall(unknown_text_NxE @ audio_NxE.T, prefix='unknown_synonyms_')
  if oracle_NxN is not None:
    figures |= recall(oracle_NxN, prefix='oracle_')
  if tokens is not None:
    figures |= agreement_figures(*tokens)
  figures['cosine_own'] = float(np.mean(np.sum(text_NxE * audio_NxE, axis=1)))
  figures['cosine_other'] = float(np.sum(scores_NxN, where=~same_NxN) / max(1, np.sum(~same_NxN)))
  return figures


def agreement_figures(audio_tokens_NxQ: np.ndarray, text_tokens_NxQ: np.ndarray) -> dict[str, list[float]]:
  """How often a text's token equals its clip's at each level, beside what chance gives.

  Chance is the agreement of a text with another clip: the product of the two token distributions.
  `text_audio_agreement_so_far` counts the pairs that agree on this and all levels before it.
  """
  audio_tokens_NxQ = np.asarray(audio_tokens_NxQ).reshape(len(audio_tokens_NxQ), -1)
  text_tokens_NxQ = np.asarray(text_tokens_NxQ).reshape(len(text_tokens_NxQ), -1)
  equal_NxQ = audio_tokens_NxQ == text_tokens_NxQ
  size = int(max(audio_tokens_NxQ.max(), text_tokens_NxQ.max())) + 1
  share = lambda tokens: token_counts.level_counts(tokens, size) / len(tokens)
  return {
      'text_audio_agreement': [float(a) for a in equal_NxQ.mean(0)],
      'text_audio_agreement_chance': [
          float(c) for c in np.sum(share(audio_tokens_NxQ) * share(text_tokens_NxQ), axis=1)],
      'text_audio_agreement_so_far': [float(a) for a in np.cumprod(equal_NxQ, axis=1).mean(0)],
  }
