"""How far texts decide what a semantic stage writes, by how it hears them.

  python -m tests.benchmarks.text_control W codes=W/semantic_lm points=W/semantic_points [--levels 1 3 12]

W holds `records` and `tokens` of the built-in music with the networks that made them; the stages are any that were
trained on the tokens. For each stage and each number of MuLan levels shown, on held-out clips: the bits a token that a
clip's own tokens, and those of a text of it (in a template that training never saw), save over no description; and what
is in samples from the texts, told by a judge that shares nothing with MuLan: a logistic regression on which semantic
tokens a clip has, fitted on training clips. Beside it: the held-out clips themselves, and the most frequent answer.

N clips, F frames, Q levels.
"""
from __future__ import annotations

import argparse
import pathlib

import jax
import numpy as np

from musiclm_jax import evaluate
from musiclm_jax.data import records
from musiclm_jax.evaluation import batched, probes, statistics
from musiclm_jax.token_lm import sample
from musiclm_jax.token_lm.draw import Sampling
from musiclm_jax.training import checkpoint, state as states

FACTS = ('lead', 'tempo', 'drums', 'bass', 'chord_style', 'density', 'register')
BATCH = 16


class Judge:
  """Names a fact of a clip from its semantic tokens."""

  def __init__(self, tokens_NxF: np.ndarray, labels_N: np.ndarray, codes: int):
    self.codes = codes
    self.model = probes.classifier().fit(probes.histograms(tokens_NxF, codes), labels_N)

  def right(self, tokens_NxF: np.ndarray, labels_N: np.ndarray) -> np.ndarray:
    return self.model.predict(probes.histograms(tokens_NxF, self.codes)) == labels_N


def token_bits(loaded: checkpoint.Loaded, semantic_NxFx1: np.ndarray, mulan_Nx1xQ: np.ndarray, levels: int
               ) -> np.ndarray:
  """Bits a token of each clip [N] with so many first levels shown."""
  objective = loaded.objective

  def nats(model, batch):
    keep = {'mulan': np.full(len(batch['slot']), levels, np.int32)}
    return objective.token_nats(model, batch, keep=keep)

  run = states.compiled(loaded.model, nats)
  return batched.in_batches(
      lambda semantic, mulan: run({'semantic': semantic, 'mulan': mulan, 'slot': np.arange(len(mulan))}),
      semantic_NxFx1, mulan_Nx1xQ, batch_size=BATCH).mean((1, 2)) / np.log(2)


def sampled(loaded: checkpoint.Loaded, mulan_Nx1xQ: np.ndarray, levels: int, guidance: float, seed: int) -> np.ndarray:
  """Semantic tokens [N, F] of a window, for each row of MuLan tokens."""
  keys_N = jax.random.split(jax.random.key(seed), len(mulan_Nx1xQ))
  return batched.in_batches(
      lambda mulan, keys: sample.sample(
          loaded.model, loaded.objective.layout, {'mulan': mulan}, jax.random.wrap_key_data(keys),
          Sampling(guidance=guidance), keep={'mulan': np.full(len(mulan), levels, np.int32)}),
      mulan_Nx1xQ, np.asarray(jax.random.key_data(keys_N)), batch_size=BATCH)[..., 0]


def main() -> None:
  parser = argparse.ArgumentParser()
  parser.add_argument('workdir', type=pathlib.Path)
  parser.add_argument('stages', nargs='+', metavar='NAME=RUN')
  parser.add_argument('--levels', type=int, nargs='+', default=[1, 3, 12])
  parser.add_argument('--guidance', type=float, default=3.0)
  parser.add_argument('--seed', type=int, default=0)
  args = parser.parse_args()
  measure = evaluate._Measure(args.workdir, 0, evaluate.Amounts())
  tokens = {split: records.RecordSet(args.workdir / 'tokens', split) for split in ('train', 'test')}
  held = [tokens['test'][i] for i in range(len(tokens['test']))]
  _, examples = measure.held_out_pairs
  assert [e['recording'] for e in held[:len(examples)]] == [e['recording'] for e in examples]
  held = held[:len(examples)]
  text_NxE = measure.pair_embeddings[1]
  tokenizer = measure.cascade.part('mulan').model
  mulan = {'clip': np.stack([e['mulan'] for e in held]),
           'text': batched.in_batches(states.compiled(tokenizer, 'text_tokens'), text_NxE, batch_size=32)}
  train = [tokens['train'][i] for i in range(min(len(tokens['train']), 4000))]
  labels = {split: {fact: np.array([e['attributes'].get(fact, 'none') for e in rows]) for fact in FACTS}
            for split, rows in (('train', train), ('test', held))}
  agree = (mulan['clip'] == mulan['text']).mean((0, 1))
  print('agreement of texts with their clips: ' + ', '.join(f'{x:.2f}' for x in agree[:4]) + '\n')
  print('| stage | levels shown | saved by the clip | by its text | ' + ' | '.join(FACTS) + ' | mean |\n' + '|---' *
        (5 + len(FACTS)) + '|')
  judges: dict[str, Judge] = {}
  for name, run in (stage.split('=') for stage in args.stages):
    loaded = checkpoint.load(run)
    target = loaded.objective.stage.target
    frames = loaded.objective.layout.frames(target)
    semantic_NxFx1 = np.stack([e['semantic'][:frames] for e in held])
    if not judges:
      seen = np.stack([e['semantic'][:frames, 0] for e in train])
      judges = {fact: Judge(seen, labels['train'][fact], target.codebook_size) for fact in FACTS}
      real = [judge.right(semantic_NxFx1[..., 0], labels['test'][f]).mean() for f, judge in judges.items()]
      chance = [statistics.majority_share(labels['test'][f]) for f in FACTS]
      row('the held-out clips', '', '', '', real)
      row('chance', '', '', '', chance)
    nothing = token_bits(loaded, semantic_NxFx1, mulan['clip'], 0)
    for levels in args.levels:
      saved = [f'{(nothing - token_bits(loaded, semantic_NxFx1, mulan[kind], levels)).mean():.3f}'
               for kind in ('clip', 'text')]
      made = sampled(loaded, mulan['text'], levels, args.guidance, args.seed)
      row(name, levels, *saved, [judge.right(made, labels['test'][f]).mean() for f, judge in judges.items()])


def row(*cells) -> None:
  *words, figures = cells
  print('| ' + ' | '.join([*map(str, words), *(f'{x:.2f}' for x in (*figures, np.mean(figures)))]) + ' |', flush=True)


if __name__ == '__main__':
  main()
