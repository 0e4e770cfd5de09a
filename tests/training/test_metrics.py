import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from musiclm_jax.objective import Aux, Media, Objective
from musiclm_jax.training import metrics, tensorboard


def test_a_resumed_run_rewrites_the_lines_of_the_steps_it_takes_again(tmp_path):
  writer = metrics.MetricsWriter(tmp_path)
  for step in (10, 20, 30):
    writer.write(step, {'loss': 1.0})
  with (tmp_path / 'metrics.jsonl').open('a') as file:
    file.write('{"step": 40, "lo')  # killed while writing
  metrics.MetricsWriter(tmp_path, 20).write(30, {'loss': 2.0})
  lines = [json.loads(line) for line in (tmp_path / 'metrics.jsonl').read_text().splitlines()]
  assert [(line['step'], line['loss']) for line in lines] == [(10, 1.0), (20, 1.0), (30, 2.0)]


def test_tensorboard_has_what_the_lines_have_and_forgets_the_steps_taken_again(tmp_path):
  pytest.importorskip('tensorboardX')
  from tests.training import event_files
  writer = metrics.MetricsWriter(tmp_path, tensorboard=True)
  for step in (10, 20, 30):
    writer.write(step, {'loss': 1.0, 'recall@1': 0.5})
    writer.write(step, {'loss': 2.0}, part='eval')
  # No close: the process was killed, and what was written is there.
  resumed = metrics.MetricsWriter(tmp_path, 20, tensorboard=True)
  resumed.write(30, {'loss': 3.0, 'recall@1': 0.5})
  resumed.write(30, {'loss': 4.0}, part='eval')
  resumed.close()
  lines = {(f'{line["part"]}/{name}', line['step']): [value] for line in metrics.read(tmp_path / 'metrics.jsonl')
           for name, value in line.items() if name not in ('part', 'step')}
  found = event_files.values(tmp_path / 'tensorboard')
  assert {key: [v.simple_value for v in values] for key, values in found.items()} == lines
  assert lines['train/loss', 30] == [3.0] and lines['eval/loss', 20] == [2.0]


def test_sounds_and_pictures_of_each_example_go_to_tensorboard(tmp_path):
  pytest.importorskip('tensorboardX')
  soundfile = pytest.importorskip('soundfile')
  import io
  from tests.training import event_files
  audio_BxN = np.array([[0.5, -0.25, 2.0], [np.nan, 0.0, -3.0]], np.float32)
  drawn = []

  def draw(sounds, sample_rate):
    drawn.append((set(sounds), sample_rate))
    return np.full((4, 6, 3), 7, np.uint8)

  writer = metrics.MetricsWriter(tmp_path, tensorboard=True)
  writer.write_media(5, Media({'original': audio_BxN, 'decoded': 0 * audio_BxN}, 8000), draw)
  writer.write_media(6, Media({}, 8000), draw)
  writer.close()
  found = event_files.values(tmp_path / 'tensorboard')
  assert set(found) == {(f'clip_{i}/{name}', 5) for i in (1, 2) for name in ('original', 'decoded', 'pictures')}
  assert drawn == 2 * [({'original', 'decoded'}, 8000)]
  (picture,), (sound,) = found['clip_1/pictures', 5], found['clip_1/original', 5]
  assert (picture.image.height, picture.image.width) == (4, 6)
  samples, rate = soundfile.read(io.BytesIO(sound.audio.encoded_audio_string))
  assert rate == sound.audio.sample_rate == 8000
  np.testing.assert_allclose(samples, [0.5, -0.25, 1.0], atol=1e-4)  # of 16 bit, and clipped
  assert not (tmp_path / 'metrics.jsonl').exists()


