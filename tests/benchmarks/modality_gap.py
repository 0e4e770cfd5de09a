"""How often a text gets its clip's MuLan tokens, level by level, under ways of closing the gap between the two.

  python -m tests.benchmarks.modality_gap W

W is the workdir of a quickstart, or holds `records` with the built-in music, `mulan` and `mulan_tokens`: its MuLan
embeds the training pairs, on which maps and codes are fitted, and the held-out ones (descriptions in templates that
training never saw), on which they are compared. Nothing of W changes.

N pairs, E embedding, K codes, Q levels.
"""
from __future__ import annotations

import argparse
import pathlib
from collections.abc import Callable

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from musiclm_jax import evaluate
from musiclm_jax.data import records
from musiclm_jax.data.batches import AudioTextBatches
from musiclm_jax.evaluation import mulan_figures
from musiclm_jax.mulan.model import unit
from musiclm_jax.nn import quantize

Pair = tuple[np.ndarray, np.ndarray]  # audio and text, [N, E] each
Map = Callable[[np.ndarray, np.ndarray], Pair]
LEVELS = 4


def as_it_is(audio_NxE: np.ndarray, text_NxE: np.ndarray) -> Map:
  return lambda a, t: (a, t)


def centred(audio_NxE: np.ndarray, text_NxE: np.ndarray) -> Map:
  """The mean of each kind taken out."""
  return lambda a, t: (a - audio_NxE.mean(0), t - text_NxE.mean(0))


def whitener(x_NxE: np.ndarray, ridge: float = 1e-3) -> np.ndarray:
  """Symmetric matrix that makes the covariance of x the identity, but for directions far below the mean variance."""
  value_E, vector_ExE = np.linalg.eigh(np.cov(x_NxE.T))
  return vector_ExE / np.sqrt(value_E + ridge * value_E.mean()) @ vector_ExE.T


def whitened(audio_NxE: np.ndarray, text_NxE: np.ndarray) -> Map:
  wa, wt = whitener(audio_NxE), whitener(text_NxE)
  return lambda a, t: ((a - audio_NxE.mean(0)) @ wa, (t - text_NxE.mean(0)) @ wt)


def text_to_audio(audio_NxE: np.ndarray, text_NxE: np.ndarray) -> Map:
  """Texts moved to the audio embedding that least squares expect of them."""
  x, y = text_NxE - text_NxE.mean(0), audio_NxE - audio_NxE.mean(0)
  move = np.linalg.solve(x.T @ x + 1e-3 * np.trace(x.T @ x) / len(x.T) * np.eye(x.shape[1]), x.T @ y)
  return lambda a, t: (a, (t - text_NxE.mean(0)) @ move + audio_NxE.mean(0))


def both_expected(audio_NxE: np.ndarray, text_NxE: np.ndarray) -> Map:
  """Audio moved to the text that least squares expect of it, so that what no text tells vanishes."""
  x, y = audio_NxE - audio_NxE.mean(0), text_NxE - text_NxE.mean(0)
  move = np.linalg.solve(x.T @ x + 1e-3 * np.trace(x.T @ x) / len(x.T) * np.eye(x.shape[1]), x.T @ y)
  return lambda a, t: ((a - audio_NxE.mean(0)) @ move, t - text_NxE.mean(0))


def shared(power: float, ridge: float = 1e-2) -> Callable[[np.ndarray, np.ndarray], Map]:
  """Canonical correlations (Hotelling, 1936): directions in which both kinds agree, weighted by how well they do."""

  def fit(audio_NxE: np.ndarray, text_NxE: np.ndarray) -> Map:
    wa, wt = whitener(audio_NxE, ridge), whitener(text_NxE, ridge)
    a, t = (audio_NxE - audio_NxE.mean(0)) @ wa, (text_NxE - text_NxE.mean(0)) @ wt
    left, correlation_E, right = np.linalg.svd(a.T @ t / len(a))
    scale_E = np.clip(correlation_E, 0, 1) ** power
    return lambda a, t: ((a - audio_NxE.mean(0)) @ wa @ left * scale_E, (t - text_NxE.mean(0)) @ wt @ right.T * scale_E)

  return fit


METHODS: dict[str, Callable[[np.ndarray, np.ndarray], Map]] = {
    'as it is': as_it_is, 'centred': centred, 'whitened': whitened, 'text moved to audio': text_to_audio,
    'audio moved to text': both_expected, 'canonical, weight r': shared(1), 'canonical, weight r^2': shared(2),
    'canonical, weight r^4': shared(4)}


