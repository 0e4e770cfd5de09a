"""How strongly samples follow their texts, by the guidance of the semantic and the coarse stage.

  python -m tests.benchmarks.guidance --workdir quickstart --guidance 1 3 4 6

Prompts are the texts of held-out clips that the report does not ask for, each lead equally often, so that what is
chosen here is not chosen by what is reported. Prints, for each guidance: the MuLan cosine of samples with their own
text above that with the others' (and its standard error over prompts), how often the judge of the report hears the
lead (with a 95% interval over prompts, whose samples are not independent), and the Frechet distance of the samples to
held-out clips in its embedding.
"""
from __future__ import annotations

import argparse
import dataclasses
import pathlib

import numpy as np

from musiclm_jax import evaluate
from musiclm_jax.cascade_networks import CascadeNetworks
from musiclm_jax.evaluation import frechet, statistics
from musiclm_jax.evaluation.batched import in_batches
from musiclm_jax.generate.pipeline import Settings

REPORT = evaluate.Amounts().prompts  # of the report: the first


def main() -> None:
  parser = argparse.ArgumentParser()
  parser.add_argument('--workdir', required=True)
  parser.add_argument('--guidance', type=float, nargs='+', default=[1.0, 3.0])
  parser.add_argument('--stages', nargs='+', default=['semantic', 'coarse'])
  parser.add_argument('--prompts', type=int, default=32)
  parser.add_argument('--seeds', type=int, default=2)
  parser.add_argument('--seconds', type=float, default=5.0)
  args = parser.parse_args()
  measure = evaluate._Measure(pathlib.Path(args.workdir), 5, evaluate.Amounts(seeds=args.seeds, prompts=args.prompts))
  usual = CascadeNetworks(measure.cascade).sampling
  _, examples = measure.held_out_pairs
  chosen = evaluate._prompts(examples, measure.pair_texts, REPORT + args.prompts)[REPORT:]
  prompts = [measure.pair_texts[i] for i in chosen]
  text_PxE = measure.pair_embeddings[1][chosen]
  leads = np.repeat([examples[i]['attributes']['lead'] for i in chosen], args.seeds)
  embed = lambda audio: in_batches(measure.cascade.function('mulan', 'embed_audio'), audio, batch_size=16)

  length = round(args.seconds * measure.rate)
  judge = measure.judge_of(length)
  held_out = frechet.moments(judge.embed(measure.held_out[0][:, :length]))

  print('| guidance | own text above the others | judge hears the lead | Frechet distance | seconds |')
  print('|---|---|---|---|---|')
  for guidance in args.guidance:
    sampling = {name: dataclasses.replace(s, guidance=guidance if name in args.stages else 1.0)
                for name, s in usual.items()}
    samples_PxSxT, _, seconds = measure._sample(prompts, Settings(seconds=args.seconds, sampling=sampling))
    flat_NxT = samples_PxSxT.reshape(-1, samples_PxSxT.shape[-1])
    similarity_PxSxP = np.einsum('PSE,QE->PSQ', embed(flat_NxT).reshape(len(prompts), args.seeds, -1), text_PxE)
    own_PxS = np.einsum('PSP->PS', similarity_PxSxP)
    others_PxS = (similarity_PxSxP.sum(-1) - own_PxS) / (len(prompts) - 1)
    gap_P = (own_PxS - others_PxS).mean(1)
    heard = statistics.bootstrap_interval(
        judge.name(flat_NxT) == leads, np.repeat(np.arange(len(prompts)), args.seeds))
    distance = frechet.distance(frechet.moments(judge.embed(flat_NxT)), held_out)
    print(f'| {guidance:g} | {gap_P.mean():.3f} +- {gap_P.std() / len(gap_P) ** 0.5:.3f} | '
          f'{heard.value:.3f} ({heard.low:.3f} to {heard.high:.3f}) | {distance:.0f} | {seconds:.0f} |', flush=True)


if __name__ == '__main__':
  main()
