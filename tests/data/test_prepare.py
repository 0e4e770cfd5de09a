"""Preparing a folder: what is written, what is left out, splits, captions, running again."""
import json
import os
import pathlib

import numpy as np
import pytest
import soundfile

from musiclm_jax.data import captions, composer, prepare, records

NOISE = np.random.default_rng(0).normal(0, 0.1, 24000 * 4)


def song(folder, name, seconds=1.5, rate=24000, seed=0):
  """A file that differs from every other: copies are left out."""
  path = folder / name
  path.parent.mkdir(parents=True, exist_ok=True)
  shift = sum(map(ord, str(name))) * 7 + seed
  soundfile.write(path, np.roll(NOISE, shift)[:round(seconds * rate)], rate)
  return path


def jsonl(path, rows):
  path.write_text('\n'.join(json.dumps(r) for r in rows))
  return path


@pytest.fixture
def music(tmp_path):
  folder = tmp_path / 'music'
  for i in range(12):
    song(folder, f'{"abc"[i % 3]}/song{i}.{["wav", "flac", "ogg"][i % 3]}')
  return folder


def examples(directory, split='train'):
  corpus = records.RecordSet(directory, split)
  return [corpus[i] for i in range(len(corpus))]


def by_recording(directory):
  return {e['recording']: e for split in ('train', 'test') for e in examples(directory, split)}


def prepared(music, output, **options):
  return prepare.prepare_folder(music, output, workers=1, **options)


def test_a_plain_folder(music, tmp_path):
  seen = []
  manifest = prepared(music, tmp_path / 'out', progress=lambda *a: seen.append(a))
  assert manifest.records('train') + manifest.records('test') == 12
  assert 1 <= manifest.records('test') <= 6
  assert seen[11] == ('files checked', 12, 12) and seen[-1][0] == 'shards written'
  example = by_recording(tmp_path / 'out')['b/song1.flac']
  audio, _ = soundfile.read(music / 'b/song1.flac', dtype='float32')
  np.testing.assert_array_equal(example['audio'], audio)
  assert (example['sample_rate'], example['start'], example['artist']) == (24000, 0.0, '')
  assert example['texts'] == []
  assert len(example['source']['sha256']) == 64
  assert 'train' in manifest.summary()


def test_stereo_at_another_rate(tmp_path):
  folder = tmp_path / 'music'
  folder.mkdir()
  both = NOISE[:48000 * 2].reshape(-1, 2)[:48000]
  soundfile.write(folder / 'both.wav', both, 48000)
  soundfile.write(folder / 'surround.wav', np.stack([NOISE[:48000]] * 6, axis=1), 48000)
  song(folder, 'mono.wav')
  manifest = prepared(folder, tmp_path / 'out', sample_rate=48000, channels=2, held_out_share=0)
  assert manifest.header.streams == {'audio': {'sample_rate': 48000, 'channels': 2}}
  assert manifest.skipped['wrong number of channels']['files'] == ['surround.wav']
  made = {e['recording']: e for e in examples(tmp_path / 'out', 'train')}
  np.testing.assert_allclose(made['both.wav']['audio'], both, atol=1e-4)
  assert made['mono.wav']['audio'].shape == (72000, 2) and made['mono.wav']['sample_rate'] == 48000
  assert manifest.hours('train') * 3600 == pytest.approx(2.5)
  with pytest.raises(ValueError, match='prepared with other settings: audio'):
    prepared(folder, tmp_path / 'out', held_out_share=0)


def test_the_result_does_not_depend_on_the_workers(music, tmp_path):
  one = prepared(music, tmp_path / 'one')
  two = prepare.prepare_folder(music, tmp_path / 'two', workers=2)
  assert one.fingerprint == two.fingerprint
  for name in os.listdir(tmp_path / 'one'):
    assert (tmp_path / 'one' / name).read_bytes() == (tmp_path / 'two' / name).read_bytes()


