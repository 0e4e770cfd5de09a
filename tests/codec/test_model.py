"""The codec: shapes, prefix property of levels, streaming with tokens, clear errors, full size."""
import math

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from musiclm_jax import axes
from musiclm_jax.codec import model
from tests.codec import configs


@pytest.fixture(scope='module')
def codec():
  return model.SoundStream(configs.CODEC, rngs=nnx.Rngs(0))


def audio(frames, batch=2, seed=0):
  shape = (batch, frames * configs.CODEC.stride)
  return jnp.asarray(np.random.default_rng(seed).uniform(-0.5, 0.5, size=shape), jnp.float32)


def test_as_much_audio_comes_back_and_tokens_follow_the_spec(codec):
  x = audio(5)
  indices = codec.encode(x)
  spec = codec.token_spec
  assert indices.shape == (2, spec.frames(x.shape[1] / 24000), spec.levels) and indices.dtype == jnp.int32
  assert 0 <= indices.min() and indices.max() < spec.codebook_size
  assert codec.decode(indices).shape == x.shape


def test_first_levels_are_a_prefix(codec):
  x = audio(5)
  whole = codec.encode(x)
  for levels in (1, 2, 3):
    np.testing.assert_array_equal(codec.encode(x, levels), whole[..., :levels])
    assert codec.decode(whole[..., :levels]).shape == x.shape
  assert np.abs(codec.decode(whole[..., :1]) - codec.decode(whole)).max() > 1e-4


def test_frame_by_frame_equals_whole(codec):
  x = audio(6)
  stride = configs.CODEC.stride
  encode_step, decode_step = jax.jit(codec.encode_step), jax.jit(codec.decode_step)
  state, tokens, sound = codec.init_state(2), [], []
  for f in range(6):
    indices, state = encode_step(x[:, f * stride:(f + 1) * stride], state)
    decoded, state = decode_step(indices, state)
    tokens.append(indices)
    sound.append(decoded)
  np.testing.assert_array_equal(np.concatenate(tokens, axis=1), codec.encode(x))
  np.testing.assert_allclose(np.concatenate(sound, axis=1), codec.decode(codec.encode(x)), atol=1e-5)


def test_the_latency_of_the_codec_is_one_frame(codec):
  assert codec.latency == configs.CODEC.stride == 48


def test_bfloat16_parameters_give_float32_audio(codec):
  graph, params, rest = nnx.split(codec, nnx.Param, ...)
  half = nnx.merge(graph, jax.tree.map(lambda p: p.astype(jnp.bfloat16), params), rest)
  x = audio(3)
  latents = half.encode_latents(x)
  assert latents.dtype == half.decode_latents(latents).dtype == jnp.float32
  np.testing.assert_allclose(latents, codec.encode_latents(x), atol=0.1)


@pytest.mark.parametrize('call, message', [
    (lambda c: c.encode(jnp.zeros((1, 100))), 'multiple of 48 samples.*100'),
    (lambda c: c.encode(jnp.zeros((48,))), 'multiple of 48 samples'),
    (lambda c: c.encode(jnp.zeros((1, 48)), 4), '3 levels; 4'),
    (lambda c: c.decode(jnp.zeros((1, 2, 5), jnp.int32)), '1 to 3 levels'),
])
def test_what_does_not_fit_is_refused_with_the_numbers(codec, call, message):
  with pytest.raises(ValueError, match=message):
    call(codec)


def test_widths_that_do_not_match_the_strides_are_refused():
  with pytest.raises(ValueError, match='2 strides need 3 widths'):
    configs.replace(configs.CODEC, widths=(4, 6))


def test_every_matrix_names_an_axis_that_can_be_split(codec):
  for path, variable in nnx.to_flat_state(nnx.state(codec)):
    names = variable.get_metadata()['axes']
    assert len(names) == variable.ndim, path
    assert set(names) - {None} <= set(axes.PARAMETER_AXES), path
    assert variable.ndim < 2 or any(names), path


def test_full_size_has_musiclms_tokens():
  paper = model.SoundStreamConfig(
      widths=(32, 64, 128, 256, 512), strides=(3, 4, 5, 8), latent=256, levels=12, codebook_size=1024)
  assert paper.stride == 480 and paper.token_spec.frame_rate == 50
  assert paper.token_spec.tokens_per_second == 600 and paper.token_spec.bitrate == 6000
  codec = nnx.eval_shape(lambda: model.SoundStream(paper, rngs=nnx.Rngs(0)))
  count = lambda module: sum(math.prod(p.shape) for p in jax.tree.leaves(nnx.state(module, nnx.Param)))

  def expected(first, last, latent_kernel):
    units = sum(3 * (7 * c * c + c + c * c + c) for c in paper.widths[:-1])
    moves = sum(2 * s * a * b for s, a, b in zip(paper.strides, paper.widths, paper.widths[1:]))
    return units + moves + first + last

  encoder = expected(7 * 32 + 32, 3 * 512 * 256 + 256, 3) + sum(paper.widths[1:])
  decoder = expected(7 * 256 * 512 + 512, 7 * 32 + 1, 7) + sum(paper.widths[:-1])
  assert count(codec.encoder) == encoder and count(codec.decoder) == decoder
  audio_shape = jax.ShapeDtypeStruct((1, 24000), jnp.float32)
  graph, state = nnx.split(codec)
  indices = jax.eval_shape(lambda s, x: nnx.merge(graph, s).encode(x), state, audio_shape)
  assert indices.shape == (1, 50, 12)
