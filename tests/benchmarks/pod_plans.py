"""Plans of every experiment at the paper's size for machines that are not here, and the tables of docs/pods.md.

    python -m tests.benchmarks.pod_plans             # the plans that are missing, then the tables
    python -m tests.benchmarks.pod_plans --tables    # the tables, from the plans that are there
    python -m tests.benchmarks.pod_plans --scaling   # the plans of the scaling study, then the tables

A plan takes one to several minutes on a core and is kept in docs/plans/, one file each: delete one to make it again.
The command can be stopped at any time and goes on where it was.
"""
from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
import dataclasses
import json
import pathlib
import subprocess
import sys
from typing import Any

from musiclm_jax.chips import topology

DOCS = pathlib.Path(__file__).resolve().parents[2] / 'docs'
PLANS = DOCS / 'plans'
EXPERIMENTS = ('coarse_lm', 'semantic_lm', 'fine_lm', 'codec', 'w2v_bert', 'mulan')
# Topology and the mesh file for it.
MACHINES = {'v5e:4x4': 'v5e_16', 'v6e:8x8': 'v6e_64', 'v5p:4x4x4': 'v5p_128', 'v5e:16x16': 'v5e_256', 'h100:8': 'gpu_8'}
# A batch that is smaller than the number of chips is split over half of them, and layers over two.
EXCEPTIONS = {('codec', 'v5e:16x16'): 'multislice'}


