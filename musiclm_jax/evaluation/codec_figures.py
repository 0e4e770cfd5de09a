"""The codec's figures on clips that training never saw.

B clips, N samples, F frames, Q levels, K codes.
"""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from musiclm_jax.data import token_counts
from musiclm_jax.evaluation import audio_measures, batched, statistics
from musiclm_jax.training import state as states


def codec_figures(
    model: Any, clips_BxN: np.ndarray, codebook_size: int, *, untrained: Any = None,
    levels: Sequence[int] = (1, 4, 12), more_clips_MxN: np.ndarray | None = None, sample_rate: int = 24000,
    recordings_B: Sequence[str] | None = None, batch_size: int = 8) -> dict[str, Any]:
  """Figures of section `codec` of the report.

  Args:
    model: has `encode(audio_BxN) -> int32 BxFxQ` and `decode(indices_BxFxq) -> audio_BxN`.
    clips_BxN: held-out clips, on which reconstruction is measured.
    untrained: the same network before training, for its mel distance; None leaves that row out.
    levels: numbers of levels to decode from; the largest gives the headline figures.
    more_clips_MxN: further held-out clips that only the code statistics use (no decoding is needed).
    recordings_B: which recording each clip is from; intervals draw whole recordings. By default each has its own.
  """
  levels = tuple(sorted(levels))
  clips_BxN = np.asarray(clips_BxN, np.float32)
  recordings_B = np.arange(len(clips_BxN)) if recordings_B is None else np.asarray(recordings_B)
  codes_BxFxQ, decoded = audio_measures.round_trip(model, clips_BxN, levels, batch_size=batch_size)
  by_level = {
      q: (audio_measures.mel_distance(clips_BxN, audio, sample_rate=sample_rate),
          audio_measures.si_sdr(clips_BxN, audio)) for q, audio in decoded.items()}
  mel_B, sdr_B = by_level[levels[-1]]
  heard = np.isfinite(sdr_B)
  if not heard.any():
    raise ValueError(f'codec evaluation: all {len(clips_BxN)} held-out clips are silent')
  baselines = audio_measures.mel_distance_baselines(clips_BxN, sample_rate=sample_rate)
  figures = {
      'clips': len(clips_BxN),
      'mel_distance': float(mel_B.mean()),
      **{f'mel_distance_{name}': float(value.mean()) for name, value in baselines.items()},
      'mel_distance_by_levels': {str(q): float(mel.mean()) for q, (mel, _) in by_level.items()},
      'si_sdr_db': float(sdr_B[heard].mean()),
      'si_sdr_db_interval': statistics.bootstrap_interval(sdr_B[heard], recordings_B[heard]).bounds,
      'si_sdr_db_median': float(np.median(sdr_B[heard])),
      'si_sdr_db_by_levels': {str(q): float(sdr[heard].mean()) for q, (_, sdr) in by_level.items()},
      'mel_distance_interval': statistics.bootstrap_interval(mel_B, recordings_B).bounds,
  }
  codes = [codes_BxFxQ.reshape(-1, codes_BxFxQ.shape[-1])]
  if more_clips_MxN is not None and len(more_clips_MxN):
    encode = states.compiled(model, 'encode')
    more = batched.in_batches(encode, np.asarray(more_clips_MxN, np.float32), batch_size=batch_size)
    codes.append(more.reshape(-1, more.shape[-1]))
  figures |= code_figures(token_counts.level_counts(np.concatenate(codes), codebook_size))
  if untrained is not None:
    _, before = audio_measures.round_trip(untrained, clips_BxN, levels[-1:], batch_size=batch_size)
    figures['mel_distance_untrained'] = float(
        audio_measures.mel_distance(clips_BxN, before[levels[-1]], sample_rate=sample_rate).mean())
  return figures


def code_figures(counts_QxK: np.ndarray) -> dict[str, Any]:
  """How evenly the codes of each level are used, from how often each occurs in held-out frames."""
  codebook_size = counts_QxK.shape[1]
  perplexity_Q = token_counts.perplexity(counts_QxK)
  return {
      'codebook_size': codebook_size,
      'perplexity_frames': int(counts_QxK[0].sum()),
      'perplexity': [float(p) for p in perplexity_Q],
      'perplexity_share': [float(p) / codebook_size for p in perplexity_Q],
      'codes_used_share': [float(u) for u in np.mean(counts_QxK > 0, axis=1)],
  }


def restart_share(rows: Sequence[Mapping[str, Any]], *, last: float = 0.1) -> float | None:
  """Share of all codes that are restarted in a step, averaged over the last tenth of training.

  `rows` are the lines of the codec's metrics file, in which `restarts` is that share at each logged step.
  Returns None where no line has it.
  """
  shares = [(row['step'], row['restarts']) for row in rows if isinstance(row.get('restarts'), (int, float))]
  if not shares:
    return None
  first = max(step for step, _ in shares) * (1 - last)
  return float(np.mean([share for step, share in shares if step > first]))
