"""Long music, stories and streaming on the trained networks of a workdir (`musiclm quickstart` makes one).

  python -m tests.benchmarks.long_generation --workdir quickstart                  # all of it
  python -m tests.benchmarks.long_generation --workdir quickstart --only memory seams --minutes 10

Prints a table. Memory is the resident set of the process. Seams: spectral flux at the borders of windows against that
elsewhere, and the same test on a piece that is cut hard at these borders. Stories: in how many windows after a change
the new text scores above the old one, by MuLan and by the judge of the report, beside recordings that it describes.
"""
from __future__ import annotations

import argparse
import itertools
import os
import pathlib
import time

import numpy as np
from scipy import stats

from musiclm_jax import evaluate
from musiclm_jax.cascade import Cascade
from musiclm_jax.cascade_networks import CascadeNetworks
from musiclm_jax.evaluation import audio_measures, judge as judges
from musiclm_jax.generate import clips, modes, pipeline
from musiclm_jax.generate.modes import Request
from musiclm_jax.generate.pipeline import Settings
from musiclm_jax.generate.prompts import Prompt
from musiclm_jax.generate.story import Story

TEXT = 'A calm melody on the piano with soft drums.'
HOP_SECONDS = 0.01
NEAR = 3  # frames of flux around a border


def resident_megabytes() -> float:
  return int(pathlib.Path('/proc/self/statm').read_text().split()[1]) * os.sysconf('SC_PAGE_SIZE') / 2**20


