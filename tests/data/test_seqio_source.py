"""SeqIO over record sets: batches bit-equal to direct reading; preprocessors that cannot be resumed."""
import dataclasses
import os
import pickle
import subprocess
import sys

import numpy as np
import pytest

from musiclm_jax import specs
from musiclm_jax.data import batches, records, source

tf = pytest.importorskip('tensorflow')
seqio = pytest.importorskip('seqio')

from musiclm_jax.data import seqio_source  # noqa: E402
from tasks import mixtures, tokens, waveforms  # noqa: E402

SEMANTIC = specs.TokenSpec('semantic', 64, 1, 25.0)
ACOUSTIC = specs.TokenSpec('acoustic', 1024, 12, 50.0)
STAGE = specs.Stage('coarse', (SEMANTIC,), ACOUSTIC.part('coarse', 0, 4), 0.4)


class Letters:
  content_hash = 'letters'

  def encode(self, text, length):
    ids = [ord(c) % 99 + 1 for c in text][:length]
    return np.array(ids + [0] * (length - len(ids)), np.int32)


def clip(i):
  rng = np.random.default_rng(i)
  return {'audio': rng.uniform(-1, 1, 200 + 10 * i).astype(np.float32), 'sample_rate': 24000,
          'recording': f'clip ä{i}', 'artist': '', 'start': 0.1 * i,
          'texts': [{'kind': 'tags', 'text': f'tägs {i}'}] * (1 + i % 2),
          'attributes': {'tempo': 80.5, 'notes': [i, 2]}, 'source': {'licence': 'CC0 1.0'}}


def token_clip(i):
  rng = np.random.default_rng(i)
  return {'semantic': rng.integers(0, 64, (20 + i, 1)), 'acoustic': rng.integers(0, 1024, (40 + 2 * i, 12)),
          'recording': str(i)}


@pytest.fixture(scope='module')
def folders(tmp_path_factory):
  root = tmp_path_factory.mktemp('records')
  audio = records.Header('audio', records.audio_streams(24000))
  header = records.Header('tokens', records.token_streams([SEMANTIC, ACOUSTIC]), lineage={'codec': 'x'})
  for name, ids in (('audio', range(12)), ('other', range(50, 55))):
    records.write_records(root / name, {'train': [clip(i) for i in ids], 'test': []}, audio, num_shards=3)
  records.write_records(root / 'tokens', {'train': [token_clip(i) for i in range(9)]}, header, num_shards=2)
  return root


@pytest.fixture(autouse=True)
def registries(folders):
  """Tasks of one test do not reach the next."""
  seqio.TaskRegistry.reset()
  seqio.MixtureRegistry.reset()
  yield


def assert_equal(a, b):
  assert a.keys() == b.keys()
  for name in a:
    assert a[name].dtype == b[name].dtype
    np.testing.assert_array_equal(a[name], b[name])


def both(path):
  return source.open_corpus(path, 'train', 'seqio'), source.open_corpus(path, 'train', 'direct')


def test_examples_are_the_records(folders):
  for name in ('audio', 'tokens'):
    task, direct = both(folders / name)
    assert isinstance(task, seqio_source.TaskCorpus) and isinstance(direct, records.RecordSet)
    assert (len(task), task.fingerprint, task.lineage) == (len(direct), direct.fingerprint, direct.lineage)
    for i in range(len(direct)):
      a, b = task[i], direct[i]
      assert a.keys() == b.keys()
      for field in b:
        if isinstance(b[field], np.ndarray):
          np.testing.assert_array_equal(a[field], b[field], strict=True)
        else:
          assert a[field] == b[field]


@pytest.mark.parametrize('make', [
    lambda corpus: batches.AudioBatches(corpus, seconds=150 / 24000, batch_size=4, seed=5),
    lambda corpus: batches.AudioBatches(corpus, seconds=0.1, batch_size=5, order='sequential'),
    lambda corpus: batches.AudioTextBatches(
        corpus, seconds=0.005, batch_size=4, tokenizer=Letters(), text_length=6, seed=2)])
def test_audio_batches_are_bit_equal(folders, make):
  task, direct = (make(c) for c in both(folders / 'audio'))
  assert task.fingerprint == direct.fingerprint
  for step in (0, 1, 2):
    assert_equal(task(step), direct(step))
  assert_equal(task(1), direct(1))  # going back
  if direct.order == 'shuffled':
    assert_equal(task(100_000, 1, 2), direct(100_000, 1, 2))  # far ahead, as one of two hosts


