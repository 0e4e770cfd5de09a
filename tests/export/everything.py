"""All that generation asks of networks, and what it makes of that: the same for a workdir and for its bundle.

Run as a program, it asks a bundle where only the base install can be imported, and saves the answers.
"""
from collections.abc import Sequence
import sys

import jax
import numpy as np

from musiclm_jax.generate import pipeline
from musiclm_jax.generate.pipeline import Settings
from musiclm_jax.token_lm.draw import Sampling
from musiclm_jax.token_lm.sequence import Layout


def answers(networks, stages: Sequence[str]) -> dict[str, np.ndarray]:
  """Each function of `generate.networks.Networks` once at least, by name; those of a stage for each of `stages`."""
  noise = lambda *shape: np.random.default_rng(0).normal(0, 0.1, shape).astype(np.float32)
  text = networks.embed_text(networks.text_ids(['slow piano', 'fast drums, no bass']))
  window = noise(2, networks.mulan_window)
  lengths = np.array([networks.mulan_window, networks.mulan_window // 2], np.int32)
  audio = networks.embed_window(window, lengths)
  frame = round(networks.sample_rate / networks.codec_spec.frame_rate)
  acoustic = networks.acoustic_tokens(noise(2, 30 * frame))
  found = {'text': text, 'expected': networks.expected_audio(text), 'audio': audio, 'acoustic': acoustic,
           'mulan': networks.mulan_tokens(audio),
           'semantic': networks.semantic_tokens(noise(2, 2 * networks.semantic_rate),
                                                np.array([2, 1], np.int32) * networks.semantic_rate)}
  state, parts = networks.decode_state(2), []
  for part in (acoustic[:, :8], acoustic[:, 8:20], acoustic[:, 20:]):
    decoded, state = networks.decode_step(part, state)
    parts.append(decoded)
  found['decoded'] = np.concatenate(parts, axis=1)
  found['decoded one level'] = networks.decode_step(acoustic[..., :1], networks.decode_state(2))[0]
  for name in stages:
    answered = of_stage(networks, name, Layout(networks.stages[name], 0.2))
    found |= {f'{name} {what}': x for what, x in answered.items()}
  return {name: np.asarray(x) for name, x in found.items()}


def of_stage(networks, name: str, layout: Layout) -> dict[str, np.ndarray]:
  rows = np.random.default_rng(1).integers(0, 8, (3, layout.length), np.int32) + layout.first_row_L
  given, keys = layout.condition_length + 2 * layout.stage.target.levels, jax.random.split(jax.random.key(3), 3)
  run = lambda null, numbers: networks.sample_rows(
      name, rows[:, :given], null, layout.positions_2xL, layout.condition_length, keys, numbers)
  return {'plain': run(None, Sampling(0.9, top_k=5, top_p=0.95).numbers),
          'guided': run(rows[::-1, :given], Sampling(1.0, guidance=2.0).numbers),
          'nats': networks.row_nats(name, rows, layout.positions_2xL, layout.condition_length)}


def music(networks) -> dict[str, np.ndarray]:
  """Tokens and audio of whole pipelines with fixed seeds."""
  found = {}
  for name, settings in (('text', Settings(1.3)),
                         ('guided', Settings(0.7, {stage: Sampling(1.0, guidance=3.0) for stage in networks.stages},
                                             mulan_levels=3))):
    made = pipeline.generate(networks, ['slow piano', 'fast drums'], settings, seed=7)
    found |= {f'{name} {feature}': tokens for feature, tokens in made.tokens.items()}
    found[f'{name} audio'] = made.audio_BxN
  return found


def main(bundle: str, output: str, what: str) -> None:
  import musiclm_jax
  loaded = musiclm_jax.load(bundle)
  if what == 'answers':
    np.savez(output, **answers(loaded, ['coarse']))
  else:
    np.savez(output, **answers(loaded, ['semantic', 'fine']), **music(loaded), **from_python(loaded))
  print(*sorted(sys.modules))


def from_python(loaded) -> dict[str, np.ndarray]:
  """The same text and seed as `music` has, through the methods of a bundle."""
  return {'api': loaded.generate('slow piano', seconds=1.3, seed=7),
          'api blocks': np.concatenate(list(loaded.stream('slow piano', seconds=1.3, seed=7, block_seconds=0.4)))}


if __name__ == '__main__':
  main(*sys.argv[1:])
