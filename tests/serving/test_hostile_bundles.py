"""Bundles that are damaged or malicious: one line, nothing written, memory bounded, nothing unpickled."""
from __future__ import annotations

import dataclasses
import json
import os
import pickle
import shutil
import tracemalloc

import jax
from jax import export
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from musiclm_jax.serving.bundle import Bundle
from musiclm_jax.serving.bundle_format import described, Files, MANIFEST, parse_manifest

CODEC = 'weights/codec.safetensors'


@pytest.fixture
def bundle(nano_bundle, tmp_path):
  """A copy to spoil."""
  return shutil.copytree(nano_bundle, tmp_path / 'bundle')


def refused(bundle, words: str) -> None:
  """Loading it raises one line with these words, and changes nothing on disk."""
  tree = lambda: sorted((str(p), p.lstat().st_size) for p in bundle.parent.rglob('*'))
  before = tree()
  with pytest.raises(ValueError) as raised:
    Bundle(bundle)
  message = str(raised.value)
  assert words in message and '\n' not in message and str(bundle) in message and len(message) < 600
  assert tree() == before


def manifest_of(bundle):
  return parse_manifest((bundle / MANIFEST).read_bytes())


def rename_in_manifest(bundle, old: str, new: str) -> None:
  """A manifest with a right checksum that has another name for a file."""
  manifest = manifest_of(bundle)
  files = dict(manifest.files)
  files[new] = files.pop(old)
  (bundle / MANIFEST).write_bytes(dataclasses.replace(manifest, files=files).to_bytes())


def put(bundle, name: str, content: bytes) -> None:
  """Another content, with a manifest that says so: all checksums are right."""
  (bundle / name).parent.mkdir(exist_ok=True)
  (bundle / name).write_bytes(content)
  manifest = manifest_of(bundle)
  files = {**manifest.files, **described({name: content})}
  (bundle / MANIFEST).write_bytes(dataclasses.replace(manifest, files=files).to_bytes())


def spoilt(content: bytes, seed: int) -> bytes:
  """With a byte changed, cut off, or appended."""
  generator = np.random.default_rng(seed)
  place = int(generator.integers(len(content)))
  changed = bytes([content[place] ^ int(generator.integers(1, 256))])
  return [content[:place] + changed + content[place + 1:], content[:place], content + b'\0'][seed % 3]


def test_the_copy_is_fine(bundle):
  assert Bundle(bundle).sample_rate == 24000


def test_any_change_of_any_file_shows(bundle):
  files = Files(bundle)
  for name in files.manifest.files:
    content = (bundle / name).read_bytes()
    for seed in range(12):
      (bundle / name).write_bytes(spoilt(content, seed))
      with pytest.raises(ValueError, match=r'checksum differs|is damaged'), files.errors():
        files.read(name)
    (bundle / name).write_bytes(content)
  Bundle(bundle)


def test_any_change_of_the_manifest_shows(bundle):
  content = (bundle / MANIFEST).read_bytes()
  for seed in range(600):
    with pytest.raises(ValueError, match=MANIFEST) as raised:
      parse_manifest(spoilt(content, seed))
    assert '\n' not in str(raised.value)


@pytest.mark.parametrize('seed', range(3))
@pytest.mark.parametrize('name', [MANIFEST, 'specs.json', 'vocabulary.model', 'MODEL_CARD.md', CODEC,
                                  'functions/codec.decode.stablehlo'])
def test_a_damaged_bundle_is_refused_as_a_whole(bundle, name, seed):
  (bundle / name).write_bytes(spoilt((bundle / name).read_bytes(), seed))
  refused(bundle, name)


@pytest.mark.parametrize('content', [
    b'', b'\0' * 100, b'[]', b'{}', b'{"format": 1}', b'[' * 100_000, b'{"format": "1", "files": {}}', b'\xff\xfe'])
def test_what_is_no_manifest_is_refused(bundle, content):
  (bundle / MANIFEST).write_bytes(content)
  refused(bundle, 'manifest.json is not')


def test_a_newer_format_is_told_apart(bundle):
  document = json.loads((bundle / MANIFEST).read_text())
  (bundle / MANIFEST).write_text(json.dumps({**document, 'format': 3, 'new': 'field'}))
  refused(bundle, 'it is of format 3, this version of musiclm_jax reads 2: update musiclm_jax')


def with_levels(bundle, levels) -> None:
  document = json.loads((bundle / 'specs.json').read_text())
  del document['value']['mulan_levels']
  if levels is not None:
    document['value']['mulan_levels'] = levels
  put(bundle, 'specs.json', json.dumps(document).encode())


def test_a_bundle_of_the_first_format_shows_its_stages_one_level(bundle):
  assert Bundle(bundle).mulan_levels == {'coarse': 12}
  with_levels(bundle, None)
  (bundle / MANIFEST).write_bytes(dataclasses.replace(manifest_of(bundle), format=1).to_bytes())
  assert Bundle(bundle).mulan_levels == {}