def test_running_again_does_nothing_and_other_settings_are_refused(music, tmp_path):
  out = tmp_path / 'out'
  first = prepared(music, out)
  before = {f: os.stat(out / f).st_mtime_ns for f in os.listdir(out)}
  assert prepared(music, out).fingerprint == first.fingerprint
  assert before == {f: os.stat(out / f).st_mtime_ns for f in os.listdir(out)}
  with pytest.raises(ValueError, match='with other settings: min_seconds: 1.0 != 0.5; choose another --out'):
    prepared(music, out, min_seconds=0.5)
  jsonl(tmp_path / 'c.jsonl', [{'file': 'song1.flac', 'caption': 'x'}])
  with pytest.raises(ValueError, match='the captions, titles, artists or licences have changed'):
    prepared(music, out, captions=tmp_path / 'c.jsonl')
  song(music, 'new.wav')
  with pytest.raises(ValueError, match='other settings: files: 12 != 13'):
    prepared(music, out)


def test_an_interrupted_run_continues(music, tmp_path, monkeypatch):
  out = tmp_path / 'out'
  written = []
  original = records.write_shard
  def dying(directory, split, index, *more, **options):
    if len(written) == 2:
      raise KeyboardInterrupt
    written.append((split, index))
    return original(directory, split, index, *more, **options)
  monkeypatch.setattr(records, 'write_shard', dying)
  with pytest.raises(KeyboardInterrupt):
    prepared(music, out)
  assert not (out / 'manifest.json').exists()
  def counting(directory, split, index, *more, **options):
    written.append((split, index))
    return original(directory, split, index, *more, **options)
  monkeypatch.setattr(records, 'write_shard', counting)
  manifest = prepared(music, out)
  assert len(written) == len(set(written)) == sum(len(s) for s in manifest.splits.values())
  assert manifest.fingerprint == prepared(music, tmp_path / 'whole').fingerprint


def test_what_cannot_be_used_is_left_out_with_its_reason(music, tmp_path):
  song(music, 'short.wav', 0.3)
  soundfile.write(music / 'silent.flac', np.zeros(48000), 24000)
  soundfile.write(music / 'nan.wav', np.full(48000, np.nan), 24000, subtype='FLOAT')
  (music / 'broken.mp3').write_bytes(b'')
  (music / 'video.m4a').write_bytes(b'something')
  (music / 'notes.txt').write_bytes(b'not counted')
  (music / '._song1.wav').write_bytes(b'a hidden file of another system')
  (music / 'zz_copy.flac').write_bytes((music / 'b/song1.flac').read_bytes())
  soundfile.write(bytes(music) + b'/caf\xe9.wav', NOISE[:36000], 24000)
  manifest = prepared(music, tmp_path / 'out')
  assert {reason: found['count'] for reason, found in manifest.skipped.items()} == {
      'too short': 1, 'silent': 1, 'non-finite': 1, 'empty': 1, 'format not supported': 1,
      'copy of another file': 1}
  assert manifest.skipped['copy of another file']['files'] == ['zz_copy.flac']
  assert 'caf\\xe9.wav' in by_recording(tmp_path / 'out')
  assert records.read_manifest(tmp_path / 'out').skipped == manifest.skipped
  assert '1 too short' in manifest.summary()


def test_nothing_usable_is_an_error_with_the_counts(tmp_path):
  folder = tmp_path / 'music'
  for i in range(2):
    song(folder, f'{i}.wav', 0.2)
  soundfile.write(folder / 'silent.wav', np.zeros(48000), 24000)
  with pytest.raises(ValueError, match='no usable audio in .*: 1 silent, 2 too short'):
    prepared(folder, tmp_path / 'out')
  (tmp_path / 'nothing').mkdir()
  with pytest.raises(ValueError, match='it has no audio files'):
    prepared(tmp_path / 'nothing', tmp_path / 'out')
  with pytest.raises(FileNotFoundError, match='is not a folder'):
    prepared(tmp_path / 'missing', tmp_path / 'out')
  assert not (tmp_path / 'out').exists()


