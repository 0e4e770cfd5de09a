"""Codes are counted by level; perplexity is the number in even use."""
import numpy as np
import pytest

from musiclm_jax.data import token_counts


def test_perplexity_of_even_and_of_collapsed_codes():
  tokens = np.stack([np.arange(800) % 8, np.zeros(800, int)], axis=-1)[None]
  np.testing.assert_allclose(token_counts.perplexity(token_counts.level_counts(tokens, 8)), [8, 1])


def test_counts_of_shards_add_up_and_codes_that_do_not_exist_are_refused():
  tokens = np.random.default_rng(0).integers(0, 6, (9, 5, 3))
  parts = token_counts.level_counts(tokens[:4], 6) + token_counts.level_counts(tokens[4:], 6)
  np.testing.assert_array_equal(parts, token_counts.level_counts(tokens, 6))
  assert parts.sum() == tokens.size
  with pytest.raises(ValueError, match='from 0 to 6 are not codes of a codebook of 6'):
    token_counts.level_counts(np.array([[0], [6]]), 6)
