"""A save that is cut off at any call leaves the step before it, whole; a save that fails ends the run and says why."""
import dataclasses
import errno
import json
import os
import pathlib
import shutil
import subprocess
import sys

import pytest

from musiclm_jax.training import checkpoint, integrity
from tests.drills import faults, saver
from tests.test_every_training import assert_same_end, command, environment, finish, tokens  # noqa: F401 (fixtures)

ROOT = pathlib.Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.parametrize('keep', [1, 2])
def test_killed_at_any_call_of_a_save_the_newest_step_is_whole(tmp_path, keep):
  """Drill 2. With `keep` 1 the older step is deleted after the save, and the cuts fall into that too."""
  script = [sys.executable, str(pathlib.Path(saver.__file__)), str(tmp_path), str(keep)]
  done = subprocess.run(script, env=faults.environment({**os.environ, 'XLA_FLAGS': '', 'PYTHONPATH': str(ROOT)}),
                        capture_output=True, text=True, timeout=3000)
  assert done.returncode == 0, done.stderr[-2000:]
  counted, *cuts = [json.loads(line) for line in done.stdout.splitlines()]
  assert counted['calls'] > 150 and len(cuts) > 80
  for cut in cuts:
    wrong = [k for k, value in cut.items() if k not in ('call', 'latest') and value is not True]
    assert not wrong, f'killed at call {cut["call"]}: {cut}'
  steps = [cut['latest'] for cut in cuts]
  assert steps == sorted(steps) and steps[0] == 1 and steps[-1] == 2  # once the new step is there, it stays


@pytest.fixture(scope='module')
def whole(environment, tokens, tmp_path_factory):  # noqa: F811
  """An unbroken run of ten steps."""
  workdir = tmp_path_factory.mktemp('unbroken') / 'run'
  finish(command('fine_lm', tokens, workdir, 10), environment)
  return workdir


@pytest.fixture(scope='module')
def begun(environment, tokens, tmp_path_factory):  # noqa: F811
  """A run that has ended after two steps."""
  workdir = tmp_path_factory.mktemp('begun') / 'run'
  finish(command('fine_lm', tokens, workdir, 2), environment)
  return workdir


def assert_ends_with_one_line(failed, cause):
  assert failed.returncode == 1
  assert 'Traceback' not in failed.stderr, failed.stderr[-3000:]
  last = failed.stderr.strip().splitlines()[-1]
  assert last.startswith('musiclm: error:') and cause in last, failed.stderr[-3000:]


@pytest.mark.slow
@pytest.mark.parametrize('number', [errno.ENOSPC, errno.EIO])
@pytest.mark.parametrize('at', [0, 15, 40, 120])
def test_a_save_that_fails_ends_the_run_with_its_cause(
    environment, tokens, begun, whole, tmp_path, number, at):  # noqa: F811
  """Drill 4: from some call of the first save on, the disk is full, or broken."""
  workdir = tmp_path / 'run'
  shutil.copytree(begun, workdir)
  armed = faults.environment(environment, root=workdir / 'checkpoints', at=at, errno=number)
  failed = subprocess.run(command('fine_lm', tokens, workdir, 40), env=armed, capture_output=True, text=True,
                          timeout=200)
  assert_ends_with_one_line(failed, os.strerror(number))
  assert checkpoint.latest_step(workdir) == 2
  lines = (workdir / 'metrics.jsonl').read_text().splitlines()
  assert json.loads(lines[-1])['step'] <= 8  # saves are due at 4, 8, ...: no later one was skipped without a word
  # With room on the disk the same command goes on, to the same end.
  finish(command('fine_lm', tokens, workdir, 10), environment)
  assert_same_end(whole, workdir)


@pytest.mark.slow
def test_a_full_disk_ends_the_run_and_with_room_it_goes_on(
    environment, tokens, begun, whole, tmp_path):  # noqa: F811
  """Drill 4, on a small file system that is really full."""
  disk = tmp_path / 'disk'
  disk.mkdir()
  if subprocess.run(['mount', '-t', 'tmpfs', '-o', 'size=64m', 'tmpfs', disk], capture_output=True).returncode:
    pytest.skip('mounting a file system needs rights that this user does not have')
  try:
    shutil.copytree(begun, disk / 'run')
    filler = disk / 'filler'
    filler.write_bytes(bytes(shutil.disk_usage(disk).free - 30_000))
    failed = subprocess.run(command('fine_lm', tokens, disk / 'run', 40), env=environment, capture_output=True,
                            text=True, timeout=200)
    assert_ends_with_one_line(failed, 'No space left on device')
    assert checkpoint.latest_step(disk / 'run') == 2
    filler.unlink()
    finish(command('fine_lm', tokens, disk / 'run', 10), environment)
    assert_same_end(whole, disk / 'run')
  finally:
    subprocess.run(['umount', disk], check=True)


@pytest.fixture(scope='module')
def two_steps(tmp_path_factory):
  folder = tmp_path_factory.mktemp('saved')
  for step in (1, 2):
    saver.save(folder, step, 2)
  return folder


def array_files(folder, step):
  """The files of the parameters that arrays are read from, the largest first."""
  files = (folder / 'checkpoints' / str(step) / 'params' / 'ocdbt.process_0' / 'd').iterdir()
  return sorted(files, key=lambda p: -p.stat().st_size)


def array_name(whole, folder, step):
  return folder / array_files(whole, step)[0].relative_to(whole)


def restored(folder):
  with checkpoint.Checkpoints(folder, saver.OBJECTIVE, keep=2) as checkpoints:
    return int(checkpoints.restore(saver.abstract()).step)


