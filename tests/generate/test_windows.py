import hypothesis
from hypothesis import strategies as st
import pytest

from musiclm_jax.generate import windows
from musiclm_jax.specs import Stage, TokenSpec

MULAN, SEMANTIC = TokenSpec('mulan', 64, 12), TokenSpec('semantic', 256, 1, 25)
ACOUSTIC = TokenSpec('acoustic', 256, 12, 50)
COARSE, FINE = ACOUSTIC.part('coarse', 0, 4), ACOUSTIC.part('fine', 4, 8)
STAGES = (Stage('semantic', (MULAN,), SEMANTIC, 5), Stage('coarse', (MULAN, SEMANTIC), COARSE, 1),
          Stage('fine', (COARSE,), FINE, 0.48), Stage('paper', (MULAN,), SEMANTIC, 30))


@hypothesis.given(st.sampled_from(STAGES), st.integers(1, 120_000), st.sampled_from([0.0, 0.25, 0.5]))
def test_windows_cover_what_is_needed_on_frame_boundaries(stage, needed, overlap):
  plan = windows.cover(stage, needed, overlap=overlap)
  assert plan.total >= needed
  assert plan.window <= windows.ticks(stage.seconds)
  if plan.count > 1:
    assert plan.total - plan.stride < needed, 'one window fewer would do'
  for spec in stage.streams:
    if spec.frame_rate:
      for tick in (*plan.starts, plan.window, plan.total):
        assert windows.frame(tick, spec) * 600 == tick * spec.frame_rate


def test_the_papers_long_generation_advances_by_half_a_window():
  plan = windows.cover(STAGES[3], windows.ticks(60), overlap=0.5)
  assert [start / 600 for start in plan.starts] == [0, 15, 30]


def test_windows_without_overlap_stand_alone():
  plan = windows.cover(STAGES[2], windows.ticks(10), overlap=0.0)
  assert plan.stride == plan.window and plan.count == 21


@pytest.mark.parametrize('needed', [0.1, 0.48])
def test_a_short_request_is_one_short_window(needed):
  plan = windows.cover(STAGES[2], windows.ticks(needed), overlap=0.0)
  assert plan.count == 1 and plan.total == windows.ticks(needed)
