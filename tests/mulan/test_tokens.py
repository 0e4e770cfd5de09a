"""MuLan tokens: the fit over frozen embeddings is residual k-means, whatever the batches."""
from __future__ import annotations

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from musiclm_jax import specs
from musiclm_jax.mulan.tokens import MuLanTokens
from tests.mulan import configs


def _rows(count: int, width: int = 8, seed: int = 0) -> np.ndarray:
  """Noisy copies of five directions, of length 1."""
  rng = np.random.default_rng(seed)
  x = rng.normal(size=(5, width))[rng.integers(0, 5, count)] + 0.2 * rng.normal(size=(count, width))
  return (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)


def _fit(fit: MuLanTokens, rows_NxD: np.ndarray, weight_N: np.ndarray | None = None, parts: int = 1):
  """What `accumulate` does, in miniature: phases, passes, sums over batches."""
  model = fit.model(nnx.Rngs(0))
  buffers = nnx.to_pure_dict(nnx.split(model, nnx.Param, ...)[2])
  weight_N = np.ones(len(rows_NxD), np.float32) if weight_N is None else weight_N
  sample, history = jnp.asarray(rows_NxD[weight_N > 0]), {}
  begin, statistics, fitted = (
      jax.jit(f, static_argnames='phase') for f in (fit.begin, fit.statistics, fit.fitted))
  for phase, iterations in fit.phases():
    buffers = begin(buffers, sample, phase=phase, key=jax.random.key(len(phase)))
    for _ in range(iterations):
      sums = [
          statistics(buffers, jnp.asarray(r), jnp.asarray(w), phase=phase)
          for r, w in zip(np.split(rows_NxD, parts), np.split(weight_N, parts))]
      buffers, metrics = fitted(buffers, jax.tree.map(lambda *x: sum(x), *sums), phase=phase)
      history.setdefault(phase, []).append({name: float(value) for name, value in metrics.items()})
  return buffers, history


def _model(fit: MuLanTokens, buffers):
  graphdef, params, _ = nnx.split(fit.model(nnx.Rngs(0)), nnx.Param, ...)
  return nnx.merge(graphdef, params, buffers)


def test_error_falls_within_a_level_and_from_level_to_level():
  fit = MuLanTokens(configs.config(), levels=4, codebook_size=8, iterations=5, align=False)
  rows = _rows(60)
  buffers, history = _fit(fit, rows)
  errors = [[m['error'] for m in history[f'level_{level}']] for level in (1, 2, 3, 4)]
  for error in errors:
    assert all(a >= b - 1e-6 for a, b in zip(error, error[1:]))
  last = [error[-1] for error in errors]
  assert last == sorted(last, reverse=True) and last[-1] < 0.3 * last[0]
  model = _model(fit, buffers)
  codes = model.tokens(jnp.asarray(rows))
  assert codes.shape == (60, 1, 4) and codes.dtype == jnp.int32 and codes.max() < 8
  decoded = model.quantizer.decode(codes[:, 0])
  assert np.mean(np.sum((decoded - rows)**2, -1)) == pytest.approx(last[-1], rel=0.1)


def test_one_level_agrees_with_scikit_learn():
  cluster = pytest.importorskip('sklearn.cluster')
  fit = MuLanTokens(configs.config(), levels=1, codebook_size=5, iterations=20, align=False)
  rows = _rows(200)
  _, history = _fit(fit, rows)
  reference = cluster.KMeans(5, n_init=5, random_state=0).fit(rows)
  assert history['level_1'][-1]['error'] == pytest.approx(reference.inertia_ / len(rows), rel=0.02)


def test_batches_and_padding_do_not_change_the_fit():
  fit = MuLanTokens(configs.config(), levels=3, codebook_size=6, iterations=3, align=False)
  rows = _rows(48)
  whole, _ = _fit(fit, rows)
  parts, _ = _fit(fit, rows, parts=4)
  padded = np.concatenate([rows, np.full((16, 8), 9.0, np.float32)])
  weighted, _ = _fit(fit, padded, np.float32([1] * 48 + [0] * 16), parts=4)
  for other in (parts, weighted):
    np.testing.assert_allclose(
        other['quantizer']['codebook'], whole['quantizer']['codebook'], atol=1e-4)


