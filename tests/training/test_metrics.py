import json

import jax.numpy as jnp
import pytest

from musiclm_jax.training import metrics


def test_a_resumed_run_rewrites_the_lines_of_the_steps_it_takes_again(tmp_path):
  writer = metrics.MetricsWriter(tmp_path)
  for step in (10, 20, 30):
    writer.write(step, {'loss': 1.0})
  with (tmp_path / 'metrics.jsonl').open('a') as file:
    file.write('{"step": 40, "lo')  # killed while writing
  metrics.MetricsWriter(tmp_path, 20).write(30, {'loss': 2.0})
  lines = [json.loads(line) for line in (tmp_path / 'metrics.jsonl').read_text().splitlines()]
  assert [(line['step'], line['loss']) for line in lines] == [(10, 1.0), (20, 1.0), (30, 2.0)]


def test_vectors_become_numbered_scalars():
  assert metrics.scalars({'a': jnp.array([1.0, 2.0]), 'b': 3}) == {'a_1': 1.0, 'a_2': 2.0, 'b': 3.0}


def test_the_alarm_rings_once_and_only_at_chance(caplog):
  alarm = metrics.ChanceAlarm(after=100)
  with caplog.at_level('WARNING'):
    alarm(50, {'loss': 6.238, 'loss_chance': 6.238})
    assert not caplog.records
    alarm(100, {'loss': 5.0, 'loss_chance': 6.238})
    assert not caplog.records
    for step in (110, 120):
      alarm(step, {'loss': 6.236, 'loss_chance': 6.238})
  assert len(caplog.records) == 1 and 'chance level 6.2380' in caplog.text


@pytest.mark.parametrize('loss', [float('nan'), float('inf'), -float('inf')])
def test_a_loss_that_is_not_finite_names_its_step_and_examples(loss, tmp_path):
  metrics.check_finite(16, jnp.float32(2.5))
  with pytest.raises(metrics.NonFiniteLoss, match=f'loss of step 17 is {loss}'):
    metrics.check_finite(17, jnp.float32(loss))
  with pytest.raises(metrics.NonFiniteLoss) as error:
    metrics.check_finite(17, jnp.float32(loss), lambda: tmp_path)
  assert f'batch of step 17 ({tmp_path})' in str(error.value)