def flux(audio_N: np.ndarray, rate: int) -> np.ndarray:
  """How much louder the bands become from frame to frame, [F]; frame i is centred at i * HOP_SECONDS."""
  hop, width = round(HOP_SECONDS * rate), round(0.02 * rate)
  window, parts, before = np.hanning(width), [], None
  for first in range(0, len(audio_N) // hop, 6000):
    centres = np.arange(first, min(first + 6000, len(audio_N) // hop)) * hop
    index = centres[:, None] + np.arange(width) - width // 2
    frames = np.where((index >= 0) & (index < len(audio_N)), audio_N[np.clip(index, 0, len(audio_N) - 1)], 0)
    level = np.log(1e-4 + np.abs(np.fft.rfft(frames * window, axis=1)))
    rise = np.diff(level, axis=0, prepend=level[:1] if before is None else before)
    parts.append(np.maximum(rise, 0).mean(axis=1))
    before = level[-1:]
  return np.concatenate(parts)


def seam_figures(audio_N: np.ndarray, rate: int, borders: np.ndarray) -> tuple[float, float]:
  """Share of borders (in seconds) above the 99th percentile of flux elsewhere, and the Mann-Whitney p of both.

  Each place is the highest flux of NEAR frames; places elsewhere do not overlap one another nor a border.
  """
  found = flux(audio_N, rate)
  highest = lambda centre: found[max(0, centre - NEAR // 2):centre + NEAR // 2 + 1].max()
  at = [round(b / HOP_SECONDS) for b in borders if NEAR < b / HOP_SECONDS < len(found) - NEAR]
  taken = np.zeros(len(found), bool)
  for centre in at:
    taken[centre - NEAR:centre + NEAR + 1] = True
  elsewhere = [c for c in range(NEAR, len(found) - NEAR, NEAR) if not taken[c - NEAR // 2:c + NEAR // 2 + 1].any()]
  border, rest = np.array([highest(c) for c in at]), np.array([highest(c) for c in elsewhere])
  return float(np.mean(border > np.quantile(rest, 0.99))), float(stats.mannwhitneyu(border, rest).pvalue)


def long_piece(networks: CascadeNetworks, seconds: float, seed: int) -> tuple[np.ndarray, list[str]]:
  """The audio, and rows of memory and speed."""
  settings, begun = Settings(seconds=seconds), time.monotonic()
  parts, memory, made = [], [], 0
  for block_N in modes.music(networks, Request((Prompt(TEXT),)), settings, seed=seed):
    parts.append(block_N.astype(np.float16))  # what is kept here is not the generator's
    made += len(block_N)
    held = sum(p.nbytes for p in parts) / 2**20
    memory.append((made / networks.sample_rate, resident_megabytes() - held))
  wall = time.monotonic() - begun
  early = [m for t, m in memory if t <= 60]
  later = [m for t, m in memory if t > 60] or early[-1:]
  rows = [f'| memory after the first minute | {early[-1]:.0f} MB |',
          f'| highest later, without the audio that the script keeps | {max(later):.0f} MB '
          f'({100 * (max(later) / early[-1] - 1):+.1f}%) |',
          f'| seconds of audio a second, compiling included | {made / networks.sample_rate / wall:.2f} |']
  return np.concatenate(parts).astype(np.float32), rows


def seams(networks: CascadeNetworks, pieces: list[np.ndarray], seconds: float) -> list[str]:
  """Of each stage's borders in the first piece, and of hard cuts between the two pieces."""
  rows, rate = [], networks.sample_rate
  planned = pipeline.plan(networks, Settings(seconds=seconds))
  for name, plan in planned.windows.items():
    borders = np.array([w.first / 600 for w in plan.windows[1:] if w.first / 600 < seconds - 0.1])
    share, p = seam_figures(pieces[0], rate, borders)
    rows.append(f'| {name} | {len(borders)} | {100 * share:.1f}% | {p:.3f} |')
    edges = np.round(borders * rate).astype(int)
    which = np.searchsorted(edges, np.arange(len(pieces[0])), side='right') % 2
    share, p = seam_figures(np.where(which, pieces[1], pieces[0]), rate, borders)
    rows.append(f'| {name}, cut hard there | {len(borders)} | {100 * share:.1f}% | {p:.1e} |')
  return rows


def first_audio(networks: CascadeNetworks) -> list[str]:
  rows = []
  for seconds, block in itertools.product((10.0, 60.0), (0.0, 0.5)):
    for _ in range(2):  # the first time to compile
      begun, times = time.monotonic(), []
      for _ in modes.music(networks, Request((Prompt(TEXT),)), Settings(seconds=seconds, block_seconds=block)):
        times.append(time.monotonic() - begun)
    rows.append(f'| {seconds:g} s | {block or "default"} | {times[0]:.2f} s | {times[-1]:.2f} s | '
                f'{100 * times[0] / times[-1]:.1f}% |')
  return rows


def stories(root: pathlib.Path, networks: CascadeNetworks, count: int, seed: int, settings: Settings) -> list[str]:
  """Pairs of held-out clips of different leads: their texts in turn, and what the halves sound like."""
  measure = evaluate._Measure(root, seed, evaluate.Amounts(clips=400, judge_clips=600))
  heard_NxT, examples = measure.held_out
  leads = [e['attributes']['lead'] for e in examples]
  codec, levels = networks.cascade.part('codec').model, networks.codec_spec.levels
  round_trip = lambda clips_NxT: audio_measures.round_trip(codec, clips_NxT, (levels,))[1][levels]
  train_NxT, train = measure.clips(evaluate.records.RecordSet(root / evaluate.RECORDS, 'train'), 600)
  judge = judges.fit(round_trip(train_NxT), [e['attributes']['lead'] for e in train], sample_rate=measure.rate)
  pairs = [(i, i + 1) for i in range(0, len(leads) - 1) if leads[i] != leads[i + 1]][:count]
  texts = measure.texts(examples, 'test')
  ours, theirs = {'MuLan': [], 'judge': []}, {'MuLan': [], 'judge': []}
  half = settings.seconds / 2
  for number, (i, j) in enumerate(pairs):
    request = Request(story=Story(((0.0, texts[i]), (half, texts[j]))))
    audio_N = np.concatenate(list(modes.music(networks, request, settings, seed=seed + number)))
    embedding_2xE = np.asarray(networks.embed_text(networks.text_ids([texts[i], texts[j]])))
    new = audio_N[round(half * networks.sample_rate):]
    for scores, piece_N in ((ours, new), (theirs, round_trip(heard_NxT[j:j + 1])[0])):
      score_windows(scores, networks, judge, piece_N, embedding_2xE, (leads[i], leads[j]))
  return [f'| {name} | {100 * np.mean(ours[name]):.0f}% of {len(ours[name])} | {100 * np.mean(theirs[name]):.0f}% of '
          f'{len(theirs[name])} |' for name in ours]


def score_windows(scores: dict[str, list[bool]], networks: CascadeNetworks, judge: judges.Judge, audio_N: np.ndarray,
                  embedding_2xE: np.ndarray, leads: tuple[str, str]) -> None:
  """Adds, for each window that MuLan hears, whether the second text, and the second lead, is the likelier one."""
  length = round(networks.mulan_window / networks.mulan_rate * networks.sample_rate)
  for first in range(0, max(1, len(audio_N) - length + 1), length):
    window_N = audio_N[first:first + length]
    old, new = embedding_2xE @ clips.embed(networks, window_N, networks.sample_rate)
    scores['MuLan'].append(bool(new > old))
    probability = judge.network.predict_proba(judge._scaled(window_N[None]))[0]
    old, new = (probability[judge.classes.index(lead)] for lead in leads)
    scores['judge'].append(bool(new > old))


def main() -> None:
  parser = argparse.ArgumentParser()
  parser.add_argument('--workdir', required=True)
  parser.add_argument('--only', nargs='+', default=['memory', 'seams', 'first', 'stories'])
  parser.add_argument('--minutes', type=float, default=10.0)
  parser.add_argument('--stories', type=int, default=20)
  parser.add_argument('--seed', type=int, default=0)
  parser.add_argument('--story_context', type=float, default=0.0, help='as of musiclm generate')
  parser.add_argument('--guidance', type=float, help='of the stories; default: as usual')
  args = parser.parse_args()
  networks = CascadeNetworks(Cascade(args.workdir))
  show = lambda *rows: print(*rows, sep='\n', flush=True)
  if {'memory', 'seams'} & set(args.only):
    pieces, rows = [], []
    for seed in (args.seed, args.seed + 1) if 'seams' in args.only else (args.seed,):
      audio_N, found = long_piece(networks, 60 * args.minutes, seed)
      pieces.append(audio_N)
      rows = rows or found
    show(f'| {args.minutes:g} minutes | |', '|---|---|', *rows)
    if 'seams' in args.only:
      show('', '| borders of windows | number | above the 99th percentile elsewhere | Mann-Whitney p |',
           '|---|---|---|---|', *seams(networks, pieces, 60 * args.minutes))
  if 'first' in args.only:
    show('', '| length | block | first audio | all of it | share |', '|---|---|---|---|---|', *first_audio(networks))
  if 'stories' in args.only:
    settings = Settings(seconds=30.0, sampling=pipeline.adjusted(networks, guidance=args.guidance),
                        story_context=args.story_context)
    show('', '| the new text above the old one | after the change | recordings that the new text describes |',
         '|---|---|---|', *stories(pathlib.Path(args.workdir), networks, args.stories, args.seed, settings))


if __name__ == '__main__':
  main()
