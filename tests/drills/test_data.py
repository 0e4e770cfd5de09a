"""Resuming in the middle of millions of examples, and a recording that lasts ten hours."""
import json
import os
import struct
import subprocess
import sys

import numpy as np
import pytest

from musiclm_jax.data import source


def test_a_fresh_process_in_mid_epoch_sees_the_next_examples_of_the_stream():
  """Drill 6: at example 5,000,000 of 10,000,000, in the middle of an epoch of a mixture."""
  lengths, rates, batch = (10_000_000, 300), (9.0, 1.0), 100
  code = ('import json; import numpy as np; from musiclm_jax.data import source; '
          f'order = source.IndexMap({lengths}, {rates}, 7, {batch}); '
          f'draws = [order(step, np.arange({batch})) for step in range(50_000, 50_010)]; '
          'print(json.dumps([[int(c), int(i), int(s)] for d in draws for c, i, s in zip(d.corpus, d.index, d.seed)]))')
  done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
  fresh = json.loads(done.stdout)
  order = source.IndexMap(lengths, rates, 7, batch)
  for step in range(0, 50_000, 997):  # an unbroken stream has seen what came before
    order(step, np.arange(batch))
  whole = [order(step, np.arange(batch)) for step in range(50_000, 50_010)]
  assert fresh == [[int(c), int(i), int(s)] for d in whole for c, i, s in zip(d.corpus, d.index, d.seed)]
  assert len({i for c, i, _ in fresh if c == 0}) == sum(c == 0 for c, _, _ in fresh)  # no repeats inside the epoch


def write_long_wav(path, hours, rate=8000):
  """8-bit mono noise at 8 kHz: ten hours are 288 MB."""
  samples = int(hours * 3600 * rate)
  noise = np.random.default_rng(0).integers(64, 192, rate, dtype=np.uint8).tobytes()
  with open(path, 'wb') as file:
    file.write(b'RIFF' + struct.pack('<I', 36 + samples) + b'WAVEfmt ' +
               struct.pack('<IHHIIHH', 16, 1, 1, rate, rate, 1, 8) + b'data' + struct.pack('<I', samples))
    for second in range(int(hours * 3600)):
      file.write(noise if second % 7 else noise[::-1])


CODE = '''
import resource, sys
from musiclm_jax.data import prepare
prepare.prepare_folder(sys.argv[1], sys.argv[2], workers=1)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
'''


@pytest.mark.slow
def test_ten_hours_in_one_file_need_no_more_memory_than_one(tmp_path):
  """Drill 11."""
  peaks = {}
  for hours in (0.1, 10.0):
    folder = tmp_path / f'{hours}'
    os.mkdir(folder)
    write_long_wav(folder / 'long.wav', hours)
    done = subprocess.run([sys.executable, '-c', CODE, str(folder), str(tmp_path / f'out {hours}')],
                          capture_output=True, text=True, check=True)
    peaks[hours] = int(done.stdout) / 1024
  assert peaks[10.0] < peaks[0.1] + 64, peaks  # MiB
