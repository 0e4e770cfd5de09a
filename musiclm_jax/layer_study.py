"""Which layer of a w2v-BERT to make semantic tokens from: what the tokens of each would tell.

Every layer gets its own clusters, fitted as the tokens that ship (`experiments/semantic_tokens.gin`), beside the same
layers before training, k-means of plain log-mel, and the codes that the network learned to predict.

Shapes: N clips, T samples, F frames, L layers, R answers to a probe.
"""
from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
import dataclasses
import functools
import json
import os
import pathlib
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import soxr

from musiclm_jax.data import composer, noise, records as recordset, source, token_counts
from musiclm_jax.evaluation import audio_measures, batched, pictures, probes, semantic_figures, statistics, tables
from musiclm_jax.semantic.model import W2vBert, W2vBertConfig
from musiclm_jax.semantic.tokenizer import SemanticTokenizer
from musiclm_jax.training import checkpoint, state as states
from musiclm_jax.training.checkpoint import Loaded

TRAINED, UNTRAINED, LOG_MEL, TARGETS = 'trained', 'untrained', 'log_mel', 'targets'
_BATCH = 8
_ROWS_PER_CODE = 200  # to fit clusters on
_NOISE_DB = 10.0  # how far the noise of the harder test lies below the music
# Of the harder tests: fitted on clean clips and asked in noise; fitted on other leads, or other keys, than asked.
CLEAN, NOISE, OTHER_LEADS, OTHER_KEYS = 'clean', 'noise', 'other_leads', 'other_keys'
_APART = {OTHER_LEADS: ('lead', ('tempo', 'meter', 'drum_style', 'chord', 'pitch_class', 'onset')),
          OTHER_KEYS: ('key', ('tempo', 'meter', 'drum_style', 'timbre', 'onset'))}


@dataclasses.dataclass(frozen=True)
class Amounts:
  """Clips to fit clusters on, clips to ask (held out), and seconds of each at most; codes, 0 for the network's own;
  whether dimensions are decorrelated, as in `SemanticTokenizer`; the probes by name, () for all."""

  fit_clips: int = 1000
  clips: int = 400
  seconds: float = 10.0
  codes: int = 0
  decorrelate: bool = True
  probes: tuple[str, ...] = ()

  def __post_init__(self):
    if self.seconds < 1:
      raise ValueError(f'{self.seconds:g} s of each clip tell nothing of music: at least 1 s is needed')


@dataclasses.dataclass(frozen=True)
class Study:
  """What was found.

  Attributes:
    figures: what `layers.json` holds: about the run, and `layers`, a list with an entry for each network and layer:
      perplexity and repeats of its tokens, and under "probes" for each test {probe: {value, interval, gains}}; a gain
      is the lead over the same layer before training, or over k-means of log-mel, with its interval.
    folder: where the file is.
  """

  figures: Mapping[str, Any]
  folder: pathlib.Path

  def text(self) -> str:
    f = self.figures
    names = list(f['chance'])
    chance = {name: {'value': value} for name, value in f['chance'].items()}
    shown = [*f['layers'], {'network': 'chance', 'layer': '', 'place': None, 'probes': {CLEAN: chance}}]
    words = {CLEAN: f'asked as they were fitted, {f["probe_clips"]} held-out clips',
             NOISE: f'fitted on clean clips, asked in noise at {f["noise_db"]:g} dB',
             OTHER_LEADS: 'fitted on other lead instruments than asked', OTHER_KEYS: 'fitted on other keys than asked'}
    lines = [f'{f["run"]}, step {f["step"]}: {f["codes"]} codes a layer, perplexity and repeats on {f["clips"]} clips '
             f'of {f["records"]}']
    for test in words:
      rows = shown if test == CLEAN else f['layers']
      have = [name for name in names if name in rows[0]['probes'].get(test, {})]
      of_tokens = ('perplexity', 'repeats') if test == CLEAN else ()
      cells = tuple(
          (f'{row["network"].replace("_", "-")} {_numbered(row)}'.strip(),
           *(tables.number(row.get(name)) for name in of_tokens),
           *(tables.number(row['probes'][test][name]['value']) for name in have))
          for row in rows)
      headers = ('tokens of', *(f'{name} share' if name == 'perplexity' else name for name in of_tokens),
                 *(name.replace('_', ' ') for name in have))
      lines += ['', f'Read from the tokens, {words[test]}:', tables.Table(headers, cells).text()]
    return '\n'.join([*lines, '', f'{self.folder}: layers.json, layers.png'])


def _numbered(row: Mapping[str, Any]) -> str:
  return row['layer'] if row['place'] is None else f'{row["place"]}: {row["layer"]}'


