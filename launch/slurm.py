#!/usr/bin/env python3
"""Trains on SLURM: submits launch/slurm_job.sh, which starts `musiclm train` by srun on all nodes.

  launch/slurm.py --nodes 4 --time 24:00:00 --partition gpu -- \\
    --gin_file experiments/coarse_lm.gin --workdir /shared/runs/coarse

What follows -- goes to `musiclm train`, with --distributed. Before the time limit the run is saved, and the job goes
back into the queue. More in docs/launching.md.
"""
from __future__ import annotations

import argparse
from collections.abc import Sequence
import pathlib
import re

import command

_JOB = pathlib.Path(__file__).resolve().parent / 'slurm_job.sh'


def _parser() -> command.Parser:
  parser = command.Parser(prog='slurm.py', description=__doc__)
  parser.add_argument('--name', metavar='NAME', default='musiclm', help='of the job, and of its log NAME-JOBID.out')
  parser.add_argument('--nodes', metavar='N', type=command.positive, default=1)
  parser.add_argument('--gpus_per_node', metavar='N', type=command.positive, default=8)
  parser.add_argument('--processes', choices=('node', 'gpu'), default='node',
                      help='one process for all GPUs of a node (tensor and sequence need that), or one for each')
  parser.add_argument('--cpus_per_process', metavar='N', type=command.positive, help='8 for each GPU if not given')
  parser.add_argument('--time', metavar='LIMIT', type=_limit, required=True, help='D-HH:MM:SS, HH:MM:SS, or minutes')
  parser.add_argument('--save_seconds', metavar='N', type=command.positive, default=300,
                      help='how long before the limit the run is saved; 300')
  parser.add_argument('--retries', metavar='N', type=command.count, default=0,
                      help='how often a step that failed is started again on the same nodes; 0')
  parser.add_argument('--partition', metavar='NAME')
  parser.add_argument('--account', metavar='NAME')
  parser.add_argument('--sbatch_flag', metavar='FLAG', action='append', default=[],
                      help='any other flag of sbatch, as in --sbatch_flag=--qos=long; repeatable')
  parser.add_argument('--container', metavar='IMAGE', help='run in this image')
  parser.add_argument('--container_runtime', choices=('pyxis', 'apptainer'), default='pyxis')
  parser.add_argument('--mount', metavar='FROM:TO', type=_mount, action='append', default=[],
                      help='a folder of the node in the container; repeatable')
  command.add_training(parser)
  command.add_dry_run(parser)
  return parser


def _limit(text: str) -> tuple[str, int]:
  """A time limit as SLURM writes it, with its seconds."""
  found = re.fullmatch(r'(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?', text)
  if not found:
    raise argparse.ArgumentTypeError(f'{text!r} is not D-HH:MM:SS, HH:MM:SS, or minutes')
  days, a, b, c = (int(part or 0) for part in found.groups())
  given = sum(part is not None for part in found.groups()[1:])
  # Without days: minutes, minutes:seconds, hours:minutes:seconds. With days the hours come first.
  hours, minutes, seconds = (a, b, c) if found[1] or given == 3 else (0, a, b)
  return text, ((days * 24 + hours) * 60 + minutes) * 60 + seconds


def _mount(text: str) -> str:
  if not re.fullmatch(r'/[^:,]*:/[^:,]*', text):
    raise argparse.ArgumentTypeError(f'{text!r} is not /FROM:/TO')
  return text


def _in_container(args: argparse.Namespace, process: list[str]) -> tuple[list[str], list[str]]:
  """Flags for srun, and the command of a process."""
  if not args.container:
    if args.mount:
      raise command.Mistake('--mount belongs to --container')
    return [], process
  if args.container_runtime == 'pyxis':
    workdir = pathlib.PurePosixPath(command.workdir(args))
    if not any(workdir.is_relative_to(mount.partition(':')[2]) for mount in args.mount):
      raise command.Mistake(f'--workdir {workdir} would vanish with the container: put it below the TO of a --mount')
    mounts = [f'--container-mounts={",".join(args.mount)}'] if args.mount else []
    return [f'--container-image={args.container}', *mounts], process
  binds = [word for mount in args.mount for word in ('--bind', mount)]
  return [], ['apptainer', 'exec', '--nv', *binds, args.container, *process]


def submission(args: argparse.Namespace) -> command.Command:
  limit, seconds = args.time
  if seconds <= args.save_seconds:
    raise command.Mistake(f'--time {limit} leaves nothing to train before the last {args.save_seconds} s '
                          '(--save_seconds), in which the run is saved')
  # In a SLURM step JAX takes SLURM_PROCID and SLURM_NTASKS, and the GPU SLURM_LOCALID as this process's only one: right
  # for a process for each GPU, as long as each sees all of them (so no --gpus-per-task, which hides the others). A
  # process for a whole node is local process 0 and would get GPU 0 alone, so its devices are named. That is the default
  # because the devices of `tensor` and `sequence` must belong to one process.
  tasks = 1 if args.processes == 'node' else args.gpus_per_node
  devices = ','.join(map(str, range(args.gpus_per_node)))
  environment = [f'JAX_LOCAL_DEVICE_IDS={devices}'] if args.processes == 'node' else []
  cpus = args.cpus_per_process or 8 * args.gpus_per_node // tasks
  flags, process = _in_container(args, command.training(args, environment))
  step = ['srun', '--kill-on-bad-exit=1', '--label', f'--cpus-per-task={cpus}', *flags, *process]
  named = [f'--{name}={value}' for name in ('partition', 'account') if (value := getattr(args, name))]
  return command.Command([
      'sbatch', f'--job-name={args.name}', f'--nodes={args.nodes}', f'--ntasks-per-node={tasks}',
      f'--gres=gpu:{args.gpus_per_node}', f'--cpus-per-task={cpus}', f'--time={limit}',
      f'--signal=B:USR1@{args.save_seconds}', '--requeue', '--open-mode=append', '--output=%x-%j.out', *named,
      *args.sbatch_flag, str(_JOB), str(args.retries), *step])


def main(argv: Sequence[str]) -> int:
  args = _parser().parse(argv)
  return command.perform([submission(args)], args.dry_run)


if __name__ == '__main__':
  command.main(main, 'slurm.py')
