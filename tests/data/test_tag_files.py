"""Files of tags in the layouts of published collections, made small."""
from __future__ import annotations

import json

import pytest

from musiclm_jax.data import tag_files


def test_magnatagatune_with_its_usual_split(tmp_path):
  path = tmp_path / 'annotations_final.csv'
  path.write_text('"clip_id"\t"no voice"\t"flute"\t"mp3_path"\n'
                  '"2"\t"0"\t"1"\t"f/one.mp3"\n"6"\t"1"\t"0"\t"0/two.mp3"\n"7"\t"1"\t"1"\t"c/three.mp3"\n'
                  '"8"\t"0"\t"0"\t"b/gone.mp3"\n')
  found = tag_files.read([path], ['f/one.mp3', '0/two.mp3', 'c/three.mp3'])
  assert (found.layout, found.tags) == ('magnatagatune', ('flute', 'no voice'))
  assert found.by_name == {'f/one.mp3': {'flute'}, '0/two.mp3': {'no voice'}}  # c is to choose settings by
  assert found.fit == {'0/two.mp3'} and found.unmatched == ('b/gone.mp3',)


def test_audioset_labels_have_their_names(tmp_path):
  (tmp_path / 'eval_segments.csv').write_text(
      '# Segments csv created\n# num_ytids=2\n# YTID, start_seconds, end_seconds, positive_labels\n'
      '--4gqARaEJE, 0.000, 10.000, "/m/068hy,/m/07q6cd_"\nabc_123, 30.000, 40.000, "/m/068hy"\n')
  names = tmp_path / 'class_labels_indices.csv'
  with pytest.raises(ValueError, match='class_labels_indices.csv is needed beside it'):
    tag_files.read([tmp_path / 'eval_segments.csv'], ['abc_123.wav'])
  names.write_text('index,mid,display_name\n0,/m/068hy,"Domestic animals, pets"\n1,/m/07q6cd_,Squeak\n')
  found = tag_files.read([tmp_path / 'eval_segments.csv'], ['--4gqARaEJE.wav', 'more/abc_123.wav'])
  assert found.by_name == {'--4gqARaEJE.wav': {'Domestic animals, pets', 'Squeak'},
                           'more/abc_123.wav': {'Domestic animals, pets'}}
  assert found.fit is None and found.layout == 'audioset'
  elsewhere = tmp_path / 'elsewhere.csv'
  names.rename(elsewhere)
  assert tag_files.read([tmp_path / 'eval_segments.csv'], ['abc_123.wav'], meanings=elsewhere).tags[1] == 'Squeak'


def test_playlists_name_what_is_in_them(tmp_path):
  (tmp_path / 'rainy.m3u').write_text('#EXTM3U\n#PLAYLIST:Rainy Sundays\n#EXTINF:1,x\nmusic\\a.mp3\nb.ogg\n')
  (tmp_path / 'Caf\xe9 jazz.m3u8').write_text('b.ogg\n')
  found = tag_files.read(sorted(tmp_path.iterdir()), ['music/a.mp3', 'b.ogg', 'c.wav'])
  assert found.by_name == {'music/a.mp3': {'Rainy Sundays'}, 'b.ogg': {'Rainy Sundays', 'Caf\xe9 jazz'}}


@pytest.mark.parametrize('name, write', [
    ('tags.csv', lambda rows: 'file,tags\n' + ''.join(f'{f},"{", ".join(t)}"\n' for f, t in rows)),
    ('tags.jsonl', lambda rows: '\n'.join(json.dumps({'file': f, 'tags': t}) for f, t in rows))])
def test_tables(tmp_path, name, write):
  rows = [('a.wav', ['slow', 'sad  strings']), ('b', ['slow']), ('none.wav', ['fast'])]
  (tmp_path / name).write_text(write(rows))
  found = tag_files.read([tmp_path / name], ['x/a.wav', 'b.flac'])
  assert found.by_name == {'x/a.wav': {'slow', 'sad strings'}, 'b.flac': {'slow'}}
  assert found.tags == ('slow', 'sad strings', 'fast') and found.unmatched == ('none.wav',)


@pytest.mark.parametrize('name, content, message', [
    ('t.csv', 'file,words\na.wav,slow\n', 'none of the known layouts: a table needs the columns "file" and "tags"'),
    ('t.csv', 'file,tags\nz.wav,slow\n', 'none of the 1 recordings that .*t.csv names is in the folder; it names z'),
    ('t.csv', '"clip_id"\t"flute"\t"mp3_path"\n"1"\t"yes"\t"0/a.wav"\n', "0/a.wav has 'yes' where 0 or 1 is wanted"),
    ('t.csv', '', 'has none of the known layouts'),
])
def test_other_files_are_refused(tmp_path, name, content, message):
  (tmp_path / name).write_text(content)
  with pytest.raises(ValueError, match=message):
    tag_files.read([tmp_path / name], ['a.wav'])


def test_recordings_of_the_same_last_name_are_told_apart_by_their_paths(tmp_path):
  (tmp_path / 'mine.m3u').write_text('/home/me/music/A/01.mp3\n../B/01.mp3\n./02.mp3\n01.mp3\n/elsewhere/03.mp3\n')
  found = tag_files.read([tmp_path / 'mine.m3u'], ['A/01.mp3', 'B/01.mp3', '02.mp3', 'C/02.mp3', 'C/03.mp3'])
  assert set(found.by_name) == {'A/01.mp3', 'B/01.mp3', '02.mp3', 'C/03.mp3'} and found.unmatched == ('01.mp3',)


def test_tags_without_quotes_and_lists_as_text(tmp_path):
  (tmp_path / 't.csv').write_text('file,tags\na.wav,slow, flute\nb.wav,"[\'low quality\', \'sad\']"\n')
  found = tag_files.read([tmp_path / 't.csv'], ['a.wav', 'b.wav'])
  assert found.by_name == {'a.wav': {'slow', 'flute'}, 'b.wav': {'low quality', 'sad'}}
  (tmp_path / 't.csv').write_text('tags,file\nslow,a.wav,flute\n')
  with pytest.raises(ValueError, match='the row of a.wav has more fields than columns'):
    tag_files.read([tmp_path / 't.csv'], ['a.wav'])
  (tmp_path / 't.csv').write_text('file,tags,YTID\na.wav,slow,x\n')
  assert tag_files.read([tmp_path / 't.csv'], ['a.wav']).layout == 'table'


def test_magnatagatune_with_commas_or_a_short_row(tmp_path):
  path = tmp_path / 'annotations.csv'
  path.write_text('clip_id,flute,mp3_path\n1,1,0/a.wav\n')
  assert tag_files.read([path], ['0/a.wav']).by_name == {'0/a.wav': {'flute'}}
  path.write_text('clip_id\tflute\tmp3_path\n1\t0/a.wav\n')
  with pytest.raises(ValueError, match='annotations.csv: the row of clip 1 has not as many fields'):
    tag_files.read([path], ['0/a.wav'])


def test_several_files_must_be_playlists(tmp_path):
  with pytest.raises(ValueError, match='one file of tags, or several playlists'):
    tag_files.read([tmp_path / 'a.csv', tmp_path / 'b.csv'], ['a.wav'])