@pytest.mark.parametrize('levels', [
    {'coarse': 2**70}, {'coarse': 13}, {'coarse': -1}, {'coarse': '1'}, {'other': 1}, 3])
def test_levels_that_no_stage_has_are_refused(bundle, levels):
  with_levels(bundle, levels)
  refused(bundle, 'specs.json cannot be read')


@pytest.mark.parametrize('field, value', [
    ('sample_rate', 'x'), ('sample_rate', 0), ('channels', 1.5), ('mulan_window', -1), ('mulan_rate', 0),
    ('codec_spec', 3), ('text_length', None)])
def test_sizes_that_nothing_has_are_refused(bundle, field, value):
  document = json.loads((bundle / 'specs.json').read_text())
  document['value'][field] = value
  put(bundle, 'specs.json', json.dumps(document).encode())
  refused(bundle, 'specs.json cannot be read')


def test_defaults_of_other_stages_are_refused(bundle):
  (bundle / MANIFEST).write_bytes(dataclasses.replace(manifest_of(bundle), defaults={}).to_bytes())
  refused(bundle, 'the defaults in its manifest.json are not those of the stages')


def test_a_huge_manifest_is_not_read(bundle):
  with open(bundle / MANIFEST, 'ab') as file:
    file.truncate(1 << 30)
  assert peak_bytes(lambda: refused(bundle, 'at most')) < 1 << 24


@pytest.mark.parametrize('name', [
    '../outside', '../../etc/passwd', '/etc/passwd', 'weights/../../outside', 'weights/codec.pkl', 'code.py', '', '.',
    'weights/a/b.safetensors', 'functions/codec.decode.stablehlo\n', MANIFEST, 'weights//codec.safetensors', 'con\0'])
def test_names_that_no_bundle_has_are_refused(bundle, name):
  (bundle.parent / 'outside').write_text('secret')
  rename_in_manifest(bundle, CODEC, name)
  refused(bundle, 'which is no file of a bundle')


def test_a_missing_file_is_named(bundle):
  (bundle / CODEC).unlink()
  refused(bundle, f'{CODEC} is missing')


@pytest.mark.parametrize('name', [CODEC, 'specs.json', MANIFEST, 'weights', 'functions'])
def test_links_are_not_followed(bundle, name):
  shutil.move(bundle / name, bundle.parent / 'outside')
  (bundle / name).symlink_to(bundle.parent / 'outside')
  refused(bundle, 'is a link')


def test_a_pipe_is_not_waited_for(bundle):
  (bundle / CODEC).unlink()
  os.mkfifo(bundle / CODEC)
  refused(bundle, 'is not a plain file')


def peak_bytes(run) -> int:
  tracemalloc.start()
  try:
    run()
    return tracemalloc.get_traced_memory()[1]
  finally:
    tracemalloc.stop()


def test_a_header_of_a_gigabyte_takes_no_memory(bundle):
  size = (1 << 30) + 8
  with open(bundle / CODEC, 'wb') as file:
    file.write((1 << 30).to_bytes(8, 'little'))
    file.truncate(size)  # a hole: it takes no disk either
  manifest = manifest_of(bundle)
  files = {**manifest.files, CODEC: (size, '0' * 64)}
  (bundle / MANIFEST).write_bytes(dataclasses.replace(manifest, files=files).to_bytes())
  assert peak_bytes(lambda: refused(bundle, 'claims a header of 1073741824 bytes')) < 1 << 26


def test_arrays_that_no_function_takes_are_not_read(bundle):
  with open(bundle / CODEC, 'ab') as file:
    file.truncate(1 << 30)
  manifest = manifest_of(bundle)
  files = {**manifest.files, CODEC: (1 << 30, '0' * 64)}
  (bundle / MANIFEST).write_bytes(dataclasses.replace(manifest, files=files).to_bytes())
  assert peak_bytes(lambda: refused(bundle, 'bytes of arrays, the functions take')) < 1 << 26


def with_header(content: bytes, change) -> bytes:
  """Safetensors with another header of the same length."""
  length = int.from_bytes(content[:8], 'little')
  header = json.loads(content[8:8 + length])
  change(header)
  changed = json.dumps(header, separators=(',', ':')).encode()
  assert len(changed) <= length
  return content[:8] + changed.ljust(length) + content[8 + length:]


def overlapping(header):
  second = sorted(header, key=lambda name: header[name]['data_offsets'])[1]
  begin, end = header[second]['data_offsets']
  header[second]['data_offsets'] = [begin - 4, end - 4]


def out_of_range(header):
  name = max(header, key=lambda name: header[name]['data_offsets'])
  begin, end = header[name]['data_offsets']
  header[name]['data_offsets'] = [begin + 4, end + 4]


