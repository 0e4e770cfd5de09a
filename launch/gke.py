#!/usr/bin/env python3
"""Trains on Google Kubernetes Engine: makes a JobSet that starts `musiclm train` on TPU slices or GPU nodes.

  launch/gke.py --name coarse --image IMAGE --tpu v5e --topology 16x16 --bucket my-runs -- \\
    --gin_file experiments/coarse_lm.gin --gin_file mesh/fsdp8.gin --workdir /data/coarse
  launch/gke.py --name coarse --image IMAGE --gpu h100 --gpus 32 --claim shared-disk -- ...

What follows -- goes to `musiclm train`, with --distributed. --dry_run prints the manifest, to keep, to change and to
create by hand. More in docs/launching.md.
"""
from __future__ import annotations

import argparse
from collections.abc import Sequence
import json
import pathlib
import re
from typing import Any

import command
import tpus

# Values of GKE's label cloud.google.com/gke-accelerator.
GPUS = {
    'a100': 'nvidia-tesla-a100',
    'a100-80gb': 'nvidia-a100-80gb',
    'h100': 'nvidia-h100-80gb',
    'h100-mega': 'nvidia-h100-mega-80gb',
    'h200': 'nvidia-h200-141gb',
    'b200': 'nvidia-b200',
    'l4': 'nvidia-l4',
}
_JOB = 'train'  # pods are named NAME-train-SLICE-HOST-xxxxx
_PORT = 8476


def _parser() -> command.Parser:
  parser = command.Parser(prog='gke.py', description=__doc__)
  parser.add_argument('--name', metavar='NAME', required=True)
  parser.add_argument('--image', metavar='IMAGE', required=True, help='a container image in which musiclm is installed')
  parser.add_argument('--tpu', metavar='KIND', help=', '.join(tpus.GENERATIONS))
  parser.add_argument('--topology', metavar='AxB', help='of one slice, such as 16x16 or 4x4x8')
  parser.add_argument('--slices', metavar='N', type=command.positive, help='1 if not given')
  parser.add_argument('--chips_per_host', metavar='N', type=command.positive,
                      help="of the node pool's machine: 4 if not given, and 1 for 1x1")
  parser.add_argument('--gpu', metavar='KIND', help=', '.join(GPUS))
  parser.add_argument('--gpus', metavar='N', type=command.positive, help='GPUs in all')
  parser.add_argument('--gpus_per_node', metavar='N', type=command.positive, help='8 if not given')
  parser.add_argument('--bucket', metavar='NAME', help='a Cloud Storage bucket, mounted by Cloud Storage FUSE')
  parser.add_argument('--claim', metavar='NAME', help='a PersistentVolumeClaim that all pods may write to')
  parser.add_argument('--mount_path', metavar='DIR', default='/data', help='where it is in the container; /data')
  parser.add_argument('--service_account', metavar='NAME', help="the pods' Kubernetes service account")
  parser.add_argument('--namespace', metavar='NAME', default='default')
  parser.add_argument('--queue', metavar='NAME', help='a LocalQueue of Kueue')
  parser.add_argument('--spot', action='store_true', help='on Spot nodes')
  parser.add_argument('--node_selector', metavar='KEY=VALUE', action='append', default=[],
                      help='a further label of the nodes, such as a reservation; repeatable')
  parser.add_argument('--max_restarts', metavar='N', type=command.count, default=100)
  parser.add_argument('--save_seconds', metavar='N', type=command.positive, default=600,
                      help='how long a pod that is asked to end may take to save; 600')
  command.add_training(parser)
  command.add_dry_run(parser)
  return parser


def _check_name(name: str, slices: int, hosts: int) -> None:
  """Raises command.Mistake for a name that Kubernetes would refuse for the JobSet, its service or its pods."""
  if not re.fullmatch(r'[a-z]([-a-z0-9]*[a-z0-9])?', name):
    raise command.Mistake(f'Kubernetes would refuse the name {name!r}: lower case letters, digits and hyphens, the '
                          'first a letter, the last no hyphen')
  longest = len(f'{name}-{_JOB}-{slices - 1}-{hosts - 1}-xxxxx')
  if longest > 63:
    raise command.Mistake(f'Kubernetes would refuse the name {name!r}: the names of its pods would have {longest} '
                          f'characters, of 63; {longest - 63} fewer will do')


def _check_other_name(flag: str, name: str | None) -> None:
  if name is not None and not re.fullmatch(r'[a-z0-9]([-a-z0-9.]*[a-z0-9])?', name):
    raise command.Mistake(f'{flag} {name!r} is no name of Kubernetes: lower case letters, digits and hyphens')


