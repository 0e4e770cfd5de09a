#!/usr/bin/env python3
"""Trains on Cloud TPU VMs: asks for them, installs, starts `musiclm train` on all of them, follows, stops, deletes.

  launch/tpu_vm.py create  --name coarse --zone us-west4-a --accelerator v5litepod-16
  launch/tpu_vm.py status  --name coarse --zone us-west4-a       # until it is ACTIVE
  launch/tpu_vm.py install --name coarse --zone us-west4-a \\
    --setup 'sudo mkdir -p /shared && sudo mount -t nfs ADDRESS:/share /shared'
  launch/tpu_vm.py start   --name coarse --zone us-west4-a -- \\
    --gin_file experiments/coarse_lm.gin --workdir /shared/coarse
  launch/tpu_vm.py logs    --name coarse --zone us-west4-a
  launch/tpu_vm.py stop    --name coarse --zone us-west4-a       # saves; the same `start` goes on
  launch/tpu_vm.py delete  --name coarse --zone us-west4-a

What follows -- goes to `musiclm train`, with --distributed. More in docs/launching.md.
"""
from __future__ import annotations

import argparse
from collections.abc import Sequence
import os
import pathlib
import re
import tempfile

import command
import tpus

_UNIT = 'musiclm'  # of systemd, on each VM
_PACKAGE, _ENVIRONMENT, _SCRIPT = 'musiclm_jax', 'musiclm_environment', 'musiclm_train.sh'  # in the home folder there


def _parser() -> command.Parser:
  parser = command.Parser(prog='tpu_vm.py', description=__doc__)
  actions = parser.add_subparsers(dest='action', metavar='ACTION', required=True)

  def action(name: str, summary: str) -> command.Parser:
    p = actions.add_parser(name, help=summary, description=summary)
    p.add_argument('--name', metavar='NAME', required=True, help='of the queued resource')
    p.add_argument('--zone', metavar='ZONE', required=True)
    p.add_argument('--project', metavar='PROJECT')
    p.add_argument('--gcloud_flag', metavar='FLAG', action='append', default=[],
                   help='any other flag of the gcloud command, as in --gcloud_flag=--network=mine; repeatable')
    command.add_dry_run(p)
    return p

  p = action('create', 'ask for TPU VMs (a queued resource)')
  p.add_argument('--accelerator', metavar='TYPE', required=True, help='such as v5litepod-16, v5p-128, v6e-256')
  p.add_argument('--slices', metavar='N', type=command.positive, default=1)
  p.add_argument('--runtime', metavar='VERSION', help="of the VMs' software; that of the accelerator if not given")
  p.add_argument('--spot', action='store_true')
  action('status', 'how far the request is')
  p = action('install', 'install musiclm (the last commit of this checkout) on all of the VMs')
  p.add_argument('--setup', metavar='COMMAND', action='append', default=[],
                 help='a shell command for each VM before that, such as a mount; repeatable')
  p.add_argument('--python', metavar='VERSION', default='3.12', choices=('3.11', '3.12', '3.13'))
  p = action('start', 'start the same training on all of the VMs')
  p.add_argument('--max_restarts', metavar='N', type=command.count, default=20,
                 help='how often a day a process that failed is started again; 20')
  p.add_argument('--save_seconds', metavar='N', type=command.positive, default=600,
                 help='how long a process that is asked to end may take to save; 600')
  command.add_training(p, f'{_ENVIRONMENT}/bin/musiclm')
  p = action('logs', 'follow what process 0 says')
  p.add_argument('--slice', metavar='I', type=command.count, default=0)
  p.add_argument('--worker', metavar='I', type=command.count, default=0)
  action('stop', 'save and end the training on all of the VMs')
  action('delete', 'give the VMs back')
  return parser


class _Resource:
  """gcloud commands about one queued resource."""

  def __init__(self, args: argparse.Namespace):
    if not re.fullmatch(r'[a-z]([-a-z0-9]{0,61}[a-z0-9])?', args.name):
      raise command.Mistake(f'{args.name!r} is no name of a queued resource: lower case letters, digits and hyphens, '
                            'the first a letter, the last no hyphen, 63 at most')
    self._name = args.name
    self._flags = [f'--zone={args.zone}', *([f'--project={args.project}'] if args.project else []), *args.gcloud_flag]

  def gcloud(self, verb: str, *flags: str, before: Sequence[str] = (), after: str | None = None) -> command.Command:
    name = self._name if after is None else f'{self._name}:{after}'
    return command.Command(
        ['gcloud', 'compute', 'tpus', 'queued-resources', verb, *before, name, *self._flags, *flags])

  def shell(self, script: str, node: str = 'all', worker: str = 'all') -> command.Command:
    """`script` in the login shell of these VMs; gcloud hands the text to ssh as it is."""
    return self.gcloud('ssh', f'--node={node}', f'--worker={worker}', f'--command={script}')


