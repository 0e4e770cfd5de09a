"""Every mode of generation with small untrained networks."""
import dataclasses
import json
import types

import jax
import numpy as np
import pytest
import soundfile

from musiclm_jax import provenance
from musiclm_jax.cascade_networks import CascadeNetworks
from musiclm_jax.generate import clips, files, modes, pipeline, prompts, story
from musiclm_jax.generate.infill import Gap
from musiclm_jax.generate.modes import Continuation, Request
from musiclm_jax.generate.pipeline import Settings
from musiclm_jax.generate.prompts import Prompt
from musiclm_jax.token_lm.draw import Sampling, USUAL
from tests.generate.stand_in import RATE, StandIn, WITHOUT_MULAN, WITHOUT_SEMANTIC
from tests.mulan import configs

CALM, LOUD = Prompt('slow piano'), Prompt('loud drums')


class Watched(StandIn):
  """Keeps what the stages were asked."""

  def __init__(self, *args, **options):
    super().__init__(*args, **options)
    self.asked: list[tuple[str, np.ndarray, np.ndarray | None]] = []

  def sample_rows(self, stage, rows, null, *arrays):
    self.asked.append((stage, np.asarray(rows), None if null is None else np.asarray(null)))
    return super().sample_rows(stage, rows, null, *arrays)


@pytest.fixture(scope='module', name='networks')
def stand_in():
  return StandIn()


@pytest.fixture(scope='module', name='clip')
def a_clip(tmp_path_factory):
  """Four seconds of a tone whose loudness moves, at another rate and in stereo."""
  path = tmp_path_factory.mktemp('clips') / 'mine.wav'
  time_N = np.arange(4 * 16000) / 16000
  tone_N = 0.3 * np.sin(2 * np.pi * 220 * time_N) * (0.5 + 0.5 * np.sin(2 * np.pi * 1.3 * time_N))
  soundfile.write(path, np.stack([tone_N, 0.5 * tone_N], axis=1), 16000)
  return str(path)


def made(networks, request, seed=1, **settings) -> np.ndarray:
  return np.concatenate(list(modes.music(networks, request, Settings(**settings), seed=seed)))


# ---- streaming and length --------------------------------------------------------------------------------------------


@pytest.mark.parametrize('seconds', [0.3, 2.0, 3.3])
def test_the_size_of_blocks_changes_nothing(networks, seconds):
  whole, *others = (made(networks, Request((CALM,)), seconds=seconds, block_seconds=b) for b in (60, 0, 0.2, 0.7))
  assert len(whole) == round(seconds * RATE)
  for other in others:
    np.testing.assert_allclose(whole, other, atol=1e-6)


def test_the_first_block_comes_before_later_ones_are_begun():
  networks = Watched()
  blocks = modes.music(networks, Request((CALM,)), Settings(seconds=4.0), seed=1)
  assert not networks.asked
  next(blocks)
  begun = len(networks.asked)
  list(blocks)
  assert begun < len(networks.asked) / 4


def test_long_music_takes_no_more_memory_than_short(networks):
  held, kept = [], []
  condition = prompts.describe(networks, (CALM,), None, 40.0).condition
  settings = Settings(seconds=40.0)
  runners = []
  original = pipeline.Sampled.__init__
  try:
    pipeline.Sampled.__init__ = lambda self, *a: (original(self, *a), runners.append(self))[0]
    for _ in pipeline.blocks(networks, condition, settings, pipeline.prompt_keys(1, 1)):
      held.append(sum(x.nbytes for x in jax.live_arrays()))
      kept.append([r.frames._codes.shape[1] for r in runners])
  finally:
    pipeline.Sampled.__init__ = original
  assert len(held) > 50
  assert max(held[5:]) <= held[5] * 1.02
  assert (np.max(kept[5:], axis=0) <= 2 * np.array([25, 50, 50])).all()


def test_the_longest_music_is_planned_at_once(networks):
  planned = pipeline.plan(networks, Settings(seconds=pipeline.MAX_SECONDS))
  assert planned.total == 600 * pipeline.MAX_SECONDS


# ---- descriptions ----------------------------------------------------------------------------------------------------


def test_a_mixture_of_one_is_itself_whatever_its_weight(networks, clip):
  for prompt in (CALM, Prompt(audio=clip)):
    alone = prompts.describe(networks, (prompt,), None, 1.0).condition.pieces[0].tokens_Bx1xQ
    for mixture in ((dataclasses.replace(prompt, weight=0.3),), (prompt, dataclasses.replace(LOUD, weight=0.0))):
      found = prompts.describe(networks, mixture, None, 1.0).condition.pieces[0].tokens_Bx1xQ
      np.testing.assert_array_equal(found, alone)
  np.testing.assert_array_equal(alone, networks.mulan_tokens(clips.embed(
      networks, clips.read(clip, networks.mulan_rate), networks.mulan_rate)[None]))


