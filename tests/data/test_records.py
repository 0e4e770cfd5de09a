"""Record sets: round trips, the manifest, resuming, and every kind of damage."""
import json
import multiprocessing
import os
import pickle
import resource
import signal
import threading

from hypothesis import given, settings, strategies as st
import numpy as np
import pytest

from musiclm_jax import specs
from musiclm_jax.data import records, source

AUDIO = records.Header('audio', records.audio_streams(24000))
MULAN = specs.TokenSpec('mulan', 1024, 12)
ACOUSTIC = specs.TokenSpec('acoustic', 40000, 3, 50.0)
TOKENS = records.Header('tokens', records.token_streams([MULAN, ACOUSTIC]), lineage={'codec': 'abc'})


def clip(i, samples=300, **more):
  audio = np.random.default_rng(i).integers(-30000, 30000, samples) / 32768
  return {'audio': audio.astype(np.float32), 'sample_rate': 24000, 'recording': f'clip {i}', 'artist': 'ä',
          'start': 0.25, 'texts': [{'kind': 'title', 'text': f'tune {i}'}] if i % 2 else [],
          'attributes': {'tempo': 90, 'x': [1.5]}, **more}


def tokens(i, frames=20):
  rng = np.random.default_rng(i)
  return {'mulan': rng.integers(0, 1024, (1, 12)), 'acoustic': rng.integers(0, 40000, (frames, 3)),
          'recording': f'clip {i}'}


@pytest.fixture
def audio_set(tmp_path):
  clips = {'train': [clip(i) for i in range(11)], 'test': [clip(99)]}
  records.write_records(tmp_path, clips, AUDIO, num_shards=3)
  return tmp_path


def test_sixteen_bit_audio_comes_back_bit_for_bit(audio_set):
  corpus = records.RecordSet(audio_set, 'train')
  assert isinstance(corpus, source.Corpus)
  found = sorted((corpus[i] for i in range(len(corpus))), key=lambda e: int(e['recording'].split()[1]))
  for i, example in enumerate(found):
    want = clip(i)
    assert example['audio'].dtype == np.float32
    np.testing.assert_array_equal(example['audio'], want.pop('audio'))
    example.pop('audio')
    assert example == want
  raw = corpus.fetch(np.array([3, 0]), np.zeros(2, np.uint64))
  np.testing.assert_array_equal(records.from_pcm(raw[0]['audio']), corpus[3]['audio'])


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(-2, 2, width=32), max_size=40))
def test_pcm_is_the_nearest_value_and_clips(values):
  audio = np.array(values, np.float32)
  back = records.from_pcm(records.to_pcm(audio))
  np.testing.assert_allclose(back, np.clip(audio, -1, 1 - 1 / 32768), atol=0.5001 / 32768)
  np.testing.assert_array_equal(records.to_pcm(back), records.to_pcm(audio))


def test_tokens_round_trip_with_large_codebooks(tmp_path):
  records.write_records(tmp_path, {'train': [tokens(i) for i in range(4)]}, TOKENS)
  corpus = records.RecordSet(tmp_path, 'train')
  for i in range(4):
    assert corpus[i]['acoustic'].dtype == np.int32
    np.testing.assert_array_equal(corpus[i]['acoustic'], tokens(i)['acoustic'])
    np.testing.assert_array_equal(corpus[i]['mulan'], tokens(i)['mulan'])
  assert corpus.durations.tolist() == [0.4] * 4
  assert corpus.lineage == {'codec': 'abc'}


@pytest.mark.parametrize('change, message', [
    ({'mulan': np.zeros((1, 11), int)}, r'mulan tokens must be \[frames, 12\], found \(1, 11\)'),
    ({'acoustic': np.full((5, 3), 40000)}, r'must lie in \[0, 40000\), found 40000 to 40000'),
    ({'acoustic': np.full((5, 3), -1)}, 'found -1 to -1')])
def test_tokens_that_do_not_fit_are_not_written(tmp_path, change, message):
  with pytest.raises(ValueError, match=message):
    records.write_shard(tmp_path, 'train', 0, 1, [tokens(0), {**tokens(1), **change}], TOKENS)
  assert os.listdir(tmp_path) == []


