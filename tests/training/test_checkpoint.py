"""What a checkpoint is known by."""
import json

from musiclm_jax.training import checkpoint
from tests.trainings import save_random


def test_what_a_later_version_adds_to_a_specification_parts_no_tokens_from_their_networks(tmp_path):
  save_random(tmp_path / 'codec', 'codec', {}, RECORDS='nowhere')
  file = next((tmp_path / 'codec' / 'checkpoints').glob('*/about/specs.json'))
  about, now = json.loads(file.read_text()), checkpoint.load(tmp_path / 'codec')
  hash_of = lambda: checkpoint.content_hash(about['objective'], now.params, now.buffers)
  assert now.content_hash == hash_of()
  del about['objective']['value']['gradients']  # as a version wrote it that did not have it yet
  file.write_text(json.dumps(about))
  older = checkpoint.load(tmp_path / 'codec')
  assert older.objective == now.objective and older.content_hash == hash_of() != now.content_hash
