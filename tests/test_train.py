"""What `train` and `fit` refuse, what they take over from other runs, and what they count as lost."""
import pytest

from musiclm_jax import train
from tests.trainings import experiment


def test_a_run_that_would_keep_no_checkpoint_is_refused():
  with pytest.raises(ValueError, match='keep must be at least 1, found 0'):
    train.Cadence(keep=0)


def test_a_fit_refuses_a_batch_that_the_mesh_does_not_divide(tmp_path):
  made = experiment('semantic_tokens', W2V_WORKDIR='nowhere', **{'batches.AudioBatches.batch_size': 4})
  with pytest.raises(ValueError, match='batch 4 is not a multiple of data x fsdp = 8'):
    made.build(workdir=str(tmp_path / 'run'), dry_run=True)
