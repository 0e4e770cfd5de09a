"""A bundle of a whole cascade gives what its workdir gives, where only the base install can be imported."""
from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest

from musiclm_jax.cascade import Cascade
from musiclm_jax.cascade_networks import CascadeNetworks
from musiclm_jax.export import bundle as exporting
from musiclm_jax.generate.modes import Continuation, music, Request
from musiclm_jax.generate.pipeline import Settings
from musiclm_jax.serving.bundle import Bundle
from musiclm_jax.token_lm.sequence import Layout
from tests.export import everything
from tests.test_no_tensorflow import BLOCK, ROOT, TENSORFLOW
from tests.trainings import random_cascade

# What `pip install musiclm_jax` does not bring.
EXTRAS = TENSORFLOW | {'absl', 'array_record', 'flax', 'gin', 'jinja2', 'matplotlib', 'msgpack', 'optax', 'orbax',
                       'rich', 'sklearn', 'tensorstore', 'threadpoolctl'}
WITHOUT = BLOCK.replace(repr(TENSORFLOW), repr(EXTRAS))


@pytest.fixture(scope='module')
def networks(nano_cascade):
  return CascadeNetworks(Cascade(nano_cascade))


def elsewhere(bundle, place, what):
  """What the bundle answers after it was moved to the folder `place`, in a process without the extras."""
  shutil.copytree(bundle, place / 'moved')
  run = (f"import runpy; sys.argv = ['everything', 'moved', 'found.npz', {what!r}]; "
         f"runpy.run_path({everything.__file__!r}, {{}}, '__main__')")
  done = subprocess.run([sys.executable, '-c', WITHOUT + run], cwd=place, capture_output=True, text=True, timeout=900,
                        env={**os.environ, 'PYTHONPATH': str(ROOT)})
  assert done.returncode == 0, done.stderr[-4000:]
  assert not EXTRAS & set(done.stdout.split())
  return dict(np.load(place / 'found.npz'))


def compare(found, expected):
  """Tokens are the same, and not the same all over; other numbers to float tolerance."""
  for name, wanted in expected.items():
    if np.issubdtype(wanted.dtype, np.integer):
      assert len(np.unique(wanted)) > 1, name
      np.testing.assert_array_equal(found[name], wanted, err_msg=name)
    else:
      np.testing.assert_allclose(found[name], wanted, atol=1e-5, rtol=1e-5, err_msg=name)


def test_every_function_gives_the_same(networks, nano_bundle, tmp_path):
  compare(elsewhere(nano_bundle, tmp_path, 'answers'), everything.answers(networks, ['coarse']))


@pytest.mark.slow
def test_every_mode_is_made_of_the_same_tokens(networks, nano_bundle, tmp_path):
  found = elsewhere(nano_bundle, tmp_path, 'music')
  compare(found, everything.answers(networks, ['semantic', 'fine']))
  compare(found, everything.music(networks, everything.write_clip(str(tmp_path / 'clip.wav'))))
  np.testing.assert_allclose(found['api'], found['text audio'], atol=1e-6)
  np.testing.assert_allclose(found['api blocks'], found['api'], atol=1e-5)


def test_a_stream_is_the_music_in_blocks(nano_bundle):
  bundle = Bundle(nano_bundle)
  blocks = list(bundle.stream('slow piano', seconds=0.2, seed=3, block_seconds=0.08))
  assert [len(block) for block in blocks] == [1920, 1920, 960]
  np.testing.assert_allclose(np.concatenate(blocks), bundle.generate('slow piano', seconds=0.2, seed=3), atol=1e-5)


@pytest.mark.slow
def test_an_audiolm_is_exported_without_mulan(tmp_path):
  conditions = {'semantic_lm': '()', 'coarse_lm': '(%SEMANTIC_TOKENS,)', 'fine_lm': '(%COARSE_TOKENS,)'}
  workdir = random_cascade(tmp_path / 'audiolm', conditions=conditions)
  bundle = Bundle(exporting.export(workdir, tmp_path / 'b', licence='CC0-1.0').path)
  assert bundle.mulan_rate == 0 and 'mulan' not in bundle.lineage
  clip = everything.write_clip(str(tmp_path / 'clip.wav'))
  for request in (Request(), Request(continuation=Continuation(clip))):
    found, wanted = (everything.Recorder(n) for n in (bundle, CascadeNetworks(Cascade(workdir))))
    for recorder in (found, wanted):
      list(music(recorder, request, Settings(0.6), seed=3))
    np.testing.assert_array_equal(np.concatenate(found.drawn), np.concatenate(wanted.drawn))
  with pytest.raises(ValueError, match='without descriptions'):
    bundle.generate('slow piano', seconds=0.5)


