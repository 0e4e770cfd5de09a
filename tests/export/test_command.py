"""`musiclm export` and `musiclm generate --bundle`: what they say, and one line for each mistake."""
from __future__ import annotations

import json

import pytest
import soundfile

from musiclm_jax import main
from musiclm_jax.serving.bundle import Bundle


def run(capsys, *argv) -> tuple[int, str, str]:
  with pytest.raises(SystemExit) as stopped:
    main.main([str(a) for a in argv])
  out, err = capsys.readouterr()
  return stopped.value.code, out, err


def test_a_bundle_is_written_once(capsys, nano_cascade, nano_bundle):
  code, out, err = run(capsys, 'export', '--workdir', nano_cascade, '--output', nano_bundle, '--licence', 'CC0-1.0')
  assert (code, err) == (0, '') and out.strip().endswith('MB, of the same networks as before')


@pytest.mark.parametrize('flags, code, words', [
    (['--weights', 'int4'], 2, 'int4'),
    (['--licence', 'X', '--records', 'nowhere'], 1, '--records: there is nothing at'),
    ([], 1, 'the model card still needs the licence of the weights (--licence'),
    (['--licence', ' '], 1, 'the model card still needs the licence of the weights (--licence'),
    (['--licence', 'X', '--output', 'no/such/folder'], 1, "there is no folder '"),
])
def test_mistakes_are_told_in_one_line(capsys, monkeypatch, tmp_path, nano_cascade, flags, code, words):
  monkeypatch.chdir(tmp_path)
  output = [] if '--output' in flags else ['--output', 'bundle']
  found, _, err = run(capsys, 'export', '--workdir', nano_cascade, *output, *flags)
  assert found == code and words in err and len(err.splitlines()) == 1
  assert not list(tmp_path.iterdir())


def test_a_workdir_without_networks_is_told(capsys, tmp_path, nano_cascade):
  code, _, err = run(capsys, 'export', '--workdir', tmp_path, '--records', nano_cascade / 'tokens', '--output',
                     tmp_path / 'b', '--licence', 'X')
  assert code == 1 and 'no checkpoint under' in err and len(err.splitlines()) == 1


def test_a_workdir_and_a_bundle_are_one_too_many(capsys, nano_cascade, nano_bundle, tmp_path):
  rest = ['--prompt', 'slow piano', '--output', tmp_path / 'a.wav']
  for place in ([], ['--workdir', nano_cascade, '--bundle', nano_bundle]):
    code, _, err = run(capsys, 'generate', *place, *rest)
    assert code == 2 and 'give either --workdir (trained runs) or --bundle' in err


def test_a_file_tells_which_bundle_made_it(capsys, nano_bundle, tmp_path):
  code, _, err = run(capsys, 'generate', '--bundle', nano_bundle, '--prompt', 'slow piano', '--seconds', '0.2',
                     '--output', tmp_path / 'a.wav')
  assert code == 0, err
  assert len(soundfile.read(tmp_path / 'a.wav')[0]) == 4800
  assert json.loads((tmp_path / 'a.json').read_text())['networks'] == Bundle(nano_bundle).identity


def test_a_damaged_bundle_is_one_line_of_the_command(capsys, tmp_path):
  (tmp_path / 'manifest.json').write_text('{}')
  code, _, err = run(capsys, 'generate', '--bundle', tmp_path, '--prompt', 'x', '--output', tmp_path / 'a.wav')
  assert code == 1 and 'manifest.json is not one of a bundle' in err and len(err.splitlines()) == 1
