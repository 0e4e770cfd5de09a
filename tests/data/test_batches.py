"""Crops and batches: alignment, padding, texts, hosts, orders, and errors at construction."""
import collections
import dataclasses

from hypothesis import given, settings, strategies as st
import numpy as np
import pytest

from musiclm_jax import specs
from musiclm_jax.data import batches, records, source

RATE = 24000
MULAN = specs.TokenSpec('mulan', 16, 3)
SEMANTIC = specs.TokenSpec('semantic', 1000, 1, 25.0)
ACOUSTIC = specs.TokenSpec('acoustic', 1000, 12, 50.0)
COARSE = specs.Stage('coarse', (MULAN, SEMANTIC), ACOUSTIC.part('coarse', 0, 4), 1.0)
FINE = specs.Stage('fine', (ACOUSTIC.part('coarse', 0, 4),), ACOUSTIC.part('fine', 4, 8), 0.48)


class Clips:
  """A corpus in memory; `fingerprint` is given, nothing is known before reading."""

  def __init__(self, examples, fingerprint='clips'):
    self.examples, self.fingerprint = examples, fingerprint

  def __len__(self):
    return len(self.examples)

  def __getitem__(self, i):
    return self.examples[i]


class Letters:
  """Each letter is an id."""

  content_hash = 'letters'

  def encode(self, text, length):
    ids = [ord(c) for c in text][:length]
    return np.array(ids + [0] * (length - len(ids)), np.int32)


def ramp(i, samples=1000, texts=()):
  """A waveform that says where it is: clip i, sample n -> i + n / 2 ** 15."""
  return {'audio': np.arange(samples, dtype=np.float32) / 2 ** 15 + i, 'sample_rate': RATE,
          'recording': f'clip {i}', 'texts': [{'kind': k, 'text': t} for k, t in texts]}


def timed_tokens(i, seconds=4.0):
  """Tokens that say when they are: the time in 20 ms of their frame."""
  frames = np.arange(round(50 * seconds))
  return {'mulan': np.full((1, 3), i % 16), 'semantic': np.arange(round(25 * seconds))[:, None] * 2,
          'acoustic': np.repeat(frames[:, None], 12, axis=1), 'recording': f'clip {i}'}


def test_audio_crops_are_pieces_of_the_clip():
  corpus = Clips([ramp(i) for i in range(20)])
  stream = batches.AudioBatches(corpus, seconds=100 / RATE, batch_size=8, seed=3)
  starts = set()
  for step in range(10):
    batch = stream(step)
    assert {n: batches.ArraySpec(a.shape, a.dtype) for n, a in batch.items()} == stream.spec()
    np.testing.assert_allclose(np.diff(batch['audio']), 2.0 ** -15, rtol=1e-3)
    assert (batch['length'] == 100).all() and batch['slot'].tolist() == list(range(8))
    starts.update(np.rint(batch['audio'][:, 0] % 1 * 2 ** 15).astype(int))
  assert len(starts) > 40 and max(starts) <= 900
  assert stream.epochs(5) == 2.0


def test_short_clips_are_filled_up_with_zeros():
  batch = batches.AudioBatches(Clips([ramp(1, 60)]), seconds=100 / RATE, batch_size=1)(0)
  assert batch['length'].tolist() == [60]
  np.testing.assert_array_equal(batch['audio'][0, :60], ramp(1, 60)['audio'])
  assert (batch['audio'][0, 60:] == 0).all()


@pytest.mark.parametrize('hosts', [2, 4, 8])
def test_hosts_share_one_global_batch(hosts):
  stream = batches.AudioBatches(Clips([ramp(i) for i in range(11)]), seconds=50 / RATE, batch_size=8, seed=1)
  whole = stream(7)
  parts = [stream(7, host, hosts) for host in range(hosts)]
  for name, array in whole.items():
    np.testing.assert_array_equal(np.concatenate([p[name] for p in parts]), array)


def test_hosts_must_divide_the_batch():
  with pytest.raises(ValueError, match='batch 8 is not a multiple of 3 processes'):
    batches.AudioBatches(Clips([ramp(i) for i in range(8)]), seconds=50 / RATE, batch_size=8)(0, 0, 3)


