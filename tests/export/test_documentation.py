"""The examples of docs/export.md run as they are printed."""
import pathlib
import re
import shutil

import pytest
import soundfile

ROOT = pathlib.Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_the_python_examples_run(nano_bundle, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  shutil.copytree(nano_bundle, tmp_path / 'quickstart' / 'bundle')
  examples = re.findall(r'^```python\n(.*?)^```', (ROOT / 'docs' / 'export.md').read_text(), re.MULTILINE | re.DOTALL)
  assert len(examples) == 3 and len(examples[0].splitlines()) == 5
  names = {}
  for example in examples:
    exec(compile(example, 'docs/export.md', 'exec'), names)
  audio, rate = soundfile.read('flute.wav')
  assert rate == 24000 and len(audio) == 240000
  assert names['first'].shape[1] + names['rest'].shape[1] == 24000
