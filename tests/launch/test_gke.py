"""GKE: the manifest against what JobSet, Job and Pod take, the numbers of TPU slices and GPU nodes, arguments."""
import re

import jsonschema
import pytest
import yaml

from tests.launch.conftest import MODULES, TRAINING, dry, refused

# The parts of jobset.x-k8s.io/v1alpha2, batch/v1 and core/v1 that are used: a field that is not here is a mistake.
NAME = {'type': 'string', 'pattern': '^[a-z]([-a-z0-9]*[a-z0-9])?$', 'maxLength': 63}
TEXTS = {'type': 'object', 'additionalProperties': {'type': 'string'}}


def only(required='', **fields):
  return {'type': 'object', 'properties': fields, 'required': required.split(), 'additionalProperties': False}


def several(item):
  return {'type': 'array', 'items': item, 'minItems': 1}


NUMBER, TEXT, YES = {'type': 'integer', 'minimum': 0}, {'type': 'string', 'minLength': 1}, {'const': True}
VARIABLE = {'oneOf': [only('name value', name=TEXT, value={'type': 'string'}),
                      only('name valueFrom', name=TEXT, valueFrom=only(fieldRef=only('fieldPath', fieldPath=TEXT)))]}
CONTAINER = only('name image command resources', name=NAME, image=TEXT, command=several({'type': 'string'}),
                 env={'type': 'array', 'items': VARIABLE}, resources=only('limits', limits=TEXTS, requests=TEXTS),
                 volumeMounts=several(only('name mountPath', name=NAME, mountPath={'type': 'string', 'pattern': '^/'})))
VOLUME = only('name', name=NAME, emptyDir=only(medium={'const': 'Memory'}),
              persistentVolumeClaim=only('claimName', claimName=NAME),
              csi=only('driver volumeAttributes', volumeAttributes=TEXTS,
                       driver={'const': 'gcsfuse.csi.storage.gke.io'}))
TOLERATION = only('key operator effect', key=TEXT, operator={'enum': ['Exists', 'Equal']}, value=TEXT,
                  effect={'const': 'NoSchedule'})
POD = only('containers restartPolicy', restartPolicy={'const': 'Never'}, terminationGracePeriodSeconds=NUMBER,
           nodeSelector=TEXTS, tolerations=several(TOLERATION), containers=several(CONTAINER), volumes=several(VOLUME),
           serviceAccountName=NAME)
JOB = only('parallelism completions completionMode backoffLimit template', parallelism=NUMBER, completions=NUMBER,
           completionMode={'const': 'Indexed'}, backoffLimit={'const': 0}, podFailurePolicy=only('rules', rules=several(
               only('action onExitCodes', action={'const': 'FailJob'}, onExitCodes=only(
                   'operator values', containerName=NAME, operator={'const': 'In'}, values=several(NUMBER))))),
           template=only('spec', metadata=only(annotations=TEXTS), spec=POD))
RULE = only('name action', name={'type': 'string', 'pattern': '^[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?$'},
            action={'enum': ['FailJobSet', 'RestartJobSet']},
            onJobFailureReasons=several({'enum': ['PodFailurePolicy']}))
JOBSET = only(
    'apiVersion kind metadata spec', apiVersion={'const': 'jobset.x-k8s.io/v1alpha2'}, kind={'const': 'JobSet'},
    metadata=only('name', name=NAME, namespace=NAME, labels=TEXTS, annotations=TEXTS),
    spec=only('replicatedJobs', network=only(enableDNSHostnames=YES, subdomain=NAME, publishNotReadyAddresses=YES),
              failurePolicy=only(maxRestarts=NUMBER, rules=several(RULE), restartStrategy={
                  'enum': ['Recreate', 'BlockingRecreate']}),
              replicatedJobs=several(only('name template', name=NAME, replicas=NUMBER,
                                          template=only('spec', spec=JOB)))))

COMMON = ('--name', 'coarse', '--image', 'registry/musiclm:1', '--claim', 'disk')
V5E = (*COMMON, '--tpu', 'v5e', '--topology', '16x16')


def manifest(*arguments):
  read = yaml.safe_load(dry('gke', *arguments, '--', *TRAINING))
  jsonschema.validate(read, JOBSET)
  (jobs,) = read['spec']['replicatedJobs']
  job = jobs['template']['spec']
  assert job['parallelism'] == job['completions']
  return read, jobs, job, job['template']['spec']


def expanded(text):
  """As Kubernetes does: $$ is a dollar, $(NAME) of a variable that there is becomes its value."""
  found = lambda match: '$' if match[0] == '$$' else f'<value of {match[1]}>'
  return re.sub(r'\$\$|\$\(([A-Za-z0-9_]+)\)', found, text)