def study(run: str | os.PathLike, *, records: str | os.PathLike = source.BUILT_IN,
          output: str | os.PathLike | None = None, amounts: Amounts = Amounts(), seed: int = 0) -> Study:
  """Writes `layers.json` and `layers.png` to `output` (the run by default) and returns what was found.

  Args:
    run: of a trained w2v-BERT, or a folder that holds a run `w2v_bert`.
    records: music to fit the clusters on ("train") and to measure how they are used on ("test"). Where it is not the
      built-in music, whose every fact is known, the probes ask clips of that.

  Raises ValueError where the run is of another network, there is no such probe, or too little music for them.
  """
  if unknown := sorted(set(amounts.probes) - set(semantic_figures.PROBES)):
    raise ValueError(f'there is no probe {unknown[0]!r}, only {", ".join(semantic_figures.PROBES)}')
  folder = checkpoint.run_in(run, 'w2v_bert')
  loaded = checkpoint.load(folder)
  if not isinstance(loaded.model, W2vBert):
    raise ValueError(f'{folder} holds a {type(loaded.objective).__name__}, not a w2v-BERT')
  encoder = loaded.objective.encoder
  rate = encoder.mel.sample_rate
  fit_NxT, _ = _clips(source.open_corpus(records, 'train', 'direct'), amounts.fit_clips, amounts.seconds, encoder)
  used_NxT, examples = _clips(source.open_corpus(records, 'test', 'direct'), amounts.clips, amounts.seconds, encoder)
  asked_NxT = used_NxT
  if str(records) == source.BUILT_IN or not all('chord_times' in e.get('attributes', ()) for e in examples):
    # Pieces that no record set of the built-in music has.
    unheard = composer.Corpus(first=1_000_000, size=amounts.clips, seconds=amounts.seconds, split='test')
    asked_NxT, examples = _clips(unheard, amounts.clips, amounts.seconds, encoder)
  noisy = functools.partial(_with_noise, noises=noise.Corpus(
      seed=seed, size=len(asked_NxT), seconds=asked_NxT.shape[1] / rate, sample_rate=rate))
  frames = asked_NxT.shape[1] // encoder.samples_per_frame
  asked = _Asked([e['attributes'] for e in examples], frames, encoder.frame_rate, seed, amounts.probes)
  codes = amounts.codes or encoder.codes
  clusters = SemanticTokenizer(encoder, layer=1, codebook_size=codes, iterations=20, seconds=amounts.seconds,
                               decorrelate=amounts.decorrelate)

  found: dict[tuple[str, str], dict[str, Any]] = {}
  right: dict[tuple[str, str], dict[tuple[str, str], np.ndarray]] = {}
  tokenizers = list(_tokenizers(loaded, clusters, fit_NxT, seed))
  heard = {CLEAN: _told(tokenizers, asked_NxT), NOISE: _told(tokenizers, asked_NxT, noisy)}
  used = heard[CLEAN] if used_NxT is asked_NxT else _told(tokenizers, used_NxT)
  for network, layers, _ in tokenizers:
    told = {name: tokens[network] for name, tokens in heard.items()}
    used_LxNxF = used[network]
    for place, layer in enumerate(layers):
      at, used_NxF = (network, layer), used_LxNxF[place]
      size = encoder.codes if network == TARGETS else codes
      counts_1xK = token_counts.level_counts(used_NxF[..., None], size)
      found[at] = {'network': network, 'layer': layer, 'place': place if network in (TRAINED, UNTRAINED) else None,
                   'perplexity': float(token_counts.perplexity(counts_1xK)[0]) / size,
                   'repeats': float(np.mean(used_NxF[:, 1:] == used_NxF[:, :-1]))}
      right[at] = asked.answered({name: tokens_LxNxF[place] for name, tokens_LxNxF in told.items()}, size)
      print(f'studied {network} {layer}', flush=True)
  for at in found:
    rivals = {UNTRAINED: (UNTRAINED, at[1]), LOG_MEL: (LOG_MEL, '')} if at[0] == TRAINED else {}
    found[at]['probes'] = asked.figures(right[at], {name: right[rival] for name, rival in rivals.items()})
  figures = {
      'run': str(folder), 'hash': loaded.content_hash, 'step': loaded.step, 'records': str(records), 'codes': codes,
      'decorrelate': clusters.decorrelate, 'fit_clips': len(fit_NxT), 'fit_seconds': fit_NxT.shape[1] / rate,
      'clips': len(used_NxT), 'probe_clips': len(asked_NxT),
      'seconds': asked_NxT.shape[1] / rate, 'noise_db': _NOISE_DB, 'seed': seed, 'chance': asked.chance(),
      'layers': list(found.values())}
  output = pathlib.Path(output or folder)
  output.mkdir(parents=True, exist_ok=True)
  (output / 'layers.json').write_text(json.dumps(figures, indent=1) + '\n')
  (output / 'layers.png').write_bytes(_picture(figures, encoder.layer_names))
  return Study(figures, output)


