"""Recipes of stages other than MusicLM's own: every line is read, the sizes are as said, and small ones train."""
from __future__ import annotations

import functools

import pytest

from musiclm_jax import config
from musiclm_jax.token_lm.sequence import Layout
from musiclm_jax.training import checkpoint
from musiclm_jax.training.state import Skeleton
from tests.test_gin_files import _unused
from tests.trainings import write_tokens

RECIPES = {  # overlay: the conditions of each stage that it is for
    'without_semantic': {'coarse_lm': ('mulan',)},
    'audiolm': {'semantic_lm': (), 'coarse_lm': ('semantic',), 'fine_lm': ('coarse',)},
    'points': {'semantic_lm': ('mulan',), 'coarse_lm': ('mulan', 'semantic')},
    'audiolm_network': {'semantic_lm': ('mulan',), 'coarse_lm': ('mulan', 'semantic'), 'fine_lm': ('coarse',)},
}
CASES = [(recipe, name) for recipe, stages in RECIPES.items() for name in stages]


@functools.cache
def experiment(name: str, size: str, *overlays: str, tokens: str = 'somewhere') -> config.Experiment:
  files = [f'experiments/{name}.gin', f'size/{size}.gin', *(f'token_lm/{o}.gin' for o in overlays)]
  given = [('TOKENS', str(tokens)), ('partition.Partitioner.data', '1')]
  if 'points' in overlays:
    given.append(('MULAN_TOKENS_WORKDIR', 'somewhere'))
  return config.load_experiment(files, given, provided=('workdir', 'dry_run'))


def test_every_recipe_is_tested():
  assert {p.stem for p in (config.gin_folder() / 'token_lm').glob('*.gin')} == set(RECIPES)


@pytest.mark.parametrize('recipe', RECIPES)
def test_every_line_is_used(recipe):
  assert not _unused(f'token_lm/{recipe}', [experiment(name, 'tiny', recipe) for name in RECIPES[recipe]])


@pytest.mark.parametrize('size', ['nano', 'tiny', 'paper'])
@pytest.mark.parametrize(('recipe', 'name'), CASES)
def test_each_stage_has_its_conditions(recipe, name, size):
  stage = experiment(name, size, recipe).argument('objective').stage
  assert tuple(s.name for s in stage.conditions) == RECIPES[recipe][name]


# Layers of attention (4 d^2) and feed-forward (2 or 3 d f) with two norms, one more norm, the bias of 16 heads, rows of
# conditions, target and null rows to a multiple of 128, and the codes that are predicted.
@pytest.mark.parametrize('name, overlays, millions, length', [
    ('coarse_lm', ('without_semantic',), 423.8, 2012), ('semantic_lm', ('audiolm',), 404.9, 751),
    ('coarse_lm', ('audiolm',), 412.3, 2250), ('fine_lm', ('audiolm',), 423.8, 1800),
    ('semantic_lm', ('audiolm', 'audiolm_network'), 153.2, 751),
    ('coarse_lm', ('audiolm', 'audiolm_network'), 160.6, 2250),
    ('fine_lm', ('audiolm', 'audiolm_network'), 172.1, 1800)])
def test_parameters_and_lengths_at_the_papers_size(name, overlays, millions, length):
  objective = experiment(name, 'paper', *overlays).argument('objective')
  stage, net = objective.stage, objective.transformer
  rows = -(-(stage.vocab_size + max(1, len(stage.conditions))) // 128) * 128
  d, f = net.width, net.mlp_width
  expected = net.depth * (4 * d * d + (3 if net.gated else 2) * d * f + 2 * d) + d + 32 * net.heads
  expected += d * (rows + stage.target.vocab_size)
  assert Skeleton.of(objective).count() == expected == pytest.approx(millions * 1e6, abs=0.05e6)
  assert Layout(stage).length == length


def test_the_network_without_its_tables():
  """151.0 M, and 302.0 M with twice the layers."""
  net = experiment('semantic_lm', 'paper', 'audiolm', 'audiolm_network').argument('objective').transformer
  layer = 4 * net.width ** 2 + 2 * net.width * net.mlp_width
  assert (net.depth, net.gated, net.heads, net.positions, net.dropout) == (12, False, 16, 't5', 0.1)
  assert (round(12 * layer / 1e6, 1), round(24 * layer / 1e6, 1)) == (151.0, 302.0)


@pytest.fixture(scope='module')
def tokens(tmp_path_factory):
  return write_tokens(tmp_path_factory.mktemp('tokens'))


# Those of points need the run that made the tokens: token_lm/test_points_training.py.
@pytest.mark.parametrize(('recipe', 'name'), [c for c in CASES if c != ('audiolm', 'fine_lm') and c[0] != 'points'])
def test_a_small_one_trains(recipe, name, tokens, tmp_path):
  files = [f'experiments/{name}.gin', 'size/nano.gin', f'token_lm/{recipe}.gin']
  given = {'TOKENS': tokens, 'NUM_STEPS': 2, 'EVAL_EVERY': 2, 'partition.Partitioner.data': 1}
  if recipe == 'audiolm_network':
    given['LM_DEPTH'] = 3
  config.load_experiment(files, [(k, str(v)) for k, v in given.items()], provided=('workdir', 'dry_run')).build(
      workdir=str(tmp_path), dry_run=False)
  assert checkpoint.load(tmp_path).step == 2