def test_manifest_counts(audio_set):
  manifest = records.read_manifest(audio_set)
  assert [s.records for s in manifest.splits['train']] == [4, 4, 3]
  assert manifest.records('train') == 11 and manifest.records('test') == 1
  assert manifest.hours('train') == pytest.approx(11 * 300 / 24000 / 3600)
  assert manifest.licences == {'not stated': 12}
  document = json.loads((audio_set / 'manifest.json').read_text())
  assert document['counts']['train']['records'] == 11
  corpus = records.RecordSet(audio_set, 'train')
  assert corpus.text_kinds.count(()) == 6 and corpus.text_kinds.count(('title',)) == 5
  assert sorted(np.concatenate([corpus.shard_indices(n) for n in range(3)])) == list(range(11))


def test_fingerprints_follow_the_content(audio_set, tmp_path_factory):
  same, other = tmp_path_factory.mktemp('same'), tmp_path_factory.mktemp('other')
  clips = {'train': [clip(i) for i in range(11)], 'test': [clip(99)]}
  again = records.write_records(same, clips, AUDIO, num_shards=3)
  changed = records.write_records(other, {**clips, 'test': [clip(98)]}, AUDIO, num_shards=3)
  first = records.read_manifest(audio_set)
  assert again.fingerprint == first.fingerprint != changed.fingerprint
  assert records.RecordSet(same, 'train').fingerprint != records.RecordSet(same, 'test').fingerprint