def test_fewer_clips_than_a_batch_is_an_error_with_the_counts():
  corpus = Clips([ramp(i) for i in range(4)])
  with pytest.raises(ValueError, match='4 usable clips, batch 8'):
    batches.AudioBatches(corpus, seconds=50 / RATE, batch_size=8)
  batch = batches.AudioBatches(corpus, seconds=50 / RATE, batch_size=8, min_clips=1)(0)
  counts = collections.Counter(np.floor(batch['audio'][:, 0]).tolist())
  assert counts == {i: 2 for i in range(4)}
  with pytest.raises(ValueError, match='0 usable clips, batch 1'):
    batches.AudioBatches(Clips([]), seconds=1, batch_size=8, min_clips=1)


def test_sequential_shows_each_clip_once_from_its_beginning():
  stream = batches.AudioBatches(Clips([ramp(i) for i in range(10)]), seconds=50 / RATE, batch_size=4,
                                order='sequential')
  assert stream.num_batches == 3
  found = [stream(s) for s in range(3)]
  weights = np.concatenate([b['weight'] for b in found])
  firsts = np.concatenate([b['audio'][:, 0] for b in found])
  assert weights.tolist() == [1] * 10 + [0] * 2
  assert firsts[weights > 0].tolist() == list(range(10))
  assert stream.spec()['weight'] == batches.ArraySpec((4,), np.dtype(np.float32))
  with pytest.raises(IndexError, match='batch 3 of 3'):
    stream(3)


def test_mixtures_keep_their_rates():
  corpus = source.Mixture((Clips([ramp(0)] * 3), Clips([ramp(1)] * 90)), (1, 3))
  stream = batches.AudioBatches(corpus, seconds=50 / RATE, batch_size=8)
  for step in range(3):
    assert np.floor(stream(step)['audio'][:, 0]).sum() == 6
  assert stream.epochs(6) == 4.0


def test_other_sample_rates_are_refused():
  corpus = Clips([{**ramp(0), 'sample_rate': 16000}])
  with pytest.raises(ValueError, match='clip 0 has 16000 samples a second, the network takes 24000'):
    batches.AudioBatches(corpus, seconds=50 / RATE, batch_size=1)(0)


def test_fingerprint_covers_everything_that_changes_a_batch():
  corpus = Clips([ramp(i) for i in range(8)])
  make = lambda corpus=corpus, **more: batches.AudioBatches(
      corpus, **{'seconds': 0.001, 'batch_size': 4, 'seed': 0, **more}).fingerprint
  assert make() == make()
  others = [make(seconds=0.002), make(batch_size=2), make(seed=1), make(order='sequential'),
            make(Clips(corpus.examples, 'other'))]
  assert len({make(), *others}) == 6


def stereo(i, samples=1000):
  """Left and right are ramps of opposite sign."""
  left = ramp(i, samples)['audio']
  return {**ramp(i), 'audio': np.stack([left, -left], axis=1)}


def test_crops_of_more_channels_keep_them_together():
  stream = batches.AudioBatches(
      Clips([stereo(i) for i in range(1, 9)]), seconds=100 / RATE, batch_size=8, seed=3, channels=2)
  batch = stream(0)
  assert batch['audio'].shape == stream.spec()['audio'].shape == (8, 100, 2)
  np.testing.assert_array_equal(batch['audio'][..., 0], -batch['audio'][..., 1])
  np.testing.assert_allclose(np.diff(batch['audio'][..., 0]), 2.0 ** -15, rtol=1e-2)


@pytest.mark.parametrize('clip, channels, message', [
    (ramp(0), 2, 'clip 0 has 1 channel, the network takes 2'),
    (stereo(0), 1, 'clip 0 has 2 channels, the network takes 1')])
def test_other_numbers_of_channels_are_refused(clip, channels, message):
  with pytest.raises(ValueError, match=message):
    batches.AudioBatches(Clips([clip]), seconds=50 / RATE, batch_size=1, channels=channels)(0)


