"""The composer: exact scores, true texts, honest splits, clean audio."""
from __future__ import annotations

import collections
import dataclasses
import hashlib
import pickle
import re

import numpy as np
import pytest

from musiclm_jax import specs
from musiclm_jax.data import composer
from musiclm_jax.data import composer_synth


def words(text: str) -> set[str]:
  return set(re.findall(r"[\w/'-]+", re.sub(r'\{\w+\}', ' ', text).lower()))


def all_words(split: str) -> set[str]:
  return set().union(*map(words, (*composer.templates(split), *composer.phrases(split))))


def descriptions(corpus: composer.Corpus) -> list[str]:
  """The first description of each piece."""
  return [composer.texts(corpus.score(i), corpus.split)[0]['text'] for i in range(len(corpus))]


# When a score, a template or a word changes on purpose: raise composer.VERSION and put the new value here.
GOLDEN = '4ea49ebd21c54056'


def test_scores_and_texts_are_bit_identical_everywhere():
  digest = hashlib.sha256()
  for seed, index in (*((0, i) for i in range(16)), (1, 0), (7, 123456), (2**40, 3)):
    score = composer.compose(seed, index, 7.5)
    played = score.tempo_bpm, [tuple(n) for n in score.notes], [tuple(c) for c in score.chords]
    digest.update(repr(played).encode())
    for split in composer.SPLITS:
      digest.update(repr([(t['kind'], t['text']) for t in composer.texts(score, split)]).encode())
  assert digest.hexdigest()[:16] == GOLDEN


def test_audio_is_the_golden_audio_to_one_step():
  audio = composer.render(composer.compose(0, 5, 2.0))
  at = np.array([100, 5000, 12000, 20011, 30000, 36007, 41000, 47999])
  steps = np.array([-1218, 1668, 257, 1779, -702, 15144, 2130, 1041])
  found = np.rint(audio[at] * 32767).astype(int)
  assert np.abs(found - steps).max() <= 1, found.tolist()


def test_a_longer_clip_begins_with_the_notes_of_a_shorter_one():
  for index in range(20):
    short, long = composer.compose(3, index, 2.3), composer.compose(3, index, 9.0)
    assert long.notes[:len(short.notes)] == short.notes
    assert len(long.notes) > len(short.notes)


@pytest.mark.parametrize('seconds', [3.0, 10.0])
def test_facts_read_from_the_notes_are_the_plan(seconds):
  for index in range(120):
    score = composer.compose(5, index, seconds)
    for name, value in composer.facts(score).items():
      assert value == getattr(score, name), (index, name)
    assert set(composer.facts(score)) == set(composer.ATTRIBUTES)


def test_every_class_occurs_often_enough():
  scores = [composer.compose(1, index, 0.5) for index in range(400)]
  for name, values in composer.ATTRIBUTES.items():
    counts = collections.Counter(getattr(score, name) for score in scores)
    assert set(counts) == set(values)
    assert min(counts.values()) > 0.35 * 400 / len(values), (name, counts)


def test_downbeats_are_accented_in_bass_and_drums():
  for index in range(60):
    score = composer.compose(2, index, 8.0)
    for part in ('bass', 'drums'):
      notes = [n for n in score.notes if n.part == part]
      first = [n.velocity for n in notes if n.start % score.bar_ticks == 0]
      other = [n.velocity for n in notes if n.start % score.bar_ticks]
      if notes and other:
        assert max(first) > max(other)


def test_texts_say_what_is_played_and_nothing_else():
  for index in range(60):
    score = composer.compose(4, index, 5.0)
    for split in composer.SPLITS:
      for said in composer.texts(score, split):
        read = composer.read_attributes(said['text'])
        truth = composer.facts(score)
        assert read and read.items() <= truth.items(), (said, truth)


