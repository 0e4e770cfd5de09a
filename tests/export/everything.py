"""All that generation asks of networks, and what it makes of that: the same for a workdir and for its bundle.

Run as a program, it asks a bundle where only the base install can be imported, and saves the answers.
"""
from collections.abc import Sequence
import sys

import jax
import numpy as np
import soundfile

from musiclm_jax.generate import modes
from musiclm_jax.generate.infill import Gap
from musiclm_jax.generate.modes import Continuation, Request
from musiclm_jax.generate.pipeline import Settings
from musiclm_jax.generate.prompts import Prompt
from musiclm_jax.generate.story import Story
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


class Recorder:
  """Networks that keep every token they draw."""

  def __init__(self, networks):
    self._networks, self.drawn = networks, []

  def __getattr__(self, name):
    return getattr(self._networks, name)

  def sample_rows(self, *arguments):
    codes = self._networks.sample_rows(*arguments)
    self.drawn.append(np.asarray(codes).ravel())
    return codes


def requests(clip: str) -> dict[str, tuple[Request, dict]]:
  """One of each mode, with the settings that differ from the usual ones."""
  piano, flute = Prompt(text='slow piano'), Prompt(text='a flute')
  style = Prompt(audio=clip, weight=0.5)
  guided = {'sampling': {stage: Sampling(1.0, guidance=3.0) for stage in ('semantic', 'coarse')}}
  return {
      'text': (Request((piano,)), {}),
      'guided': (Request((piano,), negative='fast drums'), {**guided, 'mulan_levels': 3}),
      'style': (Request((style,)), {}),
      'mixture': (Request((piano, flute, style)), {}),
      'story': (Request(story=Story(((0.0, 'slow piano'), (0.6, 'a flute')))), {}),
      'continuation': (Request((flute,), continuation=Continuation(clip)), {}),
      'gap': (Request((piano,), gap=Gap(clip, 0.6, 1.0), best_of=2), {}),
      'unconditional': (Request(), {}),
      'best of two': (Request((piano,), best_of=2), {}),
  }


def music(networks, clip: str) -> dict[str, np.ndarray]:
  """Tokens and audio of every mode with fixed seeds."""
  found = {}
  for name, (request, changes) in requests(clip).items():
    recorder = Recorder(networks)
    found[f'{name} audio'] = np.concatenate(list(modes.music(recorder, request, Settings(1.2, **changes), seed=7)))
    found[f'{name} tokens'] = np.concatenate(recorder.drawn)
  return found


def write_clip(path: str) -> str:
  """Two seconds of noise that swells."""
  swelling = np.linspace(0.01, 0.3, 48000) * np.random.default_rng(5).normal(size=48000)
  soundfile.write(path, swelling.astype(np.float32), 24000)
  return path


def main(bundle: str, output: str, what: str) -> None:
  import musiclm_jax
  loaded = musiclm_jax.load(bundle)
  if what == 'answers':
    np.savez(output, **answers(loaded, ['coarse']))
  else:
    found = answers(loaded, ['semantic', 'fine']) | music(loaded, write_clip('clip.wav')) | from_python(loaded)
    np.savez(output, **found)
  print(*sorted(sys.modules))


def from_python(loaded) -> dict[str, np.ndarray]:
  """The same text and seed as `music` has, through the methods of a bundle."""
  return {'api': loaded.generate('slow piano', seconds=1.2, seed=7),
          'api blocks': np.concatenate(list(loaded.stream('slow piano', seconds=1.2, seed=7, block_seconds=0.4)))}


if __name__ == '__main__':
  main(*sys.argv[1:])