def test_mixtures_lie_between_by_their_weights():
  a, b = np.eye(3, dtype=np.float32)[:2]
  found = prompts.mixed(np.stack([a, b]), [3.0, 1.0])
  np.testing.assert_allclose(found, np.array([3, 1, 0]) / np.sqrt(10), atol=1e-6)
  np.testing.assert_allclose(found, prompts.mixed(np.stack([b, a]), [0.1, 0.3]), atol=1e-6)
  with pytest.raises(ValueError, match='cancel'):
    prompts.mixed(np.stack([a, -a]), [1.0, 1.0])
  with pytest.raises(ValueError, match='sum to nothing'):
    prompts.mixed(np.stack([a, b]), [0.0, 0.0])


@pytest.mark.parametrize('crossfade', [0.0, 0.8])
def test_each_window_of_a_story_hears_the_text_of_its_time(crossfade):
  networks = Watched()
  told = story.parse('0:00 slow piano, 0:01 loud drums, 0:03 a flute', crossfade=crossfade)
  made(networks, Request(story=told), seconds=4.0)
  tokens = {text: pipeline.text_tokens(networks, [text])[0, 0, 0] for _, text in told.entries}
  for name in ('semantic', 'coarse'):
    condition = prompts.describe(networks, (), told, 4.0).condition
    plan = pipeline.plan(networks, Settings(seconds=4.0), condition).windows[name]
    heard = [rows[0, 0] for asked, rows, _ in networks.asked if asked == name]
    assert len(heard) == len(plan.windows)
    for window, row in zip(plan.windows, heard):
      assert row == condition.at(window.first)[0, 0, 0], 'the tokens of the time at which the window goes on'
      assert condition.at(window.first) is condition.at(window.last - 1), 'no window says both'
      if window.first in (600, 1800) and not crossfade:
        assert (window.start == window.first) == (name == 'semantic'), 'only the sound goes on'
      if not crossfade:
        text = [text for time, text in told.entries if time * 600 <= window.first][-1]
        assert row == tokens[text]
  assert len(condition.pieces) == (3 if not crossfade else 11)


def test_guidance_leads_away_from_a_negative_prompt(networks):
  guided = lambda g: {'sampling': {n: Sampling(1.0, guidance=g) for n in networks.stages}, 'mulan_levels': 12}
  run = lambda negative, g: made(networks, Request((CALM,), negative=negative), seconds=1.0, **guided(g))
  plain = run('', 1.0)
  assert not np.array_equal(run('loud drums', 30.0), run('', 30.0))
  # Away from itself is nowhere: whatever the guidance, the logits are those of the prompt.
  np.testing.assert_array_equal(run('slow piano', 3.0), plain)


@pytest.mark.parametrize('guidance, levels', [(1.0, 12), (3.0, 0)])
def test_a_negative_prompt_that_nothing_leads_away_from_is_refused(networks, guidance, levels):
  settings = Settings(sampling={n: Sampling(1.0, guidance=guidance) for n in networks.stages}, mulan_levels=levels)
  with pytest.raises(ValueError, match='no stage leads away'):
    modes.music(networks, Request((CALM,), negative='loud drums'), settings)


def test_the_null_rows_hold_the_negative_prompt():
  networks = Watched()
  settings = {'sampling': {n: Sampling(1.0, guidance=3.0) for n in networks.stages}, 'mulan_levels': 12}
  made(networks, Request((CALM,), negative='loud drums'), seconds=1.0, **settings)
  wanted = pipeline.text_tokens(networks, ['loud drums'])[0, 0] + 8 * np.arange(12)
  found = [null for stage, _, null in networks.asked if stage == 'semantic']
  assert found and all(np.array_equal(null[0, :12], wanted) for null in found)
  assert all(null is None for stage, _, null in networks.asked if stage == 'fine')


def test_only_what_there_is_something_to_lead_to_takes_two_passes():
  for request, twice in ((Request((CALM,)), {'semantic', 'coarse'}), (Request(), set()),
                         (Request(negative='loud drums'), {'semantic', 'coarse'})):
    networks = Watched()
    made(networks, request, seconds=1.0)
    assert {stage for stage, _, null in networks.asked if null is not None} == twice, request
    assert {stage for stage, _, _ in networks.asked} == {'semantic', 'coarse', 'fine'}


