"""Whether MuLan has learned that a text belongs to its clip, and says so where it has not."""
import json
import logging
import math

import pytest

from musiclm_jax.data import composer, records
from tests import trainings

BATCH, STEPS = 32, 240


def pairs(folder, shift):
  """Composed clips of 2 s, each with the texts of the one `shift` places further on."""
  header = records.Header('audio', records.audio_streams(24000))

  def split(name, first, count):
    corpus = composer.Corpus(first=first, size=count, seconds=2.0, split=name)
    clips = [corpus[i] for i in range(count)]
    return [{**clip, 'texts': clips[(i + shift) % count]['texts']} for i, clip in enumerate(clips)]

  records.write_records(folder, {'train': split('train', 0, 256), 'test': split('test', 256, 64)}, header, num_shards=2)
  return folder


@pytest.mark.slow
@pytest.mark.parametrize('right', [True, False])
def test_wrong_pairs_leave_the_held_out_loss_at_chance_and_the_alarm_says_so(tmp_path, caplog, right):
  built = trainings.experiment(
      'mulan', RECORDS=pairs(tmp_path / 'pairs', 0 if right else 7), MULAN_BATCH=BATCH, MULAN_STEPS=STEPS,
      MULAN_CHUNKS=1, MULAN_MEL_BANDS=64, MULAN_PATCH_BANDS=64, MULAN_STRIDE_BANDS=64, MULAN_BAND_MASKS=0,
      MULAN_TIME_MASKS=0, EVAL_EVERY=STEPS, **{'train.Cadence.alarm_after': STEPS, 'partition.Partitioner.data': 1})
  with caplog.at_level(logging.WARNING):
    built.build(workdir=str(tmp_path / 'run'), dry_run=False)
  lines = [json.loads(line) for line in (tmp_path / 'run' / 'metrics.jsonl').read_text().splitlines()]
  [held_out] = [line for line in lines if line.get('part') == 'eval']
  rung = [r for r in caplog.records if 'held-out loss is' in r.getMessage()]
  if right:
    assert held_out['loss'] < 0.9 * math.log(BATCH) and not rung
  else:
    assert held_out['loss'] > 0.98 * math.log(BATCH) and len(rung) == 1