def _accelerator(args: argparse.Namespace) -> tuple[dict[str, str], str, int, int, int]:
  """Labels of the nodes, the resource, its number in each pod, pods of a slice, and slices."""
  if bool(args.tpu) == bool(args.gpu):
    raise command.Mistake('give either --tpu KIND and --topology, or --gpu KIND and --gpus')
  of_the_other = ('gpus', 'gpus_per_node') if args.tpu else ('topology', 'slices', 'chips_per_host')
  for name in of_the_other:
    if getattr(args, name) is not None:
      raise command.Mistake(f'--{name} belongs to --{"gpu" if args.tpu else "tpu"}')
  if args.tpu:
    kind = tpus.generation(args.tpu)
    if not args.topology:
      raise command.Mistake(f'--topology is missing, such as {kind.topologies[4]}')
    hosts, chips = tpus.hosts(args.tpu, args.topology, args.chips_per_host)
    slices = args.slices or 1
    if slices > 1 and hosts == 1:
      raise command.Mistake(f'GKE joins slices of several hosts only, and {args.topology} is a single one')
    labels = {'cloud.google.com/gke-tpu-accelerator': kind.gke, 'cloud.google.com/gke-tpu-topology': args.topology}
    return labels, 'google.com/tpu', chips, hosts, slices
  if args.gpu not in GPUS:
    raise command.Mistake(f'{args.gpu!r} is no GPU that is known here{command.nearest(args.gpu, GPUS)} '
                          f'(there are {", ".join(GPUS)})')
  if not args.gpus:
    raise command.Mistake('--gpus is missing: how many in all')
  each = args.gpus_per_node or 8
  if args.gpus % each:
    raise command.Mistake(f'{args.gpus} GPUs are not a multiple of {each}, the GPUs of a node (--gpus_per_node)')
  return {'cloud.google.com/gke-accelerator': GPUS[args.gpu]}, 'nvidia.com/gpu', each, args.gpus // each, 1


def _environment(args: argparse.Namespace, each: int, pods: int) -> list[dict[str, Any]]:
  variables = [{'name': name, 'value': _literal(value)} for name, _, value in (v.partition('=') for v in args.env)]
  if args.tpu:  # GKE tells TPU pods their places, and JAX reads that
    return variables
  # JAX can ask the Kubernetes API for the same, but needs a package and permissions for it. With the devices named,
  # too, it asks nobody.
  index = {'fieldRef': {'fieldPath': "metadata.annotations['batch.kubernetes.io/job-completion-index']"}}
  return [
      {'name': 'JAX_COORDINATOR_ADDRESS', 'value': f'{args.name}-{_JOB}-0-0.{args.name}:{_PORT}'},
      {'name': 'JAX_NUM_PROCESSES', 'value': str(pods)},
      {'name': 'JAX_PROCESS_ID', 'valueFrom': index},
      {'name': 'JAX_LOCAL_DEVICE_IDS', 'value': ','.join(map(str, range(each)))},
      *variables,
  ]


def _literal(text: str) -> str:
  """Kubernetes replaces $(NAME) in commands and variables, and takes $$ for a dollar."""
  return text.replace('$', '$$')


def _storage(args: argparse.Namespace) -> dict[str, Any]:
  if bool(args.bucket) == bool(args.claim):
    raise command.Mistake('give either --bucket or --claim: where the workdir is, for all pods')
  mount, workdir = pathlib.PurePosixPath(args.mount_path), pathlib.PurePosixPath(command.workdir(args))
  if not mount.is_absolute():
    raise command.Mistake(f'--mount_path {mount} does not begin with /')
  if not workdir.is_relative_to(mount):
    raise command.Mistake(f'--workdir {workdir} would vanish with its pod: put it below {mount} (--mount_path)')
  if args.claim:
    return {'persistentVolumeClaim': {'claimName': args.claim}}
  return {'csi': {'driver': 'gcsfuse.csi.storage.gke.io',
                  'volumeAttributes': {'bucketName': args.bucket, 'mountOptions': 'implicit-dirs'}}}


def _pod(args: argparse.Namespace, labels: dict[str, str], resource: str, each: int, pods: int) -> dict[str, Any]:
  arguments = argparse.Namespace(**{**vars(args), 'env': []})  # they are in the pod's own list
  for pair in args.node_selector:
    key, equals, value = pair.partition('=')
    if not key or not equals:
      raise command.Mistake(f'--node_selector {pair!r} is not KEY=VALUE')
    labels[key] = value
  tolerations = [{'key': resource, 'operator': 'Exists', 'effect': 'NoSchedule'}]
  if args.spot:
    labels['cloud.google.com/gke-spot'] = 'true'
    tolerations.append({'key': 'cloud.google.com/gke-spot', 'operator': 'Equal', 'value': 'true',
                        'effect': 'NoSchedule'})
  quantity = {resource: str(each)}
  container = {
      'name': _JOB,
      'image': args.image,
      'command': [_literal(word) for word in command.training(arguments)],
      'env': _environment(args, each, pods),
      'resources': {'requests': quantity, 'limits': quantity},
      # Worker processes and NCCL share memory; what containers have of it by default is 64 MiB.
      'volumeMounts': [{'name': 'data', 'mountPath': args.mount_path},
                       {'name': 'shared-memory', 'mountPath': '/dev/shm'}],
  }
  spec = {
      'restartPolicy': 'Never',  # one process alone cannot join again: the JobSet starts all of them
      'terminationGracePeriodSeconds': args.save_seconds,
      'nodeSelector': labels,
      'tolerations': tolerations,
      'containers': [container],
      'volumes': [{'name': 'data', **_storage(args)}, {'name': 'shared-memory', 'emptyDir': {'medium': 'Memory'}}],
  }
  if args.service_account:
    spec['serviceAccountName'] = args.service_account
  annotations = {'metadata': {'annotations': {'gke-gcsfuse/volumes': 'true'}}} if args.bucket else {}
  return {**annotations, 'spec': spec}


