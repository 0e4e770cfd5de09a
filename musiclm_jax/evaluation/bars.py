"""The bars: what each figure has to reach, in one table, checked mechanically.

A figure is named by its path in the report ("codec.perplexity_share[0]"). A figure that is missing has not
reached its bar. Nothing here can change how a figure is measured.
"""
from __future__ import annotations

from collections.abc import Mapping, Sequence
import dataclasses
import math
import numbers
import operator
import re
from typing import Any

_RELATIONS = {'<=': operator.le, '<': operator.lt, '>=': operator.ge, '>': operator.gt}
_RELATION_WORDS = {'<=': 'at most', '<': 'below', '>=': 'at least', '>': 'above'}


@dataclasses.dataclass(frozen=True)
class Limit:
  """A number, or another figure times `factor` plus `offset`."""

  figure: str
  factor: float = 1.0
  offset: float = 0.0

  def words(self) -> str:
    factor = '' if self.factor == 1.0 else f'{self.factor:g} x '
    offset = '' if self.offset == 0.0 else f' {"+" if self.offset > 0 else "-"} {abs(self.offset):g}'
    return f'{factor}{self.figure}{offset}'


@dataclasses.dataclass(frozen=True)
class Bar:
  """`figure` must stand in `relation` to `limit`.

  Attributes:
    figure: path of the figure.
    relation: one of <=, <, >=, >.
    limit: a number or a `Limit`.
    words: what reaching it means, for a reader who knows no jargon.
    takes: what it would take where it is missed.
    alternatives: other bars, any one of which is enough.
  """

  figure: str
  relation: str
  limit: float | Limit
  words: str
  takes: str = ''
  alternatives: tuple[Bar, ...] = ()

  def __post_init__(self):
    if self.relation not in _RELATIONS:
      raise ValueError(f'bar of {self.figure}: relation {self.relation!r} is not one of {list(_RELATIONS)}')


@dataclasses.dataclass(frozen=True)
class BarResult:
  """How a bar came out. `value` and `limit` are None where they were not measured; `reason` says why."""

  figure: str
  passed: bool
  value: float | None
  limit: float | None
  relation: str
  limit_words: str
  words: str
  takes: str
  reason: str

  @property
  def measured(self) -> bool:
    return self.value is not None and self.limit is not None

  def as_dict(self) -> dict[str, Any]:
    return dataclasses.asdict(self)


def look_up(figures: Mapping[str, Any], path: str) -> float | None:
  """The number at `path`, names joined by dots and list places in brackets; None where there is none.

  Not a number, or not a finite one, counts as none.
  """
  value: Any = figures
  for part in re.findall(r'[^.\[\]]+', path):
    if isinstance(value, Mapping):
      value = value.get(part)
    elif isinstance(value, (list, tuple)) and part.isdigit() and int(part) < len(value):
      value = value[int(part)]
    else:
      return None
  if isinstance(value, bool) or not isinstance(value, numbers.Real) or not math.isfinite(value):
    return None
  return float(value)


def evaluate(bar: Bar, figures: Mapping[str, Any]) -> BarResult:
  """Compares one bar's figure to its limit; where there are alternatives, the first that passes counts."""
  first = _evaluate_one(bar, figures)
  results = [first, *(_evaluate_one(b, figures) for b in bar.alternatives)]
  if not bar.alternatives:
    return first
  best = next((r for r in results if r.passed), next((r for r in results if r.measured), first))
  limit_words = ' or '.join(
      f'{r.figure} {_RELATION_WORDS[r.relation]} {r.limit_words}' for r in results if r is not best)
  return dataclasses.replace(
      best, words=bar.words, takes='' if best.passed else bar.takes,
      limit_words=f'{best.limit_words} (or {limit_words})')


def _evaluate_one(bar: Bar, figures: Mapping[str, Any]) -> BarResult:
  value = look_up(figures, bar.figure)
  if isinstance(bar.limit, Limit):
    reference = look_up(figures, bar.limit.figure)
    limit = None if reference is None else reference * bar.limit.factor + bar.limit.offset
    limit_words = bar.limit.words()
  else:
    limit, limit_words = float(bar.limit), f'{bar.limit:g}'
  if value is None:
    reason = f'{bar.figure} was not measured'
  elif limit is None:
    reason = f'{bar.limit.figure}, to which it is compared, was not measured'
  else:
    reason = ''
  passed = not reason and bool(_RELATIONS[bar.relation](value, limit))
  if not reason and not passed:
    reason = f'{value:.4g} is not {_RELATION_WORDS[bar.relation]} {limit:.4g}'
  return BarResult(bar.figure, passed, value, limit, bar.relation, limit_words, bar.words,
                   '' if passed else bar.takes, reason)


def evaluate_bars(figures: Mapping[str, Any], bars: Sequence[Bar] | None = None) -> list[BarResult]:
  """All bars in their order (default: `BARS`)."""
  return [evaluate(bar, figures) for bar in (BARS if bars is None else bars)]


