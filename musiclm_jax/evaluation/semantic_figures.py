"""The semantic network's figures: masked prediction on held-out clips, and what its tokens tell.

N clips, T samples, F frames, K codes.
"""
from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
import math
from typing import Any

from flax import nnx
import jax
import numpy as np

from musiclm_jax.data import token_counts
from musiclm_jax.evaluation import batched, probes
from musiclm_jax.evaluation.probes import Probe, UNKNOWN
from musiclm_jax.objective import Aux
from musiclm_jax.training import metrics, state as states


# Probe name in the report -> name of the fact in a composer's attributes.
CLIP_PROBES = {'tempo': 'tempo', 'meter': 'meter', 'drum_style': 'drums', 'timbre': 'lead'}
PROBES = (*CLIP_PROBES, 'chord', 'pitch_class', 'onset')  # of `composer_probes` and `note_probes`


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


def composer_probes(attributes: Sequence[Mapping[str, Any]], frames: int, frame_rate: float) -> dict[str, Probe]:
  """What to ask of the built-in music, from its ground truth: facts of whole clips, and the chord of a frame.

  A frame has the chord that sounds at its centre. Facts that a piece lacks are unknown.
  """
  asked = {name: Probe(np.array([str(a.get(fact, UNKNOWN)) for a in attributes])) for name, fact in CLIP_PROBES.items()}
  chords = [(a['chord_times'], a['chord_names']) for a in attributes]
  return {**asked, 'chord': Probe(_begun(chords, frames, frame_rate))}


def note_probes(attributes: Sequence[Mapping[str, Any]], frames: int, frame_rate: float) -> dict[str, Probe]:
  """Finer ones: the pitch class of the lead, and whether one of its notes begins in a frame.

  The pitch class is that of the note begun last, at most a second ago, read from three tokens. Notes that begin are
  asked for as often as frames amid two beginnings, each read from its own token.
  """
  notes = [(np.array(a['melody_times']), [str(pitch % 12) for pitch in a['melody_pitches']]) for a in attributes]
  onsets = np.full((len(notes), frames), UNKNOWN, dtype='<U6')
  for row, (times, _) in zip(onsets, notes):
    begun = np.unique((times * frame_rate).astype(int))
    begun = begun[begun < frames]
    middle = (begun[:-1] + begun[1:]) // 2
    row[middle[np.diff(begun) > 2]] = 'held'
    row[begun] = 'begins'
  pitch = _begun(notes, frames, frame_rate, longest=1.0)
  return {'pitch_class': Probe(pitch, radius=1, stride=6), 'onset': Probe(onsets, radius=0, stride=1)}


def _begun(events: Sequence[tuple[Sequence[float], Sequence[str]]], frames: int, frame_rate: float,
           longest: float = math.inf) -> np.ndarray:
  """Of events (seconds, name) of each clip the name of the one begun last at a frame's centre, [N, F]."""
  centres_F = (np.arange(frames) + 0.5) / frame_rate
  rows = []
  for times, names in events:
    begun_F = np.searchsorted(times, centres_F, side='right')
    age_F = centres_F - np.array([-math.inf, *times])[begun_F]
    rows.append(np.where(age_F <= longest, np.array([UNKNOWN, *names])[begun_F], UNKNOWN))
  return np.array(rows)


def tokens(model: Any, audio_NxT: np.ndarray, *, batch_size: int = 8) -> np.ndarray:
  """Semantic tokens of clips, int32 [N, F]; `model.tokens(audio) -> int32 BxFx1`."""
  run = states.compiled(model, 'tokens')
  return batched.in_batches(run, np.asarray(audio_NxT, np.float32), batch_size=batch_size)[..., 0]


def semantic_figures(
    trained_NxF: np.ndarray, untrained_NxF: np.ndarray, log_mel_NxF: np.ndarray, codebook_size: int, *,
    asked: Mapping[str, Probe] | None = None, masked: Mapping[str, float] | None = None, seed: int = 0,
) -> dict[str, Any]:
  """Figures of section `semantic` of the report.

  Args:
    trained_NxF, untrained_NxF, log_mel_NxF: tokens of the same held-out clips from the tokenizer, from one
      made in the same way on the network before training, and from k-means of log-mel, all of K codes.
    asked: what is to be read from them, by name.
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
  if asked:
    figures['probes'] = probes.probe_figures(by_tokenizer, codebook_size, asked, seed=seed)
  return figures
