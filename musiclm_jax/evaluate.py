"""Measures a workdir of trained networks on music and texts that no training step saw, and writes the report.

N clips, P prompts, S samples a prompt, T samples of audio, F frames, Q levels.
"""
from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import functools
import json
import math
import os
import pathlib
import platform
import sys
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from musiclm_jax import specs
from musiclm_jax.cascade import Cascade
from musiclm_jax.cascade_networks import CascadeNetworks
from musiclm_jax.data import composer, records
from musiclm_jax.data.batches import AudioBatches, TokenBatches
from musiclm_jax.evaluation import (
    audio_measures, codec_figures, generation_figures, judge as judges, language, mulan_figures, pictures, probes,
    report, semantic_figures, stage_figures, statistics)
from musiclm_jax.evaluation.batched import in_batches
from musiclm_jax.evaluation.report import Clip, Players
from musiclm_jax.generate import pipeline
from musiclm_jax.training import checkpoint, goodput

# Where a quickstart keeps what is not a trained network.
RECORDS, TOKENS, BASELINES = 'records', 'tokens', 'baselines'
# Built-in music with texts: in place of texts of the records, or beside them.
PAIRS, MORE_PAIRS = 'pairs', 'more_pairs'


# Facts of the built-in music that are asked for as tags, and what says that a part is there.
_TAGS = ('lead', 'drums', 'tempo')
_PRESENT = {'drums': ('drums', 'percussion'), 'bass': ('bass', 'bass line')}


@dataclasses.dataclass(frozen=True)
class Amounts:
  """How much is measured; more narrows the intervals and takes longer.

  Attributes:
    codec_clips: decoded clips. clips: encoded clips, also the pairs for retrieval.
    stage_crops: crops of each stage. judge_clips: clips that the judge learns from.
    prompts, seeds: samples. sample_seconds: their length.
  """

  codec_clips: int = 64
  clips: int = 400
  stage_crops: int = 256
  judge_clips: int = 1200
  prompts: int = 16
  seeds: int = 4
  sample_seconds: float = 5.0


def evaluate(workdir: str | os.PathLike, *, output: str | os.PathLike | None = None, seed: int = 0,
             amounts: Amounts = Amounts()) -> dict[str, Any]:
  """Writes `report.json`, `report.html` and `samples/*.wav` to `output` (the workdir by default).

  What was not trained yet is left out, and its bars read as not measured. Returns the content of the report. Raises
  ValueError, after all else is written, where a section cannot be measured for another reason.
  """
  root = pathlib.Path(workdir)
  output = pathlib.Path(output or root)
  measure = _Measure(root, seed, amounts)
  figures, players, notes, failed = {}, [], list(measure.notes), []
  for name in report.SECTIONS:
    try:
      figures[name], shown = getattr(measure, name)()
    except (FileNotFoundError, ValueError) as error:
      notes.append(f'Section {name} was not measured: {error}')
      if isinstance(error, ValueError):
        failed.append(notes[-1])
      continue
    players += shown
    print(f'measured {name}', file=sys.stderr, flush=True)
  _write_wavs(output / 'samples', players)
  found = report.write_report(output, figures, _runs(root), players, environment=_environment(measure), notes=notes)
  if failed:
    raise ValueError(f'{" ".join(failed)} (the report has the other sections)')
  return found


def _write_wavs(folder: pathlib.Path, players: list[Players]) -> None:
  from musiclm_jax.data.audio_files import write_wav
  folder.mkdir(parents=True, exist_ok=True)
  for group in players:
    for clip in group.clips:
      name = ''.join(c if c.isalnum() else '_' for c in f'{group.title} {clip.title}'.lower())[:80].strip('_')
      write_wav(folder / f'{name}.wav', clip.audio_N, clip.sample_rate)


