"""Hours of work under random kills. `launch/test.sh --all` runs these."""
import os
import random
import signal
import subprocess
import sys
import time

import pytest

from musiclm_jax.data import inspection, records
from tests.test_every_training import assert_same_end, command, environment, finish  # noqa: F401 (a fixture)
from tests.trainings import make_networks, write_signals

# ruff: noqa: F811

HOURS = float(os.environ.get('SOAK_HOURS', '20'))  # of music to extract
MINUTES = float(os.environ.get('SOAK_MINUTES', '60'))  # of training
KILL_EVERY = 30.0  # seconds


def until_done(commands, environment, generator):
  """Starts the commands again and again, killing one of them every half minute, until all have ended well."""
  kills = 0
  while True:
    running = [subprocess.Popen(c, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
               for c in commands]
    deadline = time.monotonic() + KILL_EVERY * (0.7 + 0.6 * generator.random())
    while any(p.poll() is None for p in running) and time.monotonic() < deadline:
      time.sleep(0.05)
    victims = [p for p in running if p.poll() is None]
    if victims:
      victims[generator.randrange(len(victims))].send_signal(signal.SIGKILL)
      kills += 1
      for p in running:  # the others are left to their work, but not longer than the next kill
        try:
          p.wait(KILL_EVERY)
        except subprocess.TimeoutExpired:
          p.kill()
          p.wait()
          kills += 1
    codes = [p.returncode for p in running]
    assert all(code in (0, -signal.SIGKILL) for code in codes), codes
    if codes == [0] * len(codes):
      return kills


@pytest.mark.soak
def test_hours_of_extraction_under_kills_are_the_same_bytes(environment, tmp_path):
  clips = int(HOURS * 3600 / 30)
  audio = write_signals(tmp_path / 'audio', clips=clips, held_out=4, shards=max(8, clips // 60), seconds=30.0)
  networks = make_networks(tmp_path / 'networks', audio)

  def commands(output, count):
    return [[sys.executable, '-m', 'musiclm_jax.main', 'extract', '--input', str(audio), '--workdir', str(networks),
             '--output', str(tmp_path / output), '--process_index', str(i), '--process_count', str(count)]
            for i in range(count)]

  content = lambda name: {p.name: p.read_bytes() for p in (tmp_path / name).iterdir()}
  begun = time.monotonic()
  finish(commands('whole', 1)[0], environment)
  print(f'{HOURS:g} h of music in {time.monotonic() - begun:.0f} s')
  whole = content('whole')
  corpus = records.RecordSet(tmp_path / 'whole', 'train')
  assert sorted(corpus[i]['attributes']['index'] for i in range(len(corpus))) == list(range(clips))
  assert inspection.inspect(tmp_path / 'whole').faults == ()
  for count in (1, 2, 4):
    kills = until_done(commands(f'killed {count}', count), environment, random.Random(count))
    print(f'{count} processes: {kills} kills')
    assert kills and content(f'killed {count}') == whole


@pytest.mark.soak
def test_an_hour_of_training_under_kills_ends_as_an_undisturbed_one(environment, tmp_path):
  probe = command('codec', None, tmp_path / 'probe', 400, CHECKPOINT_EVERY=50)
  begun = time.monotonic()
  finish(probe, environment)
  steps = int(400 / (time.monotonic() - begun) * 60 * MINUTES)
  options = {'CHECKPOINT_EVERY': 50, 'LOG_EVERY': 50}
  kills = until_done([command('codec', None, tmp_path / 'broken', steps, **options)], environment, random.Random(0))
  finish(command('codec', None, tmp_path / 'whole', steps, **options), environment)
  print(f'{steps} steps, {kills} kills')
  assert kills >= MINUTES
  assert_same_end(tmp_path / 'whole', tmp_path / 'broken')