def test_token_batches_are_bit_equal(folders):
  task, direct = (
      batches.TokenBatches(c, stage=STAGE, batch_size=4, seed=5) for c in both(folders / 'tokens'))
  for step in (0, 1, 77):
    assert_equal(task(step), direct(step))


def test_a_registered_mixture_keeps_its_rates_and_its_order(folders):
  waveforms.register('one', str(folders / 'audio'))
  waveforms.register('two', str(folders / 'other'))
  mixtures.register('both', {'one': 1, 'two': 3})
  mixture = seqio_source.open_task('both', 'train')
  assert mixture.rates == (1.0, 3.0)
  direct = source.open_corpus({folders / 'audio': 1, folders / 'other': 3}, 'train', 'direct')
  one, two = (batches.AudioBatches(c, seconds=0.01, batch_size=8) for c in (mixture, direct))
  for step in (0, 9):
    assert_equal(one(step), two(step))


def test_the_kinds_of_text_are_a_mixture_at_their_rates(folders, tmp_path):
  kinds = [('tags', 'title'), ('tags',), ('description', 'tags', 'label'), ('title', 'label'), ('tags', 'description')]
  clips = [{**clip(i), 'texts': [{'kind': k, 'text': f'{k} {i} {n}'} for k in kinds[i % 5] for n in range(2)]}
           for i in range(15)]
  records.write_records(tmp_path / 'said', {'train': clips, 'test': clips[:2]},
                        records.Header('audio', records.audio_streams(24000)), num_shards=5)
  mixtures.register_text_kinds('said', str(tmp_path / 'said'))
  mixture = source.open_corpus('task:said', 'train')
  assert {c.task.name: (len(c), rate) for c, rate in zip(mixture.corpora, mixture.rates)} == {
      'said_tags': (12, 2), 'said_description': (6, 2), 'said_title': (6, 1), 'said_label': (6, 1)}
  made = batches.AudioTextBatches(mixture, seconds=0.005, batch_size=6, tokenizer=Letters(), text_length=6)
  counts = dict.fromkeys(batches.TEXT_RATES, 0)
  for step in range(10):
    for example in made.examples(step):
      [kind] = {t['kind'] for t in example['texts']}
      assert len(example['texts']) == 2
      counts[kind] += 1
  assert counts == {'tags': 20, 'description': 20, 'title': 10, 'label': 10}
  assert [c.task.name for c in source.open_corpus('task:said', 'test').corpora] == ['said_tags', 'said_title']
  with pytest.raises(ValueError, match='task:said is a mixture'):
    source.open_corpus(['task:said', str(folders / 'audio')], 'train')
  # Another process reads the same without having registered anything.
  pickled = pickle.dumps(mixture)
  seqio.TaskRegistry.reset()
  assert_equal(dataclasses.replace(made, corpus=pickle.loads(pickled))(3), made(3))
  # The same through SeqIO alone; a shard without any is empty.
  one = seqio.TaskRegistry.get('said_label').source.get_dataset('train', False, 0, seqio.ShardInfo(0, 5))
  assert not list(one)
  dataset = seqio.get_mixture_or_task('said_label').get_dataset(sequence_length=None, split='train', shuffle=False)
  assert sorted(e['texts'][0].decode() for e in dataset.as_numpy_iterator()) == sorted(
      f'label {i} 0' for i in range(15) if i % 5 in (2, 3))
  with pytest.raises(ValueError, match="kind 'lyrics'; there are description, label, tags, title"):
    mixtures.register_text_kinds('sung', str(tmp_path / 'said'), {'tags': 1, 'lyrics': 1})
  assert not [name for name in seqio.TaskRegistry.names() if name.startswith('sung')]


def noisy(draw):
  """A preprocessor that adds a number to each waveform."""
  return lambda dataset: dataset.map(lambda e: {**e, 'audio': e['audio'] + tf.cast(draw(e), tf.int16)})


def test_preprocessors_draw_from_the_slot(folders):
  by_slot = noisy(lambda e: tf.random.stateless_uniform([], tf.stack([e['slot_seed'], 0]), 1, 99, tf.int32))
  task = waveforms.register('noisy', str(folders / 'audio'), [by_slot])
  one, again = (batches.AudioBatches(seqio_source.open_task('noisy', 'train'), seconds=0.01, batch_size=4)
                for _ in range(2))
  plain = batches.AudioBatches(records.RecordSet(folders / 'audio', 'train'), seconds=0.01, batch_size=4)
  assert one.fingerprint != plain.fingerprint
  for step in (3, 0):
    assert_equal(one(step), again(step))
  # Another order of asking, another host count: the same numbers.
  np.testing.assert_array_equal(one(3)['audio'][2:], again(3, 1, 2)['audio'])
  assert (one(3)['audio'] != plain(3)['audio']).any()
  with pytest.raises(ValueError, match="'noisy' has preprocessors.*DATA_PROCESSES=0"):
    pickle.dumps(one.corpus)
  assert task.name == 'noisy'