@pytest.mark.parametrize('damage', ['flip', 'truncate', 'delete', 'marker', 'specs'])
def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_is_used(two_steps, tmp_path, damage):
  """Drill 5."""
  folder = tmp_path / 'run'
  shutil.copytree(two_steps, folder)
  step = folder / 'checkpoints' / '2'
  victim = array_files(folder, 2)[0]
  if damage == 'flip':
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 8
    victim.write_bytes(bytes(content))
  elif damage == 'truncate':
    victim.write_bytes(victim.read_bytes()[:victim.stat().st_size // 2])
  elif damage == 'delete':
    victim.unlink()
  elif damage == 'marker':
    (step / '_CHECKPOINT_METADATA').unlink()
  else:
    (step / 'about' / 'specs.json').write_text('{')
  if damage in ('flip', 'specs'):
    with pytest.raises(Exception, match='checksum|specs.json'):
      checkpoint.load(folder, 2)
  assert restored(folder) == 1
  assert not step.exists() and (folder / 'checkpoints_unreadable' / '2').is_dir()
  assert restored(folder) == 1


def test_where_no_checkpoint_can_be_read_nothing_is_begun_anew(two_steps, tmp_path):
  """A fault of the disk or of the memory must not cost the run: nothing is moved, and nothing trained over it."""
  folder = tmp_path / 'run'
  shutil.copytree(two_steps, folder)
  for step in (1, 2):
    victim = array_files(folder, step)[0]
    victim.rename(victim.with_name('lost'))
  with pytest.raises(ValueError, match='no checkpoint under .* can be read; of step 2: '):
    restored(folder)
  for step in (1, 2):
    lost = next((folder / 'checkpoints' / str(step)).rglob('lost'))
    shutil.copy(lost, array_name(two_steps, folder, step))
  assert restored(folder) == 2


@pytest.mark.parametrize('change, message', [
    (lambda a: dataclasses.replace(a, ema=a.params), 'another moving average of the parameters than this experiment'),
    (lambda a: dataclasses.replace(a, opt_state={'count': a.step, 'more': a.step}),
     r'another optimizer than this experiment \(1 arrays, here 2; the first that differs is more\)')])
def test_a_checkpoint_of_another_optimizer_is_refused_and_stays(two_steps, tmp_path, change, message):
  folder = tmp_path / 'run'
  shutil.copytree(two_steps, folder)
  with checkpoint.Checkpoints(folder, saver.OBJECTIVE, keep=2) as checkpoints:
    with pytest.raises(ValueError, match=message):
      checkpoints.restore(change(saver.abstract()))
  assert restored(folder) == 2


def test_other_settings_of_the_same_arrays_are_taken_with_a_warning(two_steps, caplog):
  network = saver.OBJECTIVE.transformer
  other = dataclasses.replace(saver.OBJECTIVE, transformer=dataclasses.replace(network, heads=2 * network.heads))
  difference = f'transformer.heads: {network.heads} != {2 * network.heads} (checkpoint != experiment)'
  for objective, told in ((saver.OBJECTIVE, []), (other, [difference])):
    caplog.clear()
    with caplog.at_level('WARNING', logger='absl'), checkpoint.Checkpoints(two_steps, objective) as checkpoints:
      assert int(checkpoints.restore(saver.abstract()).step) == 2
    warnings = [r.message for r in caplog.records if 'goes on with other settings than it was saved with' in r.message]
    assert len(warnings) == len(told) and all(words in line for words, line in zip(told, warnings))


def test_checksums_of_an_older_version_are_compared_as_that_made_them(two_steps, tmp_path):
  folder = tmp_path / 'run'
  shutil.copytree(two_steps, folder)
  file = folder / 'checkpoints' / '2' / 'about' / 'specs.json'
  about = json.loads(file.read_text())
  assert about.pop('checksum_version') == integrity.VERSION
  file.write_text(json.dumps(about))
  with pytest.raises(ValueError, match='its checksum differs'):
    checkpoint.load(folder, 2)
  state = saver.filled(2)
  about['checksums'] = {name: integrity.checksums(getattr(state, field), version=1)
                        for name, field in checkpoint._ITEMS.items()}
  file.write_text(json.dumps(about))
  assert restored(folder) == checkpoint.load(folder).step == 2
  about['checksum_version'] = 99
  file.write_text(json.dumps(about))
  with pytest.raises(ValueError, match='checksums are of version 99, and only 1, 2 are known'):
    checkpoint.load(folder)


def test_a_step_that_was_set_aside_is_never_overwritten(two_steps, tmp_path):
  folder = tmp_path / 'run'
  for _ in range(2):
    shutil.copytree(two_steps / 'checkpoints', folder / 'checkpoints', dirs_exist_ok=True)
    (folder / 'checkpoints' / '2' / 'about' / 'specs.json').write_text('{')
    assert restored(folder) == 1
  assert sorted(p.name for p in (folder / 'checkpoints_unreadable').iterdir()) == ['2', '2.1']


def test_no_flipped_byte_of_an_array_is_loaded_in_silence(two_steps, tmp_path):
  """Drill 5, all over the files: the step is refused, or every number is what it was."""
  folder = tmp_path / 'run'
  shutil.copytree(two_steps, folder)
  refused = 0
  for path in array_files(folder, 2)[:2]:
    whole = path.read_bytes()
    for place in range(7, len(whole), max(1, len(whole) // 8)):
      path.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1:])
      try:
        loaded = checkpoint.load(folder, 2)
      except Exception:
        refused += 1
      else:
        assert saver.holds((loaded.params, loaded.buffers), 2)
    path.write_bytes(whole)
  assert refused > 4