@pytest.mark.parametrize('channels', [1, 2])
def test_a_record_set_keeps_its_channels_and_says_so_before_training(tmp_path, channels):
  header = records.Header('audio', records.audio_streams(RATE, channels))
  make = ramp if channels == 1 else stereo
  clips = [{**make(0), 'audio': make(0)['audio'] * 0.9} for _ in range(3)]
  records.write_records(tmp_path, {'train': clips}, header)
  corpus = source.open_corpus(tmp_path, 'train', reader='direct')
  np.testing.assert_allclose(corpus[1]['audio'], clips[1]['audio'], atol=1e-4)
  assert corpus.durations[0] == pytest.approx(1000 / RATE)
  batches.AudioBatches(corpus, seconds=0.01, batch_size=2, channels=channels)(0)
  words = f'the record set has {channels} channels?, the network takes {3 - channels}: .* --channels {3 - channels}'
  with pytest.raises(ValueError, match=words):
    batches.AudioBatches(corpus, seconds=0.01, batch_size=2, channels=3 - channels)


def test_record_sets_are_mixed_by_their_shares(tmp_path):
  for name, level in (('low', 0.1), ('high', 0.5)):
    clips = [{**ramp(0), 'audio': np.full(1000, level, np.float32)}] * 5
    records.write_records(tmp_path / name, {'train': clips}, records.Header('audio', records.audio_streams(RATE, 1)))
  low, high = str(tmp_path / 'low'), str(tmp_path / 'high')

  def loud(paths):
    mixed = source.open_corpus(paths, 'train', reader='direct')
    stream = batches.AudioBatches(mixed, seconds=0.01, batch_size=4)
    return [int((stream(step)['audio'].max(axis=1) > 0.3).sum()) for step in range(5)]

  assert loud({low: 3, high: 1}) == [1] * 5
  assert sum(loud([low, high])) == 10  # two passes over five of each
  with pytest.raises(ValueError, match='no record set is named'):
    source.open_corpus({}, 'train')
  for wrong in (0, 'half'):
    with pytest.raises(ValueError, match='rates must be positive numbers'):
      loud({low: 3, high: wrong})


def noisy(noise, **more):
  options = {'seconds': 100 / RATE, 'batch_size': 8, 'seed': 3, **more}
  return batches.AudioBatches(Clips([ramp(i) for i in range(20)]), noise=noise, **options)


