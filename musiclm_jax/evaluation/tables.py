"""The figures in plain words: every number beside its chance level or baseline, as tables for the report."""
from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
import dataclasses
from typing import Any

from musiclm_jax.evaluation import bars


@dataclasses.dataclass(frozen=True)
class Table:
  """Rows of text cells under headers; the first cell of a row names it, the last may be a sentence."""

  headers: tuple[str, ...]
  rows: tuple[tuple[str, ...], ...]
  words: str = ''

  @property
  def explained(self) -> bool:
    """Whether its rows hold sentences, which a narrow screen shows below each other."""
    return self.headers == _EXPLAINED

  def text(self) -> str:
    """For a terminal: columns under their headers, the first to the left and the others to the right."""
    lines = [self.headers, *self.rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(self.headers))]
    return '\n'.join('  '.join(cell.rjust(w) if i else cell.ljust(w) for i, (cell, w) in enumerate(zip(line, widths)))
                     for line in lines)


@dataclasses.dataclass(frozen=True)
class Section:
  name: str
  title: str
  words: str
  tables: tuple[Table, ...]


@dataclasses.dataclass(frozen=True)
class Row:
  """One figure beside others.

  Attributes:
    path: of the figure in the report.
    label: its name for a reader.
    beside: (what it is, path) of each baseline.
    words: what it means.
    form: how a number is written.
  """

  path: str
  label: str
  beside: tuple[tuple[str, str], ...]
  words: str
  form: str = '{:.3f}'


def number(value: float | None, form: str = '{:.3f}') -> str:
  return '–' if value is None else form.format(value)


PERCENT = '{:.1%}'
_EXPLAINED = ('Figure', 'Value', 'Beside it', 'In plain words')
_CODEC = (
    Row('codec.mel_distance', 'Mel distance',
        (('constant spectrum of the clip', 'codec.mel_distance_clip_median'),
         ('median spectrum of all clips', 'codec.mel_distance_set_median'),
         ('another clip', 'codec.mel_distance_another_clip'),
         ('white noise', 'codec.mel_distance_white_noise'),
         ('silence', 'codec.mel_distance_silence'), ('untrained codec', 'codec.mel_distance_untrained')),
        'How far the spectrogram of the reconstruction is from the clip. 0 is equal, 0.69 is a factor of 2.',
        '{:.2f}'),
    Row('codec.si_sdr_db', 'SI-SDR (dB)', (('signal and error equally strong', ''),),
        'How much stronger the signal is than the error of the waveform. Above 0 the wave is followed.',
        '{:+.1f}'),
    Row('codec.restart_share', 'Code restarts a step', (),
        'Share of codes that were still being replaced at the end of training.', '{:.2%}'),
)
_MULAN = (
    Row('mulan.recall_at_1', 'Found first of 64',
        (('chance', 'mulan.recall_at_1_chance'), ('oracle that reads the facts', 'mulan.oracle_recall_at_1')),
        'A long description, in sentences never seen in training, picks its own clip out of 64.', PERCENT),
    Row('mulan.recall_at_1_of_200', 'Found first of 200',
        (('chance', 'mulan.recall_at_1_chance_of_200'),
         ('oracle that reads the facts', 'mulan.oracle_recall_at_1_of_200')),
        'The same out of 200.', PERCENT),
    Row('mulan.recall_at_10', 'Among the first 10 of 64', (('oracle', 'mulan.oracle_recall_at_10'),),
        'A weak test: a few facts are enough.', PERCENT),
    Row('mulan.unknown_synonyms_recall_at_1', 'Unknown synonyms, first of 64',
        (('known words', 'mulan.recall_at_1'), ('chance', 'mulan.recall_at_1_chance')),
        'Descriptions with words that training never saw. Nothing trained from scratch can know them.',
        PERCENT),
    Row('mulan.zero_shot.macro_auc', 'Tags by their words (area under ROC)',
        (('chance', 'mulan.zero_shot.auc_chance'),),
        'How well the words of a lead, a drum style or a tempo find the clips that have it, averaged over the words.',
        '{:.2f}'),
    Row('mulan.negation.drums.accuracy', '"drums" or "no drums"', (('chance', 'mulan.negation.drums.chance'),),
        'The right one of the two is nearer to the clip, with and without drums alike.', PERCENT),
    Row('mulan.negation.bass.accuracy', '"bass" or "no bass"', (('chance', 'mulan.negation.bass.chance'),),
        'The same for the bass.', PERCENT),
    Row('mulan.order.accuracy', '"a flute, then brass"', (('chance', 'mulan.order.chance'),),
        'Which of two instruments comes first. Windows are averaged: only what is within one can tell.', PERCENT),
)
_SEMANTIC = (
    Row('semantic.masked_cross_entropy', 'Masked prediction (nats)',
        (('knowing only how frequent each target is', 'semantic.target_entropy'),),
        'How surprised the network is by the frames that were hidden from it. Lower is better.', '{:.2f}'),
    Row('semantic.masked_accuracy', 'Masked targets guessed',
        (('most frequent target', 'semantic.masked_accuracy_chance'),), 'Exactly the right one of all codes.',
        PERCENT),
    Row('semantic.contrastive_accuracy', 'True frame among distractors', (),
        'How often the network tells a hidden frame from other frames of the clip.', PERCENT),
)
_GENERATION = (
    Row('generation.mcc_matched', 'Fit to the own prompt',
        (('fit to other prompts', 'generation.mcc_mismatched'),
         ('real clips with their own text', 'generation.mcc_references.real.mcc_matched')),
        'MuLan cosine of a sample with its prompt. It also steers the sampling: alone this proves little.'),
    Row('generation.mcc_p_value', 'Probability by chance (p)', (),
        'How often as large a difference would come up if the prompt did not matter. '
        'The prompt, not the sample, is the unit of the test.', '{:.5f}'),
    Row('generation.judge_timbre', 'Prompted lead timbre heard',
        (('chance', 'generation.judge_chance'), ('judge on codec round trips', 'generation.judge_accuracy')),
        'By a judge that shares nothing with MuLan: a classifier of spectra, trained on codec round trips.',
        PERCENT),
    Row('generation.frechet', 'Frechet distance to real clips',
        (('tokens drawn by frequency', 'generation.frechet_unigram'),
         ('codec round trips', 'generation.frechet_codec_round_trip'),
         ('other real clips', 'generation.frechet_real')),
        "Distance of the two clouds of clips in the judge's embedding. Lower is closer; "
        'only numbers in this row compare.', '{:.1f}'),
    Row('generation.realtime_factor', 'Speed (times real time)', (),
        'Seconds of audio made in a second of computing, once compiled.', '{:.2f}'),
)
_PROBES = {
    'tempo': 'Tempo class', 'meter': 'Meter', 'chord': 'Chord (by frame)', 'drum_style': 'Drum style',
    'timbre': 'Lead timbre'}


