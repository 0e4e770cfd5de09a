"""The semantic network's figures: masked prediction on held-out clips, and what its tokens tell.

N clips, T samples, F frames, K codes.
"""
from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from flax import nnx
import jax
import numpy as np

from musiclm_jax.data import token_counts
from musiclm_jax.evaluation import batched, probes
from musiclm_jax.objective import Aux
from musiclm_jax.training import metrics, state as states


# Probe name in the report -> name of the fact in a composer's attributes.
CLIP_PROBES = {'tempo': 'tempo', 'meter': 'meter', 'drum_style': 'drums', 'timbre': 'lead'}


def masked_figures(
    objective: Any, model: nnx.Module, batches: Iterable[Mapping[str, np.ndarray]], *, seed: int = 0,
) -> dict[str, float]:
  """Masked prediction on held-out batches of one shape and size, `masked_cross_entropy` and `target_entropy` in nats.

  Masks and negatives are drawn from `seed`, so that the figure is the same each time. Raises ValueError without any
  batch.
  """

  def loss(model: nnx.Module, batch: dict[str, jax.Array], key: jax.Array) -> tuple[jax.Array, Aux]:
    return objective.loss(model, batch, key, training=False)

  measured = metrics.held_out(
      objective, states.compiled(model, loss), map(dict, batches), jax.random.key(seed))
  keep = ('masked_cross_entropy', 'masked_accuracy', 'contrastive', 'contrastive_accuracy', 'loss', 'target_entropy',
          'target_perplexity', 'masked_accuracy_chance')
  return {name: measured[name] for name in keep if name in measured}


def composer_labels(
    attributes: Sequence[Mapping[str, Any]], frames: int, frame_rate: float,
) -> tuple[dict[str, list[str]], dict[str, np.ndarray]]:
  """Labels for the probes from the composer's ground truth: one a clip each, and chords [N, F] by frame.

  A frame has the chord that sounds at its centre. Facts that a piece lacks are unknown.
  """
  clips = {
      probe: [str(a.get(fact, probes.UNKNOWN)) for a in attributes] for probe, fact in CLIP_PROBES.items()}
  centres_F = (np.arange(frames) + 0.5) / frame_rate
  chords = []
  for a in attributes:
    begun_F = np.searchsorted(a['chord_times'], centres_F, side='right')
    chords.append(np.array([probes.UNKNOWN, *a['chord_names']])[begun_F])
  return clips, {'chord': np.array(chords)}


def tokens(model: Any, audio_NxT: np.ndarray, *, batch_size: int = 8) -> np.ndarray:
  """Semantic tokens of clips, int32 [N, F]; `model.tokens(audio) -> int32 BxFx1`."""
  run = states.compiled(model, 'tokens')
  return batched.in_batches(run, np.asarray(audio_NxT, np.float32), batch_size=batch_size)[..., 0]


def semantic_figures(
    trained_NxF: np.ndarray, untrained_NxF: np.ndarray, log_mel_NxF: np.ndarray, codebook_size: int, *,
    clip_labels: Mapping[str, Sequence[str]], frame_labels: Mapping[str, np.ndarray] | None = None,
    masked: Mapping[str, float] | None = None, seed: int = 0) -> dict[str, Any]:
  """Figures of section `semantic` of the report.

  Args:
    trained_NxF, untrained_NxF, log_mel_NxF: tokens of the same held-out clips from the tokenizer, from one
      made in the same way on the network before training, and from k-means of log-mel, all of K codes.
    clip_labels: 'tempo', 'meter', 'drum_style', 'timbre' -> a label for each clip ('' where unknown).
    frame_labels: 'chord' -> labels [N, F] ('' where there is none).
    masked: the result of `masked_figures`.
  """
  shapes = {np.shape(t) for t in (trained_NxF, untrained_NxF, log_mel_NxF)}
  if len(shapes) > 1:
    raise ValueError(f'semantic evaluation: token arrays of different shapes {sorted(shapes)}; the three '
                     'tokenizers must read the same clips at the same frame rate')
  by_tokenizer = {'trained': trained_NxF, 'untrained': untrained_NxF, 'log_mel': log_mel_NxF}
  counted = {name: token_counts.level_counts(t[..., None], codebook_size) for name, t in by_tokenizer.items()}
  figures: dict[str, Any] = {
      'clips': len(trained_NxF), 'codebook_size': codebook_size, **dict(masked or {}),
      'perplexity_share': {
          name: float(token_counts.perplexity(counts_1xK)[0]) / codebook_size
          for name, counts_1xK in counted.items()},
  }
  if clip_labels or frame_labels:
    figures['probes'] = probes.probe_figures(
        by_tokenizer, codebook_size, clip_labels, frame_labels, seed=seed)
  return figures
