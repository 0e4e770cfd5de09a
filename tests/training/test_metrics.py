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
  alarm = metrics.BarAlarm(after=100)
  with caplog.at_level('WARNING'):
    alarm(50, {'loss': 6.238, 'loss_chance': 6.238})
    assert not caplog.records
    alarm(100, {'loss': 5.0, 'loss_chance': 6.238})
    assert not caplog.records
    for step in (110, 120):
      alarm(step, {'loss': 6.236, 'loss_chance': 6.238})
  assert len(caplog.records) == 1 and 'chance level 6.2380' in caplog.text


def test_a_collapse_under_a_floor_is_told_once_with_step_and_figures(caplog):
  alarm = metrics.BarAlarm(after=100)
  with caplog.at_level('WARNING'):
    alarm(50, {'perplexity_1': 3.0, 'perplexity_1_floor': 51.2})
    alarm(110, {'perplexity_1': 60.0, 'perplexity_1_floor': 51.2, 'perplexity_2': 1.0})
    assert not caplog.records
    for step in (120, 130):
      alarm(step, {'perplexity_1': 12.5, 'perplexity_1_floor': 51.2})
  assert len(caplog.records) == 1
  assert 'step 120: perplexity_1 is 12.5000, under its floor 51.2000' in caplog.text


def test_skipped_steps_are_counted_and_too_many_in_succession_end_the_run(caplog):
  skipped = metrics.SkippedSteps(limit=2)
  for step, value in enumerate((0, 1, 1, 0, 1)):
    skipped(step, value)
  assert skipped.report() == 3 and skipped.report() == 0
  skipped(5, 1)
  with pytest.raises(metrics.NonFiniteGradient, match='gradients of 3 steps in succession, up to step 6'):
    skipped(6, 1)
  assert 'step 1: the gradient is not finite' in caplog.text


@pytest.mark.parametrize('loss', [float('nan'), float('inf'), -float('inf')])
def test_a_loss_that_is_not_finite_names_its_step_and_examples(loss, tmp_path):
  metrics.check_finite(16, jnp.float32(2.5))
  with pytest.raises(metrics.NonFiniteLoss, match=f'loss of step 17 is {loss}'):
    metrics.check_finite(17, jnp.float32(loss))
  with pytest.raises(metrics.NonFiniteLoss) as error:
    metrics.check_finite(17, jnp.float32(loss), lambda: tmp_path)
  assert f'batch of step 17 ({tmp_path})' in str(error.value)