def write_round_trips(workdir: str | os.PathLike, count: int = 2) -> list[pathlib.Path]:
  """The first sound of a fresh workdir: held-out clips, and what the codec makes of them, as WAV files."""
  measure = _Measure(pathlib.Path(workdir), 0, Amounts(codec_clips=count))
  players = measure.round_trips(count)
  folder = pathlib.Path(workdir) / 'samples'
  _write_wavs(folder, players)
  return sorted(folder.glob('*.wav'))


def _described(corpus: records.RecordSet) -> list[int]:
  """Indices of the clips that have a text."""
  return [i for i, kinds in enumerate(corpus.text_kinds) if kinds]


def _composed(example: Mapping[str, Any]) -> bool:
  """Whether a clip is of the built-in music, whose every fact is known."""
  return 'lead' in (example.get('attributes') or {})


def _levels(codec: checkpoint.Loaded) -> tuple[int, ...]:
  """How many levels to decode from: one, few and all."""
  levels = codec.objective.token_spec.levels
  return tuple(sorted({1, min(4, levels), levels}))


def _runs(root: pathlib.Path) -> list[report.Run]:
  """The trainings of a workdir, with what is recorded of each."""
  runs = []
  for metrics_file in sorted(root.glob('*/metrics.jsonl')):
    folder = metrics_file.parent
    step = checkpoint.latest_step(folder)
    if step is None:
      continue
    loaded = checkpoint.load(folder)
    marker = root / 'steps' / f'{folder.name}.json'
    recorded = json.loads(marker.read_text()) if marker.exists() else {}
    # The marker knows the last start alone.
    seconds = goodput.total_seconds(folder) or recorded.get('wall_seconds', 0.0)
    runs.append(report.Run(
        folder.name, loaded.made_with.get('seed', recorded.get('seed')), step, seconds,
        specs.fingerprint(loaded.objective), sum(x.size for x in jax.tree.leaves(loaded.params)), metrics_file))
  return runs


def _environment(measure: _Measure) -> dict[str, Any]:
  import musiclm_jax
  return {'musiclm_jax': musiclm_jax.__version__, 'jax': jax.__version__, 'python': platform.python_version(),
          'device': str(jax.devices()[0].device_kind), 'processors': os.cpu_count(),
          'music': measure.audio.manifest.summary(), 'music_fingerprint': measure.audio.fingerprint,
          'seed': measure.seed}