def test_long_recordings_are_cut(tmp_path):
  song(tmp_path / 'music', 'long.wav', 3.7)
  song(tmp_path / 'music', 'other.wav', 2.3)
  manifest = prepared(tmp_path / 'music', tmp_path / 'out', segment_seconds=1.5, min_seconds=0.75)
  found = examples(tmp_path / 'out', 'train') + examples(tmp_path / 'out', 'test')
  starts = {(e['recording'], e['start']): len(e['audio']) for e in found}
  assert starts == {('long.wav', 0.0): 36000, ('long.wav', 1.5): 36000, ('other.wav', 0.0): 36000,
                    ('other.wav', 1.5): 19200}
  assert manifest.skipped['last piece too short']['count'] == 1
  audio, _ = soundfile.read(tmp_path / 'music/long.wav', dtype='float32')
  second = next(e for e in found if e['start'] == 1.5 and e['recording'] == 'long.wav')
  np.testing.assert_array_equal(second['audio'], audio[36000:72000])


def test_silent_pieces_are_left_out(tmp_path):
  (tmp_path / 'music').mkdir()
  broken = np.concatenate([NOISE[:24000], np.zeros(24000), NOISE[:24000]])
  soundfile.write(tmp_path / 'music/a.wav', broken, 24000)
  song(tmp_path / 'music', 'b.wav')
  manifest = prepared(tmp_path / 'music', tmp_path / 'out', segment_seconds=1.0)
  assert manifest.skipped['silent piece']['count'] == 1
  found = by_recording(tmp_path / 'out')
  assert found['a.wav']['start'] == 2.0


def test_artists_are_never_on_both_sides(tmp_path):
  folder = tmp_path / 'music'
  rows = [{'file': f'{i}.wav', 'artist': f'artist {i % 7}'} for i in range(21)]
  for row in rows:
    song(folder, row['file'], 1.0)
  jsonl(folder / 'manifest.jsonl', rows)
  prepared(folder, tmp_path / 'out', held_out_share=0.3)
  train, test = ({e['artist'] for e in examples(tmp_path / 'out', s)} for s in ('train', 'test'))
  assert len(train) + len(test) == 7 and not train & test and len(test) >= 1
  # One more artist moves nobody to the other side.
  song(folder, 'new.wav', 1.0)
  prepared(folder, tmp_path / 'more', held_out_share=0.3)
  assert {e['artist'] for e in examples(tmp_path / 'more', 'test')} - {''} == test


@pytest.mark.parametrize('groups', [[1, 1], [5, 1], [1] * 30, [20, 1, 1], [3, 3]])
def test_something_is_held_out_and_most_is_not(groups):
  found = [prepare.Recording(f'{g}.{i}', b'', None, captions.Facts(artist=f'artist {g}'))
           for g, size in enumerate(groups) for i in range(size)]
  split = prepare._split(found, 0.1)
  assert len(split['train']) >= len(split['test']) >= 1


def test_one_artist_cannot_be_split(tmp_path):
  song(tmp_path / 'music', 'only.wav')
  with pytest.warns(UserWarning, match='1 recordings in 1 groups .* nothing is held out'):
    manifest = prepared(tmp_path / 'music', tmp_path / 'out')
  assert (manifest.records('train'), manifest.records('test')) == (1, 0)
  with pytest.raises(ValueError, match="split 'test' .* has no records"):
    records.RecordSet(tmp_path / 'out', 'test')