def test_rows_are_worth_the_same_in_any_batch(nano_bundle):
  bundle = Bundle(nano_bundle)
  layout = Layout(bundle.stages['coarse'], 0.2)
  rows = np.random.default_rng(1).integers(0, 8, (5, layout.length), np.int32) + layout.first_row_L
  nats = lambda rows: np.asarray(bundle.row_nats('coarse', rows, layout.positions_2xL, layout.condition_length))
  np.testing.assert_allclose(nats(rows)[:1], nats(rows[:1]), atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize('kind, smaller, error', [('bfloat16', 0.62, 0.02), ('int8', 0.5, 0.05)])
def test_smaller_weights_are_smaller_and_nearly_as_good(nano_cascade, nano_bundle, networks, tmp_path, kind, smaller,
                                                        error):
  made = exporting.export(nano_cascade, tmp_path / kind, licence='CC0-1.0', weights=kind)
  sizes = [sum(path.stat().st_size for path in (place / 'weights').iterdir()) for place in (made.path, nano_bundle)]
  assert sizes[0] < smaller * sizes[1]
  found, expected = (everything.answers(n, n.stages) for n in (Bundle(made.path), networks))
  for name in ('text', 'audio', 'semantic nats', 'coarse nats', 'fine nats'):
    difference = np.abs(found[name] - expected[name]).max() / np.abs(expected[name]).max()
    assert 0 < difference < error, name


def test_the_card_is_filled_from_the_run(nano_bundle):
  card = (nano_bundle / 'MODEL_CARD.md').read_text()
  assert 'license: cc0-1.0' in card and '| tokens | not stated | 24 | 0.03 |' in card
  assert 'no report.json' in card
  for name in ('codec', 'mulan', 'semantic_lm'):
    assert f'| {name} | 1 |' in card


def test_what_is_missing_of_the_card_is_told_in_one_line(nano_cascade, tmp_path):
  with pytest.raises(ValueError, match=r'^the model card still needs the licence .*\(--licence.*$'):
    exporting.export(nano_cascade, tmp_path / 'b')
  alone = shutil.copytree(nano_cascade, tmp_path / 'alone', ignore=shutil.ignore_patterns('tokens'))
  with pytest.raises(ValueError, match='hours of training music by licence .--records'):
    exporting.export(alone, tmp_path / 'b', licence='CC0-1.0')
  assert not (tmp_path / 'b').exists()


def test_the_same_networks_are_exported_once(nano_cascade, nano_bundle):
  before = (nano_bundle / 'manifest.json').read_bytes()
  again = exporting.export(nano_cascade, nano_bundle, licence='CC0-1.0')
  assert not again.fresh and (nano_bundle / 'manifest.json').read_bytes() == before


def test_nothing_is_overwritten_but_a_bundle_that_may_be(nano_cascade, nano_bundle, tmp_path, tmp_path_factory,
                                                         monkeypatch):
  # What is exported of a network takes time, and is the same again.
  monkeypatch.setattr(exporting, '_exported', lambda name, *_: {
      path.relative_to(nano_bundle).as_posix(): path.read_bytes() for path in nano_bundle.glob(f'*/{name}.*')})
  other = shutil.copytree(nano_bundle, tmp_path / 'other')
  with pytest.raises(ValueError, match='holds a bundle of other networks.*--replace'):
    exporting.export(nano_cascade, other, licence='CC-BY-4.0')
  made = exporting.export(nano_cascade, other, licence='CC-BY-4.0', replace=True)
  assert made.fresh and Bundle(other).manifest.licence == 'CC-BY-4.0'
  measured = shutil.copytree(nano_cascade, tmp_path_factory.mktemp('measured') / 'same')
  (measured / 'report.json').write_text('{"codec": {"si_sdr_db": 5.5}, "bars_passed": 1, "bars_total": 2}')
  assert exporting.export(measured, other, licence='CC-BY-4.0', replace=True).fresh, 'the figures are new'
  assert '| codec: SI-SDR | 5.5 dB |' in Bundle(other).card
  assert os.listdir(tmp_path) == ['other'], 'nothing is left beside it'
  codec, manifest = other / 'weights' / 'codec.safetensors', other / 'manifest.json'
  codec.write_bytes(codec.read_bytes()[:-1])
  assert exporting.export(measured, other, licence='CC-BY-4.0').fresh, 'what is damaged is mended'
  manifest.write_bytes(manifest.read_bytes()[:-9])
  with pytest.raises(ValueError, match='manifest.json is not .*--replace does so in its place'):
    exporting.export(measured, other, licence='CC-BY-4.0')
  link = tmp_path / 'link'
  link.symlink_to(other)
  assert exporting.export(measured, link, licence='CC-BY-4.0', replace=True).fresh and Bundle(link).card
  assert sorted(os.listdir(tmp_path)) == ['link', 'other'] and link.is_symlink()
  (tmp_path / 'mine').mkdir()
  (tmp_path / 'mine' / 'song.wav').write_text('precious')
  with pytest.raises(ValueError, match='not a bundle: name another output'):
    exporting.export(nano_cascade, tmp_path / 'mine', licence='CC0-1.0', replace=True)
  assert (tmp_path / 'mine' / 'song.wav').read_text() == 'precious'


def test_an_export_that_fails_leaves_nothing(nano_cascade, tmp_path, monkeypatch):
  monkeypatch.setattr(exporting, '_exported', lambda *_: {})
  monkeypatch.setattr(exporting, 'Bundle', lambda path: 1 / 0)
  with pytest.raises(ZeroDivisionError):
    exporting.export(nano_cascade, tmp_path / 'b', licence='CC0-1.0')
  assert not os.listdir(tmp_path)


def test_networks_that_do_not_belong_together_are_refused(nano_cascade, tmp_path):
  workdir = shutil.copytree(nano_cascade, tmp_path / 'mixed')
  about = next((workdir / 'coarse_lm' / 'checkpoints').glob('*/about/specs.json'))
  document = json.loads(about.read_text())
  document['lineage']['codec'] = 'f' * 16
  about.write_text(json.dumps(document))
  with pytest.raises(ValueError, match='the coarse stage in .* was trained on tokens of codec ffff'):
    exporting.export(workdir, tmp_path / 'b', licence='CC0-1.0')