def _create(args: argparse.Namespace, resource: _Resource) -> list[command.Command]:
  generation, _ = tpus.of_accelerator(args.accelerator)
  flags = [f'--accelerator-type={args.accelerator}',
           f'--runtime-version={args.runtime or tpus.generation(generation).runtime}']
  if args.slices == 1:
    flags.append(f'--node-id={args.name}')
  else:
    flags += [f'--node-count={args.slices}', f'--node-prefix={args.name}']
  return [resource.gcloud('create', *flags, *(['--spot'] if args.spot else []))]


def _install(args: argparse.Namespace, resource: _Resource) -> list[command.Command]:
  archive = os.path.join(tempfile.gettempdir(), f'{_PACKAGE}-{os.getuid()}.tar.gz')
  there = f'{_PACKAGE}.tar.gz'
  # The VMs' own Python is older than what is needed; uv brings one.
  script = ' && '.join([
      *args.setup,
      f'rm -rf {_PACKAGE} && tar -xzf {there}',
      'python3 -m pip install --quiet --user --upgrade uv',
      f'python3 -m uv venv --quiet --allow-existing --python {args.python} {_ENVIRONMENT}',
      f'python3 -m uv pip install --quiet --python {_ENVIRONMENT}/bin/python ./{_PACKAGE}"[train,tpu]"',
      f'{_ENVIRONMENT}/bin/musiclm --version',
  ])
  return [
      command.Command(['git', '-C', str(command.ROOT), 'archive', '--format=tar.gz', f'--prefix={_PACKAGE}/',
                       f'--output={archive}', 'HEAD']),
      resource.gcloud('scp', '--node=all', '--worker=all', before=[archive], after=there),
      resource.shell(script),
  ]


def _start(args: argparse.Namespace, resource: _Resource) -> list[command.Command]:
  if not pathlib.PurePosixPath(command.workdir(args)).is_absolute():
    raise command.Mistake('--workdir must begin with /, and be a folder that all of the VMs share')
  # The command is in a file on each VM, where one can read it: systemd would expand what looks like its variables.
  script = f'exec {command.quoted(command.training(args))}'
  unit = [
      '[Unit]',
      'StartLimitIntervalSec=1d',
      f'StartLimitBurst={args.max_restarts + 1}',
      '[Service]',
      'Restart=on-failure',
      'RestartSec=30',  # meanwhile the other processes notice, and end, too
      f'RestartPreventExitStatus={" ".join(map(str, command.FINAL))}',
      'KillMode=mixed',  # SIGTERM for the trainer alone; its workers are its own business
      f'TimeoutStopSec={args.save_seconds}',
      # Services have low limits by default, and the TPU's driver locks memory.
      'LimitMEMLOCK=infinity',
      'LimitNOFILE=1048576',
      f'ExecStart=/bin/sh {_SCRIPT}',
  ]
  lines = command.quoted(['printf', '%s\\n', *unit])
  own = 'printf "User=%s\\nWorkingDirectory=%s\\n" "$(id -un)" "$HOME"'
  busy = f'if systemctl is-active --quiet {_UNIT}; then echo "a training runs here: stop it first" >&2; exit 1; fi'
  return [resource.shell(
      f'{busy}; {command.quoted(["printf", "%s", script])} > {_SCRIPT} && '
      f'{{ {lines}; {own}; }} | sudo tee /etc/systemd/system/{_UNIT}.service > /dev/null && '
      f'sudo systemctl daemon-reload && {{ sudo systemctl reset-failed {_UNIT} 2> /dev/null; '
      f'sudo systemctl start {_UNIT}; }}')]


def _logs(args: argparse.Namespace, resource: _Resource) -> list[command.Command]:
  follow = f'sudo journalctl --unit={_UNIT} --follow --lines=200 --output=cat'
  return [resource.shell(follow, str(args.slice), str(args.worker))]


def commands(args: argparse.Namespace) -> list[command.Command]:
  """What an action runs, in order."""
  resource = _Resource(args)
  if args.after and args.action != 'start':
    raise command.Mistake(f'{args.action} takes nothing after --')
  of_action = {'create': _create, 'install': _install, 'start': _start, 'logs': _logs}
  if args.action in of_action:
    return of_action[args.action](args, resource)
  if args.action == 'stop':
    return [resource.shell(f'sudo systemctl stop {_UNIT}')]
  # `delete` takes the VMs along; gcloud asks before it does.
  return [resource.gcloud('describe') if args.action == 'status' else resource.gcloud('delete', '--force')]


def main(argv: Sequence[str]) -> int:
  args = _parser().parse(argv)
  return command.perform(commands(args), args.dry_run)


if __name__ == '__main__':
  command.main(main, 'tpu_vm.py')
