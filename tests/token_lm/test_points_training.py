"""Stages that hear MuLan's points start from the run that made the tokens, and from no other."""
import jax
import numpy as np
import pytest

from musiclm_jax.cascade import Cascade
from musiclm_jax.cascade_networks import CascadeNetworks
from musiclm_jax.training import checkpoint

from tests import trainings

OVERLAY = 'token_lm/points.gin'


@pytest.fixture(scope='module')
def workdir(tmp_path_factory):
  folder = tmp_path_factory.mktemp('points')
  for name, macros in (('codec', {'RECORDS': 'nowhere'}), ('semantic_tokens', {'W2V_WORKDIR': 'nowhere'}),
                       ('mulan_tokens', {'MULAN_WORKDIR': 'nowhere'})):
    trainings.save_random(folder / name, name, {}, **macros)
  trainings.write_tokens(folder / 'tokens', lineage=Cascade(folder).lineage)
  return folder


def train(workdir, name, tokens, run=None, **macros):
  donor = {} if 'INIT_FROM' in macros else {'MULAN_TOKENS_WORKDIR': workdir / 'mulan_tokens'}
  given = {**donor, 'NUM_STEPS': 2, 'BATCH_SIZE': 8, **macros}
  built = trainings.experiment(name, tokens, OVERLAY, **given)
  built.build(workdir=str(run or workdir / name), dry_run=False)
  return checkpoint.load(run or workdir / name)


def test_the_codes_come_from_the_run_and_stay_as_they_are(workdir):
  loaded, donor = train(workdir, 'semantic_lm', workdir / 'tokens'), checkpoint.load(workdir / 'mulan_tokens')
  assert loaded.step == 2 and loaded.lineage['mulan'] == donor.content_hash
  np.testing.assert_array_equal(loaded.model.mulan.codebook[...], donor.model.quantizer.codebook[...])
  networks = CascadeNetworks(Cascade(workdir))
  assert networks.mulan_levels == {'semantic': donor.objective.levels}
  trained = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_flatten_with_path(loaded.params)[0]]
  assert any('point' in name for name in trained) and not any('codebook' in name for name in trained)


def test_tokens_of_another_mulan_are_refused(workdir, tmp_path):
  tokens = trainings.write_tokens(tmp_path / 'tokens', lineage={'mulan': 'f00d'})
  with pytest.raises(ValueError, match='the tokens are those of mulan f00d.*name the run that made them'):
    train(workdir, 'coarse_lm', tokens, tmp_path / 'run')


def test_a_dry_run_refuses_them_too(workdir, tmp_path):
  tokens = trainings.write_tokens(tmp_path / 'tokens', lineage={'mulan': 'f00d'})
  given = {'MULAN_TOKENS_WORKDIR': workdir / 'mulan_tokens', 'BATCH_SIZE': 8}
  with pytest.raises(ValueError, match='the tokens are those of mulan f00d'):
    trainings.experiment('coarse_lm', tokens, OVERLAY, **given).build(workdir=str(tmp_path / 'run'), dry_run=True)


def test_a_run_that_has_begun_goes_on_without_its_donor_and_refuses_other_tokens(workdir, tmp_path):
  tokens = workdir / 'tokens'
  train(workdir, 'semantic_lm', tokens)
  train(workdir, 'semantic_lm', tokens, NUM_STEPS=3, MULAN_TOKENS_WORKDIR=tmp_path / 'gone')
  others = trainings.write_tokens(tmp_path / 'tokens', lineage={'mulan': 'f00d'})
  with pytest.raises(ValueError, match='f00d.*choose another workdir'):
    train(workdir, 'semantic_lm', others, NUM_STEPS=4)


def test_a_stage_with_the_points_of_nothing_is_not_sampled(workdir):
  train(workdir, 'coarse_lm', workdir / 'tokens', INIT_FROM=None)
  with pytest.raises(ValueError, match='points that are not those of'):
    Cascade(workdir).stage('coarse')


def test_another_run_than_mulans_is_refused(workdir, tmp_path):
  with pytest.raises(ValueError, match='this is to start from mulan'):
    train(workdir, 'coarse_lm', workdir / 'tokens', tmp_path / 'run',
          MULAN_TOKENS_WORKDIR=workdir / 'semantic_tokens')
