"""Tokens as a job: the same bytes however often it is killed, whoever shares the work, and nothing mixed up."""
import json
import os
import random
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from musiclm_jax import extract as extraction
from musiclm_jax.cascade import TOKENIZERS, Cascade
from musiclm_jax.data import inspection, records
from musiclm_jax.specs import TokenSpec
from musiclm_jax.training import state as states
from tests.trainings import for_commands, make_networks, write_signals


@pytest.fixture(scope='session')
def audio(tmp_path_factory):
  return write_signals(tmp_path_factory.mktemp('signals'))


@pytest.fixture(scope='session')
def networks(tmp_path_factory, audio):
  return make_networks(tmp_path_factory.mktemp('networks'), audio)


@pytest.fixture(scope='session')
def cascade(networks):
  return Cascade(networks)


@pytest.fixture(scope='session')
def tokens(tmp_path_factory, audio, cascade):
  folder = tmp_path_factory.mktemp('tokens')
  extraction.extract(audio, folder, cascade, batch_size=1, report=lambda line: None)
  return folder


def content(folder):
  return {p.name: p.read_bytes() for p in folder.iterdir()}


def test_every_record_is_there_once_with_what_it_carried(audio, tokens):
  corpus = records.RecordSet(tokens, 'train')
  examples = [corpus[i] for i in range(len(corpus))]
  assert sorted(e['attributes']['index'] for e in examples) == list(range(30))
  short = [e for e in examples if e['attributes']['index'] % 7 == 0]
  assert {len(e['semantic']) for e in short} == {25} and {len(e['acoustic']) for e in short} == {50}
  assert {len(e['semantic']) for e in examples} == {25, 50} and {len(e['mulan']) for e in examples} == {1}
  assert inspection.inspect(tokens, workers=1).faults == ()


def test_the_tokens_are_those_of_the_networks(audio, tokens, cascade):
  """Computed here from the clip alone, one clip at a time."""
  clips, made = records.RecordSet(audio, 'train'), records.RecordSet(tokens, 'train')
  for i in (0, 3, 20):
    np.testing.assert_array_equal(clips[i]['recording'], made[i]['recording'])
    clip = clips[i]['audio'][None]
    mulan = cascade.function('mulan', 'embed_audio')(clip, np.array([clip.shape[1]], np.int32))
    alone = {'acoustic': cascade.function('codec', 'encode')(clip),
             'semantic': cascade.function('semantic', 'tokens')(clip),
             'mulan': cascade.function('mulan', 'tokens')(mulan)}
    for name, there in alone.items():
      if name == 'mulan':
        assert_same_codes(cascade.part('mulan').model.quantizer, mulan[0], np.asarray(there)[0, 0], made[i][name][0])
      else:
        np.testing.assert_array_equal(np.asarray(there)[0], made[i][name], err_msg=f'{name} of clip {i}')


def assert_same_codes(quantizer, x_E, ours_Q, theirs_Q):
  """Up to the first level at which both codes are as near: an embedding is an average over windows, of which a longer
  clip beside it makes more, and rounding then decides."""
  different = np.flatnonzero(ours_Q != theirs_Q)
  if len(different):
    errors = [np.linalg.norm(x_E - quantizer.decode(codes[:different[0] + 1])) for codes in (ours_Q, theirs_Q)]
    np.testing.assert_allclose(*errors, rtol=1e-5)


def test_tokens_without_a_network(audio, tokens, networks, tmp_path):
  """As AudioLM's stages need them: of a workdir that has no MuLan, and the same as they would be with one."""
  for role in ('codec', 'semantic_tokens'):
    (tmp_path / role).symlink_to(networks / role)
  some = Cascade(tmp_path)
  extraction.extract(audio, tmp_path / 'tokens', some, roles=('codec', 'semantic'), batch_size=1, report=lambda line: 0)
  header = records.read_manifest(tmp_path / 'tokens').header
  assert set(header.streams) == {'acoustic', 'semantic'} and set(header.lineage) == {'codec', 'semantic'}
  with_mulan, without = (records.RecordSet(folder, 'train') for folder in (tokens, tmp_path / 'tokens'))
  for name in ('acoustic', 'semantic'):
    np.testing.assert_array_equal(with_mulan[3][name], without[3][name])
  with pytest.raises(FileNotFoundError, match='mulan_tokens'):
    extraction.extract(audio, tmp_path / 'more', some, batch_size=1, report=lambda line: 0)


