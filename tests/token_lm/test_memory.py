"""What a training step keeps grows with the length of a stage's sequences, and not with its square."""
import pytest

from tests.benchmarks import paper_step


@pytest.mark.parametrize('positions', ['rotary', 't5'])
def test_a_step_of_a_longer_sequence_needs_that_much_more(positions):
  found = {}
  for length in (1024, 8192):
    sizes = dict(LM_POSITIONS=positions, LM_REMAT=True, LM_DROPOUT=0.1)
    seconds = paper_step.seconds_of(paper_step.stage_of('nano'), length)
    experiment = paper_step.stage_of('nano', COARSE_SECONDS=seconds, **sizes)
    tokens = experiment.argument('objective').stage.length
    assert length - 8 < tokens <= length
    found[length] = paper_step.compiled_step(experiment, 1)[1].memory_analysis().temp_size_in_bytes / tokens
  assert found[8192] < 1.25 * found[1024]
