"""What `musiclm data inspect` finds, and that nothing else counts as damage."""
import json
import re

import numpy as np
import pytest

from musiclm_jax import specs
from musiclm_jax.data import inspection, records

SEMANTIC = specs.TokenSpec('semantic', 16, 1, 25.0)
ACOUSTIC = specs.TokenSpec('acoustic', 8, 2, 50.0)
HEADER = records.Header('tokens', records.token_streams([SEMANTIC, ACOUSTIC]), lineage={'codec': 'abc'})


def example(i):
  rng = np.random.default_rng(i)
  acoustic = np.stack([rng.integers(0, 8, 100), rng.integers(0, 2, 100)], axis=1)
  return {'recording': f'song {i // 2}', 'start': 2.0 * (i % 2), 'semantic': rng.integers(0, 16, (50, 1)),
          'acoustic': acoustic}


@pytest.fixture
def token_set(tmp_path):
  records.write_records(tmp_path, {'train': [example(i) for i in range(12)], 'test': [example(20)]}, HEADER,
                        num_shards=3)
  return tmp_path


def test_a_whole_set_has_no_faults_and_its_numbers_are_right(token_set):
  found = inspection.inspect(token_set, workers=1)
  assert found.faults == () and found.held == {'test': (1, 2.0), 'train': (12, 24.0)}
  used = np.concatenate([example(i)['acoustic'] for i in (*range(12), 20)])
  for level, perplexity in enumerate(found.perplexity['acoustic']):
    share = np.bincount(used[:, level]) / len(used)
    assert perplexity == pytest.approx(np.exp(-np.sum(share * np.log(share))))
  assert 'codec abc' in found.text() and 'acoustic: perplexity of 8 codes by level 8 2' in found.text()


def test_several_processes_find_the_same(token_set):
  one, two = (inspection.inspect(token_set, workers=n) for n in (1, 2))
  assert one.text() == two.text()


def damage_header(path):
  sidecar = path.with_name(path.name + '.json')
  content = json.loads(sidecar.read_text())
  content['shard']['records'] += 1
  sidecar.write_text(json.dumps(content))


def describes(change):
  def damage(path):
    sidecar = path.with_name(path.name + '.json')
    content = json.loads(sidecar.read_text())
    sidecar.write_text(json.dumps(change(content) or content))
  return damage


DAMAGE = {
    'seconds': (describes(lambda c: c['record_seconds'].__setitem__(0, 9.0)), 'its .json describes other records'),
    'kinds': (describes(lambda c: c['text_kind_sets'].__setitem__(0, ['title'])), 'its .json describes other records'),
    'other': (describes(lambda c: c['header']['lineage'].update(codec='x')), 'its .json says that it belongs to an'),
    'a list': (describes(lambda c: [c]), 'its .json is damaged'),
    'no entry': (describes(lambda c: c.pop('shard') and None), 'its .json is damaged'),
    'no json': (lambda path: path.with_name(path.name + '.json').unlink(), 'its .json is missing'),
    'cut': (lambda path: path.write_bytes(path.read_bytes()[:-9]), r'has \d+ bytes and should have \d+'),
    'gone': (lambda path: path.unlink(), 'is missing'),
    'disagrees': (damage_header, r'its .json says 5 records .* the manifest 4'),
}


@pytest.mark.parametrize('kind', DAMAGE)
def test_damage_is_named_and_made_again_by_the_same_command(token_set, kind):
  damage, message = DAMAGE[kind]
  before = {p.name: p.read_bytes() for p in token_set.iterdir()}
  damage(token_set / 'train-00001-of-00003.arrayrecord')
  found = inspection.inspect(token_set, workers=1)
  assert [f.file for f in found.faults] == ['train-00001-of-00003.arrayrecord']
  assert re.search(message, found.faults[0].problem)
  assert '1 of 4 shards are damaged' in found.advice(deleted=False)
  found.delete_damaged()
  assert [records.shard_done(token_set, 'train', i, 3, HEADER) for i in range(3)] == [True, False, True]
  rows = [example(i) for i in range(12)]
  records.write_shard(token_set, 'train', 1, 3, rows[1::3], HEADER)
  records.finish(token_set, HEADER, {'train': 3, 'test': 1})
  assert {p.name: p.read_bytes() for p in token_set.iterdir()} == before


def test_any_flipped_byte_is_found(token_set):
  path = token_set / 'train-00000-of-00003.arrayrecord'
  whole = path.read_bytes()
  named = 0
  # The records come first; the rest of the file is its index and padding.
  for place in (*range(0, 2000, 100), *range(2000, len(whole), len(whole) // 10)):
    path.write_bytes(whole[:place] + bytes([whole[place] ^ 16]) + whole[place + 1:])
    [fault] = inspection.inspect(token_set, workers=1).faults
    assert fault.file == path.name
    named += fault.problem.startswith('record ')
  assert named > 8  # of 20 places: most belong to a record, and then it is named


def test_a_record_that_is_there_twice_is_found(tmp_path):
  records.write_records(tmp_path, {'train': [example(0), example(1)], 'test': [example(1)]}, HEADER)
  found = inspection.inspect(tmp_path, workers=1)
  assert found.faults == ()  # the files are what they should be: making them again would not help
  assert found.repeated == ('record 1 of train-00000-of-00001.arrayrecord is also record 0 of '
                            'test-00000-of-00001.arrayrecord',)
  assert '1 records are there more than once' in found.advice(deleted=False)
  found.delete_damaged()
  assert records.shard_done(tmp_path, 'train', 0, 1, HEADER)


def test_records_without_a_name_are_no_repetitions(tmp_path):
  nameless = [{k: v for k, v in example(i).items() if k not in ('recording', 'start')} for i in range(3)]
  records.write_records(tmp_path, {'train': nameless}, HEADER)
  assert inspection.inspect(tmp_path, workers=1).advice(deleted=False) == ''