def another_type(header):
  name = next(n for n in header if header[n]['dtype'] == 'F32')
  header[name]['dtype'] = 'I32'


def another_shape(header):
  name = next(n for n in header if (shape := header[n]['shape']) != shape[::-1])
  header[name]['shape'].reverse()


def another_name(header):
  name = next(iter(header))
  header['x'] = header.pop(name)


@pytest.mark.parametrize('change, words', [
    (overlapping, 'is no safetensors file'), (out_of_range, 'is no safetensors file'),
    (another_type, 'the functions take'), (another_shape, 'the functions take'), (another_name, 'the array')])
def test_arrays_that_lie_are_refused(bundle, change, words):
  put(bundle, CODEC, with_header((bundle / CODEC).read_bytes(), change))
  refused(bundle, words)


class Bomb:
  def __reduce__(self):
    return os.mkdir, ('pickled',)


@pytest.mark.parametrize('name', [CODEC, 'functions/codec.decode.stablehlo', 'specs.json', 'vocabulary.model'])
def test_a_pickle_is_data_that_nobody_reads(bundle, name, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  put(bundle, name, pickle.dumps(Bomb()))
  refused(bundle, str(bundle))
  assert not os.path.exists('pickled')


@pytest.mark.parametrize('content', [b'', b'not a program', b'\0' * 4096, b'\xff' * 4096])
def test_functions_that_are_none_are_refused(bundle, content):
  put(bundle, 'functions/codec.decode.stablehlo', content)
  refused(bundle, 'codec.decode.stablehlo cannot be read by JAX')


def test_a_function_that_calls_the_machine_is_refused(bundle):
  def run(weights, codes):
    del weights
    return jax.ffi.ffi_call('steal', jax.ShapeDtypeStruct((3,), jnp.float32))(jnp.ones(3)) + codes.sum()

  there = export.deserialize(bytearray((bundle / 'functions/codec.decode.stablehlo').read_bytes()))
  arguments, _ = jax.tree.unflatten(there.in_tree, there.in_avals)
  checks = [export.DisabledSafetyCheck.custom_call('steal')]
  made = export.export(jax.jit(run), platforms=['cpu'], disabled_checks=checks)(*arguments)
  put(bundle, 'functions/codec.decode.stablehlo', bytes(made.serialize()))
  refused(bundle, "calls 'steal' on the machine")


def test_a_function_that_leaves_its_weights_open_is_refused(bundle):
  (size,) = export.symbolic_shape('n')
  weights = {'a': jax.ShapeDtypeStruct((size,), jnp.float32)}
  made = export.export(jax.jit(lambda weights: weights['a'].sum()), platforms=['cpu'])(weights)
  put(bundle, 'functions/codec.decode.stablehlo', bytes(made.serialize()))
  refused(bundle, 'is no plain function')


def test_a_function_for_another_machine_is_refused(bundle):
  made = export.export(jax.jit(lambda weights: weights['a'].sum()), platforms=['tpu'])({'a': jnp.ones(3)})
  put(bundle, 'functions/codec.decode.stablehlo', bytes(made.serialize()))
  refused(bundle, 'is for tpu, and JAX computes on cpu here')


def test_functions_of_other_networks_are_refused(bundle):
  put(bundle, 'functions/codec.decode.stablehlo', (bundle / 'functions/mulan.tokens.stablehlo').read_bytes())
  refused(bundle, 'the functions of codec take different weights')


def test_a_function_too_many_or_too_few_is_refused(bundle):
  put(bundle, 'functions/codec.steal.stablehlo', (bundle / 'functions/codec.decode.stablehlo').read_bytes())
  refused(bundle, 'its functions are not those of the networks')


@pytest.mark.parametrize('specs', [
    '', '{}', 'null', '[' * 100_000, '{"schema": 1, "value": {"type": "os.system"}}',
    '{"schema": 1, "value": {"type": "musiclm_jax.quickstart.Step", "name": "x", "arguments": []}}',
    '{"schema": 1, "value": {"stages": 3}}', '{"schema": 9, "value": 1}'])
def test_specs_of_anything_else_are_refused(bundle, specs):
  put(bundle, 'specs.json', specs.encode())
  refused(bundle, 'specs.json cannot be read')


def test_weights_of_more_arrays_are_refused(bundle):
  arrays = safetensors.numpy.load((bundle / CODEC).read_bytes())
  put(bundle, CODEC, safetensors.numpy.save({**arrays, 'more': np.zeros(3, np.float32)}))
  refused(bundle, 'the functions take')


def test_no_folder_and_no_bundle_are_told_apart(tmp_path):
  with pytest.raises(FileNotFoundError, match='no bundle at'):
    Bundle(tmp_path / 'nowhere')
  with pytest.raises(ValueError, match='manifest.json is missing'):
    Bundle(tmp_path)