_MORE_STEPS = 'More training steps (the same commands at size/small.gin), or a faster machine for them.'
_CODEC_STEPS = 'More codec steps; a larger waveform weight lifts SI-SDR at the cost of the mel distance.'
_STAGE_STEPS = 'More steps of this stage: these curves start flat and fall late.'

_CODEC = (
    Bar('codec.mel_distance', '<=', Limit('codec.mel_distance_clip_median', 0.85),
        'Reconstructions follow events in time: clearly closer than the best constant spectrum of the clip.',
        _CODEC_STEPS),
    Bar('codec.si_sdr_db', '>=', 3.0,
        'The waveform itself is recovered: signal at least twice as strong as the error.', _CODEC_STEPS),
    Bar('codec.si_sdr_db_by_levels.12', '>', Limit('codec.si_sdr_db_by_levels.4'),
        'The fine levels (5 to 12) carry something.', _CODEC_STEPS),
    Bar('codec.si_sdr_db_by_levels.4', '>', Limit('codec.si_sdr_db_by_levels.1'),
        'Levels 2 to 4 carry something.', _CODEC_STEPS),
    Bar('codec.perplexity_share[0]', '>=', 0.5,
        'At least half of the first codebook is in even use on clips that training never saw.',
        'More codec steps, or a data-dependent start on more clips.'),
    Bar('codec.perplexity_frames', '>=', Limit('codec.codebook_size', 20.0),
        'Perplexity was measured on at least 20 frames for each code.', 'More held-out clips.'),
    Bar('codec.restart_share', '<', 0.01,
        'At the end of training fewer than 1% of the codes are restarted in a step.',
        'More codec steps, or larger batches.'),
)
_MULAN = (
    Bar('mulan.recall_at_1', '>=', 0.35, 'A description finds its own clip among 64, first try.',
        _MORE_STEPS),
    Bar('mulan.recall_at_1_of_200', '>=', 0.2, 'A description finds its own clip among 200, first try.',
        _MORE_STEPS),
    Bar('mulan.text_audio_agreement[0]', '>=', 0.4,
        'The first MuLan token of a text is that of its clip, so that training on audio and prompting with '
        'text mean the same.', _MORE_STEPS),
)
_SEMANTIC = (
    Bar('semantic.masked_cross_entropy', '<=', Limit('semantic.target_entropy', 0.75),
        'The network guesses masked frames of unseen clips far better than their frequencies allow.',
        _MORE_STEPS),
    Bar('semantic.probes.tempo.trained', '>=', Limit('semantic.probes.tempo.untrained', offset=0.05),
        'Training put something of tempo or meter into the tokens that the untrained network has not.',
        'More steps of the semantic network: rhythm is learned late.',
        (Bar('semantic.probes.meter.trained', '>=',
             Limit('semantic.probes.meter.untrained', offset=0.05), ''),)),
)


def _stage(name: str, ratio: float, baseline: str, condition: str, gap: float) -> tuple[Bar, ...]:
  path = f'stages.{name}'
  return (
      Bar(f'{path}.bits_per_token', '<', Limit(f'{path}.bigram_bits_per_token'),
          'The stage predicts better than a table of which token follows which.', _STAGE_STEPS),
      Bar(f'{path}.bits_per_token', '<=', Limit(f'{path}.{baseline}_bits_per_token', ratio),
          f'The stage predicts clearly better than the {baseline} baseline.', _STAGE_STEPS),
      Bar(f'{path}.unigram_share_of_log2_k', '>=', 0.6,
          'No level of its tokens is so unevenly used that predicting it is easy.',
          'A better fitted codebook: more steps of the tokenizer.'),
      Bar(f'{path}.condition_gap.{condition}.bits', '>=', gap,
          f'The stage listens to its {condition} condition: given that of another recording it does worse.',
          _STAGE_STEPS),
      Bar(f'{path}.condition_gap.{condition}.interval[0]', '>', 0.0,
          f'That loss without the right {condition} condition is no accident (95% interval above 0).',
          _STAGE_STEPS + ' Or more held-out recordings.'),
  )


_GENERATION = (
    Bar('generation.mcc_p_value', '<', 0.01,
        'Samples fit their own prompt better than other prompts, by MuLan; chance would rarely do that.',
        _MORE_STEPS),
    Bar('generation.judge_timbre', '>=', Limit('generation.judge_chance', 2.0),
        'A judge that knows nothing of MuLan hears the prompted lead at least twice as often as chance.',
        _MORE_STEPS),
    Bar('generation.judge_timbre_interval[0]', '>', Limit('generation.judge_chance'),
        'And that is no accident (95% interval above chance).', _MORE_STEPS + ' Or more prompts.'),
    Bar('generation.frechet', '<', Limit('generation.frechet_unigram'),
        'Samples sound more like held-out music than tokens drawn by frequency alone.', _MORE_STEPS),
)

BARS: tuple[Bar, ...] = (
    *_CODEC, *_MULAN, *_SEMANTIC,
    *_stage('semantic', 0.95, 'bigram', 'mulan', 0.02),
    *_stage('coarse', 0.85, 'unigram', 'semantic', 0.01),
    *_stage('fine', 0.985, 'unigram', 'coarse', 0.1),
    *_GENERATION)