@pytest.mark.parametrize('tpu, topology, more, label, pods, chips', [
    ('v5e', '16x16', (), 'tpu-v5-lite-podslice', 64, 4), ('v5e', '1x1', (), 'tpu-v5-lite-podslice', 1, 1),
    ('v5e', '2x4', (), 'tpu-v5-lite-podslice', 2, 4),
    ('v5e', '2x4', ('--chips_per_host', '8'), 'tpu-v5-lite-podslice', 1, 8),
    ('v6e', '2x2', (), 'tpu-v6e-slice', 1, 4), ('v6e', '8x16', (), 'tpu-v6e-slice', 32, 4),
    ('v5p', '2x2x1', (), 'tpu-v5p-slice', 1, 4), ('v5p', '4x4x8', (), 'tpu-v5p-slice', 32, 4),
    ('v5p', '8x16x16', (), 'tpu-v5p-slice', 512, 4),
    ('v4', '2x2x4', (), 'tpu-v4-podslice', 4, 4), ('tpu7x', '4x4x4', (), 'tpu7x', 16, 4)])
def test_tpu_slices(tpu, topology, more, label, pods, chips):
  read, jobs, job, pod = manifest(*COMMON, '--tpu', tpu, '--topology', topology, *more)
  assert (jobs['replicas'], job['parallelism']) == (1, pods)
  assert pod['nodeSelector'] == {
      'cloud.google.com/gke-tpu-accelerator': label, 'cloud.google.com/gke-tpu-topology': topology}
  (container,) = pod['containers']
  assert container['resources'] == {kind: {'google.com/tpu': str(chips)} for kind in ('limits', 'requests')}
  assert container['env'] == [], 'GKE tells TPU pods their places'
  exclusive = read['metadata'].get('annotations', {}).get('alpha.jobset.sigs.k8s.io/exclusive-topology')
  assert exclusive == ('cloud.google.com/gke-nodepool' if pods > 1 else None)


def test_several_slices():
  _, jobs, job, _ = manifest(*V5E, '--slices', '4')
  assert (jobs['replicas'], job['parallelism']) == (4, 64)


@pytest.mark.parametrize('gpu, label', [('h100', 'nvidia-h100-80gb'), ('h100-mega', 'nvidia-h100-mega-80gb'),
                                        ('h200', 'nvidia-h200-141gb')])
def test_gpus_name_their_coordinator_and_their_places(gpu, label):
  _, jobs, job, pod = manifest(*COMMON, '--gpu', gpu, '--gpus', '32', '--env', 'NCCL_DEBUG=INFO $(A)')
  assert (jobs['replicas'], job['parallelism']) == (1, 4)
  assert pod['nodeSelector'] == {'cloud.google.com/gke-accelerator': label}
  (container,) = pod['containers']
  assert container['resources']['limits'] == {'nvidia.com/gpu': '8'}
  assert container['env'] == [
      {'name': 'JAX_COORDINATOR_ADDRESS', 'value': 'coarse-train-0-0.coarse:8476'},
      {'name': 'JAX_NUM_PROCESSES', 'value': '4'},
      {'name': 'JAX_PROCESS_ID', 'valueFrom': {'fieldRef': {
          'fieldPath': "metadata.annotations['batch.kubernetes.io/job-completion-index']"}}},
      {'name': 'JAX_LOCAL_DEVICE_IDS', 'value': '0,1,2,3,4,5,6,7'},
      {'name': 'NCCL_DEBUG', 'value': 'INFO $$(A)'}]


def test_restarts_wait_for_the_save_and_end_at_mistakes():
  read, _, job, pod = manifest(*V5E, '--max_restarts', '7', '--save_seconds', '900')
  policy = read['spec']['failurePolicy']
  assert policy['maxRestarts'] == 7 and policy['restartStrategy'] == 'BlockingRecreate'
  assert pod['terminationGracePeriodSeconds'] == 900
  assert job['podFailurePolicy']['rules'][0]['onExitCodes']['values'] == [2]
  assert policy['rules'][0]['action'] == 'FailJobSet'


def test_arguments_reach_the_trainer_unchanged(fakes):
  text = dry('gke', *V5E, '--', *TRAINING)
  words = manifest(*V5E)[3]['containers'][0]['command']
  assert [expanded(word) for word in words] == ['musiclm', 'train', '--distributed', *TRAINING]
  fakes.add('kubectl', 'cat > "$CALLS/manifest"')
  fakes.run('gke', *V5E, '--', *TRAINING)
  assert [call.arguments for call in fakes.calls('kubectl')] == [['create', '--filename', '-']]
  comment, _, printed = text.partition('\n')
  assert comment == '# kubectl create --filename - reads this:'
  assert (fakes.folder / 'calls' / 'manifest').read_text() == printed


