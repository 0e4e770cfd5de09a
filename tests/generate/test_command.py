"""`musiclm generate`: every mode by its flags, and every mistake as one line that leaves nothing behind."""
import json
import shutil

import numpy as np
import pytest
import soundfile

from musiclm_jax import cascade_networks, main
from tests import trainings
from tests.generate.stand_in import RATE, StandIn


@pytest.fixture(autouse=True)
def small_networks(monkeypatch):
  monkeypatch.setattr(cascade_networks, 'CascadeNetworks', lambda cascade: StandIn())


@pytest.fixture(name='folder')
def with_clips(tmp_path, monkeypatch):
  """A folder with a good clip and with bad ones; it is also the workdir."""
  monkeypatch.chdir(tmp_path)
  generator = np.random.default_rng(0)
  sound = lambda seconds: generator.normal(0, 0.1, round(seconds * 8000)).astype(np.float32)
  soundfile.write('good.wav', sound(4), 8000)
  soundfile.write('short.wav', sound(0.1), 8000)
  soundfile.write('silent.wav', np.zeros(16000), 8000)
  soundfile.write('nan.wav', np.full(16000, np.nan, np.float32), 8000, subtype='FLOAT')
  # Three hours need little space where nothing changes.
  with soundfile.SoundFile('long.flac', 'w', 1000, 1) as file:
    for _ in range(180):
      file.write(np.tile([0.1, -0.1], 30_000))
  (tmp_path / 'text.wav').write_text('no sound')
  (tmp_path / 'empty.wav').write_bytes(b'')
  (tmp_path / 'story.txt').write_text('0:00 slow piano\n0:01 loud drums')
  return tmp_path


def run(capsys, *argv: str, output: str = 'out.wav') -> tuple[int, list[str]]:
  with pytest.raises(SystemExit) as stopped:
    main.main(['generate', '--workdir', '.', '--output', output, *argv])
  return stopped.value.code, capsys.readouterr().err.splitlines()


@pytest.mark.parametrize('argv, mode, seconds', [
    (['--prompt', 'slow piano', '--seconds', '0.5'], 'text', 0.5),
    (['--style_audio', 'good.wav', '--seconds', '0.5'], 'style of a clip', 0.5),
    (['--prompt', 'a flute', '--style_audio', 'good.wav', '--weights', '1', '2', '--seconds', '0.5'], 'mixture', 0.5),
    (['--story', '0:00 slow piano, 0:01 loud drums', '--seconds', '2', '--crossfade', '0.5'], 'story', 2),
    (['--story', 'story.txt', '--seconds', '2'], 'story', 2),
    (['--unconditional', '--seconds', '0.5'], 'unconditional', 0.5),
    (['--continue_audio', 'good.wav', '--continue_at', '0:02', '--seconds', '1'], 'continuation', 3),
    (['--continue_audio', 'good.wav', '--drop_clip', '--prompt', 'a flute', '--seconds', '1'], 'continuation', 1),
    (['--infill_audio', 'good.wav', '--gap', '0:01-0:02'], 'infilling', 4),
    (['--prompt', 'slow piano', '--best_of', '2', '--seconds', '0.5'], 'text', 0.5),
    (['--prompt', 'slow piano', '--negative_prompt', 'noise', '--guidance', '2', '--seconds', '0.5'], 'text', 0.5),
])
def test_every_mode_has_its_flags(folder, capsys, argv, mode, seconds):
  assert run(capsys, *argv, '--seed', '3') == (0, [])
  audio, rate = soundfile.read('out.wav')
  assert rate == RATE and len(audio) == round(seconds * RATE)
  told = json.loads((folder / 'out.json').read_text())
  assert (told['mode'], told['seed'], told['seconds']) == (mode, 3, seconds)


def test_a_sidecar_can_be_left_out(folder, capsys):
  assert run(capsys, '--prompt', 'slow piano', '--seconds', '0.5', '--no_sidecar') == (0, [])
  assert (folder / 'out.wav').exists() and not (folder / 'out.json').exists()


P = ('--prompt', 'slow piano')