def test_drums_are_mentioned_only_if_they_are_in_the_score():
  score = next(s for s in (composer.compose(0, i, 5.0) for i in range(50)) if s.drums == 'rock')
  muted = dataclasses.replace(score, notes=tuple(n for n in score.notes if n.part != 'drums'))
  for said in composer.texts(muted):
    assert composer.read_attributes(said['text']).get('drums', 'none') == 'none'
  assert composer.read_attributes(composer.texts(muted)[0]['text'])['drums'] == 'none'
  assert composer.read_attributes(composer.texts(score)[0]['text'])['drums'] == 'rock'


@pytest.mark.parametrize('split', composer.SPLITS)
def test_descriptions_tell_every_fact_but_the_key(split):
  for text in descriptions(composer.Corpus(seed=8, size=40, seconds=4.0, split=split)):
    assert set(composer.ATTRIBUTES) - set(composer.read_attributes(text)) <= {'key'}, text


def test_the_four_kinds_are_there_and_differ():
  kinds = collections.Counter()
  for index in range(30):
    said = composer.texts(composer.compose(0, index, 4.0))
    kinds.update(t['kind'] for t in said)
    assert len({t['text'] for t in said}) >= 8
  assert set(kinds) == set(composer.KINDS) and min(kinds.values()) >= 60


def test_test_templates_are_new_but_their_words_are_known():
  assert not set(composer.templates('train')) & set(composer.templates('test'))
  assert composer.phrases('train') == composer.phrases('test')
  assert all_words('test') <= all_words('train')
  said = {t['text'] for i in range(200) for t in composer.texts(composer.compose(0, i, 2.0), 'train')}
  for i in range(20):
    for t in composer.texts(composer.compose(0, i, 2.0), 'test'):
      if t['kind'] == 'description':
        assert t['text'] not in said


def test_held_out_synonyms_share_no_word_with_training():
  held_out = set().union(*map(words, composer.phrases('synonyms')))
  assert held_out & all_words('train') <= {'a', 'an'}
  train_words = all_words('train') | {'an'} | words('a b c d e f g sharp major minor')
  for i in range(40):
    for said in composer.texts(composer.compose(0, i, 2.0), 'train'):
      assert words(said['text']) <= train_words
    for said in composer.texts(composer.compose(0, i, 2.0), 'synonyms'):
      assert words(said['text']) & (held_out - {'a', 'an'})


@pytest.mark.parametrize('split', composer.SPLITS)
def test_an_oracle_finds_the_piece_among_200(split):
  corpus = composer.Corpus(seed=9, size=200, seconds=2.0, split=split)
  truth = [composer.facts(corpus.score(i)) for i in range(200)]
  recall = 0.0
  for i, text in enumerate(descriptions(corpus)):
    read = composer.read_attributes(text)
    agree = np.array([sum(t[name] == value for name, value in read.items()) for t in truth])
    recall += (agree[i] == agree.max()) / np.sum(agree == agree.max()) / 200  # ties are broken by chance
  assert recall >= 0.6


def test_chatter_is_marked_and_only_on_request():
  assert 'chatter' not in {t['kind'] for t in composer.Corpus(seconds=0.2)[0]['texts']}
  last = composer.Corpus(seconds=0.2, chatter=True)[0]['texts'][-1]
  assert last['kind'] == 'chatter' and not composer.read_attributes(last['text'])


def test_audio_is_16_bit_unclipped_and_of_the_asked_length():
  peaks = {'soft': [], 'loud': []}
  for index, seconds in enumerate((0.05, 1.0, 1.2345, 2.0, 2.0, 2.0)):
    score = composer.compose(6, index, seconds)
    audio = composer.render(score)
    assert audio.dtype == np.float32 and audio.shape == (round(seconds * 24000),)
    grid = np.rint(audio.astype(np.float64) * 32767).astype(np.float32) / np.float32(32767)
    np.testing.assert_array_equal(audio, grid)
    peaks[score.dynamics].append(float(np.abs(audio).max()))
  assert max(sum(peaks.values(), [])) <= 0.9
  assert 0.2 < max(peaks['soft']) < 0.5 < min(peaks['loud'])