def test_storage_and_the_rest():
  arguments = ('--name', 'a', '--image', 'i', '--tpu', 'v5e', '--topology', '4x4')
  read, _, job, pod = manifest(*arguments, '--bucket', 'my_runs', '--service_account', 'writer', '--spot',
                               '--queue', 'q', '--node_selector', 'cloud.google.com/reservation-name=mine',
                               '--namespace', 'music')
  assert job['template']['metadata']['annotations'] == {'gke-gcsfuse/volumes': 'true'}
  assert pod['volumes'][0]['csi']['volumeAttributes']['bucketName'] == 'my_runs'
  assert pod['serviceAccountName'] == 'writer' and pod['nodeSelector']['cloud.google.com/gke-spot'] == 'true'
  assert pod['nodeSelector']['cloud.google.com/reservation-name'] == 'mine'
  assert read['metadata']['labels'] == {'kueue.x-k8s.io/queue-name': 'q'} and read['metadata']['namespace'] == 'music'
  mounted = {mount['name'] for mount in pod['containers'][0]['volumeMounts']}
  assert mounted == {volume['name'] for volume in pod['volumes']}


@pytest.mark.parametrize('value', [
    'on', 'No', 'null', '~', '1e3', '0x10', '1:30', '', ' a', 'a: b', '#a', '\t\x7f\x85', '🎵', '- a', 'a-', '12', True,
    3, [], {}, [[1], {'a': ['b']}], {'a': {'b': [{'c': 1, 'd': []}]}}])
def test_yaml_is_what_was_meant(value):
  assert yaml.safe_load(MODULES['gke'].yaml({'key': value, 'list': [value, {'x': value, 'y': 1}]})) == {
      'key': value, 'list': [value, {'x': value, 'y': 1}]}


@pytest.mark.parametrize('arguments, message', [
    ((), 'required: --name, --image'),
    ((*COMMON, '--topology'), '--topology: expected one argument'),
    ((*COMMON, '--tpu', 'v5e', '--topology', '16x15'), "v5e has no topology '16x15'; the nearest one is 16x16"),
    ((*COMMON, '--tpu', 'v5p', '--topology', '4x4'), "v5p has no topology '4x4'; the nearest one is 2x2x4"),
    ((*COMMON, '--tpu', 'v6e', '--topology', '2x4x'), "no topology '2x4x'; the nearest one is 2x4"),
    ((*COMMON, '--tpu', 'v5ee', '--topology', '4x4'), "'v5ee' is no TPU that is known here; did you mean v5e?"),
    ((*COMMON, '--tpu', 'v5e'), '--topology is missing'),
    ((*COMMON, '--tpu', 'v5e', '--topology', '4x4', '--chips_per_host', '3'), '3 chips a host do not make up the 16'),
    ((*COMMON, '--tpu', 'v5e', '--topology', '4x4', '--chips_per_host', '8'), 'only a slice of 2x4'),
    ((*COMMON, '--tpu', 'v5e', '--topology', '2x2', '--slices', '2'), 'slices of several hosts only'),
    ((*COMMON, '--gpu', 'h100', '--gpus', '20'), '20 GPUs are not a multiple of 8'),
    ((*COMMON, '--gpu', 'h10'), "'h10' is no GPU that is known here; did you mean h100?"),
    ((*COMMON, '--gpu', 'h100'), '--gpus is missing'),
    ((*COMMON, '--gpu', 'h100', '--gpus', '8', '--topology', '4x4'), '--topology belongs to --tpu'),
    (COMMON, 'give either --tpu KIND and --topology, or --gpu'),
    ((*V5E, '--name', 'Coarse'), "Kubernetes would refuse the name 'Coarse'"),
    ((*V5E, '--name', 'c_1'), "Kubernetes would refuse the name 'c_1'"),
    ((*V5E, '--name', 'a' * 48), 'would have 65 characters, of 63; 2 fewer will do'),
    ((*V5E, '--namespace', 'A'), "--namespace 'A' is no name of Kubernetes"),
    ((*V5E, '--bucket', 'b'), 'give either --bucket or --claim'),
    ((*V5E, '--mount_path', '/runs'), 'would vanish with its pod: put it below /runs'),
    ((*V5E, '--node_selector', 'a'), "'a' is not KEY=VALUE"),
    ((*V5E, '--topolgy', '4x4'), 'unknown flag --topolgy; did you mean --topology?'),
])
def test_mistakes_are_told(arguments, message):
  assert message in refused('gke', *arguments, '--', *TRAINING)