def test_a_stage_that_always_saw_its_conditions_is_not_guided():
  dropout = {'stage/semantic': 0.1, 'stage/coarse': 0.0, 'stage/fine': 0.1}
  objective = lambda name: types.SimpleNamespace(condition_dropout=dropout[f'stage/{name}'], stage=None)
  cascade = types.SimpleNamespace(has=dropout.__contains__,
                                  stage=lambda name: types.SimpleNamespace(objective=objective(name)))
  found = CascadeNetworks(cascade).sampling
  assert found == {**USUAL, 'coarse': dataclasses.replace(USUAL['coarse'], guidance=1.0)}
  assert USUAL['semantic'].guidance > 1 and USUAL['fine'].guidance == 1
  asked = pipeline.adjusted(types.SimpleNamespace(sampling=found), guidance=5.0)
  assert {name: one.guidance for name, one in asked.items()} == {'semantic': 5.0, 'coarse': 1.0, 'fine': 1.0}


def test_the_best_of_several_is_the_one_that_scores_highest(networks):
  settings = Settings(seconds=1.0)
  description = prompts.describe(networks, (CALM,), None, 1.0)
  every = pipeline.collect(networks, pipeline.blocks(
      networks, description.condition, settings, pipeline.prompt_keys(1, 4))).audio_BxN
  scores = [prompts.score(networks, description, audio_N) for audio_N in every]
  assert len(set(scores)) == 4
  np.testing.assert_array_equal(made(networks, Request((CALM,), best_of=4), seconds=1.0), every[np.argmax(scores)])


# ---- clips -----------------------------------------------------------------------------------------------------------


def test_a_continuation_goes_on_from_the_tokens_of_the_clip_exactly(clip):
  networks = Watched()
  made(networks, Request((CALM,), continuation=Continuation(clip)), seconds=1.0)
  audio_N = clips.read(clip, RATE)
  acoustic = np.asarray(networks.acoustic_tokens(audio_N[None]))
  semantic = np.asarray(networks.semantic_tokens(audio_N[None], None))
  first = {}
  for stage, rows, _ in networks.asked:
    first.setdefault(stage, rows)
  prefix = lambda name, count: (first[name][0, -count:] - networks.stages[name].offset(networks.stages[name].target))
  np.testing.assert_array_equal(prefix('semantic', 12), semantic[0, -12:, 0])
  coarse = prefix('coarse', 20).reshape(10, 2) - 8 * np.arange(2)
  np.testing.assert_array_equal(coarse, acoustic[0, -10:, :2])


def test_the_recording_itself_stands_in_front_of_its_continuation(networks, clip):
  audio_N = clips.read(clip, RATE)
  request = lambda **options: Request((CALM,), continuation=Continuation(clip, **options))
  found = made(networks, request(at=2.5), seconds=1.0)
  assert len(found) == 3.5 * RATE
  fade = round(clips.FADE_TICKS / 600 * RATE)
  np.testing.assert_array_equal(found[:int(2.5 * RATE) - fade], audio_N[:int(2.5 * RATE) - fade])
  new = made(networks, request(at=2.5, keep=False), seconds=1.0)
  np.testing.assert_array_equal(found[int(2.5 * RATE):], new)


def test_a_filled_gap_leaves_the_rest_of_the_recording_as_it_is(networks, clip):
  audio_N = clips.read(clip, RATE)
  found = made(networks, Request(gap=Gap(clip, 1.0, 1.7), best_of=3))
  fade = round(clips.FADE_TICKS / 600 * RATE)
  assert len(found) == len(audio_N)
  begin, end = RATE, round(RATE * 1.72)  # on the grid of the stages
  np.testing.assert_array_equal(found[:begin - fade], audio_N[:begin - fade])
  np.testing.assert_array_equal(found[end + fade:], audio_N[end + fade:])
  assert not np.allclose(found[begin:end], audio_N[begin:end], atol=0.05)