def test_facts_of_the_folder(music, tmp_path):
  jsonl(music / 'manifest.jsonl', [
      {'file': 'a/song0.wav', 'title': 'Tune', 'artist': 'Anna', 'licence': 'CC0 1.0',
       'caption': ' A  tune. ', 'tags': ['calm', 'piano'], 'source_url': 'https://example.org'},
      {'file': 'gone.wav', 'caption': 'ignored'}])
  jsonl(music / 'b' / 'manifest.jsonl', [{'file': 'song1.flac', 'license': 'CC BY 4.0'}])
  manifest = prepared(music, tmp_path / 'out')
  found = by_recording(tmp_path / 'out')['a/song0.wav']
  assert found['artist'] == 'Anna'
  assert found['texts'] == [
      {'kind': 'description', 'text': 'A tune.'}, {'kind': 'tags', 'text': 'calm, piano'},
      {'kind': 'title', 'text': 'Tune'}]
  assert found['source']['source_url'] == 'https://example.org'
  assert manifest.licences == {'CC BY 4.0': 1, 'CC0 1.0': 1, 'not stated': 10}
  # A caption file replaces captions and tags, not titles, artists or licences.
  jsonl(tmp_path / 'c.jsonl', [{'file': 'song0.wav', 'text': 'Another.'}])
  prepared(music, tmp_path / 'again', captions=tmp_path / 'c.jsonl')
  found = by_recording(tmp_path / 'again')['a/song0.wav']
  assert found['texts'] == [{'kind': 'description', 'text': 'Another.'}, {'kind': 'title', 'text': 'Tune'}]
  assert found['artist'] == 'Anna' and found['source']['licence'] == 'CC0 1.0'


def test_captions_are_matched_and_the_rest_is_reported(music, tmp_path):
  table = tmp_path / 'captions.csv'
  table.write_text('\ufefffile,caption,tags\na/song0.wav,"One, with\na comma.",x\nsong1,Two.,\n'
                   './c/song2.ogg,Three.,\na/song0.wav,Four.,x\nmissing.wav,Five.,\n')
  with pytest.warns(UserWarning, match="1 rows of .*captions.csv name no recording of .*'missing.wav'"):
    manifest = prepared(music, tmp_path / 'out', captions=table)
  assert manifest.skipped['caption without a recording'] == {'count': 1, 'files': ['missing.wav']}
  found = by_recording(tmp_path / 'out').items()
  texts = {n: [t['text'] for t in e['texts']] for n, e in found if e['texts']}
  assert texts == {'a/song0.wav': ['One, with a comma.', 'x', 'Four.'], 'b/song1.flac': ['Two.'],
                   'c/song2.ogg': ['Three.']}


def test_links_and_unreadable_places_in_a_folder(music, tmp_path):
  elsewhere = tmp_path / 'elsewhere'
  song(elsewhere, 'album/far.wav')
  (music / 'linked').symlink_to(elsewhere)
  (music / 'a' / 'again').symlink_to(music / 'b')
  (music / 'loop').symlink_to(tmp_path)
  (music / 'gone.wav').symlink_to('/nowhere')
  manifest = prepared(music, tmp_path / 'out')
  names = set(by_recording(tmp_path / 'out'))
  assert 'linked/album/far.wav' in names and len(names) == 13
  assert manifest.skipped['unreadable'] == {'count': 1, 'files': ['gone.wav']}


def test_what_is_known_of_a_copy_is_known_of_what_is_kept(tmp_path):
  folder = tmp_path / 'music'
  first = song(folder, 'a.wav')
  (folder / 'b.wav').write_bytes(first.read_bytes())
  table = tmp_path / 'captions.csv'
  table.write_text('file,caption\nb.wav,slow piano\n')
  with pytest.warns(UserWarning, match='cannot be split'):
    prepared(folder, tmp_path / 'out', captions=table)
  (example,) = examples(tmp_path / 'out')
  assert example['recording'] == 'a.wav' and [t['text'] for t in example['texts']] == ['slow piano']


NAMES = ['a/one.wav', 'b/one.flac', 'b/two.wav']


def test_names_match_in_any_form_of_unicode(tmp_path):
  composed, apart = 'Beyonc\u00e9.mp3', 'Beyonce\u0301.mp3'
  for there, given in ((apart, composed), (composed, apart)):
    assert captions.Matcher([there])(given) == there
  assert captions.Matcher([composed, apart])(apart) == apart


def test_ambiguous_names_are_not_guessed(tmp_path):
  path = jsonl(tmp_path / 'c.json', [{'file': 'one', 'text': 'x'}, {'file': 'one.wav', 'text': 'y'}])
  found = captions.read_captions(path, NAMES)
  assert found.unmatched == ('one',) and list(found.texts) == ['a/one.wav']