def test_each_slot_comes_with_a_noise_of_its_own():
  """The same one for any number of hosts, whatever else is in the batch; the music is that without noise."""
  noises = Clips([ramp(i + 100, 300) for i in range(50)], 'noises')
  stream = noisy(noises)
  whole = stream(5)
  assert whole['noise'].shape == stream.spec()['noise'].shape == (8, 100)
  np.testing.assert_array_equal(whole['audio'], noisy(None)(5)['audio'])
  parts = [stream(5, host, 4)['noise'] for host in range(4)]
  np.testing.assert_array_equal(np.concatenate(parts), whole['noise'])
  drawn = np.concatenate([stream(step)['noise'][:, 0] for step in range(40)])
  assert len(set(drawn // 1)) == 50 and len(set(drawn)) > 200
  assert stream.fingerprint not in (noisy(None).fingerprint, noisy(Clips(noises.examples, 'others')).fingerprint)


def test_short_noise_is_repeated_and_one_channel_serves_all():
  short = Clips([ramp(1, 30)], 'noises')
  batch = noisy(short)(0)
  np.testing.assert_array_equal(batch['noise'][0], np.tile(ramp(1, 30)['audio'], 4)[:100])
  both = batches.AudioBatches(Clips([stereo(0)]), seconds=100 / RATE, batch_size=1, channels=2, noise=short)(0)
  np.testing.assert_array_equal(both['noise'][0], np.stack([batch['noise'][0]] * 2, axis=1))
  wrong = Clips([{**ramp(1), 'sample_rate': 8000}], 'noises')
  with pytest.raises(ValueError, match='8000 samples a second, the network takes 24000'):
    noisy(wrong)(0)


TEXTS = [('tags', 't'), ('description', 'dd'), ('description', 'DD'), ('title', 'i'), ('chatter', 'c')]


def test_texts_are_drawn_by_the_rates_of_their_kinds():
  stream = batches.AudioTextBatches(
      Clips([ramp(i, texts=TEXTS) for i in range(50)]), seconds=10 / RATE, batch_size=50, tokenizer=Letters(),
      text_length=3, kinds={'tags': 2, 'description': 2, 'title': 1, 'label': 1})
  rows = np.concatenate([stream(s)['text'] for s in range(20)])
  assert rows.dtype == np.int32 and rows.shape == (1000, 3) and (rows[:, 2] == 0).all()
  shares = {k: n / 1000 for k, n in collections.Counter(chr(r) for r in rows[:, 0]).items()}
  assert set(shares) == {'t', 'd', 'D', 'i'}
  for kind, share in {'t': 0.4, 'd': 0.2, 'D': 0.2, 'i': 0.2}.items():
    assert abs(shares[kind] - share) < 0.06
  assert {n: batches.ArraySpec(a.shape, a.dtype) for n, a in stream(0).items()} == stream.spec()


def text_set(path):
  header = records.Header('audio', records.audio_streams(RATE))
  rows = [{**ramp(0, 50, TEXTS if i % 3 else ()), 'recording': f'clip {i}'} for i in range(9)]
  records.write_records(path, {'train': rows}, header)
  return records.RecordSet(path, 'train')


def test_clips_without_text_are_counted_before_training(tmp_path):
  corpus = text_set(tmp_path)
  options = dict(seconds=0.001, tokenizer=Letters(), text_length=3)
  with pytest.raises(ValueError, match='3 of 9 clips have no text of the kinds .*--captions FILE'):
    batches.AudioTextBatches(corpus, batch_size=2, **options)
  with pytest.raises(ValueError, match='9 of 9 clips have no text of the kinds label'):
    batches.AudioTextBatches(corpus, batch_size=2, kinds={'label': 1}, **options)
  with pytest.warns(UserWarning, match='3 of 9 clips have no text'):
    kept = batches.AudioTextBatches(corpus, batch_size=2, unusable='drop', **options)
  assert kept.num_clips == 6
  assert (kept(0)['text'][:, 0] > 0).all()
  with pytest.warns(UserWarning), pytest.raises(ValueError, match='6 usable clips, batch 7.*3 of 9 clips have no text'):
    batches.AudioTextBatches(corpus, batch_size=7, unusable='drop', **options)


def test_a_clip_without_text_that_was_not_foreseen():
  stream = batches.AudioTextBatches(
      Clips([ramp(5)]), seconds=0.001, batch_size=1, tokenizer=Letters(), text_length=3)
  with pytest.raises(ValueError, match='clip 5 has no text .*--captions'):
    stream(0)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2 ** 40), step=st.integers(0, 10 ** 6), stage=st.sampled_from([COARSE, FINE]))
def test_token_crops_show_the_same_time_in_all_streams(seed, step, stage):
  corpus = Clips([timed_tokens(i) for i in range(6)])
  stream = batches.TokenBatches(corpus, stage=stage, batch_size=4, seed=seed)
  batch = stream(step)
  assert {n: batches.ArraySpec(a.shape, a.dtype) for n, a in batch.items()} == stream.spec()
  acoustic = batch['acoustic']
  assert (np.diff(acoustic, axis=1) == 1).all() and (acoustic == acoustic[..., :1]).all()
  if stage is COARSE:
    assert acoustic.shape == (4, 50, 4) and batch['mulan'].shape == (4, 1, 3)
    np.testing.assert_array_equal(batch['semantic'][:, :, 0], acoustic[:, ::2, 0])
  else:
    assert acoustic.shape == (4, 24, 12)


@pytest.mark.parametrize('rates, grid', [
    ((50, 25), 1 / 25), ((75, 50), 1 / 25), ((12.5, 50), 2 / 25), ((75,), 1 / 75)])
def test_crops_start_on_the_coarsest_common_grid(rates, grid):
  streams = tuple(specs.TokenSpec(f's{i}', 10, 1, float(r)) for i, r in enumerate(rates))
  corpus = Clips([{s.name: np.arange(int(8 * s.frame_rate))[:, None] for s in streams}])
  stream = batches.TokenBatches(corpus, stage=specs.Stage('x', streams[:-1], streams[-1], 2.0), batch_size=1)
  assert float(stream._grid) == pytest.approx(grid)
  starts = set()
  for step in range(60):
    batch = stream(step)
    times = {float(batch[s.name][0, 0, 0] / s.frame_rate) for s in streams}
    assert len(times) == 1
    starts |= times
  assert max(starts) <= 6 + 1e-9 and len(starts) > 15
  places = np.array(sorted(starts)) / grid
  np.testing.assert_allclose(places, np.rint(places), atol=1e-6)


