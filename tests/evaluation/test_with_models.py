"""The measures run on the package's own networks, untrained and of the smallest sizes."""
from __future__ import annotations

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from musiclm_jax import specs
from musiclm_jax.codec.model import SoundStream, SoundStreamConfig
from musiclm_jax.evaluation import codec_figures, stage_figures
from musiclm_jax.training import state as states
from musiclm_jax.nn.transformer import TransformerConfig
from musiclm_jax.token_lm.objective import NextToken


@pytest.fixture(scope='module')
def codecs():
  config = SoundStreamConfig(
      patch=8, widths=(4, 6), strides=(10,), latent=6, levels=3, codebook_size=8, dilations=(1,), kernel=3)
  first = SoundStream(config, rngs=nnx.Rngs(0))
  graphdef, state = nnx.split(first)
  # Another codec of the same architecture, without the time that building one takes.
  return first, nnx.merge(graphdef, jax.tree.map(lambda x: 1.3 * x[::-1], nnx.to_pure_dict(state)))


def test_codec_figures_of_a_codec(codecs):
  clips = 0.1 * np.random.default_rng(0).standard_normal((3, 4800)).astype(np.float32)
  before = states._jitted.cache_info().misses
  figures = codec_figures.codec_figures(
      codecs[0], clips, 8, untrained=codecs[1], levels=(1, 3), more_clips_MxN=clips, batch_size=2)
  # The trained and the untrained codec share one program for encoding and one for decoding.
  assert states._jitted.cache_info().misses == before + 2
  assert figures['si_sdr_db_by_levels'].keys() == {'1', '3'}
  assert all(np.isfinite(v) for v in figures.values() if isinstance(v, float))
  assert figures['mel_distance'] != figures['mel_distance_untrained']
  assert figures['perplexity_frames'] == 6 * 60


def test_compiled_methods_are_the_methods(codecs):
  audio = np.random.default_rng(0).standard_normal((2, 4800)).astype(np.float32)
  codes = [np.asarray(states.compiled(codec, 'encode')(audio)) for codec in codecs]
  assert (codes[0] != codes[1]).any()
  np.testing.assert_array_equal(codes[0], codecs[0].encode(jnp.asarray(audio)))


@pytest.mark.parametrize('keep', [None, {'mulan': 0}])
def test_bits_of_a_stage_are_its_loss(keep):
  mulan = specs.TokenSpec('mulan', 8, levels=2)
  semantic = specs.TokenSpec('semantic', 8, frame_rate=25.0)
  stage = specs.Stage('semantic', (mulan,), semantic, 0.4)
  objective = NextToken(stage, TransformerConfig(width=16, depth=1, heads=2, mlp_width=32))
  model = objective.model(nnx.Rngs(0))
  rng = np.random.default_rng(0)
  streams = {'mulan': rng.integers(0, 8, (6, 1, 2)).astype(np.int32),
             'semantic': rng.integers(0, 8, (6, 10, 1)).astype(np.int32)}
  bits = stage_figures.objective_bits(objective, model, keep=keep)
  figures = stage_figures.stage_figures(
      bits, stage, streams, np.arange(6), streams['semantic'], batch_size=4)
  gap = figures['condition_gap']['mulan']['bits']
  if keep is None:
    batch = {**streams, 'slot': np.arange(6)}
    _, aux = objective.loss(model, batch, jax.random.key(0), training=False)
    assert figures['bits_per_token'] == pytest.approx(float(aux.metrics['bits_per_token']), rel=1e-4)
    assert gap != 0
  else:
    assert gap == pytest.approx(0, abs=1e-6)  # a hidden condition cannot matter
