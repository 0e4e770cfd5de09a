"""The whole chain at size nano, as a newcomer runs it."""
import json
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from musiclm_jax import main, quickstart
from musiclm_jax.data import composer
from musiclm_jax.data.audio_files import write_wav
from musiclm_jax.training import checkpoint
from tests.trainings import for_commands

NETWORKS = ('codec', 'mulan', 'mulan_tokens', 'w2v_bert', 'semantic_tokens', 'semantic_lm', 'coarse_lm', 'fine_lm')


@pytest.fixture(scope='module')
def environment(tmp_path_factory):
  return for_commands(tmp_path_factory.mktemp('compiled'), MUSICLM_READER='direct', XLA_FLAGS='')


def arguments(workdir, *more):
  return [sys.executable, '-m', 'musiclm_jax.main', 'quickstart', '--size', 'nano', '--workdir', str(workdir), *more]


def hashes(workdir):
  return {name: checkpoint.load(pathlib.Path(workdir) / name).content_hash for name in NETWORKS}


@pytest.fixture(scope='module')
def finished(environment, tmp_path_factory):
  workdir = tmp_path_factory.mktemp('quickstart')
  done = subprocess.run(arguments(workdir), env=environment, capture_output=True, text=True, timeout=1500)
  assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
  return workdir


@pytest.mark.parametrize('own', [{}, {'audio_dir': 'music'}, {'audio_dir': 'music', 'captions': 'captions.csv'}])
def test_every_step_is_a_command_and_the_last_one_exports(tmp_path, own):
  steps = quickstart.plan(tmp_path, **{'audio_dir': None, 'captions': None, **own}, size='nano', seed=0)
  asked = [main.parse(step.arguments) for step in steps]
  assert all(set(step.after) <= {s.name for s in steps[:i]} for i, step in enumerate(steps))
  last = asked[-1]
  assert (last.verb, last.workdir, last.output) == ('export', str(tmp_path), str(tmp_path / quickstart.BUNDLE))
  assert last.replace and last.licence == ('unknown' if own else 'CC0-1.0')


def scheduled(root, *arguments):
  """A scheduler of one step, whose command is no command of ours where Python is told so."""
  for folder in ('steps', 'logs'):
    (root / folder).mkdir(exist_ok=True)
  return quickstart._Scheduler(root, [quickstart.Step('codec', arguments)], 0)


def stands_in(monkeypatch, tmp_path, code):
  """Has each step run this Python code."""
  script = tmp_path / 'step.sh'
  script.write_text(f'#!/bin/sh\nexec {sys.executable} -c "{code}"\n')
  script.chmod(0o755)
  monkeypatch.setattr(sys, 'executable', str(script))


def test_a_step_that_was_killed_says_so_and_not_how_far_it_was(tmp_path, monkeypatch):
  stands_in(monkeypatch, tmp_path, "import os; print('step 100, 3 steps/s', flush=True); os.kill(os.getpid(), 9)")
  with pytest.raises(quickstart.StepFailed, match='^step codec was killed .SIGKILL; out of memory.. .all of it: '):
    scheduled(tmp_path).run()


def test_a_step_fails_for_what_this_start_wrote(tmp_path, monkeypatch):
  stands_in(monkeypatch, tmp_path, 'raise SystemExit(3)')
  scheduler = scheduled(tmp_path)
  (tmp_path / 'logs' / 'codec.log').write_text('an error of yesterday\n')
  with pytest.raises(quickstart.StepFailed, match='^step codec failed: exit code 3 '):
    scheduler.run()


def test_a_system_without_affinity_runs_steps_on_any_processor(tmp_path, monkeypatch):
  stands_in(monkeypatch, tmp_path, 'pass')
  monkeypatch.delattr('os.sched_setaffinity', raising=False)
  monkeypatch.setattr(quickstart._Scheduler, '_first_sound', lambda self: None)
  scheduled(tmp_path).run()
  assert json.loads((tmp_path / 'steps' / 'codec.json').read_text())['seed'] == 0


@pytest.mark.slow
def test_it_ends_with_music_and_a_report(finished):
  report = json.loads((finished / 'report.json').read_text())
  assert set(report) >= {'codec', 'mulan', 'semantic', 'stages', 'generation', 'bars', 'runs'}
  assert set(report['runs']) >= set(NETWORKS)
  assert report['codec']['mel_distance_clip_median'] > 0
  page = (finished / 'report.html').read_text()
  assert '<audio' in page and 'src="http' not in page
  assert len(list((finished / 'samples').glob('*.wav'))) >= 4


