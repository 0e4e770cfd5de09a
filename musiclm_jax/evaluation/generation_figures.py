"""Do samples do what their prompt says, and do they sound like music of the training kind?

P prompts, S seeds (samples a prompt), T samples of audio, E embedding.
"""
from __future__ import annotations

from collections.abc import Mapping, Sequence
import dataclasses
from typing import Any

import numpy as np

from musiclm_jax.evaluation import frechet, statistics
from musiclm_jax.evaluation.judge import Judge


def adherence(audio_PxSxE: np.ndarray, prompts_PxE: np.ndarray) -> dict[str, Any]:
  """MuLan cycle consistency (arXiv 2301.11325, section 4.3): cosine of samples with prompts.

  `mcc_matched` is the mean with the own prompt, `mcc_mismatched` with all other prompts. The samples of one
  prompt are not independent, so the prompt is the unit of the paired permutation test: the pairs are
  (matched, mismatched), averaged over the samples of each prompt. All inputs have unit norm.
  """
  audio_PxSxE = np.asarray(audio_PxSxE, np.float64)
  prompts = len(prompts_PxE)
  if len(audio_PxSxE) != prompts or prompts < 2:
    raise ValueError(f'adherence: samples of {len(audio_PxSxE)} prompts with {prompts} prompts; they must be '
                     'the same and at least 2')
  scores_PxP = audio_PxSxE.mean(1) @ np.asarray(prompts_PxE, np.float64).T
  matched_P = np.diagonal(scores_PxP)
  mismatched_P = (scores_PxP.sum(1) - matched_P) / (prompts - 1)
  return {
      'mcc_matched': float(matched_P.mean()), 'mcc_mismatched': float(mismatched_P.mean()),
      'mcc_p_value': statistics.paired_permutation_test(matched_P, mismatched_P)}


def judge_figures(
    judge: Judge, samples_PxSxT: np.ndarray, timbres_P: Sequence[str], *, seed: int = 0) -> dict[str, Any]:
  """How often the judge hears the prompted lead timbre in samples, with chance and a 95% interval.

  Chance is the best constant answer over these prompts (the share of the most frequent timbre, at least one
  over the number of timbres the judge knows). The interval draws whole prompts.
  """
  prompts, seeds, length = samples_PxSxT.shape
  named = judge.name(samples_PxSxT.reshape(prompts * seeds, length)).reshape(prompts, seeds)
  right_PxS = named == np.asarray(timbres_P)[:, None]
  groups = np.repeat(np.arange(prompts), seeds)
  interval = statistics.bootstrap_interval(right_PxS.reshape(-1), groups, seed=seed)
  return {
      'judge_timbre': interval.value,
      'judge_timbre_interval': interval.bounds,
      'judge_chance': max(statistics.majority_share(timbres_P), 1.0 / len(judge.classes)),
      'judge_classes': list(judge.classes),
  }


def frechet_figures(
    judge: Judge, held_out_NxT: np.ndarray, rows: Mapping[str, np.ndarray]) -> dict[str, float]:
  """Frechet distance of each row of clips [M, T] to held-out clips, in the judge's embedding.

  All rows should have as many clips: the distance grows as they get fewer.
  """
  reference = frechet.moments(judge.embed(held_out_NxT))
  return {name: frechet.distance(frechet.moments(judge.embed(clips)), reference)
          for name, clips in rows.items()}


@dataclasses.dataclass(frozen=True)
class Samples:
  """What was sampled.

  Attributes:
    audio_PxSxT: S samples of each prompt.
    embedding_PxSxE, prompts_PxE: MuLan embeddings of the samples and of the prompts' texts, unit norm.
    timbres_P: the lead timbre that each prompt asks for; empty where unknown.
    wall_seconds: time that sampling all of it took, once compiled; 0 where unknown.
  """

  audio_PxSxT: np.ndarray
  embedding_PxSxE: np.ndarray
  prompts_PxE: np.ndarray
  timbres_P: Sequence[str] = ()
  wall_seconds: float = 0.0
  sample_rate: int = 24000


def generation_figures(
    samples: Samples, *, references: Mapping[str, np.ndarray] | None = None, judge: Judge | None = None,
    judge_accuracy: float | None = None, held_out_NxT: np.ndarray | None = None,
    frechet_rows: Mapping[str, np.ndarray] | None = None, seed: int = 0) -> dict[str, Any]:
  """Figures of section `generation` of the report.

  Args:
    references: name -> MuLan embeddings [P, S', E] to compare with: "real" clips that the prompts describe,
      their "codec_round_trip", samples of "another_prompt".
    judge, judge_accuracy: a fitted judge and its accuracy on held-out codec round trips. Without a judge its
      figures are left out.
    held_out_NxT: held-out clips, of the samples' length.
    frechet_rows: name -> clips [M, T] whose distance is reported as `frechet_<name>`: "unigram" (decoded
      unigram-sampled tokens), "real" (other held-out clips), "codec_round_trip".
  """
  prompts, seeds, length = samples.audio_PxSxT.shape
  seconds = length / samples.sample_rate
  figures: dict[str, Any] = {
      'prompts': prompts, 'seeds': seeds, 'seconds': seconds,
      **adherence(samples.embedding_PxSxE, samples.prompts_PxE)}
  figures['mcc_references'] = {
      name: adherence(row, samples.prompts_PxE) for name, row in (references or {}).items()}
  if judge is not None:
    if len(samples.timbres_P):
      figures |= judge_figures(judge, samples.audio_PxSxT, samples.timbres_P, seed=seed)
    if judge_accuracy is not None:
      figures['judge_accuracy'] = judge_accuracy
    if held_out_NxT is not None:
      rows = {'': samples.audio_PxSxT.reshape(-1, length)}
      rows |= {f'_{name}': clips for name, clips in (frechet_rows or {}).items()}
      figures |= {f'frechet{n}': d for n, d in frechet_figures(judge, held_out_NxT, rows).items()}
  if samples.wall_seconds:
    figures['realtime_factor'] = prompts * seeds * seconds / samples.wall_seconds
  return figures
