"""Pretrains a small BERT on words about music, as a stand-in for a published one: what does it know that pairs do not?

  pip install -e .[train] torch transformers
  python -m tests.benchmarks.text_pretraining OUT [--steps 3000]

writes OUT/model.safetensors and OUT/vocab.txt of the size of MuLan's text tower in `size/tiny.gin`, by masked words
(arXiv 1810.04805, section 3.1) on sentences that put two words for the same side by side ("a sluggish, slow tune"), as
much text does. Among them are the synonyms that no training text of the built-in music has. Compare, on held-out
pairs, a MuLan that begins with these weights with one that has the same vocabulary and begins at random:

  musiclm train --gin_file experiments/mulan.gin --gin_file mulan/published_bert.gin --gin.MULAN_TEXT_VOCAB=...
      --gin.BERT_WEIGHTS=OUT/model.safetensors --gin.MULAN_VOCABULARY=OUT/vocab.txt --workdir W/mulan
"""
from __future__ import annotations

import argparse
import collections
import pathlib
import random
import re

from musiclm_jax.data import composer_texts

LENGTH, MASKED = 48, 0.15
SPECIAL = ['[PAD]', '[UNK]', '[CLS]', '[SEP]', '[MASK]']
FRAMES = ('{} and {}', '{}, that is {}', '{} or {}', 'something {}, rather {}', 'both {} and {}', '{}: {}')


def sentences(count: int) -> list[str]:
  generator = random.Random(0)
  groups = [[*known, *held_out] for values in composer_texts.WORDS.values() for known, held_out in values.values()]
  groups = [group for group in groups if len(group) > 1]
  made = []
  for _ in range(count):
    parts = []
    for group in generator.sample(groups, 2):
      parts.append(generator.choice(FRAMES).format(*generator.sample(group, 2)))
    made.append('; '.join(parts).lower())
  return made


def vocabulary(texts: list[str]) -> list[str]:
  """Whole words and single signs: there are few."""
  found = collections.Counter(piece for text in texts for piece in re.findall(r"\w+|[^\w\s]", text))
  known = collections.Counter(
      piece for score in range(2000) for said in composer_texts.texts(_score(score)) for piece in
      re.findall(r"\w+|[^\w\s]", said['text'].lower()))
  letters = [chr(c) for c in range(ord('a'), ord('z') + 1)] + [str(d) for d in range(10)]
  return SPECIAL + sorted(found.keys() | known.keys() | set(letters)) + [f'##{c}' for c in letters]


def _score(index: int):
  from musiclm_jax.data import composer
  return composer.compose(0, index, 5.0)


def main() -> None:
  parser = argparse.ArgumentParser()
  parser.add_argument('out', type=pathlib.Path)
  parser.add_argument('--steps', type=int, default=3000)
  parser.add_argument('--batch', type=int, default=64)
  args = parser.parse_args()
  import numpy as np
  import torch
  from transformers import BertConfig, BertForMaskedLM
  from musiclm_jax.text.tokenizer import Tokenizer
  args.out.mkdir(parents=True, exist_ok=True)
  texts = sentences(20_000)
  pieces = vocabulary(texts)
  (args.out / 'vocab.txt').write_text('\n'.join(pieces) + '\n')
  tokenizer = Tokenizer.load(args.out / 'vocab.txt')
  ids = torch.from_numpy(np.stack([tokenizer.encode(text, LENGTH) for text in texts])).long()
  ids = torch.cat([torch.full((len(ids), 1), pieces.index('[CLS]')), ids], dim=1)
  torch.manual_seed(0)
  model = BertForMaskedLM(BertConfig(
      vocab_size=len(pieces), hidden_size=128, num_hidden_layers=2, num_attention_heads=4, intermediate_size=256,
      max_position_embeddings=73, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)).train()
  optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
  for step in range(args.steps):
    batch = ids[torch.randint(len(ids), (args.batch,))]
    masked = (torch.rand(batch.shape) < MASKED) & (batch >= len(SPECIAL))
    shown = torch.where(masked, pieces.index('[MASK]'), batch)
    loss = model(input_ids=shown, attention_mask=(batch != 0).long(),
                 labels=torch.where(masked, batch, -100)).loss
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step % 250 == 0:
      print(f'{step}: {loss.item():.3f} nats a masked word', flush=True)
  model.save_pretrained(args.out, safe_serialization=True)
  print(f'{len(pieces)} pieces: --gin.MULAN_TEXT_VOCAB={-(-len(pieces) // 128) * 128}')


if __name__ == '__main__':
  main()