def _clips(corpus: source.Corpus, count: int, seconds: float, encoder: W2vBertConfig,
           ) -> tuple[np.ndarray, list[dict[str, Any]]]:
  """Clips [N, T] from all over a corpus, and their examples without audio.

  All are as long as nine tenths of them are, `seconds` at most; the others are left out.
  """
  rate = encoder.mel.sample_rate
  clips, examples = [], []
  for index in np.unique(np.linspace(0, len(corpus) - 1, min(count, len(corpus))).astype(int)):
    example = dict(corpus[int(index)])
    clip = example.pop('audio')
    clip = recordset.from_pcm(clip) if clip.dtype == np.int16 else clip
    if example['sample_rate'] != rate:
      clip = soxr.resample(clip, example['sample_rate'], rate)
    clips.append(clip)
    examples.append(example)
  lengths = np.array([len(clip) for clip in clips])
  length = audio_measures.common_length(lengths, seconds * rate)
  length = int(length) // encoder.samples_per_frame * encoder.samples_per_frame
  kept = np.flatnonzero(lengths >= length)
  return np.stack([clips[i][:length] for i in kept]), [examples[i] for i in kept]


def _with_noise(audio_BxT: np.ndarray, index_B: np.ndarray, noises: noise.Corpus) -> np.ndarray:
  """Each clip with the noise of its index, `_NOISE_DB` below it."""
  power = lambda x: np.sqrt(np.mean(np.square(x))) + 1e-9
  return np.stack([clip + np.float32(power(clip) / power(n) * 10 ** (-_NOISE_DB / 20)) * n
                   for clip, n in ((clip, noises[int(i)]['audio']) for clip, i in zip(audio_BxT, index_B))])


_Tokenizer = tuple[str, Sequence[str], Callable[[np.ndarray], np.ndarray]]


def _told(tokenizers: Sequence[_Tokenizer], clips_NxT: np.ndarray,
          heard: Callable[[np.ndarray, np.ndarray], np.ndarray] = lambda clips_BxT, index_B: clips_BxT,
          ) -> dict[str, np.ndarray]:
  """{network: tokens [L, N, F]} of clips as `heard` makes them from a batch and its indices: once for all networks, and
  never of all clips at once, which would take as much memory again."""
  def tokens(clips_BxT, index_B):
    heard_BxT = heard(clips_BxT, index_B)
    return {network: tokens_of(heard_BxT) for network, _, tokens_of in tokenizers}

  told = batched.in_batches(tokens, clips_NxT, np.arange(len(clips_NxT)), batch_size=_BATCH)
  return {network: np.moveaxis(tokens_NxLxF, 1, 0) for network, tokens_NxLxF in told.items()}