def test_fewer_rows_than_codes_are_all_kept_exactly():
  fit = MuLanTokens(configs.config(), levels=2, codebook_size=16, iterations=4, align=False)
  buffers, history = _fit(fit, _rows(10))
  assert history['level_1'][-1]['error'] < 1e-6
  assert np.isfinite(buffers['quantizer']['codebook']).all()


@pytest.mark.parametrize('fit_on', ['audio', 'both'])
@pytest.mark.parametrize('align', [False, True])
def test_features_to_tokens_with_both_kinds_and_moved_texts(fit_on, align):
  cfg = configs.config()
  fit = MuLanTokens(cfg, levels=3, codebook_size=4, seconds=0.7, iterations=2, fit_on=fit_on, align=align)
  batch = configs.batch(cfg, size=12, samples=16800)
  for name, spec in fit.batch_spec(12).items():
    assert batch[name].shape == spec.shape and batch[name].dtype == spec.dtype
  model = fit.model(nnx.Rngs(0))
  rows = np.asarray(fit.features(model, batch))
  assert rows.shape == (12, cfg.embedding * (2 if align or fit_on == 'both' else 1))
  buffers, history = _fit(fit, rows)
  model = _model(fit, buffers)
  audio, text = model.embed_audio(batch['audio']), model.embed_text(batch['text'])
  for x in (audio, text):
    np.testing.assert_allclose(np.linalg.norm(x, axis=-1), 1.0, atol=1e-5)
    assert model.tokens(x).shape == model.text_tokens(x).shape == (12, 1, 3)
  moved = text @ model.text_map[...] + model.text_shift[...]
  moved = moved / np.linalg.norm(moved, axis=1, keepdims=True)
  np.testing.assert_array_equal(model.text_tokens(text), model.tokens(moved))
  if not align:
    np.testing.assert_allclose(moved, text, atol=1e-6)
  else:
    assert history['align'][0]['gap'] > 0 and 0 < history['align'][0]['explained'] <= 1
  # The fit saw what tokens are later made of: its error at level 1 is that of the embeddings themselves.
  fitted_on = np.concatenate([audio, moved]) if fit_on == 'both' else audio
  codes = model.quantizer.codebook[...][0]
  error = np.mean(np.min(np.sum((fitted_on[:, None] - codes)**2, -1), axis=1))
  assert error <= history['level_1'][-1]['error'] + 1e-6


def test_texts_are_moved_to_where_least_squares_expects_their_clips():
  generator = np.random.default_rng(0)
  text = _rows(400) + 0.3 * generator.normal(size=(400, 8)).astype(np.float32)
  turn = np.linalg.qr(generator.normal(size=(8, 8)))[0]
  audio = text @ turn + np.float32([3, 0, 0, 0, 0, 0, 0, 0]) + 0.1 * generator.normal(size=(400, 8))
  rows = np.concatenate([audio, text], axis=1).astype(np.float32)
  fit = MuLanTokens(configs.config(embedding=8), levels=1, codebook_size=4, iterations=1)
  buffers, history = _fit(fit, rows, parts=4)
  known = np.c_[text, np.ones(400)]
  expected = known @ np.linalg.lstsq(known, audio, rcond=None)[0]
  moved = text @ np.asarray(buffers['text_map']) + np.asarray(buffers['text_shift'])
  np.testing.assert_allclose(moved, expected, atol=0.05)
  share = 1 - np.sum((audio - expected) ** 2) / np.sum((audio - audio.mean(0)) ** 2)
  assert history['align'][0]['explained'] == pytest.approx(share, abs=0.01)
  # Two texts in three now have their clip as the nearest, where it had been far from all of them.
  unit = lambda x: x / np.linalg.norm(x, axis=1, keepdims=True)
  nearest = lambda x: np.mean(np.argmax(unit(x) @ unit(audio).T, axis=1) == np.arange(400))
  assert nearest(moved) > 0.6 > 0.1 > nearest(text)


def test_token_spec_is_one_frame_of_twelve_levels():
  fit = MuLanTokens(configs.config(), codebook_size=64)
  assert fit.token_spec == specs.TokenSpec('mulan', 64, levels=12)
  assert fit.token_spec.tokens(10.0) == 12
  assert specs.from_json(specs.to_json(fit)) == fit
  assert [name for name, _ in fit.phases()] == ['align', *(f'level_{i}' for i in range(1, 13))]
  with pytest.raises(ValueError, match='fit_on must be'):
    MuLanTokens(configs.config(), fit_on='text')
