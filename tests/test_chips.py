"""Names of topologies: what they stand for, and what is said of those that there are not."""
import pytest

from musiclm_jax.chips import CHIPS, topology


@pytest.mark.parametrize('name, chips, slices, tpu', [
    ('v5e:4x4', 16, 1, True), ('v5e:16x16*4', 1024, 4, True), ('v5p:4x4x4', 64, 1, True), ('v5p:4x4x8', 128, 1, True),
    ('h100:8', 8, 1, False), ('h100:8x4', 32, 4, False), ('h200:1', 1, 1, False), ('cpu:8', 8, 1, False)])
def test_what_names_stand_for(name, chips, slices, tpu):
  found = topology(name)
  assert (found.chips, found.slices, found.is_tpu, found.name) == (chips, slices, tpu, name)


@pytest.mark.parametrize('name, nearest', [
    ('v5e:4x5', 'v5e:4x4'), ('v5e:32x32', 'v5e:16x16'), ('v5p:4x4', 'v5p:2x2x4'), ('v6e:9x9*2', r'v6e:8x8 \(several'),
    ('v5e:4x4*0', 'v5e:4x4'), ('v5e', 'v5e:1x1'), ('h100:16', 'h100:8x2'), ('h100:4x4', 'h100:8x2'),
    ('h100:3', 'h100:'), ('h10:8', "'h100'"), ('V5E:4x4', "'v5e'")])
def test_of_what_there_is_not_the_nearest_is_named(name, nearest):
  with pytest.raises(ValueError, match=f'there is no .*{nearest}'):
    topology(name)


def test_links_count_twice_where_the_ends_of_a_slice_are_joined():
  assert topology('v5e:16x16').ring == 2 * topology('v5e:4x4').ring == 2 * CHIPS['v5e'].link
  assert topology('v5p:4x4x4').ring == 2 * topology('v5p:2x2x4').ring
  assert topology('h100:8').ring == CHIPS['h100'].link
