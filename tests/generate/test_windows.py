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
  if len(plan.windows) > 1:
    assert plan.total - (plan.window - plan.overlap) < needed, 'one window fewer would do'
  for spec in stage.streams:
    if spec.frame_rate:
      for tick in (*(t for w in plan.windows for t in w), plan.window, plan.total):
        assert windows.frame(tick, spec) * 600 == tick * spec.frame_rate


def test_the_papers_long_generation_advances_by_half_a_window():
  plan = windows.cover(STAGES[3], windows.ticks(60), overlap=0.5)
  assert [w.start / 600 for w in plan.windows] == [0, 15, 30]


def test_windows_without_overlap_stand_alone():
  plan = windows.cover(STAGES[2], windows.ticks(10), overlap=0.0)
  assert plan.stand_alone and len(plan.windows) == 21


@pytest.mark.parametrize('needed', [0.1, 0.48])
def test_a_short_request_is_one_short_window(needed):
  plan = windows.cover(STAGES[2], windows.ticks(needed), overlap=0.0)
  assert len(plan.windows) == 1 and plan.total == windows.ticks(needed)


@hypothesis.given(st.sampled_from(STAGES), st.integers(1, 300), st.integers(0, 100), st.dictionaries(
    st.integers(1, 299), st.sampled_from([None, 0, 1, 9])))
def test_what_is_kept_is_everything_once_and_never_across_a_change(stage, needed, given, changes):
  grid = windows.grid(stage)
  given, needed = given * grid, (given + needed) * grid
  changes = {c * grid: seen if seen is None else seen * grid for c, seen in changes.items()}
  plan = windows.cover(stage, needed, overlap=0.5, given=given, changes=changes)
  edge = given
  for window in plan.windows:
    assert window.first == edge and window.start <= window.first < window.last <= window.start + plan.window
    seen = changes.get(window.first)
    assert window.start == max(0, window.first - min(plan.overlap, plan.overlap if seen is None else seen))
    assert not any(window.first < c < window.last for c in changes)
    edge = window.last
  assert edge >= needed and plan.windows[-1].first < needed


def test_no_window_crosses_the_limit():
  plan = windows.cover(STAGES[1], windows.ticks(3), overlap=0.5, limit=windows.ticks(3))
  assert plan.total == windows.ticks(3) and plan.windows[-1].last == windows.ticks(3)