@pytest.mark.slow
def test_a_second_call_skips_everything(finished, environment):
  before = hashes(finished)
  done = subprocess.run(arguments(finished), env=environment, capture_output=True, text=True, timeout=900)
  assert done.returncode == 0
  assert done.stdout.count('done before') == len(quickstart.plan(
      finished, audio_dir=None, captions=None, size='nano', seed=0))
  assert hashes(finished) == before


@pytest.mark.slow
def test_text_to_wav_by_command(finished, environment, tmp_path):
  run = lambda name, seed: subprocess.run(
      [sys.executable, '-m', 'musiclm_jax.main', 'generate', '--workdir', str(finished), '--prompt', 'slow piano',
       '--seconds', '2.5', '--seed', str(seed), '--output', str(tmp_path / name)],
      env=environment, capture_output=True, text=True, timeout=900)
  for name, seed in (('a.wav', 7), ('b.wav', 7), ('c.wav', 8)):
    assert run(name, seed).returncode == 0
  a, b, c = ((tmp_path / name).read_bytes() for name in ('a.wav', 'b.wav', 'c.wav'))
  assert a == b and a != c
  import soundfile
  audio, rate = soundfile.read(tmp_path / 'a.wav')
  assert rate == 24000 and len(audio) == 60000 and np.isfinite(audio).all()


@pytest.mark.slow
def test_the_bundle_makes_the_same_file_as_the_workdir(finished, environment, tmp_path):
  shutil.copytree(finished / 'bundle', tmp_path / 'elsewhere')
  for flag, place in (('--workdir', finished), ('--bundle', tmp_path / 'elsewhere')):
    done = subprocess.run(
        [sys.executable, '-m', 'musiclm_jax.main', 'generate', flag, str(place), '--prompt', 'slow piano', '--seconds',
         '2.5', '--seed', '7', '--output', str(tmp_path / f'{flag}.wav')],
        env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-2000:]
  import soundfile
  (a, rate), (b, _) = (soundfile.read(tmp_path / f'{flag}.wav', dtype='int16') for flag in ('--workdir', '--bundle'))
  assert rate == 24000 and np.abs(a.astype(int) - b).max() <= 1 and np.abs(a.astype(int)).max() > 10
  card = (finished / 'bundle' / 'MODEL_CARD.md').read_text()
  assert 'license: cc0-1.0' in card and 'bars of the report were reached' in card


@pytest.mark.slow
def test_killed_twice_it_ends_with_the_same_parameters(finished, environment, tmp_path):
  for step in ('codec', 'coarse_lm'):
    process = subprocess.Popen(arguments(tmp_path), env=environment, stdout=subprocess.DEVNULL,
                               stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 900
    while not (tmp_path / step / 'metrics.jsonl').exists() and process.poll() is None:
      assert time.monotonic() < deadline
      time.sleep(0.02)
    assert process.poll() is None, 'it ended before it could be killed'
    process.send_signal(signal.SIGKILL)
    process.wait()
    time.sleep(1)  # its children end with it
  done = subprocess.run(arguments(tmp_path), env=environment, capture_output=True, text=True, timeout=1500)
  assert done.returncode == 0, done.stdout[-3000:]
  assert hashes(tmp_path) == hashes(finished)


@pytest.mark.slow
def test_a_failing_step_ends_it_with_one_line(environment, tmp_path):
  (tmp_path / 'music').mkdir()
  done = subprocess.run(arguments(tmp_path / 'w', '--audio_dir', str(tmp_path / 'music')), env=environment,
                        capture_output=True, text=True, timeout=900)
  assert done.returncode == 1
  assert 'step prepare failed' in done.stderr.splitlines()[-1]


@pytest.mark.slow
def test_a_dozen_recordings_of_which_some_have_captions(environment, tmp_path):
  music = tmp_path / 'music'
  music.mkdir()
  rows = ['file,caption']
  for i, clip in enumerate(composer.Corpus(seed=5, first=0, size=14, seconds=6.0, split='train')):
    write_wav(music / f'{i}.wav', clip['audio'], composer.SAMPLE_RATE)
    if i % 3:
      rows.append(f'{i}.wav,"a recording of number {i}, quietly"')
  (tmp_path / 'captions.csv').write_text('\n'.join(rows))
  done = subprocess.run(
      arguments(tmp_path / 'w', '--audio_dir', str(music), '--captions', str(tmp_path / 'captions.csv')),
      env=environment, capture_output=True, text=True, timeout=1500)
  assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
  report = json.loads((tmp_path / 'w' / 'report.json').read_text())
  assert any('captions' in note for note in report['notes'])
  assert 'have no text' in (tmp_path / 'w' / 'logs' / 'mulan.log').read_text()
  assert list((tmp_path / 'w' / 'samples').glob('prompt*.wav'))