def test_the_lead_stands_out_and_little_energy_lies_above_6_khz():
  share, above = [], []
  for index in range(10):
    score = composer.compose(10, index, 2.0)
    solo, rest = (
        dataclasses.replace(score, notes=tuple(n for n in score.notes if (n.part == 'lead') == wanted))
        for wanted in (True, False))
    lead, backing = (composer_synth.mix_notes(s).astype(np.float64) for s in (solo, rest))
    share.append(np.sum(lead**2) / np.sum(lead**2 + backing**2))
    power = np.abs(np.fft.rfft(composer.render(score))) ** 2
    above.append(power[12000:].sum() / power.sum())
  assert min(share) > 0.15 and np.mean(share) > 0.4, share
  assert max(above) < 0.05


def test_examples_have_the_agreed_fields():
  corpus = composer.Corpus(seed=3, first=40, size=2, seconds=4.0)
  example = corpus[1]
  assert len(corpus) == 2 and len(list(corpus)) == 2
  assert set(example) == {'audio', 'sample_rate', 'recording', 'artist', 'start', 'texts', 'attributes'}
  assert example['recording'] == 'composer-3-41' and example['sample_rate'] == 24000
  same = composer.Corpus(seed=3, first=41, size=1, seconds=4.0)[0]
  np.testing.assert_array_equal(example['audio'], same['audio'])
  truth = example['attributes']
  assert set(composer.ATTRIBUTES) <= set(truth)
  assert len(truth['chord_times']) == len(truth['chord_names']) and truth['chord_times'][0] == 0.0
  bar = np.diff(truth['chord_times'])
  np.testing.assert_allclose(bar, int(truth['meter'][0]) * 60 / truth['tempo_bpm'], atol=1e-4)
  np.testing.assert_allclose(np.diff(truth['beat_times']), 60 / truth['tempo_bpm'], atol=1e-4)
  assert len(truth['melody_times']) == len(truth['melody_pitches']) > 0


def test_pitches_are_where_the_truth_says():
  score = next(s for s in (composer.compose(11, i, 4.0) for i in range(200))
               if s.lead == 'flute' and s.density == 'sparse' and s.register == 'high')
  audio, truth = composer.render(score), composer.attributes(score)
  for n, (start, pitch) in enumerate(zip(truth['melody_times'], truth['melody_pitches'])):
    piece = audio[int((start + 0.1) * 24000):int((start + 0.3) * 24000)]
    if piece.size < 4000:
      continue
    power = np.abs(np.fft.rfft(piece * np.hanning(piece.size), 1 << 16))
    hz = np.fft.rfftfreq(1 << 16, 1 / 24000)
    power[(hz < 450) | (hz > 1200)] = 0  # the range of a high lead
    assert abs(12 * np.log2(hz[power.argmax()] / 440) + 69 - pitch) < 0.5, n


def test_fingerprint_changes_with_each_field():
  base = composer.Corpus()
  changed = [dataclasses.replace(base, **{name: value}) for name, value in (
      ('seed', 1), ('first', 1), ('size', 2), ('seconds', 5.0), ('split', 'test'), ('chatter', True))]
  assert len({c.fingerprint for c in (base, *changed)}) == 7
  assert specs.from_json(specs.to_json(base)) == base
  assert pickle.loads(pickle.dumps(base)).fingerprint == base.fingerprint


@pytest.mark.parametrize('wrong', [{'size': 0}, {'first': -1}, {'seconds': 0.0}, {'split': 'valid'}])
def test_wrong_settings_are_named(wrong):
  with pytest.raises(ValueError, match=str(*wrong.values())):
    composer.Corpus(**wrong)


def test_an_index_outside_the_corpus_is_refused():
  for i in (-1, 2):
    with pytest.raises(IndexError, match='corpus of 2'):
      composer.Corpus(size=2, seconds=0.1)[i]


def test_note_tables_are_bounded():
  assert composer_synth._table.cache_info().maxsize <= 512