def test_first_and_last_place_are_both_reached():
  corpus = Clips([timed_tokens(0, 1.08)])  # 27 semantic frames: a crop may start at frame 0, 1 or 2
  stream = batches.TokenBatches(corpus, stage=COARSE, batch_size=1)
  assert {int(stream(s)['semantic'][0, 0, 0]) for s in range(40)} == {0, 2, 4}


def token_set(path, seconds=(4.0, 4.0, 0.5, 0.98, 1.0)):
  header = records.Header('tokens', records.token_streams([MULAN, SEMANTIC, ACOUSTIC]))
  records.write_records(path, {'train': [timed_tokens(i, s) for i, s in enumerate(seconds)]}, header)
  return records.RecordSet(path, 'train')


@pytest.mark.parametrize('recorded', [True, False])
def test_clips_shorter_than_the_crop_are_counted(tmp_path, recorded):
  corpus = token_set(tmp_path)
  if not recorded:
    corpus = Clips([corpus[i] for i in range(len(corpus))])
  with pytest.raises(ValueError, match='2 of 5 clips are shorter than the crop of 1 s .*--min_seconds 1'):
    batches.TokenBatches(corpus, stage=COARSE, batch_size=2)
  with pytest.warns(UserWarning, match='2 of 5 clips .* left out'):
    stream = batches.TokenBatches(corpus, stage=COARSE, batch_size=3, unusable='drop')
  assert sorted(stream(0)['mulan'][:, 0, 0]) == [0, 1, 4]


def test_a_crop_of_part_of_the_slowest_frame_is_taken_where_it_fits(tmp_path):
  stage = dataclasses.replace(COARSE, seconds=1.5)  # 37 whole semantic frames and 75 acoustic ones
  corpus = token_set(tmp_path, [1.5, 1.48])  # the set says 1.48 s of both
  with pytest.warns(UserWarning, match='1 of 2 clips'):
    stream = batches.TokenBatches(corpus, stage=stage, batch_size=1, unusable='drop')
  assert stream(0)['acoustic'].shape[1] == 75 and stream(0)['mulan'][0, 0, 0] == 0


def test_a_record_set_must_have_the_streams_of_the_stage(tmp_path):
  corpus = token_set(tmp_path, (4.0, 4.0))
  stage = lambda *streams: specs.Stage('s', streams[:-1], streams[-1], 1.0)
  wrong = {
      "needs the stream 'melody'; the record set has acoustic, mulan, semantic": ('melody', 5),
      "'semantic': the record set has codebook_size 1000, stage 's' needs 512": ('semantic', 512, 1, 25.0),
      "'semantic': the record set has frame_rate 25.0, stage 's' needs 50": ('semantic', 1000, 1, 50.0),
      "'acoustic': the record set has 12 levels, stage 's' needs 16": ('acoustic', 1000, 16, 50.0)}
  for message, spec in wrong.items():
    with pytest.raises(ValueError, match=message):
      batches.TokenBatches(corpus, stage=stage(specs.TokenSpec(*spec)), batch_size=1)
  with pytest.raises(ValueError, match='audio is needed, but the record set holds tokens'):
    batches.AudioBatches(corpus, seconds=1, batch_size=1)
  with pytest.raises(ValueError, match='tokens are needed, .* holds audio: run `musiclm extract`'):
    batches.TokenBatches(text_set(tmp_path / 'audio'), stage=COARSE, batch_size=1)


def test_wrong_options():
  corpus = Clips([ramp(0)])
  with pytest.raises(ValueError, match='the order must be one of'):
    batches.AudioBatches(corpus, seconds=1, batch_size=1, order='random')
  with pytest.raises(ValueError, match='"refuse" or "drop"'):
    batches.AudioBatches(corpus, seconds=1, batch_size=1, unusable='ignore')