@pytest.mark.parametrize(('channels', 'heard'), [(2, 2), (3, 1)])
def test_channels_are_heard_as_they_are_or_as_their_mean(channels, heard, tmp_path):
  pytest.importorskip('tensorboardX')
  soundfile = pytest.importorskip('soundfile')
  import io
  from tests.training import event_files
  audio_BxNxC = np.random.default_rng(0).uniform(-0.5, 0.5, (1, 16, channels)).astype(np.float32)
  writer = metrics.MetricsWriter(tmp_path, tensorboard=True)
  writer.write_media(1, Media({'x': audio_BxNxC}, 8000), lambda sounds, rate: np.zeros((1, 1, 3), np.uint8))
  writer.close()
  (sound,) = event_files.values(tmp_path / 'tensorboard')['clip_1/x', 1]
  samples, _ = soundfile.read(io.BytesIO(sound.audio.encoded_audio_string), always_2d=True)
  expected = audio_BxNxC[0] if heard == 2 else audio_BxNxC[0].mean(axis=1, keepdims=True)
  np.testing.assert_allclose(samples, expected, atol=1e-4)


def test_a_writer_with_nothing_to_write_or_without_tensorboard_leaves_no_event_file(tmp_path):
  metrics.MetricsWriter(tmp_path, 20, tensorboard=True).close()
  writer = metrics.MetricsWriter(tmp_path)
  writer.write(1, {'loss': 1.0})
  writer.write_media(1, Media({'x': np.zeros((1, 4))}, 8000), lambda sounds, rate: np.zeros((1, 1, 3), np.uint8))
  writer.close()
  assert [p.name for p in tmp_path.iterdir()] == ['metrics.jsonl']


def test_a_missing_tensorboard_is_named_with_the_way_to_get_it(monkeypatch):
  monkeypatch.setitem(sys.modules, 'tensorboardX', None)
  with pytest.raises(ValueError, match=r'needs the package tensorboardX: pip install "musiclm_jax\[tensorboard\]"'):
    tensorboard.check_installed()


def test_held_out_metrics_are_means_and_what_the_objective_makes_of_all_batches():
  class Counts(Objective):
    def evaluated(self, statistics):
      share = statistics['count'] / jnp.sum(statistics['count'])
      return {'perplexity': jnp.exp(-jnp.sum(share * jnp.log(share)))}

  def evaluate(batch, key):
    count = jnp.bincount(batch, length=4).astype(jnp.float32)
    values = {'first': batch[0], 'perplexity': jnp.float32(-1), 'drawn': jax.random.uniform(key, (2,))}
    return jnp.mean(batch), Aux(values, {'count': count})

  batches = [np.array([0, 0, 1, 1]), np.array([2, 2, 3, 3])]
  found = metrics.held_out(Counts(), evaluate, batches, jax.random.key(0))
  assert found['loss'] == 1.5 and found['first'] == 1
  assert found['perplexity'] == pytest.approx(4)  # 2 in each batch
  draws = [jax.random.uniform(jax.random.fold_in(jax.random.key(0), i), (2,)) for i in range(2)]
  np.testing.assert_allclose([found['drawn_1'], found['drawn_2']], np.mean(draws, axis=0), rtol=1e-6)
  with pytest.raises(ValueError, match='no held-out batches'):
    metrics.held_out(Counts(), evaluate, [], jax.random.key(0))


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


def test_held_out_music_has_an_alarm_of_its_own_and_accuracies_are_better_when_higher(caplog):
  alarm = metrics.BarAlarm(after=100, held_out=True)
  with caplog.at_level('WARNING'):
    alarm(100, {'masked_accuracy': 0.23, 'masked_accuracy_chance': 0.04, 'loss': 2.0, 'loss_chance': 4.0})
    assert not caplog.records
    alarm(200, {'masked_accuracy': 0.04, 'masked_accuracy_chance': 0.04, 'loss': 5.0, 'loss_chance': 4.96})
  assert len(caplog.records) == 2
  assert 'held-out loss is 5.0000, no better than its chance level 4.9600' in caplog.text
  assert 'held-out masked_accuracy is 0.0400' in caplog.text


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