@pytest.mark.parametrize('argv, code, message', [
    # what is to be made
    ([], 2, 'give one of'), ([*P, '--unconditional'], 2, 'give one of'), ([*P, '--story', '0:00 a'], 2, 'give one of'),
    (['--prompt', ' '], 2, 'a prompt is empty'), (['--prompt', '!?'], 1, 'knows nothing of the prompt'),
    (['--prompt', 'a very long tune ' * 40], 1, 'shorten it'),
    # lengths, seeds, numbers
    ([*P, '--seconds', '-1'], 2, 'not above 0'), ([*P, '--seconds', '0'], 2, 'not above 0'),
    ([*P, '--seconds', '0.0005'], 1, 'seconds must lie between 0.01'),
    ([*P, '--seconds', '1e9'], 1, 'seconds must lie between'), ([*P, '--seconds', 'inf'], 1, 'seconds must lie'),
    ([*P, '--seconds', 'nan'], 2, 'not above 0'), ([*P, '--seconds', 'ten'], 2, "invalid positive float value: 'ten'"),
    ([*P, '--seed', '1.5'], 2, "invalid int value: '1.5'"), ([*P, '--seed', 'x'], 2, 'invalid int value'),
    ([*P, '--seed', '-1'], 1, 'the seed must lie between'), ([*P, '--seed', str(2**40)], 1, 'the seed must lie'),
    ([*P, '--guidance', 'nan'], 1, 'guidance must be a number'), ([*P, '--mulan_levels', '-1'], 1, 'mulan_levels'),
    ([*P, '--best_of', '0'], 2, 'not above 0'), (['--unconditional', '--best_of', '2'], 2, 'give one'),
    # mixtures
    ([*P, '--weights', '1', '2'], 2, 'one for each --prompt'), ([*P, '--weights', '0'], 1, 'sum to nothing'),
    ([*P, *P, '--weights', '1', '-1'], 2, 'must lie between 0'), ([*P, '--weights', 'nan'], 2, 'weight'),
    ([*P, *P, '--weights', '1', '1e39'], 2, 'must lie between 0'),
    ([*P, '--negative_prompt', 'noise', '--guidance', '1'], 2, 'needs --guidance'),
    ([*P, '--negative_prompt', 'noise', '--mulan_levels', '0'], 1, 'no stage leads away'),
    ([*P, '--negative_prompt', ' ', '--guidance', '2'], 2, 'a prompt is empty'),
    # stories
    (['--story', 'calm'], 2, 'no time before'), (['--story', '0:00 a, 0:00 b'], 2, 'must ascend'),
    (['--story', '0:05 a'], 2, 'must begin at 0:00'), (['--story', '0:00 a, 0:99 b'], 2, 'is no time'),
    (['--story', '0:00 a, 0:05'], 2, 'no text at 0:05'), (['--story', 'no.txt'], 1, 'no.txt'),
    (['--story', '0:00 a, 0:10 b', '--seconds', '10'], 1, 'more seconds'),
    (['--story', '0:00 a, 0:01 b', '--crossfade', '5'], 2, 'does not fit'), ([*P, '--crossfade', '5'], 2, 'needs --st'),
    ([*P, '--story_context', '1'], 2, 'needs --story'),
    (['--story', '0:00 a, 0:01 b', '--story_context', '-1'], 1, 'story_context must not be negative'),
    # clips
    (['--style_audio', 'no.wav'], 1, "no file 'no.wav'"), (['--style_audio', '.'], 1, "no file '.'"),
    (['--style_audio', 'short.wav'], 1, 'short.wav: too short'), (['--style_audio', 'long.flac'], 1, 'flac: too long'),
    (['--style_audio', 'silent.wav'], 1, 'silent.wav: silent'),
    (['--style_audio', 'nan.wav'], 1, 'nan.wav: non-finite'),
    (['--style_audio', 'text.wav'], 1, 'text.wav: unreadable'), (['--style_audio', 'empty.wav'], 1, 'empty.wav: empty'),
    (['--style_audio', ''], 2, '--style_audio is empty'), ([*P, '--continue_audio', ''], 2, 'continue_audio is empty'),
    (['--infill_audio', 'good.wav', '--gap', '1-2', '--unconditional'], 2, '--mulan_levels 0'),
    (['--continue_audio', 'short.wav'], 1, 'too short'), (['--continue_audio', 'long.flac'], 1, 'too long'),
    (['--continue_audio', 'good.wav', '--continue_at', '0:05'], 1, 'cannot be continued from 5 s'),
    (['--continue_audio', 'good.wav', '--continue_at', '0:0x'], 2, 'is no time'),
    (['--continue_audio', 'good.wav', '--continue_at', '0.1'], 1, 'cannot be continued'),
    (['--continue_audio', 'good.wav', '--continue_at', 'x'], 2, 'is no time'),
    ([*P, '--continue_at', '0:01'], 2, 'needs --continue_audio'), ([*P, '--drop_clip'], 2, 'needs --continue_audio'),
    (['--infill_audio', 'good.wav'], 2, 'needs --gap'), ([*P, '--gap', '1-2'], 2, 'needs --infill_audio'),
    (['--infill_audio', 'good.wav', '--gap', '2'], 2, 'is no gap'),
    (['--infill_audio', 'good.wav', '--gap', '0:02-0:01'], 2, 'ends after it begins'),
    (['--infill_audio', 'good.wav', '--gap', '0:01-0:04'], 1, 'leaves less than'),
    (['--infill_audio', 'good.wav', '--gap', '1-2', '--seconds', '3'], 2, 'does not go with --infill_audio'),
    (['--infill_audio', 'silent.wav', '--gap', '1-1.2'], 1, 'silent'),
])
def test_a_mistake_is_one_line_and_leaves_nothing(folder, capsys, argv, code, message):
  before = sorted(p.name for p in folder.iterdir())
  found, lines = run(capsys, *argv)
  assert (found, len(lines)) == (code, 1), lines
  assert lines[0].startswith('musiclm: error: ') and message in lines[0]
  assert sorted(p.name for p in folder.iterdir()) == before