def embeddings(workdir: pathlib.Path, most: int) -> tuple[Pair, Pair, list[dict], list[dict]]:
  """Training pairs and held-out pairs, and the facts of both."""
  measure = evaluate._Measure(workdir, 0, evaluate.Amounts())
  model = measure.cascade.part('mulan').model
  pairs = workdir / evaluate.PAIRS
  train = records.RecordSet(pairs if pairs.is_dir() else workdir / evaluate.RECORDS, 'train')
  clips, examples = measure.clips(train, most)
  batches = AudioTextBatches(train, seconds=1.0, batch_size=32, tokenizer=measure.cascade.tokenizer, text_length=72)
  texts = [batches.text_of(example, seed) for seed, example in enumerate(examples)]
  fitted = mulan_figures.embed(model, clips, measure.ids(texts))
  held = measure.pair_embeddings
  return fitted, held, [e['attributes'] for e in examples], [e['attributes'] for e in measure.held_out_pairs[1]]


def measured(fitted: Pair, held: Pair, fit_on: str, codes: int, seed: int) -> dict[str, np.ndarray]:
  rows = {'audio': fitted[0], 'text': fitted[1], 'both': np.concatenate(fitted)}[fit_on]
  quantizer = quantize.ResidualQuantizer(LEVELS, codes, rows.shape[1], rngs=nnx.Rngs(0))
  quantizer.codebook[...] = quantize.kmeans_start(jnp.asarray(rows), LEVELS, codes, jax.random.key(seed))['codebook']
  train, audio, text = (np.asarray(quantizer.encode(jnp.asarray(x))) for x in (fitted[0], *held))
  agree = mulan_figures.agreement_figures(audio, text)
  used = [quantize.perplexity(jnp.bincount(jnp.asarray(train[:, q]), length=codes)) for q in (0, 1)]
  chance = agree['text_audio_agreement_chance'][0]
  return {'agree': np.array(agree['text_audio_agreement']), 'chance': np.array(chance), 'used': np.array(used),
          'codes': (train, text)}


def main() -> None:
  parser = argparse.ArgumentParser()
  parser.add_argument('workdir', type=pathlib.Path)
  parser.add_argument('--codes', type=int, nargs='+', default=[64, 256])
  parser.add_argument('--maps', nargs='+', default=list(METHODS), choices=METHODS)
  parser.add_argument('--clips', type=int, default=4000)
  parser.add_argument('--seeds', type=int, default=3, help='starts of k-means; means over them are printed')
  args = parser.parse_args()
  *pairs, facts, held_facts = embeddings(args.workdir, args.clips)
  leads = [np.array([fact['lead'] for fact in rows]) for rows in (facts, held_facts)]
  print('| K | map | fitted on | agree 1 | 2 | 3 | 4 | chance 1 | perplexity 1 | 2 | lead told by the first code of a '
        'text | by two |\n|' + '---|' * 12)
  for codes in args.codes:
    for name in args.maps:
      move = METHODS[name](*pairs[0])
      fitted, held = ([np.asarray(unit(jnp.asarray(x, jnp.float32))) for x in move(*p)] for p in pairs)
      for fit_on in ('audio', 'text', 'both'):
        found = [measured(fitted, held, fit_on, codes, seed) for seed in range(args.seeds)]
        told = np.array([[told_by(r['codes'][0][:, :q], leads[0], r['codes'][1][:, :q], leads[1]) for q in (1, 2)]
                         for r in found])
        mean = lambda key, found=found: np.mean([r[key] for r in found], axis=0)
        cells = [*(f'{x:.2f}' for x in mean('agree')), f'{mean("chance"):.3f}',
                 *(f'{x:.0f}' for x in mean('used')), *(f'{x:.2f}' for x in told.mean(0))]
        print(f'| {codes} | {name} | {fit_on} | ' + ' | '.join(cells) + ' |', flush=True)


def told_by(train_NxQ: np.ndarray, labels_N: np.ndarray, text_MxQ: np.ndarray, true_M: np.ndarray) -> float:
  """How often the commonest label of the training clips with the text's codes is the right one."""
  right = 0
  for row, true in zip(text_MxQ, true_M):
    mine = labels_N[(train_NxQ == row).all(axis=1)]
    values, counts = np.unique(mine, return_counts=True)
    right += bool(len(values)) and values[counts.argmax()] == true
  return right / len(true_M)


if __name__ == '__main__':
  main()