@pytest.mark.parametrize('roles, words', [(('semantic',), 'those of the codec'), (('codec', 'melody'), "no 'melody'")])
def test_tokens_that_there_are_none_of(audio, cascade, tmp_path, roles, words):
  with pytest.raises(ValueError, match=words):
    extraction.extract(audio, tmp_path, cascade, roles=roles)


def test_a_shard_says_what_made_it(tokens, cascade):
  sidecar = json.loads((tokens / 'train-00000-of-00005.arrayrecord.json').read_text())
  assert sidecar['header']['lineage'] == cascade.lineage
  assert sidecar['shard']['records'] == 6 and len(sidecar['made_with']['code']) == 16
  made = sidecar['made_with']['networks']
  assert made.keys() == TOKENIZERS.keys() and len(made['codec']['perplexity']) == 4
  text = inspection.inspect(tokens, workers=1).text()
  assert "the network's own, in training" in text and 'acoustic: perplexity of 16 codes' in text


@pytest.mark.parametrize('count', [2, 4])
def test_processes_that_share_the_work_make_the_same_bytes(audio, cascade, tokens, tmp_path, count):
  order = random.Random(count).sample(range(count), count)
  said = []
  made = [extraction.extract(audio, tmp_path, cascade, batch_size=1, process_index=i, process_count=count,
                             report=said.append) for i in order]
  assert made[:-1] == [None] * (count - 1) and made[-1] is not None
  assert sum('of other processes are missing' in line for line in said) == count - 1
  assert content(tmp_path) == content(tokens)


def test_an_interrupted_extraction_makes_only_what_is_missing(audio, cascade, tokens, tmp_path):
  for name, whole in content(tokens).items():
    if name.startswith('train-00001') or name.startswith('test'):
      (tmp_path / name).write_bytes(whole)
  torn, at_work, foreign = (tmp_path / name for name in (
      '.train-00002-of-00005.arrayrecord.99.tmp', '.train-00003-of-00005.arrayrecord.98.tmp', 'mine.arrayrecord'))
  for path in (torn, at_work, foreign):
    path.write_bytes(b'torn')
  os.utime(torn, (time.time() - 10 ** 6,) * 2)
  said = []
  extraction.extract(audio, tmp_path, cascade, batch_size=1, report=said.append)
  assert said == [f'extracted train {i}/5' for i in (1, 3, 4, 5)]
  assert not torn.exists()
  at_work.unlink()  # another process may be writing it, and other files are none of ours
  foreign.unlink()
  assert content(tmp_path) == content(tokens)
  before = {p: p.stat().st_mtime_ns for p in tmp_path.glob('*.arrayrecord')}
  extraction.extract(audio, tmp_path, cascade, batch_size=1, report=said.append)
  assert {p: p.stat().st_mtime_ns for p in tmp_path.glob('*.arrayrecord')} == before


@pytest.mark.parametrize('finished', [True, False])
def test_tokens_of_other_networks_or_settings_are_refused(audio, cascade, tokens, tmp_path, finished):
  for name, whole in content(tokens).items():
    if finished or 'manifest' not in name:
      (tmp_path / name).write_bytes(whole)
  with pytest.raises(ValueError, match='holds tokens of batch 1, this would be batch 2; name another output'):
    extraction.extract(audio, tmp_path, cascade, batch_size=2)

  class Other(Cascade):
    @property
    def lineage(self):
      return {**super().lineage, 'codec': 'other'}

  other = Other('', cascade.places)
  with pytest.raises(ValueError, match=f'tokens of codec {cascade.lineage["codec"]}, this would be codec other'):
    extraction.extract(audio, tmp_path, other, batch_size=1)
  assert finished == ((tmp_path / 'manifest.json').exists())


def test_many_devices_compute_what_one_computes(cascade):
  clips = np.random.default_rng(0).normal(0, 0.1, (jax.local_device_count(), 24000)).astype(np.float32)
  for role, method in (('codec', 'encode'), ('semantic', 'tokens')):
    one, many = (states.compiled(cascade.part(role).model, method, parallel=p) for p in (False, True))
    np.testing.assert_array_equal(np.concatenate([one(c[None]) for c in clips]), many(clips))