class _Measure:
  """One method a section of the report; each returns its figures and what there is to listen to."""

  def __init__(self, root: pathlib.Path, seed: int, amounts: Amounts):
    self.root, self.seed, self.amounts = root, seed, amounts
    self.cascade = Cascade(root)
    self.audio = records.RecordSet(root / RECORDS, 'test')
    self.rate = records.rate_of(self.audio.header)
    self.pairs, self.notes = self._pairs()

  def _pairs(self) -> tuple[records.RecordSet, list[str]]:
    """Where what concerns texts is measured, and what to say of it."""
    if (pairs := self.root / PAIRS).is_dir():
      return records.RecordSet(pairs, 'test'), [
          'The music came without captions: MuLan was trained on the built-in music and its texts, and what concerns '
          'texts is measured there.']
    if not (pairs := self.root / MORE_PAIRS).is_dir():
      return self.audio, []
    note = 'MuLan was trained on the captions and, as often, on the built-in music and its texts'
    said: set[str] = set()  # clips of one recording have its caption in common
    for i in _described(self.audio)[:self.amounts.clips]:
      said |= set(self.texts([self.audio[i]], 'test'))
      if len(said) >= self.amounts.prompts:
        return self.audio, [f'{note}; what concerns texts is measured on the held-out clips that have a caption.']
    return records.RecordSet(pairs, 'test'), [
        f'{note}; what concerns texts is measured there, as the held-out clips have only {len(said)} different '
        'captions.']

  def seconds(self, corpus: records.RecordSet) -> float:
    """Length of the clips of a corpus that are compared: whole seconds, 10 at most, that nine tenths of them have.

    Clips of less than a second do not count; ValueError where all are.
    """
    usable = corpus.durations[corpus.durations >= 1]
    if not len(usable):
      raise ValueError(f'all clips of split {corpus.split!r} of {corpus.directory} are shorter than a second')
    return float(math.floor(audio_measures.common_length(usable, 10.0)))

  def clips(self, corpus: records.RecordSet, count: int, chosen: Sequence[int] | None = None, *,
            seconds: float | None = None) -> tuple[np.ndarray, list[dict[str, Any]]]:
    """The first clips of a split, or the first of the chosen ones [N, T], and their examples without audio.

    Clips shorter than `seconds` (those of the corpus, where they are not given) are left out. Raises ValueError where
    none is left, or they are not mono.
    """
    if (channels := records.channels_of(corpus.header)) > 1:
      raise ValueError(f'{corpus.directory} has {channels} channels; only mono can be measured here')
    seconds = self.seconds(corpus) if seconds is None else seconds
    rate = records.rate_of(corpus.header)
    length = specs.frames_in(seconds, rate)
    long_enough = corpus.durations * rate > length - 0.5  # seconds are rounded, samples are not
    chosen = [i for i in (range(len(corpus)) if chosen is None else chosen) if long_enough[i]][:count]
    if not chosen:
      raise ValueError(f'no clip of split {corpus.split!r} of {corpus.directory} that could be measured has '
                       f'{seconds:g} s')
    audio_NxT = np.zeros((len(chosen), length), np.float32)
    examples = []
    for row, i in enumerate(chosen):
      example = corpus[i]
      clip = example.pop('audio')
      audio_NxT[row] = clip[:length]
      example['seconds'] = len(clip) / rate
      examples.append(example)
    return audio_NxT, examples

  @functools.cached_property
  def held_out(self) -> tuple[np.ndarray, list[dict[str, Any]]]:
    return self.clips(self.audio, self.amounts.clips)

  @functools.cached_property
  def held_out_pairs(self) -> tuple[np.ndarray, list[dict[str, Any]]]:
    """Held-out clips that have texts, and their examples; ValueError where there is none."""
    described = _described(self.pairs)
    if not described:
      raise ValueError(f'no held-out clip of {self.pairs.directory} has a text')
    if self.pairs is self.audio and len(described) == len(self.audio):
      return self.held_out
    return self.clips(self.pairs, self.amounts.clips, described)

  @property
  def composed(self) -> bool:
    """Whether the music is the built-in, whose every fact is known."""
    return _composed(self.held_out[1][0])

  def _check_sound(self, corpus: records.RecordSet, network: str, sample_rate: int, channels: int = 1) -> None:
    """ValueError where a corpus is not of the rate and the channels that a network hears."""
    there = records.rate_of(corpus.header), records.channels_of(corpus.header)
    if there != (sample_rate, channels):
      words = lambda rate, count: f'{rate} Hz with {count} channel{"s" if count > 1 else ""}'
      raise ValueError(f'{corpus.directory} is audio of {words(*there)}, and the {network} is one for '
                       f'{words(sample_rate, channels)}: prepare the music again as the {network} hears it')

  def _codec(self, corpus: records.RecordSet | None = None) -> checkpoint.Loaded:
    """The codec; ValueError where the music (or another corpus) is not what it codes."""
    loaded = self.cascade.part('codec')
    self._check_sound(corpus or self.audio, 'codec', loaded.model.config.sample_rate, loaded.model.config.channels)
    return loaded

  def _mulan(self) -> checkpoint.Loaded:
    """MuLan; ValueError where the pairs are not of the rate that it hears."""
    loaded = self.cascade.part('mulan')
    self._check_sound(self.pairs, 'MuLan', loaded.objective.mulan.audio.mel.sample_rate)
    return loaded

  # ---- codec -------------------------------------------------------------------------------------------------------

  def round_trips(self, count: int = 2) -> list[Players]:
    loaded = self._codec()
    clips_NxT, _ = self.clips(self.audio, count)
    levels = _levels(loaded)
    _, decoded = audio_measures.round_trip(loaded.model, clips_NxT, levels, batch_size=count)
    return [Players(f'round trip {i + 1}', (
        Clip('original', clips_NxT[i], self.rate),
        *(Clip(f'{q} levels', np.clip(decoded[q][i], -1, 1), self.rate) for q in reversed(levels))),
        section='codec', words='A held-out clip, and what the codec makes of it with all levels and with fewer.')
            for i in range(len(clips_NxT))]

  def codec(self) -> tuple[dict[str, Any], list[Players]]:
    loaded = self._codec()
    spec = loaded.objective.token_spec
    untrained = loaded.objective.model(nnx.Rngs(self.seed))
    clips_NxT, examples = self.held_out
    count = self.amounts.codec_clips
    figures = codec_figures.codec_figures(
        loaded.model, clips_NxT[:count], spec.codebook_size, untrained=untrained,
        levels=_levels(loaded), more_clips_MxN=clips_NxT[count:], sample_rate=self.rate,
        recordings_B=[e['recording'] for e in examples[:count]])
    figures['restart_share'] = codec_figures.restart_share(
        pictures.read_metrics(self.root / 'codec' / 'metrics.jsonl'))
    figures |= {'bitrate': spec.bitrate, 'hash': loaded.content_hash, 'steps': loaded.step}
    return figures, self.round_trips()

  # ---- MuLan -------------------------------------------------------------------------------------------------------

  def texts(self, examples: list[dict[str, Any]], words: str) -> list[str]:
    """The first long description of each clip; for the built-in music in held-out templates or synonyms."""
    chosen = []
    for example in examples:
      said = example['texts']
      if _composed(example) and words != 'test':
        _, seed, index = example['recording'].split('-')
        said = composer.texts(composer.compose(int(seed), int(index), example['seconds']), words)
      chosen.append(next((t['text'] for t in said if t['kind'] == 'description'), said[0]['text']))
    return chosen

  def ids(self, texts: list[str]) -> np.ndarray:
    length = self.cascade.part('mulan').objective.mulan.text.length
    return np.stack([self.cascade.tokenizer.encode(t, length) for t in texts])

  @functools.cached_property
  def pair_texts(self) -> list[str]:
    """The text of each of `held_out_pairs`."""
    return self.texts(self.held_out_pairs[1], 'test')

  @functools.cached_property
  def pair_embeddings(self) -> tuple[np.ndarray, np.ndarray]:
    audio_NxT, _ = self.held_out_pairs
    return mulan_figures.embed(self.cascade.part('mulan').model, audio_NxT, self.ids(self.pair_texts))

  def mulan(self) -> tuple[dict[str, Any], list[Players]]:
    loaded = self._mulan()
    _, examples = self.held_out_pairs
    audio_NxE, text_NxE = self.pair_embeddings
    tokens = tuple(in_batches(self.cascade.function('mulan', method), e, batch_size=32)
                   for method, e in (('tokens', audio_NxE), ('text_tokens', text_NxE)))
    unknown = oracle = None
    if _composed(examples[0]):
      unknown = mulan_figures.embed_texts(loaded.model, self.ids(self.texts(examples, 'synonyms')))
      read = [composer.read_attributes(t) for t in self.pair_texts]
      oracle = statistics.attribute_agreement(read, [e['attributes'] for e in examples])
    figures = mulan_figures.mulan_figures(audio_NxE, text_NxE, texts_N=self.pair_texts, tokens=tokens,
                                          unknown_text_NxE=unknown, oracle_NxN=oracle, seed=self.seed)
    if oracle is not None:  # the facts are known
      figures |= self._words(audio_NxE)
    return {**figures, 'hash': loaded.content_hash}, []

  def _words(self, audio_NxE: np.ndarray) -> dict[str, Any]:
    """What single words mean to MuLan, by the facts of the built-in music: tags, "no", and what comes first."""
    model = self.cascade.part('mulan').model
    clips_NxT, examples = self.held_out_pairs
    facts = [e['attributes'] for e in examples]
    embed = lambda texts: mulan_figures.embed_texts(model, self.ids(list(texts)))

    def middle(texts):
      mean_E = embed(texts).mean(axis=0)
      return mean_E / max(float(np.linalg.norm(mean_E)), 1e-12)

    tags = [(name, value) for name in _TAGS for value in composer.words(name)]
    labels_NxT = np.array([[fact.get(name) == value for name, value in tags] for fact in facts])
    tag_TxE = np.stack([middle(composer.words(name)[value]) for name, value in tags])
    figures: dict[str, Any] = {'zero_shot': language.zero_shot_figures(
        audio_NxE, tag_TxE, labels_NxT, [f'{name} {value}' for name, value in tags])}
    has = {name: np.array([fact[name] != 'none' for fact in facts]) for name in _PRESENT}
    figures['negation'] = {
        name: language.negation_figures(audio_NxE, middle(said), middle(composer.words(name)['none']), has[name])
        for name, said in _PRESENT.items() if 0 < has[name].sum() < len(facts)}
    pairs = [(i, i + 1) for i in range(len(facts) - 1) if len({f.get('lead', '') for f in facts[i:i + 2]} - {''}) == 2]
    if not pairs:
      return figures
    half = clips_NxT.shape[1] // 2
    then = np.stack([np.concatenate([clips_NxT[i, :half], clips_NxT[j, :half]]) for i, j in pairs])
    lead = lambda i: composer.words('lead')[facts[i]['lead']][0]
    audio_MxE = in_batches(self.cascade.function('mulan', 'embed_audio'), then, batch_size=32)
    figures['order'] = language.order_figures(audio_MxE, embed(f'{lead(i)}, then {lead(j)}' for i, j in pairs),
                                              embed(f'{lead(j)}, then {lead(i)}' for i, j in pairs))
    return figures

  # ---- semantic ----------------------------------------------------------------------------------------------------

  def semantic(self) -> tuple[dict[str, Any], list[Players]]:
    encoder = checkpoint.load(self.root / 'w2v_bert')
    self._check_sound(self.audio, 'w2v-BERT', encoder.objective.encoder.mel.sample_rate)
    clips_NxT, examples = self.held_out
    seconds = encoder.objective.batch_spec(1)['audio'].shape[1] / self.rate
    size = min(16, len(self.audio))
    batches = AudioBatches(self.audio, seconds=seconds, batch_size=size, order='sequential', sample_rate=self.rate)
    whole = [batches(i) for i in range(min(batches.num_batches, 16)) if i == 0 or (i + 1) * size <= len(self.audio)]
    whole = [{k: v for k, v in b.items() if k != 'weight'} for b in whole]
    masked = semantic_figures.masked_figures(encoder.objective, encoder.model, whole, seed=self.seed)
    spec = self.cascade.token_spec('semantic')
    trained = semantic_figures.tokens(self.cascade.part('semantic').model, clips_NxT)
    untrained = semantic_figures.tokens(checkpoint.load(self.root / BASELINES / 'semantic_tokens').model, clips_NxT)
    fit_NxT, _ = self.clips(records.RecordSet(self.root / RECORDS, 'train'), self.amounts.clips)
    log_mel = probes.log_mel_tokens(self.cascade.part('semantic').objective, fit_NxT, clips_NxT, seed=self.seed)
    asked = semantic_figures.composer_probes(
        [e['attributes'] for e in examples], trained.shape[1], spec.frame_rate) if self.composed else {}
    figures = semantic_figures.semantic_figures(
        trained, untrained, log_mel, spec.codebook_size, asked=asked, masked=masked, seed=self.seed)
    return {**figures, 'hash': self.cascade.part('semantic').content_hash}, []

  # ---- stages ------------------------------------------------------------------------------------------------------

  def stages(self) -> tuple[dict[str, Any], list[Players]]:
    return {name: self._stage(name) for name in ('semantic', 'coarse', 'fine')}, []

  def _stage(self, name: str) -> dict[str, Any]:
    loaded = self.cascade.stage(name)
    stage = loaded.objective.stage
    corpus = records.RecordSet(self.root / TOKENS, 'test')
    batches = TokenBatches(corpus, stage=stage, batch_size=16, seed=self.seed, min_clips=1, unusable='drop')
    crops, recordings = [], []
    for step in range(math.ceil(self.amounts.stage_crops / 16)):
      crops.append(batches(step))
      recordings += [example['recording'] for example in batches.examples(step)]
    streams = {k: np.concatenate([c[k] for c in crops]) for k in crops[0] if k != 'slot'}
    bits = stage_figures.objective_bits(loaded.objective, loaded.model)
    train = records.RecordSet(self.root / TOKENS, 'train')
    rows = (train[i][stage.target.feature] for i in range(min(len(train), 4000)))
    figures = stage_figures.stage_figures(bits, stage, streams, np.array(recordings), rows, batch_size=16,
                                          seed=self.seed)
    return {**figures, 'hash': loaded.content_hash, 'steps': loaded.step}

  # ---- generation --------------------------------------------------------------------------------------------------

  def generation(self) -> tuple[dict[str, Any], list[Players]]:
    a = self.amounts
    self._mulan()
    self._codec(self.pairs)
    _, examples = self.held_out_pairs
    chosen = _prompts(examples, self.pair_texts, a.prompts)
    prompts = [self.pair_texts[i] for i in chosen]
    if len(prompts) < 2:
      raise ValueError(f'all held-out clips of {self.pairs.directory} have the same text; samples of one are compared '
                       'with those of another')
    settings = pipeline.Settings(seconds=min(a.sample_seconds, self.seconds(self.pairs)))
    samples_PxSxT, tokens, wall = self._sample(prompts, settings)
    embed = lambda audio: in_batches(self.cascade.function('mulan', 'embed_audio'), audio, batch_size=16)
    embedding = embed(samples_PxSxT.reshape(-1, samples_PxSxT.shape[-1])).reshape(len(prompts), a.seeds, -1)
    prompts_PxE = self.pair_embeddings[1][chosen]
    real_PxT = self.held_out_pairs[0][chosen][:, :samples_PxSxT.shape[-1]]
    references = {'real': embed(real_PxT)[:, None], 'codec_round_trip': embed(self._heard(real_PxT))[:, None],
                  'another_prompt': np.roll(embedding, 1, axis=0)}
    known = self.pairs is self.audio and self.composed  # the judge learns from the music of the prompts
    timbres = [examples[i]['attributes']['lead'] for i in chosen] if known else []
    samples = generation_figures.Samples(samples_PxSxT, embedding, prompts_PxE, timbres, wall, self.rate)
    judged = self._judged(samples_PxSxT, tokens) if known else {}
    figures = generation_figures.generation_figures(samples, references=references, seed=self.seed, **judged)
    levels = pipeline.mulan_levels_of(CascadeNetworks(self.cascade), settings)
    figures |= {'prompt_texts': prompts, 'mulan_levels': levels}
    players = [Players(f'prompt {i + 1}', (Clip('sample', samples_PxSxT[i, 0], self.rate),
                                           Clip('a real clip that the text describes', real_PxT[i], self.rate)),
                       words=prompt) for i, prompt in enumerate(prompts)]
    return figures, players

  def _sample(self, prompts: list[str], settings: pipeline.Settings) -> tuple[np.ndarray, dict[str, np.ndarray], float]:
    """Samples [P, S, T] for each prompt and seed, tokens of some, and the time that all take once compiled."""
    seeds, parts = self.amounts.seeds, 2 if self.amounts.seeds % 2 == 0 else 1
    # Long descriptions are cut where the text tower ends, as in training.
    embedding_PxE = self.cascade.function('mulan', 'embed_text')(self.ids(prompts))
    networks = CascadeNetworks(self.cascade)
    mulan_Px1xQ = pipeline.tokens_of_texts(networks, embedding_PxE)
    keys_SxP = jnp.stack([pipeline.prompt_keys(self.seed + s, len(prompts)) for s in range(seeds)])
    drawn = []
    for part_SxP in jnp.split(keys_SxP, parts):
      many_Bx1xQ = jnp.tile(mulan_Px1xQ, (len(part_SxP), 1, 1))
      made = pipeline.from_mulan_tokens(networks, many_Bx1xQ, settings, part_SxP.reshape(-1))
      drawn.append(made.audio_BxN.reshape(len(part_SxP), len(prompts), -1))
    return np.concatenate(drawn).swapaxes(0, 1), made.tokens, parts * made.wall_seconds

  def judge_of(self, length: int) -> judges.Judge:
    """The independent judge of samples of this length: it hears what the codec makes of training clips."""
    train_NxT, train = self.clips(records.RecordSet(self.root / RECORDS, 'train'), self.amounts.judge_clips,
                                 seconds=length / self.rate)
    leads = [e['attributes']['lead'] for e in train]
    return judges.fit(self._heard(train_NxT[:, :length]), leads, sample_rate=self.rate, seed=self.seed)

  def _heard(self, clips_NxT: np.ndarray) -> np.ndarray:
    """Clips through the codec, with all of its levels."""
    levels = self.cascade.token_spec('codec').levels
    return audio_measures.round_trip(self.cascade.part('codec').model, clips_NxT, (levels,))[1][levels]

  def _judged(self, samples_PxSxT: np.ndarray, tokens: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """The independent judge, and the clips that the Frechet distance compares."""
    length = samples_PxSxT.shape[-1]
    judge, (test_NxT, test) = self.judge_of(length), self.held_out
    round_trips = self._heard(test_NxT[:, :length])
    half, count = len(test_NxT) // 2, samples_PxSxT.shape[0] * samples_PxSxT.shape[1]
    rows = {'unigram': self._unigram_audio(count, tokens['acoustic'].shape[1], length),
            'real': test_NxT[half:half + count, :length], 'codec_round_trip': round_trips[half:half + count]}
    return {'judge': judge, 'judge_accuracy': judge.accuracy(round_trips, [e['attributes']['lead'] for e in test]),
            'held_out_NxT': test_NxT[:half, :length], 'frechet_rows': rows}

  def _unigram_audio(self, count: int, frames: int, length: int) -> np.ndarray:
    """Decoded tokens that were drawn level by level from their frequencies: the baseline without any model."""
    train = records.RecordSet(self.root / TOKENS, 'train')
    spec = self.cascade.token_spec('codec')
    ngrams = statistics.fit_ngrams((train[i]['acoustic'] for i in range(min(len(train), 500))), spec.codebook_size)
    generator = np.random.default_rng(self.seed)
    codes = np.stack([generator.choice(spec.codebook_size, size=(count, frames), p=p / p.sum())
                      for p in np.exp(ngrams.unigram_QxK)], axis=-1)
    decode: Callable = self.cascade.function('codec', 'decode')
    return audio_measures.fit_length(in_batches(decode, codes.astype(np.int32), batch_size=8), length)


def _prompts(examples: Sequence[Mapping[str, Any]], texts: Sequence[str], count: int) -> list[int]:
  """Indices of clips for prompts: each lead timbre equally often where timbres are known, else the first ones.

  Of clips that share a text only the first is taken: the permutation test exchanges prompts, which must differ.
  """
  first: dict[str, int] = {}
  for i, text in enumerate(texts):
    first.setdefault(text, i)
  if not _composed(examples[0]):
    return list(first.values())[:count]
  by_lead: dict[str, list[int]] = {}
  for i in first.values():
    by_lead.setdefault(examples[i]['attributes']['lead'], []).append(i)
  rounds = [indices[k] for k in range(count) for _, indices in sorted(by_lead.items()) if k < len(indices)]
  return rounds[:count]