def test_the_candidate_that_makes_the_other_side_likeliest_fills_a_gap(clip):
  class Judging(StandIn):
    """Finds the tokens behind the gap likely after one candidate only."""

    liked, seen = 0, None

    def row_nats(self, stage, rows, *arrays):
      self.seen = self.seen or {}
      self.seen[stage] = np.asarray(rows)
      return np.where(np.arange(len(rows)) == self.liked, 0.1, 1.0)[:, None] * np.ones(rows.shape)

  results = []
  for liked in range(3):
    networks = Judging()
    networks.liked = liked
    results.append(made(networks, Request(gap=Gap(clip, 1.0, 1.7), best_of=3)))
    assert set(networks.seen) == {'semantic', 'coarse', 'fine'}
    ends = {tuple(rows[-8:]) for rows in networks.seen['coarse']}
    assert len(ends) == 1, 'all candidates are judged by the same tokens'
  assert not np.array_equal(results[0], results[1]) and not np.array_equal(results[1], results[2])


def test_long_clips_are_heard_as_mulan_hears_them():
  model = configs.model(configs.config())
  networks = StandIn()
  config = model.config
  networks.mulan_rate, networks.mulan_window = config.audio.mel.sample_rate, config.audio.window_samples
  networks.mulan_hop = config.hop_samples
  networks.embed_window = model.embed_audio
  for seconds in (0.3, 1.0, 4.7):
    audio_N = np.random.default_rng(0).normal(0, 0.1, round(seconds * networks.mulan_rate)).astype(np.float32)
    np.testing.assert_allclose(clips.embed(networks, audio_N, networks.mulan_rate), model.embed_audio(audio_N[None])[0],
                               atol=1e-5)


# ---- other cascades --------------------------------------------------------------------------------------------------


def test_without_a_semantic_stage_the_coarse_stage_does_without():
  networks = Watched(WITHOUT_SEMANTIC)
  assert len(made(networks, Request((CALM,)), seconds=1.0)) == RATE
  assert {stage for stage, _, _ in networks.asked} == {'coarse', 'fine'}


def test_audiolm_has_no_mulan_and_another_rate(clip):
  networks = Watched(WITHOUT_MULAN, mulan=False, sample_rate=16000)
  assert len(made(networks, Request(), seconds=1.0)) == 16000
  assert len(made(networks, Request(continuation=Continuation(clip)), seconds=1.0)) == 5 * 16000
  assert len(made(networks, Request(gap=Gap(clip, 1.0, 2.0)))) == 4 * 16000
  assert networks.asked[0][0] == 'semantic' and networks.asked[0][1].shape == (1, 1)
  with pytest.raises(ValueError, match='without descriptions'):
    modes.music(networks, Request((CALM,)))


@pytest.mark.parametrize('missing, words', [('coarse', 'coarse'), ('semantic', 'semantic stage|semantic tokens')])
def test_a_missing_stage_is_named(missing, words):
  networks = StandIn()
  del networks.stages[missing]
  with pytest.raises(ValueError, match=words):
    modes.music(networks, Request((CALM,)))


# ---- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('seed', [1.5, '7', None, -1, 2**32])
def test_a_seed_is_a_whole_number_of_32_bits(networks, seed):
  with pytest.raises(ValueError, match='the seed must'):
    modes.music(networks, Request((CALM,)), seed=seed)


def test_the_largest_seed_is_one_of_its_own(networks):
  a, b = (made(networks, Request((CALM,)), seed=seed, seconds=0.3) for seed in (0, modes.LARGEST_SEED))
  assert not np.array_equal(a, b)


@pytest.mark.parametrize('bad, words', [
    (lambda: Request((CALM,), story.parse('0:00 a')), 'prompts or a story'),
    (lambda: Request(best_of=2), 'give one'), (lambda: Request((CALM,), best_of=0), 'at least 1'),
    (lambda: Gap('x.wav', 3, 2), 'ends after it begins'), (lambda: Gap('x.wav', 0, 100), 'may last 60 s'),
    (lambda: Prompt('x', weight=float('nan')), 'weight'), (lambda: Prompt('x', weight=-1), 'weight'),
])
def test_what_does_not_go_together_is_refused(bad, words):
  with pytest.raises(ValueError, match=words):
    bad()


def test_the_best_of_too_much_is_refused(networks, clip):
  with pytest.raises(ValueError, match='more memory'):
    modes.music(networks, Request((CALM,), best_of=100), Settings(seconds=600))
  with pytest.raises(ValueError, match='more memory'):
    modes.music(networks, Request(gap=Gap(clip, 1.0, 1.5), best_of=10**6))


# ---- where it comes from ---------------------------------------------------------------------------------------------


def written(networks, path, request, **options):
  settings = Settings(seconds=0.5)
  about = modes.about(networks, request, settings, 7)
  return files.write(path, modes.music(networks, request, settings, seed=7), networks.sample_rate, about=about,
                     **options)