@pytest.mark.parametrize('step, message', [
    (lambda ds: ds.filter(lambda e: tf.size(e['texts']) > 1), 'exactly one element for each record'),
    (lambda ds: ds.flat_map(lambda e: tf.data.Dataset.from_tensors(e).repeat(2)), 'exactly one'),
    (lambda ds: ds.take(3), 'exactly one element for each record'),
    (lambda ds: ds.shuffle(4), 'hold elements back'),
    (lambda ds: ds.map(lambda e: {k: e[k] for k in ('audio', 'slot_seed')}), "lose the feature 'texts'"),
    (noisy(lambda e: tf.random.uniform([], 0, 9999, tf.int32)), 'not determined by the feature "slot_seed"'),
    (seqio.map_over_dataset(
        lambda e, seed: {**e, 'audio': e['audio'] + tf.cast(
            tf.random.stateless_uniform([], seed, 0, 9999, tf.int32), tf.int16)}, num_seeds=1),
     'not determined by the feature "slot_seed"')])
def test_preprocessors_that_cannot_be_resumed_are_refused(folders, step, message, monkeypatch):
  monkeypatch.setattr(seqio_source, '_TIMEOUT', 3.0)
  waveforms.register('wrong', str(folders / 'audio'), [step])
  with pytest.raises(ValueError, match=message):
    batches.AudioBatches(seqio_source.open_task('wrong', 'train'), seconds=0.01, batch_size=4)(0)


def test_tasks_are_ordinary_seqio_tasks(folders):
  task = tokens.register('music', str(folders / 'tokens'), [SEMANTIC, ACOUSTIC])
  assert task.splits == ('train',) and task.num_input_examples('train') == 9
  assert task.output_features['acoustic'].vocabulary.vocab_size == 12 * 1024
  whole = list(task.get_dataset(split='train', shuffle=False).as_numpy_iterator())
  assert [len(e['semantic']) for e in whole] == [20, 22, 24, 26, 28, 21, 23, 25, 27]
  shuffled = [len(e['semantic']) for e in task.get_dataset(split='train', seed=3).as_numpy_iterator()]
  assert sorted(shuffled) == list(range(20, 29)) != shuffled
  shards = [[len(e['semantic']) for e in task.get_dataset(
      split='train', shuffle=False, shard_info=seqio.ShardInfo(i, 2)).as_numpy_iterator()] for i in range(2)]
  assert shards == [[20, 22, 24, 26, 28], [21, 23, 25, 27]]
  cut = next(iter(task.get_dataset({'semantic': (5, 1), 'acoustic': (10, 12)}, 'train').as_numpy_iterator()))
  assert cut['semantic'].shape == (5, 1) and cut['acoustic'].shape == (10, 12)


def test_wrong_record_sets_and_names(folders):
  with pytest.raises(ValueError, match='holds audio; .* is for tokens'):
    tokens.register('a', str(folders / 'audio'))
  with pytest.raises(ValueError, match="records 'acoustic' as .*1024.*, the specification is .*512"):
    tokens.register('b', str(folders / 'tokens'), [specs.TokenSpec('acoustic', 512, 12, 50.0)])
  with pytest.raises(FileNotFoundError, match='is not a record set'):
    waveforms.register('c', str(folders))
  waveforms.register('d', str(folders / 'audio'))
  with pytest.raises(ValueError, match="no task or mixture is registered as 'e'; there are d"):
    seqio_source.open_task('e', 'train')
  with pytest.raises(ValueError, match="the split 'test' .* has no records"):
    seqio_source.open_task('d', 'test')
  with pytest.raises(ValueError, match='"auto", "seqio" or "direct"'):
    source.open_corpus(folders / 'audio', 'train', 'fast')


def test_a_process_that_read_through_seqio_ends(folders):
  """A pipeline that waits must not keep the interpreter from ending; direct reading loads no TensorFlow."""
  code = ('import sys\nfrom musiclm_jax.data import source\n'
          f'corpus = source.open_corpus({str(folders / "audio")!r}, "train")\n'
          'print(len(corpus[0]["audio"]), "seqio" in sys.modules)')
  for reader in ('seqio', 'direct'):
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, timeout=900,
                          env={**os.environ, 'MUSICLM_READER': reader})
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ['200', str(reader == 'seqio')]