@pytest.mark.parametrize('content, column, message', [
    ('ytid,caption\nx,y\n', None, 'needs the columns "file" and .caption. or .text.; it has ytid, caption'),
    ('file,description\ntwo,y\n', None, 'it has file, description. Name the column of .* --caption_column'),
    ('file,caption\ntwo,y\n', 'words', "needs the columns \"file\" and 'words'; it has file, caption"),
    ('', None, 'it has no rows'),
    ('file,caption\ntwo.wav,slow piano, minor key\n', None, "the row of 'two.wav' has more fields .* put quotes"),
    ('file,caption\ntwo.wav,"slow piano\na/one.wav,x\n', None, 'c.csv, row 1, is not one of a table .*not closed'),
    ('file,caption\ntwo.wav,"' + 'long ' * 40_000, None, 'row 1, is not one of a table .*not closed'),
    ('file,caption\nthree.wav,x\n', None, 'none of the 1 rows .* names three.wav, the folder has a/one.wav')])
def test_caption_files_that_do_not_fit(tmp_path, content, column, message):
  path = tmp_path / 'c.csv'
  path.write_text(content)
  with pytest.raises(ValueError, match=message):
    captions.read_captions(path, NAMES, column)


def test_caption_files_that_cannot_be_read(tmp_path):
  path = tmp_path / 'c.jsonl'
  path.write_text('{"file": "two.wav", "caption": "a line\u2028separator"}\n{"file": \n')
  with pytest.raises(ValueError, match=r'c.jsonl, line 2, is not JSON'):
    captions.read_captions(path, NAMES)
  path.write_text('{"file": "two.wav", "caption": "half a \\ud83d pair"}')
  assert captions.read_captions(path, NAMES).texts['b/two.wav'][0]['text'] == 'half a ? pair'
  path.write_bytes(b'\xff\xfe')
  with pytest.raises(ValueError, match='is not UTF-8 text'):
    captions.read_captions(path, NAMES)
  path.write_text('["a"]')
  with pytest.raises(ValueError, match='row 1 is not a JSON object'):
    captions.read_captions(path, NAMES)


def test_a_caption_column_and_other_tables(tmp_path):
  path = tmp_path / 'c.tsv'
  path.write_text('file\twords\nb\\two.wav\thello\n')
  assert captions.read_captions(path, NAMES, 'words').texts == {
      'b/two.wav': ({'kind': 'description', 'text': 'hello'},)}


def test_the_built_in_music(tmp_path):
  manifest = prepare.prepare_composer(6, tmp_path / 'a', seconds=1.0, held_out=2, num_shards=2, workers=1)
  assert (manifest.records('train'), manifest.records('test')) == (6, 2)
  found = examples(tmp_path / 'a', 'test')
  want = composer.Corpus(seed=0, first=6, size=2, seconds=1.0, split='test')
  for example, i in zip(found, range(2)):
    np.testing.assert_allclose(example['audio'], want[i]['audio'], atol=1 / 32768)
    assert example['texts'] == want[i]['texts'] and example['attributes'] == want[i]['attributes']
  assert not {e['recording'] for e in found} & {e['recording'] for e in examples(tmp_path / 'a')}
  assert prepare.prepare_composer(6, tmp_path / 'a', seconds=1.0, held_out=2, num_shards=2) == manifest
  with pytest.raises(ValueError, match='other'):
    prepare.prepare_composer(6, tmp_path / 'a', seconds=1.0, held_out=2, num_shards=2, seed=1)
  with pytest.raises(ValueError, match="comes in the sizes nano, tiny, small, base, paper, not 'huge'"):
    prepare.prepare_composer('huge', tmp_path / 'b')


def test_wrong_settings(tmp_path):
  with pytest.raises(ValueError, match='min_seconds 40 must be positive and at most segment_seconds 30'):
    prepare.prepare_folder(tmp_path, pathlib.Path(tmp_path) / 'out', min_seconds=40)
