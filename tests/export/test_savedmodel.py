"""SavedModels give what the bundle's functions give, where TensorFlow is and JAX is not."""
from __future__ import annotations

import os
import subprocess

import jax
import numpy as np
import pytest

from musiclm_jax import main
from musiclm_jax.export import bundle as exporting
from musiclm_jax.serving.bundle import Bundle
from musiclm_jax.token_lm.draw import Sampling
from musiclm_jax.token_lm.sequence import Layout
from tests import environments

# Runs in the folder of the SavedModels with the arguments in `given.npz`.
CALLS = '''
import importlib.util, sys
import numpy as np
import tensorflow as tf
assert importlib.util.find_spec('jax') is None and 'jax' not in sys.modules
given = dict(np.load('../given.npz'))
mulan, codec, stage = (tf.saved_model.load(name) for name in ('mulan', 'codec', 'coarse_lm'))
found = {'text': mulan.embed_text(given['ids']), 'audio': codec.decode(given['codes'])}
state = tf.nest.map_structure(lambda x: tf.zeros([2, *x.shape[1:]], x.dtype), codec.decode_step.input_signature[1])
first, state = codec.decode_step(given['codes'][:, :3], state)
rest, _ = codec.decode_step(given['codes'][:, 3:], state)
found['in steps'] = tf.concat([first, rest], 1)
numbers = tuple(given[name] for name in ('temperature', 'top_k', 'top_p', 'guidance'))
more = given['positions'], given['length'], given['keys'], numbers
found['plain'] = stage.sample(given['rows'], *more)
found['guided'] = stage.sample_guided(given['rows'], given['rows'][::-1], *more)
np.savez('../found.npz', **{name: np.asarray(x) for name, x in found.items()})
'''


def test_nothing_is_written_over(capsys, nano_cascade, tmp_path):
  (tmp_path / 'mine').mkdir()
  (tmp_path / 'mine' / 'song.wav').write_text('precious')
  with pytest.raises(ValueError, match='holds something that is not a bundle'):
    exporting.export_savedmodel(nano_cascade, tmp_path / 'mine', licence='CC0-1.0')
  with pytest.raises(SystemExit):
    main.main(['export', '--workdir', str(nano_cascade), '--output', 'x', '--format', 'savedmodel', '--replace'])
  assert '--replace concerns bundles' in capsys.readouterr().err


@pytest.mark.slow
def test_saved_models_need_no_jax(nano_cascade, nano_bundle, tmp_path):
  made = exporting.export_savedmodel(nano_cascade, tmp_path / 'saved', licence='CC0-1.0')
  assert {'MODEL_CARD.md', 'codec', 'coarse_lm', 'specs.json', 'vocabulary.model'} <= set(os.listdir(made.path))
  bundle = Bundle(nano_bundle)
  generator, layout = np.random.default_rng(0), Layout(bundle.stages['coarse'], 0.2)
  rows = generator.integers(0, 8, (3, layout.length), np.int32) + layout.first_row_L
  keys = jax.random.split(jax.random.key(5), 3)
  numbers = Sampling(0.9, top_k=6, guidance=2.0).numbers
  codes = generator.integers(0, 16, (2, 8, 4), np.int32)
  given = {'ids': bundle.text_ids(['slow piano', 'loud drums']), 'codes': codes,
           'rows': rows[:, :layout.condition_length], 'positions': layout.positions_2xL,
           'length': np.int32(layout.condition_length), 'keys': jax.random.key_data(keys), **numbers._asdict()}
  np.savez(tmp_path / 'given.npz', **given)
  python = environments.linked(tmp_path / 'environment', ['tensorflow'])
  done = subprocess.run([python, '-c', CALLS], cwd=made.path, capture_output=True, text=True, timeout=900,
                        env={'PATH': '/usr/bin:/bin', 'CUDA_VISIBLE_DEVICES': '-1'})
  assert done.returncode == 0, done.stderr[-3000:]
  found = np.load(tmp_path / 'found.npz')
  np.testing.assert_allclose(found['text'], bundle.embed_text(given['ids']), atol=1e-5)
  np.testing.assert_allclose(found['audio'], bundle.decode(given['codes']), atol=1e-5)
  np.testing.assert_allclose(found['in steps'], found['audio'], atol=1e-5)
  for name, null in (('plain', None), ('guided', given['rows'][::-1])):
    expected = bundle.sample_rows('coarse', given['rows'], null, layout.positions_2xL, layout.condition_length, keys,
                                  numbers)
    assert len(np.unique(expected)) > 1
    np.testing.assert_array_equal(found[name], expected)