def _tokenizers(loaded: Loaded, clusters: SemanticTokenizer, fit_NxT: np.ndarray, seed: int,
                ) -> Iterator[_Tokenizer]:
  """(network, its layers, function from clips [B, T] to the tokens of each [B, L, F]), of the baseline first."""
  encoder = loaded.objective.encoder
  untrained = loaded.objective.model(nnx.Rngs(seed))
  untrained.mel_mean[...], untrained.mel_deviation[...] = loaded.model.mel_mean[...], loaded.model.mel_deviation[...]
  wanted = _ROWS_PER_CODE * clusters.codebook_size
  clips = min(len(fit_NxT), -(-wanted // (fit_NxT.shape[1] // encoder.samples_per_frame)))
  fit_NxT = fit_NxT[np.linspace(0, len(fit_NxT) - 1, clips).astype(int)]
  mel = lambda audio_NxT: probes.log_mel_rows(encoder, audio_NxT, batch_size=_BATCH)
  found = probes.fitted(clusters, mel(fit_NxT), seed)
  yield LOG_MEL, ('',), lambda audio_BxT: probes.tokens(found, mel(audio_BxT))[:, None]
  yield TARGETS, tuple(f'group {i + 1}' for i in range(encoder.groups)), states.compiled(loaded.model, _targets)
  for network, model in ((UNTRAINED, untrained), (TRAINED, loaded.model)):
    one, every = states.compiled(model, _one_layer), states.compiled(model, _tokens)
    fit = []
    for place in range(len(encoder.layer_names)):  # one by one: features of all would be many
      rows = batched.in_batches(lambda audio, one=one, place=np.int32(place): one(audio, place), fit_NxT,
                                batch_size=_BATCH)
      fit.append(probes.fitted(clusters, rows, seed))
    yield network, encoder.layer_names, lambda audio_BxT, every=every, fit=fit: every(audio_BxT, fit)


def _targets(model: W2vBert, audio_BxN: jax.Array) -> jax.Array:
  """The codes of each group, int32 [B, G, F]."""
  mel_BxFxM = model.spectrogram(audio_BxN)
  codes = model.quantizer(model.target_rows(mel_BxFxM, model.subsampling(mel_BxFxM)))
  return jnp.moveaxis(codes.ids_BxTxG, -1, 1)


def _one_layer(model: W2vBert, audio_BxN: jax.Array, place: jax.Array) -> jax.Array:
  """Features of the layer at a place that is not known when this is compiled: one program serves all."""
  return jax.lax.dynamic_index_in_dim(model.every_layer(audio_BxN), place, keepdims=False)


def _tokens(model: W2vBert, audio_BxN: jax.Array, fit: Sequence[Mapping[str, Any]]) -> jax.Array:
  """Tokens of each layer with what was fitted to it, int32 [B, L, F]."""
  every = model.every_layer(audio_BxN)
  return jnp.stack([probes.tokens(found, every[place]) for place, found in enumerate(fit)], axis=1)


class _Asked:
  """The probes and the harder tests, on clips with these facts."""

  def __init__(self, facts: Sequence[Mapping[str, Any]], frames: int, frame_rate: float, seed: int,
               names: Sequence[str] = ()):
    there = {**semantic_figures.composer_probes(facts, frames, frame_rate),
             **semantic_figures.note_probes(facts, frames, frame_rate)}
    self.probes = {name: there[name] for name in semantic_figures.PROBES if name in (names or there)}
    self.facts, self.seed = facts, seed

  def chance(self) -> dict[str, float]:
    return {name: statistics.majority_share(probe.answers) for name, probe in self.probes.items()}

  def answered(self, tokens: Mapping[str, np.ndarray], codes: int) -> dict[tuple[str, str], np.ndarray]:
    """(test, probe) -> which rows are answered rightly."""
    clean, found = tokens[CLEAN], {}
    ask = lambda name, **how: probes.answered(self.probes[name], clean, codes, seed=self.seed, **how)
    for name in self.probes:
      found[CLEAN, name] = ask(name)
      found[NOISE, name] = ask(name, heard_NxF=tokens[NOISE])
    for test, (_, names) in _APART.items():
      found |= {(test, name): ask(name, apart_N=self._groups(test)) for name in names if name in self.probes}
    return found

  def _groups(self, test: str) -> np.ndarray:
    return np.array([str(f.get(_APART[test][0], '')) for f in self.facts])

  def figures(self, right: Mapping[tuple[str, str], np.ndarray],
              rivals: Mapping[str, Mapping[tuple[str, str], np.ndarray]]) -> dict[str, dict[str, Any]]:
    """{test: {probe: accuracy with its interval, and the lead over each rival}}."""
    found: dict[str, dict[str, Any]] = {}
    for at, right_R in right.items():
      test, name = at
      groups_R, _ = self.probes[name].chosen
      if test in _APART:  # what is wrong for one lead is wrong for its clips together
        groups_R = self._groups(test)[groups_R]
      interval = lambda values_R, groups_R=groups_R: statistics.bootstrap_interval(
          values_R, groups_R, seed=self.seed).as_dict()
      gains = {rival: interval(right_R.astype(float) - there[at]) for rival, there in rivals.items()}
      found.setdefault(test, {})[name] = {**interval(right_R), **({'gains': gains} if gains else {})}
    return found


def _picture(figures: Mapping[str, Any], layers: Sequence[str]) -> bytes:
  """A panel for each probe: accuracy over the layers, clean and in noise."""
  at = {(row['network'], row['layer']): row for row in figures['layers']}
  value = lambda network, layer, test, name: at[network, layer]['probes'][test][name]['value']
  panels = {}
  for name, chance in figures['chance'].items():
    curves = {f'{network}{words}': [value(network, layer, test, name) for layer in layers]
              for network in (TRAINED, UNTRAINED) for test, words in ((CLEAN, ''), (NOISE, ', in noise'))}
    lines = {'log-mel': value(LOG_MEL, '', CLEAN, name), 'log-mel, in noise': value(LOG_MEL, '', NOISE, name),
             'chance': chance}
    panels[name.replace('_', ' ')] = curves, lines
  short = [name.replace('convolutions', 'conv').replace('contrastive ', 'c').replace('masked ', 'm') for name in layers]
  return pictures.over_layers(panels, short)