def test_each_file_says_where_it_comes_from(networks, clip, tmp_path):
  found = written(networks, tmp_path / 'out.flac', Request((CALM, Prompt(audio=clip, weight=2.0)), negative='noise'))
  audio, rate = soundfile.read(tmp_path / 'out.flac')
  assert rate == RATE and len(audio) == RATE // 2 and found.seconds == 0.5
  told = json.loads((tmp_path / 'out.json').read_text())
  assert told['generated_by_a_model'] is True and told['networks'] == networks.identity
  assert (told['mode'], told['seed'], told['negative_prompt']) == ('mixture', 7, 'noise')
  assert told['prompts'][0] == {'weight': 1.0, 'text': 'slow piano'}
  assert told['settings']['sampling'] == {name: dataclasses.asdict(usual) for name, usual in USUAL.items()}
  assert told['prompts'][1]['audio'] == 'mine.wav' and len(told['prompts'][1]['sha256']) == 64
  assert told['settings']['sampling']['semantic']['temperature'] == 1.0
  assert told['audio_sha256'] == provenance.hash_file(tmp_path / 'out.flac')
  assert {p.name for p in tmp_path.iterdir()} == {'out.flac', 'out.json'}


def test_what_comes_after_may_mark_and_sign(networks, tmp_path):
  def mark(path, about):
    audio, rate = soundfile.read(path)
    soundfile.write(path, -audio, rate)
    return {**about, 'signature': 'mine'}

  written(networks, tmp_path / 'plain.wav', Request((CALM,)))
  written(networks, tmp_path / 'out.wav', Request((CALM,)), after=mark)
  told = json.loads((tmp_path / 'out.json').read_text())
  assert told['signature'] == 'mine' and told['audio_sha256'] == provenance.hash_file(tmp_path / 'out.wav')
  np.testing.assert_allclose(soundfile.read(tmp_path / 'out.wav')[0], -soundfile.read(tmp_path / 'plain.wav')[0],
                             atol=1e-4)


def test_a_long_block_is_written_a_little_at_a_time(tmp_path):
  # libvorbis puts what it is given at a time on the stack: a process dies of 90 s.
  block_N = np.sin(np.arange(150 * RATE) * 0.1) / 2
  assert files.write(tmp_path / 'out.ogg', iter([block_N]), RATE).seconds == 150
  assert soundfile.info(tmp_path / 'out.ogg').frames == len(block_N)


def test_a_file_of_another_kind_is_not_taken_for_a_sidecar(tmp_path):
  blocks = lambda: iter([np.zeros(100)])
  for content in ('{"bars_passed": 3}', 'no JSON', '[]'):
    (tmp_path / 'report.json').write_text(content)
    with pytest.raises(ValueError, match='report.json is there and says nothing of report.wav'):
      files.write(tmp_path / 'report.wav', blocks(), RATE, about={})
    files.write(tmp_path / 'report.wav', blocks(), RATE)
    assert (tmp_path / 'report.json').read_text() == content
  files.write(tmp_path / 'out.wav', blocks(), RATE, about={'seed': 1})
  with pytest.raises(ValueError, match='says nothing of out.flac'):
    files.write(tmp_path / 'out.flac', blocks(), RATE, about={})
  files.write(tmp_path / 'out.wav', blocks(), RATE, about={'seed': 2})
  assert json.loads((tmp_path / 'out.json').read_text())['seed'] == 2
  files.write(tmp_path / 'out.wav', blocks(), RATE)
  assert not (tmp_path / 'out.json').exists(), 'it would speak of other audio'


def test_a_disk_that_takes_no_more_is_one_line(tmp_path, monkeypatch):
  class Full(soundfile.SoundFile):
    def write(self, data):
      raise soundfile.LibsndfileError(2, 'Error : ')

  monkeypatch.setattr(soundfile, 'SoundFile', Full)
  with pytest.raises(OSError, match='out.wav cannot be written .System error.; is the disk full'):
    files.write(tmp_path / 'out.wav', iter([np.zeros(10)]), RATE)
  assert not list(tmp_path.iterdir())


def test_nothing_half_written_stays(tmp_path):
  (tmp_path / 'out.wav').write_text('what was there')

  def blocks():
    yield np.zeros(100)
    raise ValueError('no more')

  with pytest.raises(ValueError, match='no more'):
    files.write(tmp_path / 'out.wav', blocks(), RATE, about={})
  with pytest.raises(ValueError, match='no numbers'):
    files.write(tmp_path / 'out.wav', iter([np.full(10, np.nan)]), RATE, about={})
  assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [('out.wav', 'what was there')]
