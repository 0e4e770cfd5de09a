"""Bits per token of a stage beside n-grams of its own tokens, and what each condition is worth.

N crops, B batch, F frames, Q levels of the target.
"""
from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
import math
from typing import Any

import numpy as np

from musiclm_jax import specs
from musiclm_jax.evaluation import batched, statistics
from musiclm_jax.training import state as states

Streams = Mapping[str, np.ndarray]  # raw streams by feature name, int32 [N, F, Q]
Bits = Callable[[dict[str, np.ndarray]], np.ndarray]  # a batch of streams -> bits of each target token BxFxQ


def stage_figures(
    bits: Bits, stage: specs.Stage, streams: Streams, recordings_N: np.ndarray,
    training_rows: Iterable[np.ndarray], *, batch_size: int = 8, shuffles: int = 1, seed: int = 0,
) -> dict[str, Any]:
  """Figures of section `stages.<name>` of the report.

  Args:
    bits: -log2 p(token) of every target token given what comes before it, [B, F, Q], from a batch of raw
      streams as training reads them ('slot' included); compiled by the caller.
    streams: held-out crops by feature name, [N, F, Q] each.
    recordings_N: which recording each crop is from; intervals and shuffles respect it.
    training_rows: tokens of the target's stream in the training set, [F, Q of the whole stream] each; the
      n-grams are fitted on its levels.
    shuffles: how many times each condition is exchanged for that of another recording.
  """
  target, size = stage.target, stage.target.codebook_size
  streams = {name: np.asarray(x) for name, x in streams.items()}
  recordings_N = np.asarray(recordings_N)
  ngrams = statistics.fit_ngrams((row[..., target.level_slice] for row in training_rows), size)
  held_out_NxFxQ = streams[target.feature][..., target.level_slice]
  run = lambda s: np.asarray(_bits(bits, s, batch_size), np.float64)
  bits_NxFxQ = run(streams)
  if bits_NxFxQ.shape != held_out_NxFxQ.shape:
    raise ValueError(f'stage {stage.name!r}: bits of shape {bits_NxFxQ.shape} for tokens of shape '
                     f'{held_out_NxFxQ.shape}')
  unigram = ngrams.unigram_bits(held_out_NxFxQ)
  bigram = ngrams.bigram_bits(held_out_NxFxQ)
  unigram_Q = unigram.mean((0, 1))
  bits_N = bits_NxFxQ.mean((1, 2))
  interval = statistics.bootstrap_interval(bits_N, recordings_N, seed=seed)
  figures = {
      'crops': len(bits_N), 'recordings': int(len(np.unique(recordings_N))),
      'bits_per_token': float(bits_NxFxQ.mean()),
      'bits_per_token_interval': interval.bounds,
      'bigram_bits_per_token': float(bigram.mean()),
      'unigram_bits_per_token': float(unigram.mean()),
      'uniform_bits_per_token': math.log2(size),
      'bits_by_level': _floats(bits_NxFxQ.mean((0, 1))),
      'bigram_bits_by_level': _floats(bigram.mean((0, 1))),
      'unigram_bits_by_level': _floats(unigram_Q),
      'unigram_share_of_log2_k': float(unigram_Q.min() / math.log2(size)),
      'bits_first_frame': float(bits_NxFxQ[:, 0].mean()),
      'unigram_bits_first_frame': float(unigram[:, 0].mean()),
      'condition_gap': {},
  }
  if len(np.unique(recordings_N)) < 2:
    return figures  # nothing to exchange conditions with
  for condition in stage.conditions:
    gap_N, gap_first_N = np.zeros(len(bits_N)), np.zeros(len(bits_N))
    for k in range(shuffles):
      shuffled = run(with_other_condition(streams, condition, recordings_N, seed=seed + k))
      gap_N += (shuffled.mean((1, 2)) - bits_N) / shuffles
      gap_first_N += (shuffled[:, 0] - bits_NxFxQ[:, 0]).mean(1) / shuffles
    gap = statistics.bootstrap_interval(gap_N, recordings_N, seed=seed)
    first = statistics.bootstrap_interval(gap_first_N, recordings_N, seed=seed)
    figures['condition_gap'][condition.name] = {
        **gap.as_dict('bits'), 'bits_first_frame': first.value,
        'interval_first_frame': first.bounds}
  return figures


def objective_bits(objective: Any, model: Any, *, keep: Mapping[str, int] | None = None) -> Bits:
  """The bits function of a trained stage, compiled once.

  `objective.token_nats(model, batch, keep=...) -> float32 BxFxQ`; `keep` limits conditions by name to their
  first levels (0 hides one whole), all levels where it names none.
  """

  def nats(model: Any, batch: dict[str, Any]) -> Any:
    size = batch['slot'].shape[0]
    shown = {name: np.full(size, levels, np.int32) for name, levels in (keep or {}).items()}
    return objective.token_nats(model, batch, keep=shown or None)

  run = states.compiled(model, nats)
  return lambda batch: np.asarray(run(batch)) / math.log(2)


def _floats(values: np.ndarray) -> list[float]:
  return [float(v) for v in values]


def _bits(bits: Bits, streams: Streams, batch_size: int) -> np.ndarray:
  names = sorted(streams)
  arrays = [streams[n] for n in names] + [np.arange(len(streams[names[0]]), dtype=np.int32)]
  return batched.in_batches(
      lambda *parts: bits(dict(zip([*names, 'slot'], parts))), *arrays, batch_size=batch_size)


def with_other_condition(
    streams: Streams, condition: specs.TokenSpec, recordings_N: np.ndarray, *, seed: int = 0,
) -> dict[str, np.ndarray]:
  """The same crops with the levels of one condition taken from a crop of another recording.

  All other streams, and the other levels of the same stream (the fine levels, where coarse is exchanged),
  stay as they are.
  """
  index_N = other_recording(recordings_N, seed=seed)
  changed = np.array(streams[condition.feature])
  changed[..., condition.level_slice] = streams[condition.feature][index_N][..., condition.level_slice]
  return {**streams, condition.feature: changed}


def other_recording(recordings_N: np.ndarray, *, seed: int = 0) -> np.ndarray:
  """For each crop the index of a random crop of another recording; a permutation where one exists.

  Raises ValueError where there is only one recording.
  """
  recordings_N = np.asarray(recordings_N)
  _, group_N = np.unique(recordings_N, return_inverse=True)
  sizes_G = np.bincount(group_N)
  if len(sizes_G) < 2:
    raise ValueError('condition shuffle: all crops are of one recording; at least two are needed')
  rng = np.random.default_rng(seed)
  if sizes_G.max() * 2 > len(group_N):
    # One recording has most crops: its crops cannot all be exchanged one to one.
    return np.array([rng.choice(np.flatnonzero(group_N != g)) for g in group_N])
  # Crops in random order within recordings in random order; a shift by the largest recording leaves none in
  # place.
  order = np.lexsort((rng.random(len(group_N)), rng.permutation(len(sizes_G))[group_N]))
  result = np.empty(len(group_N), np.int64)
  result[order] = np.roll(order, -int(sizes_G.max()))
  return result