@dataclasses.dataclass(frozen=True)
class Cell:
  """One plan to make: `flags` are what `musiclm plan` gets beside experiment, size and topology."""

  experiment: str
  topology: str
  mesh: str
  flags: tuple[str, ...] = ()
  study: str = ''

  @property
  def path(self) -> pathlib.Path:
    parts = (self.study, self.experiment, self.topology.replace(':', '_').replace('*', '_times_'))
    return PLANS / f'{"-".join(filter(None, parts))}.json'

  def read(self) -> dict[str, Any] | None:
    return json.loads(self.path.read_text()) if self.path.exists() else None

  @property
  def command(self) -> list[str]:
    return ['plan', '--gin_file', f'experiments/{self.experiment}.gin', '--gin_file', 'size/paper.gin', '--gin_file',
            f'mesh/{self.mesh}.gin', '--topology', self.topology, *self.flags]

  def make(self) -> None:
    """Plans it, in a process of its own; what does not fit is kept as the message that says so."""
    PLANS.mkdir(exist_ok=True)
    partial = self.path.with_suffix('.partial')
    done = subprocess.run([sys.executable, '-m', 'musiclm_jax.main', *self.command, '--output', str(partial)],
                          stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    if done.returncode:
      message = done.stderr.strip().rpartition('musiclm: error: ')[2]
      if 'fits' not in message:
        raise SystemExit(f'{" ".join(self.command)}: {message}')
      partial.write_text(json.dumps({'topology': self.topology, 'fits': False, 'message': message}, indent=1) + '\n')
    partial.rename(self.path)


def grid() -> Iterator[Cell]:
  for machine, mesh in MACHINES.items():
    for experiment in EXPERIMENTS:
      yield Cell(experiment, machine, EXCEPTIONS.get((experiment, machine), mesh))


# Of the scaling study: machines of 1 to 1,024 chips, by the mesh file whose other settings are taken.
SCALED = {'gpu_8': ('h100:1', 'h100:8', 'h100:8x4', 'h100:8x32', 'h100:8x128'),
          'v5e_16': ('v5e:1x1', 'v5e:2x4', 'v5e:4x8', 'v5e:16x16', 'v5e:16x16*4')}


def scaling() -> Iterator[Cell]:
  """The coarse stage on 1 to 1,024 chips: weak, 16 rows each, and strong, the 256 rows of the recipe in all."""
  sizes = lambda **axes: tuple(f'--gin.partition.Partitioner.{axis}={n}' for axis, n in {'data': 0, **axes}.items())
  for mesh, machines in SCALED.items():
    for machine in machines:
      chips = topology(machine).chips
      fsdp = min(chips, 8)
      tensor = 4 if chips > 256 else 1  # there are no more rows than 256
      yield Cell('coarse_lm', machine, mesh, (*sizes(fsdp=fsdp), f'--gin.BATCH_SIZE={16 * chips}'), 'weak')
      if tensor > 2 and mesh.startswith('v5e'):  # those that share a row would lie on several hosts, which is refused
        continue
      # What a device cannot hold at once it takes in parts, each of the rows that it has in the weak study.
      yield Cell('coarse_lm', machine, mesh, (*sizes(fsdp=fsdp // tensor, tensor=tensor),
                                               f'--gin.MICROBATCHES={max(1, 256 // (16 * chips))}'), 'strong')


def _number(value: float) -> str:
  return f'{value:,.0f}' if value >= 100 else f'{value:.3g}'


def grid_table(plans: Mapping[Cell, dict[str, Any] | None]) -> str:
  head = ('experiment', 'topology', 'mesh file', 'batch', 'memory, GiB', 'reduce-scattered', 'step, s', 'compute',
          'of peak', 'longest message', 'hours', 'chip-hours')
  lines = [head, tuple('---' for _ in head)]
  for cell, plan in plans.items():
    start = (cell.experiment, cell.topology, cell.mesh)
    if plan is None:
      lines.append((*start, 'not computed', *[''] * 8))
    elif not plan['fits']:
      lines.append((*start, plan['message'], *[''] * 8))
    else:
      lines.append((*start, *_row(plan)))
  return '\n'.join('| ' + ' | '.join(line) + ' |' for line in lines)


def _row(plan: dict[str, Any]) -> tuple[str, ...]:
  memory, scattered = plan['memory'], plan['scattered_share']
  return (str(plan['batch_size']), f'{memory["peak"] / 2**30:.1f} of {memory["limit"] / 2**30:.0f}',
          'one copy a device' if scattered is None else f'{100 * scattered:.0f}%', _number(plan['step_seconds']),
          f'{100 * plan["compute_share"]:.0f}%', f'{100 * plan["mfu"]:.0f}%', _longest(plan), _number(plan['hours']),
          _number(plan['chip_hours']))


def _longest(plan: dict[str, Any]) -> str:
  rows = plan['collectives']
  return f'{rows[0]["kind"]} along {" x ".join(rows[0]["axes"])}' if rows else 'none'


def scaling_table(plans: Mapping[Cell, dict[str, Any] | None]) -> str:
  """Efficiency against the first machine of the study that fits: operations of the model a second and chip."""
  head = ('study', 'topology', 'chips', 'batch', 'step, s', 'operations a second and chip', 'efficiency', 'messages',
          'the longest')
  lines, first = [head, tuple('---' for _ in head)], {}
  kind = lambda cell: (cell.topology.partition(':')[0], cell.study != 'weak')
  for cell, plan in sorted(plans.items(), key=lambda item: kind(item[0])):
    if plan is None or not plan['fits']:
      lines.append((cell.study, cell.topology, 'not computed' if plan is None else plan['message'], *[''] * 6))
      continue
    rate = plan['flops'] / plan['step_seconds'] / plan['chips']
    first.setdefault(kind(cell), rate)
    lines.append((cell.study, cell.topology, str(plan['chips']), str(plan['batch_size']), _number(plan['step_seconds']),
                  f'{rate / 1e12:.0f}e12', f'{100 * rate / first[kind(cell)]:.0f}%',
                  f'{100 * plan["collective_seconds"] / plan["step_seconds"]:.0f}% of the step', _longest(plan)))
  return '\n'.join('| ' + ' | '.join(line) + ' |' for line in lines)


def write(name: str, table: str) -> None:
  """Puts a table between its markers in docs/pods.md."""
  path = DOCS / 'pods.md'
  before, begin, rest = path.read_text().partition(f'<!-- {name} -->\n')
  _, end, after = rest.partition(f'<!-- end of {name} -->')
  if not begin or not end:
    raise SystemExit(f'{path} has no markers for {name}')
  path.write_text(f'{before}{begin}{table}\n{end}{after}')


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--tables', action='store_true', help='plan nothing')
  parser.add_argument('--scaling', action='store_true', help='make the plans of the scaling study')
  args = parser.parse_args()
  cells = [] if args.tables else list(scaling() if args.scaling else grid())
  for cell in cells:
    if not cell.path.exists():
      print(cell.path.stem, flush=True)
      cell.make()
  write('plans', grid_table({cell: cell.read() for cell in grid()}))
  write('scaling', scaling_table({cell: cell.read() for cell in scaling()}))


if __name__ == '__main__':
  main()