def test_reading_from_threads_and_another_process(audio_set):
  corpus = pickle.loads(pickle.dumps(records.RecordSet(audio_set, 'train')))
  want = [corpus[i]['recording'] for i in range(11)]
  wrong = []
  def read():
    for i in np.random.default_rng().permutation(11):
      if corpus[i]['recording'] != want[i]:
        wrong.append(i)
  threads = [threading.Thread(target=read) for _ in range(4)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert not wrong
  pickle.dumps(corpus)  # also with open shards
  with pytest.raises(IndexError):
    corpus[11]


def test_no_record_set(tmp_path):
  with pytest.raises(FileNotFoundError, match='is not a record set: it has no manifest.json'):
    records.RecordSet(tmp_path, 'train')


def test_unknown_and_empty_splits(tmp_path):
  records.write_records(tmp_path, {'train': [clip(0)], 'test': []}, AUDIO)
  with pytest.raises(ValueError, match=r"no split 'valid'; it has test \(0 records\), train \(1 records\)"):
    records.RecordSet(tmp_path, 'valid')
  with pytest.raises(ValueError, match="the split 'test' .* has no records"):
    records.RecordSet(tmp_path, 'test')


def test_other_format_version(audio_set):
  path = audio_set / 'manifest.json'
  path.write_text(path.read_text().replace('"format": 2', '"format": 9'))
  with pytest.raises(ValueError, match='has format 9; this version of musiclm_jax reads 2'):
    records.RecordSet(audio_set, 'train')


@pytest.mark.parametrize('edit', [lambda t: t[:100], lambda t: t.replace('"records": 4', '"records": 5', 1),
                                  lambda t: '[]', lambda t: t.replace('"kind": "audio"', '"kind": "video"')])
def test_damaged_manifest(audio_set, edit):
  path = audio_set / 'manifest.json'
  path.write_text(edit(path.read_text()))
  with pytest.raises(ValueError, match='manifest.json'):
    records.read_manifest(audio_set).records('train')
    corpus = records.RecordSet(audio_set, 'train')
    [corpus[i] for i in range(len(corpus))]


def test_missing_shard_is_named(audio_set):
  (audio_set / 'train-00001-of-00003.arrayrecord').unlink()
  with pytest.raises(FileNotFoundError, match='shard .*train-00001-of-00003.arrayrecord is missing'):
    records.RecordSet(audio_set, 'train')


def test_truncated_shard_is_named(audio_set):
  path = audio_set / 'train-00002-of-00003.arrayrecord'
  path.write_bytes(path.read_bytes()[:-50])
  with pytest.raises(ValueError, match='train-00002-of-00003.arrayrecord has .* bytes; manifest.json says'):
    records.RecordSet(audio_set, 'train')


def test_flipped_bytes_never_go_unnoticed(tmp_path):
  """Any byte of the data: the read fails naming shard and record, or every record is still right."""
  records.write_records(tmp_path, {'train': [clip(i, 30) for i in range(5)]}, AUDIO)
  path = tmp_path / 'train-00000-of-00001.arrayrecord'
  whole = path.read_bytes()
  want = [records.RecordSet(tmp_path, 'train')[i] for i in range(5)]
  noticed = 0
  for place in range(0, len(whole), max(1, len(whole) // 150)):
    path.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1:])
    corpus = records.RecordSet(tmp_path, 'train')
    for i in range(5):
      try:
        example = corpus[i]
      except ValueError as error:
        assert f'record {i} of {path} cannot be read' in str(error)
        noticed += 1
      else:
        np.testing.assert_array_equal(example.pop('audio'), want[i]['audio'])
        assert example == {k: v for k, v in want[i].items() if k != 'audio'}
  assert noticed


def test_more_shards_than_files_may_be_open(tmp_path, monkeypatch):
  monkeypatch.setattr(records, '_OPEN_SHARDS', 3)
  records.write_records(tmp_path, {'train': [clip(i) for i in range(8)]}, AUDIO, num_shards=8)
  opened = lambda: sum('arrayrecord' in os.readlink(f'/proc/self/fd/{name}') for name in os.listdir('/proc/self/fd')
                       if os.path.lexists(f'/proc/self/fd/{name}'))
  before, corpus = opened(), records.RecordSet(tmp_path, 'train')
  for _ in range(2):
    assert [corpus[i]['recording'] for i in range(8)] == [clip(i)['recording'] for i in range(8)]
    assert opened() - before == 3


def test_writing_resumes_shard_by_shard(tmp_path):
  done = lambda i, header=AUDIO: records.shard_done(tmp_path, 'train', i, 2, header)
  records.write_shard(tmp_path, 'train', 0, 2, [clip(0)], AUDIO)
  assert done(0) and not done(1)
  assert not done(0, records.Header('audio', records.audio_streams(24000), {'min_seconds': 2}))
  with pytest.raises(ValueError, match='1 of 2 shards are missing .* train-00001-of-00002.arrayrecord'):
    records.finish(tmp_path, AUDIO, {'train': 2})
  with pytest.raises(FileNotFoundError):
    records.RecordSet(tmp_path, 'train')
  # A write that dies half-way leaves what was there.
  def dying():
    yield clip(1)
    raise RuntimeError('power cut')
  with pytest.raises(RuntimeError):
    records.write_shard(tmp_path, 'train', 1, 2, dying(), AUDIO)
  assert not done(1)
  records.write_shard(tmp_path, 'train', 1, 2, [clip(1)], AUDIO)
  (tmp_path / 'train-00000-of-00009.arrayrecord').write_bytes(b'of an earlier run')
  records.finish(tmp_path, AUDIO, {'train': 2})
  assert len(records.RecordSet(tmp_path, 'train')) == 2
  assert not (tmp_path / 'train-00000-of-00009.arrayrecord').exists()
  (tmp_path / 'train-00000-of-00002.arrayrecord').write_bytes(b'')
  assert not done(0)


def test_a_sidecar_of_another_shard_is_refused(audio_set):
  one, two = (audio_set / f'train-0000{i}-of-00003.arrayrecord.json' for i in range(2))
  one.write_bytes(two.read_bytes())
  with pytest.raises(ValueError, match='describe different shards'):
    records.RecordSet(audio_set, 'train')


def test_a_shard_that_is_written_again_under_a_run_is_refused(audio_set):
  corpus = records.RecordSet(audio_set, 'train')
  want = corpus[0]['audio']
  records.write_shard(audio_set, 'train', 0, 3, [clip(i + 50) for i in range(4)], AUDIO)
  records.write_shard(audio_set, 'train', 1, 3, [clip(i + 60) for i in range(4)], AUDIO)
  np.testing.assert_array_equal(corpus[1]['audio'].shape, want.shape)  # open: still the old one, whole
  with pytest.raises(ValueError, match='train-00001-of-00003.arrayrecord.json and manifest.json describe different'):
    corpus[4]  # not opened yet
  with pytest.raises(ValueError, match='describe different'):
    records.RecordSet(audio_set, 'train')


def test_a_deleted_shard_under_a_run_is_named(audio_set):
  corpus = records.RecordSet(audio_set, 'train')
  (audio_set / 'train-00001-of-00003.arrayrecord').unlink()
  with pytest.raises(FileNotFoundError, match='train-00001-of-00003.arrayrecord is missing'):
    corpus[4]


def test_a_record_without_one_of_its_streams_is_named(tmp_path):
  """Written under a header with one stream, read under a manifest that promises two."""
  less = records.Header('tokens', records.token_streams([MULAN]))
  records.write_records(tmp_path, {'train': [tokens(0)]}, less)
  record = records.encode({'mulan': tokens(0)['mulan']}, less)
  with pytest.raises(ValueError, match="it has no stream 'acoustic', only mulan, texts"):
    records.decode(record, TOKENS)
  with pytest.raises(ValueError, match="it has no stream 'acoustic'"):
    records.encode({'mulan': tokens(0)['mulan']}, TOKENS)


def test_differences_are_seen_in_finished_and_unfinished_sets(audio_set, tmp_path_factory):
  other = records.Header('audio', records.audio_streams(24000), {'min_seconds': 2})
  assert records.difference(audio_set, AUDIO) is None
  assert records.difference(audio_set, other) == ('min_seconds', None, 2)
  unfinished = tmp_path_factory.mktemp('unfinished')
  assert records.difference(unfinished, other) is None
  records.write_shard(unfinished, 'train', 0, 2, [tokens(0)], TOKENS)
  assert records.difference(unfinished, TOKENS) is None
  changed = records.Header('tokens', TOKENS.streams, lineage={'codec': 'xyz'})
  assert records.difference(unfinished, changed) == ('codec', 'abc', 'xyz')
  assert records.difference(unfinished, AUDIO) == ('kind', 'tokens', 'audio')


def test_a_write_that_dies_leaves_the_shard_that_was_there(audio_set):
  def broken():
    yield clip(1)
    raise RuntimeError('no more')
  before = {p.name: p.read_bytes() for p in audio_set.iterdir()}
  with pytest.raises(RuntimeError, match='no more'):
    records.write_shard(audio_set, 'train', 1, 3, broken(), AUDIO)
  assert {p.name: p.read_bytes() for p in audio_set.iterdir()} == before


def _write_on_a_full_disk(folder):
  resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
  signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
  with pytest.raises(OSError, match='cannot be written .*is the disk full'):
    records.write_shard(folder, 'train', 0, 1, (clip(i, 3000) for i in range(100)), AUDIO)


def test_a_disk_that_takes_no_more_is_one_line_and_nothing_stays(tmp_path):
  child = multiprocessing.get_context('spawn').Process(target=_write_on_a_full_disk, args=(tmp_path,))
  child.start()
  child.join()
  assert child.exitcode == 0 and not list(tmp_path.iterdir())


def test_a_folder_is_not_written_over(tmp_path):
  with pytest.raises(IsADirectoryError, match='is a folder; name a file'), records.replacing(tmp_path):
    pass
  assert not list(tmp_path.iterdir())


def test_a_rewriting_that_dies_is_an_unfinished_set_that_can_be_finished(audio_set):
  count = iter(range(99))
  def keep(index, example):
    if next(count) == 6:
      raise RuntimeError('no more')
    return index != 0
  with pytest.raises(RuntimeError, match='no more'):
    records.rewrite(audio_set, 'train', keep, 'not wanted')
  with pytest.raises(FileNotFoundError, match='was interrupted, run it again'):
    records.RecordSet(audio_set, 'train')
  assert records.difference(audio_set, AUDIO) is None
  made = records.finish(audio_set, AUDIO, {'train': 3, 'test': 1})
  assert made.records('train') == 10 and made.skipped == {'not wanted': {'count': 1, 'files': []}}


def test_who_made_a_set_is_kept_and_does_not_change_it(tmp_path):
  fingerprints = []
  for name, made in (('a', [{'code': 'one'}, {'code': 'one'}]), ('b', [{'code': 'one'}, {'code': 'two'}])):
    for i in range(2):
      records.write_shard(tmp_path / name, 'train', i, 2, [clip(i)], AUDIO, made_with=made[i])
    manifest = records.finish(tmp_path / name, AUDIO, {'train': 2})
    assert list(records.read_manifest(tmp_path / name).made_with) == list(manifest.made_with)
    fingerprints.append(manifest.fingerprint)
  assert fingerprints[0] == fingerprints[1]
  assert len(records.read_manifest(tmp_path / 'a').made_with) == 1
  assert len(records.read_manifest(tmp_path / 'b').made_with) == 2


def test_a_split_is_written_again_without_some_records(audio_set):
  before = {e['recording'] for e in map(records.RecordSet(audio_set, 'train').__getitem__, range(11))}
  made = records.rewrite(audio_set, 'train', lambda i, e: e['recording'] not in ('clip 3', 'clip 4'), 'not wanted')
  corpus = records.RecordSet(audio_set, 'train')
  assert {corpus[i]['recording'] for i in range(len(corpus))} == before - {'clip 3', 'clip 4'}
  assert made.skipped == {'not wanted': {'count': 2, 'files': []}}
  again = records.rewrite(audio_set, 'train', lambda i, e: e['recording'] != 'clip 5', 'not wanted')
  assert again.skipped['not wanted']['count'] == 3 and again.records('train') == 8