def manifest(args: argparse.Namespace) -> dict[str, Any]:
  """The JobSet. Raises command.Mistake for what GKE or `musiclm train` would refuse."""
  labels, resource, each, pods, slices = _accelerator(args)
  _check_name(args.name, slices, pods)
  for flag in ('namespace', 'service_account', 'queue', 'claim'):
    _check_other_name(f'--{flag}', getattr(args, flag))
  metadata: dict[str, Any] = {'name': args.name, 'namespace': args.namespace}
  if args.queue:
    metadata['labels'] = {'kueue.x-k8s.io/queue-name': args.queue}
  if args.tpu and pods > 1:  # a slice is a node pool: the pods of one job must not be spread over two of them
    metadata['annotations'] = {'alpha.jobset.sigs.k8s.io/exclusive-topology': 'cloud.google.com/gke-nodepool'}
  job = {
      'completionMode': 'Indexed',
      'parallelism': pods,
      'completions': pods,
      'backoffLimit': 0,
      # Exit code 2 is a mistake in the configuration, which no restart puts right.
      'podFailurePolicy': {'rules': [{'action': 'FailJob', 'onExitCodes': {
          'containerName': _JOB, 'operator': 'In', 'values': [command.USAGE_ERROR]}}]},
      'template': _pod(args, labels, resource, each, pods),
  }
  return {
      'apiVersion': 'jobset.x-k8s.io/v1alpha2',
      'kind': 'JobSet',
      'metadata': metadata,
      'spec': {
          # The names by which pods find one another, from before they are ready.
          'network': {'enableDNSHostnames': True, 'subdomain': args.name, 'publishNotReadyAddresses': True},
          'failurePolicy': {
              'maxRestarts': args.max_restarts,
              # New pods wait for the end of all old ones: those may still be saving, and own the workdir.
              'restartStrategy': 'BlockingRecreate',
              'rules': [{'name': 'configuration', 'action': 'FailJobSet', 'onJobFailureReasons': ['PodFailurePolicy']}],
          },
          'replicatedJobs': [{'name': _JOB, 'replicas': slices, 'template': {'spec': job}}],
      },
  }


def yaml(value: Any, indent: int = 0) -> str:
  """Dictionaries, lists and scalars as YAML: in blocks, scalars as in JSON, so that none is taken for anything else."""
  space = ' ' * indent
  if isinstance(value, dict) and value:
    lines = []
    for key, item in value.items():
      nested = isinstance(item, (dict, list)) and item
      lines.append(f'{space}{_scalar(key)}:' + ('\n' + yaml(item, indent + 2) if nested else f' {_scalar(item)}'))
    return '\n'.join(lines)
  if isinstance(value, list) and value:
    return '\n'.join(f'{space}- {yaml(item, indent + 2).lstrip()}' for item in value)
  return space + _scalar(value)


def _scalar(value: Any) -> str:
  if isinstance(value, str) and re.fullmatch(r'[A-Za-z][A-Za-z0-9]*(-[A-Za-z0-9]+)*', value) and (
      value.lower() not in ('true', 'false', 'null', 'yes', 'no', 'on', 'off', 'y', 'n')):
    return value
  # All that is not ASCII by its number: YAML does not allow every character, and JSON makes two of the high ones.
  return re.sub(r'[^ -~]', lambda found: f'\\U{ord(found[0]):08x}', json.dumps(value, ensure_ascii=False))


def main(argv: Sequence[str]) -> int:
  args = _parser().parse(argv)
  text = yaml(manifest(args)) + '\n'
  # `create`, not `apply`: that would say "unchanged" of a JobSet that has ended, and start nothing.
  create = ['kubectl', 'create', '--filename', '-']
  if args.dry_run:
    print(f'# {command.quoted(create)} reads this:\n{text}', end='')
    return 0
  return command.run(command.Command(create, text))


if __name__ == '__main__':
  command.main(main, 'gke.py')