def _rows_table(rows: Sequence[Row], figures: Mapping[str, Any]) -> Table | None:
  cells = []
  for row in rows:
    value = bars.look_up(figures, row.path)
    if value is None:
      continue
    beside = [
        f'{what}: {number(reference, row.form)}' for what, path in row.beside
        if (reference := bars.look_up(figures, path) if path else 0.0) is not None]
    cells.append((row.label, number(value, row.form), '\n'.join(beside), row.words))
  return Table(_EXPLAINED, tuple(cells)) if cells else None


def _levels_table(
    figures: Mapping[str, Any], columns: Mapping[str, tuple[str, str]], words: str) -> Table | None:
  """One row a level from lists in the figures: header -> (path of the list, form)."""
  found = {}
  for header, (path, form) in columns.items():
    values: Any = figures
    for part in path.split('.'):
      values = values.get(part) if isinstance(values, Mapping) else None
    if isinstance(values, list) and values:
      found[header] = [number(v, form) for v in values]
  if not found:
    return None
  levels = max(len(v) for v in found.values())
  rows = tuple((str(i + 1), *(v[i] if i < len(v) else '–' for v in found.values())) for i in range(levels))
  return Table(('Level', *found), rows, words)


def _codec(figures: Mapping[str, Any]) -> list[Table | None]:
  by_levels = figures.get('codec', {}).get('si_sdr_db_by_levels', {})
  quality = tuple(
      (f'{levels} of {max(by_levels, key=int)}',
       number(bars.look_up(figures, f'codec.mel_distance_by_levels.{levels}'), '{:.2f}'),
       number(bars.look_up(figures, f'codec.si_sdr_db_by_levels.{levels}'), '{:+.1f}'))
      for levels in sorted(by_levels, key=int))
  return [
      _rows_table(_CODEC, figures),
      Table(('Levels decoded', 'Mel distance', 'SI-SDR (dB)'), quality,
            'Each further level must bring the reconstruction closer.') if quality else None,
      _levels_table(
          figures, {'Perplexity / codes': ('codec.perplexity_share', '{:.2f}'),
                    'Codes seen': ('codec.codes_used_share', PERCENT)},
          'How evenly the codes of each level are used on held-out clips; 1 is perfectly even.')]


