"""The `musiclm` command and the checks of configurations: exit codes, and one line for each mistake."""
from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from musiclm_jax import config, main

ROOT = Path(__file__).resolve().parent.parent
EXPERIMENT = '''# A toy. Required: SECONDS.
from __gin__ import dynamic_registration
from musiclm_jax import specs

include 'size/tiny.gin'

RUN = @specs.Stage
# How long the crops are.
SECONDS = %gin.REQUIRED
NAME = 'toy'
TARGET = @specs.TokenSpec()
specs.Stage:
  name = %NAME
  conditions = (@text/specs.TokenSpec(),)
  target = %TARGET
  seconds = %SECONDS
specs.TokenSpec.name = 'semantic'
text/specs.TokenSpec.name = 'mulan'
specs.TokenSpec.codebook_size = %CODES
'''


@pytest.fixture
def folder(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  (tmp_path / 'toy.gin').write_text(EXPERIMENT)
  (tmp_path / 'size').mkdir()
  (tmp_path / 'size' / 'tiny.gin').write_text('CODES = 8\nOTHER_NETWORK = 3\n')
  (tmp_path / 'size' / 'large.gin').write_text('CODES = 1024\n')
  return tmp_path


def load(*bindings: str, files=('toy.gin',), **options):
  return config.load_experiment(files, [tuple(b.split('=', 1)) for b in bindings], **options)


def run(capsys, *argv: str) -> tuple[int, list[str]]:
  with pytest.raises(SystemExit) as stopped:
    main.main(argv)
  return stopped.value.code, capsys.readouterr().err.splitlines()


def test_builds_what_run_names(folder):
  stage = load('SECONDS=2').build()
  assert (stage.name, stage.seconds, stage.target.codebook_size) == ('toy', 2, 8)
  assert [s.name for s in stage.streams] == ['mulan', 'semantic']


def test_later_files_and_the_command_line_override(folder):
  assert load('SECONDS=2', files=('toy.gin', 'size/large.gin')).build().target.codebook_size == 1024
  assert load('SECONDS=2', 'CODES=9', files=('toy.gin', 'size/large.gin')).build().target.codebook_size == 9


@pytest.mark.parametrize(('text', 'value'), [
    ('slow/piano-in a.minor', 'slow/piano-in a.minor'), ("'quoted'", 'quoted'), ('10k', '10k'), ('', ''),
    ('3 4', '3 4'), ("it's", "it's"), ('%NAME_OF', 'macro'),
])
def test_text_needs_no_quotes(folder, text, value):
  more = ['NAME_OF=macro'] if '%' in text else []
  assert load('SECONDS=2', *more, f'NAME={text}').build().name == value


@pytest.mark.parametrize(('binding', 'value'), [('2.5', 2.5), ('2', 2), ('1e1', 10.0), ('%CODES', 8)])
def test_literals_and_macros_are_parsed(folder, binding, value):
  assert load(f'SECONDS={binding}').build().seconds == value


def test_scoped_bindings(folder):
  stage = load('SECONDS=2', 'text/specs.TokenSpec.codebook_size=5', 'TARGET/specs.TokenSpec.levels=3').build()
  assert (stage.conditions[0].codebook_size, stage.target.levels) == (5, 3)


def test_operative_text_gives_the_same_run(folder):
  first = load('SECONDS=2')
  assert 'OTHER_NETWORK' not in first.operative()
  (folder / 'again.gin').write_text(first.operative())
  again = load(files=('again.gin',))
  assert again.build() == first.build()
  assert again.fingerprint == first.fingerprint


def test_the_fingerprint_is_that_of_what_is_read(folder):
  plain = load('SECONDS=2').fingerprint
  assert load('SECONDS=3').fingerprint != plain
  (folder / 'size' / 'tiny.gin').write_text('CODES = 8\nOTHER_NETWORK = 4\n')
  assert load('SECONDS=2').fingerprint == plain


def test_experiments_do_not_mix(folder):
  first = load('SECONDS=2')
  second = load('SECONDS=3')
  assert (first.build().seconds, second.build().seconds, first.build().seconds) == (2, 3, 2)
  assert first.argument('target').name == first.macro('TARGET').name == 'semantic'


def test_arguments_win_and_their_bindings_are_not_evaluated(folder):
  (folder / 'late.gin').write_text(EXPERIMENT.replace("NAME = 'toy'\n", ''))
  experiment = load('SECONDS=2', files=('late.gin',), provided=('name',))
  assert experiment.build(name='given').name == 'given'


def test_what_an_override_puts_out_of_use_is_no_mistake(folder):
  assert load('RUN=@specs.TokenSpec', files=('toy.gin',)).build().codebook_size == 8


@pytest.mark.parametrize(('bindings', 'message'), [
    (['SECNDS=2'], "--gin.SECNDS: nothing in this experiment uses SECNDS; did you mean 'SECONDS'?"),
    (['SECONDS=2', 'specs.Stage.secnds=2'], "no parameter 'secnds'; did you mean 'seconds'?"),
    (['SECONDS=2', 'spec.Stage.seconds=2'], "nothing named 'spec' is imported; did you mean 'specs'?"),
    (['SECONDS=2', 'specs.Stge.seconds=2'], "specs has no 'Stge'; did you mean 'Stage'?"),
    (['SECONDS=%CODS'], "--gin.SECONDS: no macro 'CODS'; did you mean 'CODES'?"),
    (['SECONDS=abc'], "--gin.SECONDS: Stage.seconds takes float, not 'abc'"),
    (['SECONDS=2', 'CODES=True'], '--gin.CODES: TokenSpec.codebook_size takes int, not True'),
    (['SECONDS=true'], '--gin.SECONDS=true: write True'),
    (['SECONDS=2', 'NAME=none'], '--gin.NAME=none: write None, or \'"none"\' for the text'),
    (['SECONDS=[1'], '--gin.SECONDS=[1: not a gin value'),
    (['SECONDS=2', 'eval/specs.Stage.seconds=3'], 'does not reach eval/specs.Stage'),
    (['SECONDS=2', 'RUN=3'], 'no line "RUN = @train.train"'),
    (['SECONDS=2', 'TARGET=@specs.os.system()'], "specs has no 'os'"),
    (['SECONDS=2', 'TARGET=@specs.importlib.import_module()'], "comes from 'importlib', which a gin"),
    ([], 'toy.gin needs values for SECONDS (How long the crops are.): give --gin.SECONDS=...'),
])
def test_mistakes_on_the_command_line(folder, bindings, message):
  with pytest.raises(config.ConfigError) as error:
    load(*bindings)
  assert message in str(error.value)
  assert '\n' not in str(error.value)


@pytest.mark.parametrize(('old', 'new', 'message'), [
    ("NAME = 'toy'", "NAM = 'toy'", "toy.gin:10: nothing in this experiment uses NAM; did you mean 'NAME'?"),
    ("NAME = 'toy'", "NAME = 'toy'\nSECONDS = 3", 'toy.gin:11: SECONDS was already bound in line 9'),
    ('%gin.REQUIRED', 'gin.REQUIRED', 'toy.gin:9: a required value is written %gin.REQUIRED'),
    ('seconds = %SECONDS', 'secs = %SECONDS', "toy.gin:16: specs.Stage has no parameter 'secs'"),
    ('@text/specs', '@text/spec', "toy.gin:14: nothing named 'spec' is imported"),
    ('  target = %TARGET\n', '', "toy.gin:11: nothing in this experiment uses TARGET"),
    ("include 'size/tiny.gin'", "include 'size/tinny.gin'", "toy.gin:5: no gin file 'size/tinny.gin'; did"),
    ("include 'size/tiny.gin'", "include 'toy.gin'", 'toy.gin includes itself'),
    ("NAME = 'toy'", "NAME = 'toy", 'toy.gin:10: '),
    ('import specs', 'import specs, axis', "toy.gin:3: cannot import 'musiclm_jax.axis'"),
    ('import specs', 'import specs, subprocess', "toy.gin:3: cannot import 'musiclm_jax.subprocess'"),
    ('import specs', 'import spec', "toy.gin:3: cannot import 'musiclm_jax.spec'"),
    ('import specs', 'import specs\nimport os', "toy.gin:4: 'os' may not be imported from a gin file; "),
    ('from __gin__ import dynamic_registration\n', '', 'needs "from __gin__ import dynamic_registration"'),
    ('  name = %NAME\n', '', 'toy.gin:10: nothing in this experiment uses NAME'),
    ("specs.TokenSpec.name = 'semantic'\n", '', 'specs.TokenSpec needs a value for name'),
])
def test_mistakes_in_the_file(folder, old, new, message):
  assert old in EXPERIMENT
  (folder / 'toy.gin').write_text(EXPERIMENT.replace(old, new))
  with pytest.raises(config.ConfigError) as error:
    load('SECONDS=2') if 'REQUIRED' not in old else load()
  assert message in str(error.value)
  assert '\n' not in str(error.value)


def test_nothing_is_imported_before_every_file_was_checked(folder):
  (folder / 'trap.py').write_text('raise AssertionError("imported")')
  (folder / 'size' / 'tiny.gin').write_text('import trap\nCODES = 8\n')
  with pytest.raises(config.ConfigError, match="size/tiny.gin:1: 'trap' may not be imported"):
    load('SECONDS=2')


def test_allowed_imports(folder, monkeypatch):
  monkeypatch.syspath_prepend(folder)
  (folder / 'mine_for_test.py').write_text('def seconds():\n  return 7\n')
  (folder / 'toy.gin').write_text(EXPERIMENT.replace('import specs', 'import specs\nimport mine_for_test'))
  assert load('SECONDS=@mine_for_test.seconds()', allow=['mine_for_test']).build().seconds == 7


def test_several_modules_of_one_package(folder):
  (folder / 'toy.gin').write_text(EXPERIMENT.replace('import specs', 'import specs, main as command  # both'))
  experiment = load('RUN=@command.UsageError')
  assert isinstance(experiment.build(), main.UsageError)
  assert 'main as command' in experiment.operative()


def test_files_are_found_along_the_search_path(folder, tmp_path_factory):
  other = tmp_path_factory.mktemp('other')
  (other / 'size').mkdir()
  (other / 'size' / 'tiny.gin').write_text('CODES = 99\n')
  assert load('SECONDS=2', search_paths=[other]).build().target.codebook_size == 99


@pytest.mark.parametrize(('argv', 'code', 'message'), [
    ([], 2, 'no verb'),
    (['trian'], 2, "no 'trian'; did you mean 'train'?"),
    (['train'], 2, '--gin_file'),
    (['train', '--gin_fil', 'x'], 2, '--gin_file'),
    (['train', '--gin_file', 'toy.gin', '--gin.X'], 2, '--gin.X: write --gin.NAME=VALUE'),
    (['train', '--gin_file', 'toi.gin', '--workdir', 'w'], 2, "no gin file 'toi.gin'; did you mean 'toy"),
    (['train', '--gin_file', 'toy.gin', '--gin.SECNDS=2', '--workdir', 'w'], 2, "did you mean 'SECONDS'?"),
    (['train', '--gin_file', 'toy.gin', '--workdir', 'w'], 2, 'needs values for SECONDS'),
    (['train', '--gin_file', 'toy.gin', '--gin.SECONDS=2', '--workdir', 'toy.gin/w'], 1, 'cannot write to'),
    (['quickstart', '--gin.X=3'], 2, '--gin.X belongs to `musiclm train`'),
    (['quickstart', '--size', 'huge'], 2, "invalid choice: 'huge'"),
    (['extract', '--input', '.', '--output', 'd', '--batch_size', '0'], 2, '0 is not above 0'),
    (['prepare', '--output_dir', 'd'], 2, 'either --audio_dir'),
    (['prepare', '--output_dir', 'd', '--audio_dir', 'nowhere'], 1, "--audio_dir: there is nothing at 'no"),
    (['generate', '--workdir', 'nowhere', '--prompt', 'x', '--output', 'x.wav'], 1, "nothing at 'nowhere'"),
    (['extract', '--input', '.', '--output', 'd'], 2, '--workdir for all'),
    (['data', 'look', 'd'], 2, "invalid choice: 'look'"),
    (['data', 'inspect', 'nowhere'], 1, "nothing at 'nowhere'"),
    (['data', 'inspect', 'size'], 1, 'size is not a record set: it has no manifest.json'),
    (['data', 'duplicates', 'size'], 1, 'size is not a record set'),
    (['reproduce', 'size', '--workdir', 'w'], 1, 'size/checkpoints; train it first'),
])
def test_a_mistake_is_one_line(folder, capsys, argv, code, message):
  found, lines = run(capsys, *argv)
  assert found == code
  assert len(lines) == 1 and lines[0].startswith('musiclm: error: ') and message in lines[0]


def test_a_run_without_a_workdir_is_asked_for_one(capsys):
  assert run(capsys, 'train', '--gin_file', 'experiments/codec.gin') == (
      2, ['musiclm: error: --workdir is needed: where this run keeps its checkpoints and metrics'])


def test_traceback_on_request(folder, capsys):
  _, lines = run(capsys, '--traceback', 'train', '--gin_file', 'toi.gin', '--workdir', 'w')
  assert lines[0].startswith('Traceback') and lines[-1].startswith('musiclm: error: no gin file')


def test_a_missing_package_names_the_extra(folder, capsys, monkeypatch):
  monkeypatch.setitem(sys.modules, 'gin', None)
  for name in ('musiclm_jax.config', 'musiclm_jax.config_check', 'gin.config'):
    monkeypatch.delitem(sys.modules, name, raising=False)
  code, lines = run(capsys, 'train', '--gin_file', 'toy.gin', '--workdir', 'w')
  assert code == 1
  assert lines == ['musiclm: error: this needs the package \'gin\': pip install "musiclm_jax[train]"']


def test_a_fault_of_the_program_keeps_its_traceback(capsys, monkeypatch):
  def broken(*args, **kwargs):
    raise TypeError('broken')
  monkeypatch.setattr(main, '_late', lambda module, name: broken)
  code, lines = run(capsys, 'quickstart')
  assert code == 1 and lines[0].startswith('Traceback') and lines[-1] == 'musiclm: error: TypeError: broken'


@pytest.mark.parametrize(
    'verb', ['prepare', 'vocabulary', 'train', 'extract', 'data', 'codec', 'mulan', 'generate', 'evaluate',
             'reproduce', 'quickstart'])
def test_every_verb_explains_itself(capsys, verb):
  with pytest.raises(SystemExit) as stopped:
    main.main([verb, '--help'])
  assert stopped.value.code == 0
  text = capsys.readouterr().out
  assert 'example' in text and f'musiclm {verb}' in text


def test_help_imports_nothing_that_takes_time():
  code = ('import sys, json; from musiclm_jax import main\n'
          'try: main.main(["--help"])\n'
          'except SystemExit: print(json.dumps(sorted(sys.modules)))')
  done = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True, check=True)
  assert not {'jax', 'numpy', 'gin', 'tensorflow', 'seqio', 'absl'} & set(json.loads(done.stdout.splitlines()[-1]))


def test_gin_does_not_bring_tensorflow_or_jax():
  code = 'import sys, json, musiclm_jax.config; print(json.dumps(sorted(sys.modules)))'
  done = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True, check=True)
  assert not {'tensorflow', 'jax', 'numpy', 'seqio'} & set(json.loads(done.stdout))


@pytest.mark.parametrize('file, ours', [(main.__file__, True), ('/usr/lib/python3/site-packages/numpy/core.py', False)])
def test_an_error_that_crossed_from_a_worker_process_is_judged_by_where_it_was_raised(file, ours):
  from concurrent.futures.process import _RemoteTraceback
  error = ValueError('record 5 cannot be read')
  error.__cause__ = _RemoteTraceback('\n"""\nTraceback (most recent call last):\n  File "/x/process.py", line 1, in f\n'
                                     f'  File "{file}", line 3, in read\n    raise\nValueError: record 5\n"""')
  assert main._explain(error) == (1, 'record 5 cannot be read', ours)
