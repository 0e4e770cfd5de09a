import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from musiclm_jax import specs
from musiclm_jax.specs import Stage, TokenSpec
from musiclm_jax.token_lm.sequence import Layout, build, codes, revert

MULAN, SEMANTIC = TokenSpec('mulan', 1024, 12), TokenSpec('semantic', 1024, 1, 25)
ACOUSTIC = TokenSpec('acoustic', 1024, 12, 50)
COARSE, FINE = ACOUSTIC.part('coarse', 0, 4), ACOUSTIC.part('fine', 4, 8)
STAGES = (Stage('semantic', (MULAN,), SEMANTIC, 30), Stage('coarse', (MULAN, SEMANTIC), COARSE, 10),
          Stage('fine', (COARSE,), FINE, 3))
UNCONDITIONAL = Stage('unconditional', (), SEMANTIC, 30)


def random_streams(stage: Stage, batch: int = 2) -> dict[str, jax.Array]:
  streams = {}
  for i, spec in enumerate((MULAN, SEMANTIC, ACOUSTIC)):
    shape = (batch, spec.frames(stage.seconds), spec.levels)
    streams[spec.feature] = jax.random.randint(jax.random.key(i), shape, 0, spec.codebook_size)
  return streams


@pytest.mark.parametrize('stage, length', zip(STAGES, (762, 2262, 1800)), ids=[s.name for s in STAGES])
def test_the_papers_lengths(stage, length):
  assert stage.length == Layout(stage).length == length


def test_the_papers_bitrate():
  assert ACOUSTIC.bitrate == 6000 and COARSE.bitrate == 2000 and SEMANTIC.bitrate == 250
  assert ACOUSTIC.tokens(30) + SEMANTIC.tokens(30) == 18_750


def test_a_stage_without_conditions_begins_with_a_row_of_its_own():
  streams, layout = random_streams(UNCONDITIONAL), Layout(UNCONDITIONAL)
  rows = build(layout, streams, streams['semantic'])
  assert layout.condition_length == UNCONDITIONAL.condition_length == 1
  assert rows.shape == (2, layout.length) == (2, UNCONDITIONAL.length) == (2, 751)
  assert (rows[:, 0] == UNCONDITIONAL.start_row).all() and UNCONDITIONAL.start_row == UNCONDITIONAL.vocab_size
  assert build(layout, streams, streams['semantic'][:, :0]).shape == (2, 1)
  assert layout.positions_2xL.shape == (2, 751) and layout.positions_2xL[:, :2].tolist() == [[0, 1], [0, 0]]


@pytest.mark.parametrize('stage', (*STAGES, UNCONDITIONAL), ids=lambda s: s.name)
def test_revert_undoes_build(stage):
  streams, layout = random_streams(stage), Layout(stage)
  found = revert(layout, build(layout, streams, codes(streams, stage.target)))
  for spec in stage.streams:
    np.testing.assert_array_equal(found[spec.name], codes(streams, spec))


@pytest.mark.parametrize('stage', STAGES, ids=[s.name for s in STAGES])
def test_rows_of_different_levels_and_streams_never_meet(stage):
  layout = Layout(stage)
  ranges = sorted({(row, row + 1024) for row in layout.first_row_L.tolist()})
  assert all(a[1] <= b[0] for a, b in zip(ranges, ranges[1:]))
  assert len(ranges) == sum(s.levels for s in stage.streams)
  assert ranges[-1][1] == stage.vocab_size


def test_flattening_is_frame_by_frame():
  streams = random_streams(STAGES[2])
  rows = build(Layout(STAGES[2]), streams, codes(streams, FINE))
  np.testing.assert_array_equal(rows[:, :8] % 1024, streams['acoustic'][:, :2, :4].reshape(2, -1))


def test_levels_that_are_not_kept_become_the_null_row():
  stage, streams = STAGES[1], random_streams(STAGES[1])
  rows = build(Layout(stage), streams, codes(streams, COARSE), keep={'mulan': jnp.array([0, 3])})
  null = stage.null_row(MULAN)
  assert np.all(rows[0, :12] == null) and np.all(rows[1, 3:12] == null) and np.all(rows[1, :3] != null)
  assert null >= stage.vocab_size and stage.null_row(SEMANTIC) == null + 1
  np.testing.assert_array_equal(rows[:, 12:], build(Layout(stage), streams, codes(streams, COARSE))[:, 12:])


def test_the_second_position_is_time():
  layout = Layout(STAGES[1])
  place, moment = layout.positions_2xL
  assert place.tolist() == list(range(2262))
  semantic, coarse = moment[12:262], moment[262:]
  assert semantic[25] == 50 and coarse[4 * 50] == 50  # one second, in frames of the fastest stream


def test_wrong_shapes_are_named():
  streams = random_streams(STAGES[0])
  with pytest.raises(ValueError, match='250 frames of 1 levels of .semantic.'):
    build(Layout(STAGES[1]), streams, codes(streams, COARSE)[:, :500])


def test_specs_survive_json():
  for value in (*STAGES, Layout(STAGES[0], 5.0)):
    assert specs.from_json(specs.to_json(value)) == value
  assert specs.fingerprint(STAGES[0]) != specs.fingerprint(dataclasses.replace(STAGES[0], seconds=29.0))


@pytest.mark.parametrize(
    'kind', ['os.system', 'subprocess.Popen', 'musiclm_jax.specs.frames_in', 'musiclm_jax.nothing.X'])
def test_specs_json_cannot_name_code(kind):
  text = specs.to_json(MULAN).replace('musiclm_jax.specs.TokenSpec', kind)
  with pytest.raises(ValueError, match='not a frozen dataclass'):
    specs.from_json(text)


def test_first_difference_names_the_field():
  other = dataclasses.replace(STAGES[0], target=dataclasses.replace(SEMANTIC, codebook_size=512))
  assert specs.first_difference(STAGES[0], other) == 'target.codebook_size: 1024 != 512'