def test_a_split_without_records_and_sets_that_are_not_music(cascade, tmp_path):
  clip = {'audio': np.full(24000, 0.1, np.float32), 'sample_rate': 24000, 'recording': 'a'}
  header = records.Header('audio', records.audio_streams(24000))
  for split, clips in (('train', [clip]), ('test', [])):
    records.write_shard(tmp_path / 'empty', split, 0, 1, clips, header)
  records.finish(tmp_path / 'empty', header, {'train': 1, 'test': 1})
  made = extraction.extract(tmp_path / 'empty', tmp_path / 'out', cascade, report=lambda line: None)
  assert (made.records('train'), made.records('test')) == (1, 0)
  with pytest.raises(ValueError, match='out holds tokens, not audio'):
    extraction.extract(tmp_path / 'out', tmp_path / 'again', cascade)
  records.write_records(tmp_path / 'fast', {'train': [{**clip, 'sample_rate': 48000}]},
                        records.Header('audio', records.audio_streams(48000)))
  with pytest.raises(ValueError, match='has 48000 samples a second, the networks were trained with 24000'):
    extraction.extract(tmp_path / 'fast', tmp_path / 'again', cascade)
  records.write_records(tmp_path / 'none', {'train': []}, header)
  with pytest.raises(ValueError, match='none holds no records'):
    extraction.extract(tmp_path / 'none', tmp_path / 'again', cascade)


def test_the_process_index_must_fit():
  with pytest.raises(ValueError, match='process 3 of 3: the index counts from 0'):
    extraction.extract('nowhere', 'nowhere', None, process_index=3, process_count=3)


def test_token_crops_are_the_tokens_of_cropped_audio_away_from_the_edges(cascade):
  """The codec is causal: what a frame hears ends with it, and begins `reach` frames before."""
  audio = np.random.default_rng(1).normal(0, 0.1, (1, 48000)).astype(np.float32)
  encode = cascade.function('codec', 'encode')
  whole = np.asarray(encode(audio))
  reach = cascade.part('codec').model.encoder_reach
  assert 0 < reach < 20
  for first in (10, 37, 60):
    crop = np.asarray(encode(audio[:, first * 480:]))
    np.testing.assert_array_equal(crop[:, reach:], whole[:, first + reach:])
  assert TokenSpec('x', 2, 1, 50.0).frames(1.0) == 50


@pytest.fixture(scope='session')
def by_command(audio, networks, tmp_path_factory):
  """How to extract in a process of its own, and what that makes undisturbed."""
  folder = tmp_path_factory.mktemp('by_command')
  environment = for_commands(folder / 'compiled')

  def start(output, i=0, count=1):
    return subprocess.Popen(
        [sys.executable, '-m', 'musiclm_jax.main', 'extract', '--input', str(audio), '--workdir', str(networks),
         '--output', str(output), '--batch_size', '1', '--process_index', str(i), '--process_count', str(count)],
        env=environment, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)

  assert start(folder / 'undisturbed').wait() == 0
  return start, folder / 'undisturbed'


@pytest.mark.slow
@pytest.mark.parametrize('count', [1, 2, 4])
def test_killed_again_and_again_by_command_it_makes_the_same_bytes(by_command, tmp_path, count):
  start, undisturbed = by_command
  output, generator, kills = tmp_path / 'made', random.Random(count), 0
  for _ in range(20):
    running = [start(output, i, count) for i in range(count)]
    wanted = len(list(output.glob('*.arrayrecord'))) + 1
    deadline = time.monotonic() + 900
    while any(p.poll() is None for p in running) and time.monotonic() < deadline:
      if kills < 4 and len(list(output.glob('*.arrayrecord'))) >= wanted:
        time.sleep(generator.random() * 0.1)
        victim = generator.choice(running)
        kills += victim.poll() is None
        victim.send_signal(signal.SIGKILL)
        break
      time.sleep(0.005)
    codes = [p.wait() for p in running]
    if codes == [0] * count:
      break
  assert kills and (output / 'manifest.json').exists()
  whole = lambda folder: {name: data for name, data in content(folder).items() if name[0] != '.'}
  assert whole(output) == whole(undisturbed)