@pytest.mark.parametrize('output, message', [
    ('out.mp3', 'must end with one of .wav'), ('out', 'must end with'), ('nowhere/out.wav', 'there is no folder'),
])
def test_an_output_that_cannot_be_written(folder, capsys, output, message):
  code, lines = run(capsys, *P, output=output)
  assert code == 1 and len(lines) == 1 and message in lines[0]


@pytest.mark.slow
def test_audiolm_from_its_tokens_to_music(folder, capsys, monkeypatch):
  """No MuLan anywhere, and a stage without conditions; the rate is that of the codec, here 24 kHz."""
  monkeypatch.undo()
  monkeypatch.chdir(folder)
  audio = trainings.write_signals(folder / 'nano' / 'audio')
  workdir = trainings.make_networks(folder / 'nano' / 'workdir', audio)
  for name in ('mulan', 'mulan_tokens'):
    shutil.rmtree(workdir / name)
  with pytest.raises(SystemExit) as stopped:
    main.main(['extract', '--input', str(audio), '--workdir', str(workdir), '--output', 'tokens', '--without', 'mulan'])
  assert stopped.value.code == 0
  recipe = {'semantic_lm': {'SEMANTIC_CONDITIONS': '()'}, 'fine_lm': {},  # token_lm/audiolm.gin
            'coarse_lm': {'COARSE_CONDITIONS': '(%SEMANTIC_TOKENS,)'}}
  for name, given in recipe.items():
    built = trainings.experiment(name, folder / 'tokens', NUM_STEPS=1, **{'partition.Partitioner.data': 1, **given})
    built.build(workdir=str(workdir / name), dry_run=False)
  capsys.readouterr()
  for argv in (['--unconditional', '--seconds', '1'], ['--continue_audio', 'good.wav', '--seconds', '1']):
    with pytest.raises(SystemExit) as stopped:
      main.main(['generate', '--workdir', str(workdir), '--output', 'out.wav', *argv])
    assert stopped.value.code == 0, capsys.readouterr().err
  with pytest.raises(SystemExit) as stopped:
    main.main(['generate', '--workdir', str(workdir), '--output', 'out.wav', *P])
  assert stopped.value.code == 1 and 'without descriptions' in capsys.readouterr().err


@pytest.mark.slow
def test_a_workdir_generates_in_every_mode(folder, nano_cascade, capsys, monkeypatch):
  monkeypatch.undo()
  monkeypatch.chdir(folder)
  for argv in (P, ['--style_audio', 'good.wav', *P], ['--story', 'story.txt', '--seconds', '2'], ['--unconditional'],
               ['--continue_audio', 'good.wav'], ['--infill_audio', 'good.wav', '--gap', '1-2'],
               [*P, '--best_of', '2', '--negative_prompt', 'noise', '--guidance', '2']):
    more = [] if '--seconds' in argv or '--gap' in argv else ['--seconds', '1']
    waves = []
    for name in ('a.wav', 'b.wav'):
      with pytest.raises(SystemExit) as stopped:
        main.main(['generate', '--workdir', str(nano_cascade), '--output', name, '--seed', '5', *argv, *more])
      assert stopped.value.code == 0, capsys.readouterr().err
      waves.append((folder / name).read_bytes())
    assert waves[0] == waves[1]