def _mulan(figures: Mapping[str, Any]) -> list[Table | None]:
  return [
      _rows_table(_MULAN, figures),
      _levels_table(
          figures, {'Text token = clip token': ('mulan.text_audio_agreement', PERCENT),
                    'Chance': ('mulan.text_audio_agreement_chance', PERCENT),
                    'This and all before': ('mulan.text_audio_agreement_so_far', PERCENT)},
          'Stages are trained on tokens of audio and prompted with tokens of text. To a stage that learns codes they '
          'mean the same where the two agree, which is at the first levels only; one that hears points is shown all.')]


def _semantic(figures: Mapping[str, Any]) -> list[Table | None]:
  probes = figures.get('semantic', {}).get('probes', {})
  rows = tuple(
      (_PROBES.get(name, name), *(
          number(bars.look_up(figures, f'semantic.probes.{name}.{column}'), PERCENT)
          for column in ('trained', 'untrained', 'log_mel', 'chance'))) for name in probes)
  return [
      _rows_table(_SEMANTIC, figures),
      Table(('Read from the tokens', 'Trained', 'Untrained', 'k-means of log-mel', 'Chance'), rows,
            'A linear probe reads facts from which tokens a clip has. Timbre and chord of synthetic music '
            'can be read from the spectrum; what training adds is what lasts longer.') if rows else None]


def _stages(figures: Mapping[str, Any]) -> list[Table | None]:
  stages = figures.get('stages', {})
  bits, gaps, found = [], [], lambda path: bars.look_up(figures, path)
  for name in stages:
    path = f'stages.{name}'
    bits.append((name.capitalize(), *(
        number(found(f'{path}.{column}'), '{:.3f}') for column in (
            'bits_per_token', 'bigram_bits_per_token', 'unigram_bits_per_token', 'uniform_bits_per_token'))))
    for condition in stages[name].get('condition_gap', {}):
      gap = f'{path}.condition_gap.{condition}'
      low, high = found(f'{gap}.interval[0]'), found(f'{gap}.interval[1]')
      gaps.append((
          f'{name.capitalize()} without the right {condition}', number(found(f'{gap}.bits'), '{:+.3f}'),
          f'{number(low, "{:+.3f}")} to {number(high, "{:+.3f}")}',
          number(found(f'{gap}.bits_first_frame'), '{:+.3f}')))
  return [
      Table(('Stage', 'Bits per token', 'Bigram', 'Unigram', 'All codes alike'), tuple(bits),
            'Bits needed for each held-out token; fewer is better. The bigram knows the token before it at '
            'the same level, the unigram only frequencies, both from training tokens.') if bits else None,
      Table(('Condition of another recording', 'Bits lost', '95% interval', 'At the first frame'),
            tuple(gaps),
            'What each condition is worth: the extra bits where it is that of another recording and all '
            'else stays. An interval above 0 means that the stage listens to it.') if gaps else None]


def _generation(figures: Mapping[str, Any]) -> list[Table | None]:
  references = figures.get('generation', {}).get('mcc_references', {})
  rows = tuple(
      (name.replace('_', ' ').capitalize(), *(
          number(bars.look_up(figures, f'generation.mcc_references.{name}.{column}'), form)
          for column, form in (
              ('mcc_matched', '{:.3f}'), ('mcc_mismatched', '{:.3f}'), ('mcc_p_value', '{:.5f}'))))
      for name in references)
  return [
      _rows_table(_GENERATION, figures),
      Table(('To compare with', 'Own prompt', 'Other prompts', 'p'), rows,
            'The same measure on clips that are not samples of these prompts.') if rows else None]


_SECTIONS: tuple[tuple[str, str, str, Callable[[Mapping[str, Any]], list[Table | None]]], ...] = (
    ('generation', 'Generation',
     'Text in, music out: does it do what the prompt says, and does it sound right?', _generation),
    ('stages', 'Token stages',
     'Three language models in a row: semantic writes what happens over seconds from the prompt, coarse the '
     'rough sound of every frame from that, fine its detail.', _stages),
    ('codec', 'Codec', 'Turns audio into tokens and back. Everything that is heard went through it.', _codec),
    ('mulan', 'Text and music (MuLan)', 'One space for clips and their descriptions.', _mulan),
    ('semantic', 'Semantic tokens', 'Tokens for what lasts longer than a frame of sound.', _semantic),
)


def sections(figures: Mapping[str, Any]) -> list[Section]:
  """The sections for which there are figures, in reading order."""
  result = []
  for name, title, words, build in _SECTIONS:
    if figures.get(name):
      tables = tuple(table for table in build(figures) if table is not None)
      if tables:
        result.append(Section(name, title, words, tables))
  return result
