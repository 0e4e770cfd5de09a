"""Hours of work under random kills. `launch/test.sh --all` runs these."""
import os
import random
import signal
import subprocess
import sys
import time

import pytest

from musiclm_jax.data import inspection, records
from musiclm_jax.training import checkpoint
from tests.test_every_training import assert_same_end, command, environment, finish  # noqa: F401 (a fixture)
from tests.trainings import make_networks, write_signals

# ruff: noqa: F811

HOURS = float(os.environ.get('SOAK_HOURS', '20'))  # of music to extract
MINUTES = float(os.environ.get('SOAK_MINUTES', '60'))  # of training
KILL_EVERY = 30.0  # seconds between kills of processes that extract
# A training process needs a while to start, and has to come past its next checkpoint more often than not.
KILL_TRAINING = (20.0, 120.0)


def start(arguments, environment):
  return subprocess.Popen(arguments, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def under_kills(commands, environment, generator):
  """Runs all commands side by side; every half minute one of them is killed and started again. How many were."""
  running = [start(c, environment) for c in commands]
  kills, due = 0, time.monotonic() + KILL_EVERY
  while alive := [i for i, p in enumerate(running) if p.poll() is None]:
    time.sleep(0.05)
    if time.monotonic() < due:
      continue
    victim = generator.choice(alive)
    running[victim].send_signal(signal.SIGKILL)
    kills += running[victim].wait() == -signal.SIGKILL
    running[victim] = start(commands[victim], environment)
    due = time.monotonic() + KILL_EVERY * (0.7 + 0.6 * generator.random())
  assert [p.returncode for p in running] == [0] * len(commands)
  return kills


@pytest.mark.soak
def test_hours_of_extraction_under_kills_are_the_same_bytes(environment, tmp_path):
  clips = int(HOURS * 3600 / 30)
  audio = write_signals(tmp_path / 'audio', clips=clips, held_out=4, shards=max(8, clips // 12), seconds=30.0)
  networks = make_networks(tmp_path / 'networks', audio)

  def commands(output, count):
    return [[sys.executable, '-m', 'musiclm_jax.main', 'extract', '--input', str(audio), '--workdir', str(networks),
             '--output', str(tmp_path / output), '--process_index', str(i), '--process_count', str(count)]
            for i in range(count)]

  content = lambda name: {p.name: p.read_bytes() for p in (tmp_path / name).iterdir() if p.name[0] != '.'}
  begun = time.monotonic()
  finish(commands('whole', 1)[0], environment, timeout=None)
  print(f'{HOURS:g} h of music, {clips} records, undisturbed: {time.monotonic() - begun:.0f} s', flush=True)
  whole = content('whole')
  corpus = records.RecordSet(tmp_path / 'whole', 'train')
  assert sorted(corpus[i]['attributes']['index'] for i in range(len(corpus))) == list(range(clips))
  assert inspection.inspect(tmp_path / 'whole').faults == ()
  for count in (1, 2, 4):
    begun = time.monotonic()
    kills = under_kills(commands(f'killed {count}', count), environment, random.Random(count))
    print(f'{count} processes: {kills} kills, {time.monotonic() - begun:.0f} s', flush=True)
    assert kills and content(f'killed {count}') == whole


@pytest.mark.soak
def test_an_hour_of_training_under_kills_ends_as_an_undisturbed_one(environment, tmp_path):
  generator = random.Random(0)
  train = lambda name, steps: command('codec', None, tmp_path / name, steps, CHECKPOINT_EVERY=50, LOG_EVERY=50)
  kills, end = 0, time.monotonic() + 60 * MINUTES
  while time.monotonic() < end:
    process = start(train('broken', 10 ** 8), environment)
    with pytest.raises(subprocess.TimeoutExpired):
      process.wait(generator.uniform(*KILL_TRAINING))
    process.send_signal(signal.SIGKILL)
    process.wait()
    kills += 1
  steps = checkpoint.latest_step(tmp_path / 'broken') + 75
  finish(train('broken', steps), environment, timeout=None)
  begun = time.monotonic()
  finish(train('whole', steps), environment, timeout=None)
  print(f'{MINUTES:g} minutes, {kills} kills, {steps} steps; undisturbed: {time.monotonic() - begun:.0f} s', flush=True)
  assert_same_end(tmp_path / 'whole', tmp_path / 'broken')
