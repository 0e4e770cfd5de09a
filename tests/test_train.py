"""What `train` and `fit` refuse, what they take over from other runs, and what they count as lost."""
import shutil
import types

import jax
import numpy as np
import pytest

from musiclm_jax import train
from musiclm_jax.semantic.model import mel_statistics
from musiclm_jax.training import checkpoint
from tests.trainings import experiment, save_random, write_signals, write_tokens


def test_a_run_that_would_keep_no_checkpoint_is_refused():
  with pytest.raises(ValueError, match='keep must be at least 1, found 0'):
    train.Cadence(keep=0)


@pytest.mark.parametrize('changes, words', [
    ({'compute': 'float31'}, "float16, found 'float31'"), ({'compute': 'int32'}, 'compute must be one of float32'),
    ({'microbatches': 0}, 'microbatches must be at least 1'), ({'max_skipped': -1}, 'max_skipped at least 0'),
    ({'ema_decay': 1.0}, 'ema_decay must be .* below 1, found 1.0'), ({'ema_decay': -0.5}, 'ema_decay')])
def test_a_precision_that_cannot_be_is_refused(changes, words):
  with pytest.raises(ValueError, match=words):
    train.Precision(**changes)


def test_a_number_of_steps_below_none_is_refused(tmp_path):
  with pytest.raises(ValueError, match='num_steps must be at least 0, found -1'):
    experiment('fine_lm', write_tokens(tmp_path / 'tokens'), NUM_STEPS=-1).build(workdir=str(tmp_path), dry_run=True)


def test_a_fit_refuses_a_batch_that_the_mesh_does_not_divide(tmp_path):
  made = experiment('semantic_tokens', W2V_WORKDIR='nowhere', **{'batches.AudioBatches.batch_size': 4})
  with pytest.raises(ValueError, match='batch 4 is not a multiple of data x fsdp = 8'):
    made.build(workdir=str(tmp_path / 'run'), dry_run=True)


def test_a_part_is_taken_over_from_wherever_the_donor_has_it():
  """Parameters, buffers or both; what else the donor has, and this model, does not matter."""
  there, here = np.ones(2), np.zeros(2)
  loaded = types.SimpleNamespace(params={'encoder': {'w': there}, 'both': {'w': there}},
                                 buffers={'codes': {'c': there}, 'both': {'c': there}})
  params, buffers = {'encoder': {'w': here}, 'both': {'w': here}}, {'both': {'c': here}, 'ours': {'c': here}}

  def taken(part, into):
    source = train.InitFrom('run', part=part, into=into)
    return jax.tree.map(lambda x: bool(x.all()), train._OfRun(loaded, source).take_over(params, buffers))

  no = {'c': False}
  assert taken('encoder', 'encoder') == ({'encoder': {'w': True}, 'both': {'w': False}}, {'both': no, 'ours': no})
  assert taken('codes', 'ours') == ({'encoder': {'w': False}, 'both': {'w': False}}, {'both': no, 'ours': {'c': True}})
  assert taken('both', 'both') == ({'encoder': {'w': False}, 'both': {'w': True}}, {'both': {'c': True}, 'ours': no})
  assert taken('both/w', 'encoder/w')[0] == {'encoder': {'w': True}, 'both': {'w': False}}
  with pytest.raises(ValueError, match=r"has no part 'decoder'; it has \['both', 'codes', 'encoder'\]"):
    taken('decoder', 'encoder')
  with pytest.raises(ValueError, match=r"the source checkpoint has no \['both'\]\['c'\]"):
    taken('codes/c', '')


def test_a_run_goes_on_past_a_damaged_step_without_its_donor_and_keeps_what_it_was_made_of(tmp_path):
  tokens = write_tokens(tmp_path / 'tokens')
  save_random(tmp_path / 'donor', 'fine_lm', {})

  def run(steps, **macros):
    made = experiment('fine_lm', tokens, NUM_STEPS=steps, CHECKPOINT_EVERY=1, **macros)
    made.build(workdir=str(tmp_path / 'run'), dry_run=False)
    return checkpoint.load(tmp_path / 'run').lineage['init']

  donor = checkpoint.load(tmp_path / 'donor').content_hash
  assert run(2, INIT_FROM=tmp_path / 'donor') == donor
  shutil.rmtree(tmp_path / 'donor')
  (tmp_path / 'run' / 'checkpoints' / '2' / 'about' / 'specs.json').write_text('{')
  assert run(2, INIT_FROM=tmp_path / 'donor') == donor
  assert run(3) == donor


def test_the_start_hears_as_many_batches_as_the_objective_asks_for(tmp_path):
  audio = write_signals(tmp_path / 'audio')
  made = experiment('w2v_bert', RECORDS=audio, NUM_STEPS=0, **{'partition.Partitioner.data': 1})
  made.build(workdir=str(tmp_path / 'run'), dry_run=False)
  objective, batches = made.macro('OBJECTIVE'), made.macro('BATCHES')
  count = objective.start_batches(batches.batch_size)
  assert count > 2
  first = [batches(step) for step in range(count)]

  def mean_of(parts):
    whole = {name: np.concatenate([part[name] for part in parts]) for name in ('audio', 'length')}
    encoder = objective.encoder
    return mel_statistics(whole['audio'], encoder.mel, encoder.valid(objective.samples, whole['length']))[0]

  found = checkpoint.load(tmp_path / 'run').model.mel_mean[...]
  np.testing.assert_allclose(found, mean_of(first), atol=1e-4)
  assert np.abs(found - mean_of(first[:-1])).max() > 1e-3
