"""docs/pods.md: a row for every experiment and machine, and as the plans that are kept say."""
import pytest

from musiclm_jax.chips import topology
from musiclm_jax.config import gin_folder
from tests.benchmarks import pod_plans


def between(name):
  text = (pod_plans.DOCS / 'pods.md').read_text()
  assert text.count(f'<!-- {name} -->') == text.count(f'<!-- end of {name} -->') == 1
  return text.partition(f'<!-- {name} -->\n')[2].partition(f'<!-- end of {name} -->')[0].strip()


@pytest.mark.parametrize('name, cells, table', [
    ('plans', pod_plans.grid, pod_plans.grid_table), ('scaling', pod_plans.scaling, pod_plans.scaling_table)])
def test_tables_say_what_the_plans_say(name, cells, table):
  found = between(name)
  assert found == table({cell: cell.read() for cell in cells()}), 'run python -m tests.benchmarks.pod_plans --tables'


def test_every_experiment_has_a_row_for_every_machine():
  rows = [line.split('|')[1:3] for line in between('plans').splitlines()[2:]]
  assert [[c.strip() for c in row] for row in rows] == [
      [e, t] for t in pod_plans.MACHINES for e in pod_plans.EXPERIMENTS]
  assert len(pod_plans.MACHINES) == 5


def test_cells_name_what_there_is():
  for cell in (*pod_plans.grid(), *pod_plans.scaling()):
    topology(cell.topology)
    assert (gin_folder() / 'mesh' / f'{cell.mesh}.gin').exists()
    assert (gin_folder() / 'experiments' / f'{cell.experiment}.gin').exists()
    if (plan := cell.read()) is not None and plan['fits']:
      assert plan['topology'] == cell.topology and plan['chips'] == topology(cell.topology).chips
  assert {c.path for c in pod_plans.grid()}.isdisjoint(c.path for c in pod_plans.scaling())
  assert not {path for path in pod_plans.PLANS.glob('*')} - {
      c.path for c in (*pod_plans.grid(), *pod_plans.scaling())}, 'plans that no table shows'
