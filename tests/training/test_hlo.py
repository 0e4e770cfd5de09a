"""Programs read from their text: small ones by hand, and what a real one says on eight devices."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from musiclm_jax.training.hlo import Program, replica_groups, size_of

MESH = {'data': 2, 'fsdp': 4}
HEAD = 'HloModule step, is_scheduled=true, num_partitions=8\n\n'
SUM = '''%sum (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %c = f32[] add(%a, %b)
}

'''


def program(body, before=''):
  return Program.parse(f'{HEAD}{SUM}{before}ENTRY %main (x: f32[16,4]) -> f32[16,4] {{\n'
                       f'  %x = f32[16,4]{{1,0}} parameter(0)\n{body}\n}}\n')


@pytest.mark.parametrize('stated, groups', [
    ('{{0,1},{2,3}}', [[0, 1], [2, 3]]),
    ('{}', [[0, 1, 2, 3, 4, 5, 6, 7]]),
    ('[2,4]<=[8]', [[0, 1, 2, 3], [4, 5, 6, 7]]),
    ('[4,2]<=[2,4]T(1,0)', [[0, 4], [1, 5], [2, 6], [3, 7]]),
    ('[4,2]<=[2,2,2]T(2,1,0)', [[0, 4], [2, 6], [1, 5], [3, 7]]),
    ("mesh['x'=2,'y'=4] {'y'}", [[0, 1, 2, 3], [4, 5, 6, 7]]),
    ("mesh['x'=2,'y'=4] {'x'}", [[0, 4], [1, 5], [2, 6], [3, 7]]),
    ("mesh[x=2,y=4] {x,y}", [[0, 1, 2, 3, 4, 5, 6, 7]]),
    ("mesh['x'=8] {'x':(2)2}", [[0, 2], [1, 3], [4, 6], [5, 7]]),
    ("mesh['x'=1,'y'=2,'z'=4], device_ids=([4,2]T(1,0)) {'y'}", [[0, 1], [2, 3], [4, 5], [6, 7]]),
    ("mesh['x'=2,'y'=2], device_ids=(3,2,1,0) {'y'}", [[3, 2], [1, 0]]),
])
def test_groups_in_every_notation(stated, groups):
  found = replica_groups(f'channel_id=1, replica_groups={stated}, use_global_device_ids=true, to_apply=%sum', 8)
  assert sorted(found.tolist()) == sorted(groups)


@pytest.mark.parametrize('stated, words', [('<3 of something>', 'cannot read the groups'), ('{{0,1},{2}}', 'differ')])
def test_groups_in_a_notation_that_is_not_known_are_refused(stated, words):
  with pytest.raises(ValueError, match=words):
    program(f'  ROOT %r = f32[16,4] all-reduce(%x), replica_groups={stated}, to_apply=%sum').collectives  # noqa: B018


@pytest.mark.parametrize('line, kind, moved, axes', [
    ('all-reduce(%x), replica_groups=[2,4]<=[8], to_apply=%sum', 'all-reduce', 2 * 3 / 4 * 256, ('fsdp',)),
    ('reduce-scatter(%x), replica_groups=[2,4]<=[8], dimensions={0}, to_apply=%sum', 'reduce-scatter', 3 / 4 * 256,
     ('fsdp',)),
    ('all-gather(%x), replica_groups=[4,2]<=[2,4]T(1,0), dimensions={0}', 'all-gather', 256, ('data',)),
    ('all-to-all(%x), replica_groups={}, dimensions={0}', 'all-to-all', 7 / 8 * 256, ('data', 'fsdp')),
    ('collective-permute(%x), source_target_pairs={{0,1},{1,2},{2,3},{3,0}}', 'collective-permute', 256, ('fsdp',)),
    ('all-gather-start(%x), replica_groups={{0,4},{1,5},{2,6},{3,7}}, dimensions={0}', 'all-gather', 256, ('data',)),
])
def test_bytes_and_axes_of_each_kind(line, kind, moved, axes):
  found, = program(f'  ROOT %r = f32[16,4] {line}').collectives
  assert (found.kind, found.moved(), found.axes(MESH), found.times) == (kind, moved, axes, 1)
  assert found.dims == ((16, 4),)


LOOPS = '''%inner (p: (s32[], f32[16,4])) -> (s32[], f32[16,4]) {
  %p = (s32[], f32[16,4]{1,0}) parameter(0)
  %y = f32[16,4]{1,0} get-tuple-element(%p), index=1
  ROOT %r = f32[16,4] all-reduce(%y), channel_id=7, replica_groups={}, to_apply=%sum
}

%under (p: (s32[], f32[16,4])) -> pred[] {
  %p = (s32[], f32[16,4]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %most = s32[] constant(5)
  ROOT %less = pred[] compare(%i, %most), direction=LT
}

%unknown (p: (s32[], f32[16,4])) -> pred[] {
  %p = (s32[], f32[16,4]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  ROOT %less = pred[] compare(%i, %i), direction=LT
}

%outer (p: (s32[], f32[16,4])) -> (s32[], f32[16,4]) {
  %p = (s32[], f32[16,4]{1,0}) parameter(0)
  ROOT %w = (s32[], f32[16,4]{1,0}) while(%p), condition=%under, body=%inner
}

'''


def test_loops_count_as_often_as_they_run():
  known = 'backend_config={"known_trip_count":{"n":"24"},"other":{}}'
  found, = program(f'  ROOT %w = (s32[], f32[16,4]) while(%x), condition=%unknown, body=%outer, {known}',
                   LOOPS).collectives
  assert found.times == 24 * 5
  guessed = program('  ROOT %w = (s32[], f32[16,4]) while(%x), condition=%unknown, body=%outer', LOOPS)
  assert guessed.unknown_loops == ('w',) and guessed.collectives[0].times == 5


def test_pieces_of_a_message_in_several_fusions_are_one_and_a_sum_of_which_a_part_is_kept_is_scattered():
  piece = '''%%start.%d (p: f32[16,4]) -> f32[64,4] {
  %%p = f32[16,4]{1,0} parameter(0)
  ROOT %%g.%d = f32[64,4]{1,0} all-gather(%%p), channel_id=3, replica_groups=[2,4]<=[8], dimensions={0}
}

'''
  scatter = '''%all-reduce-scatter.1 (p: f32[64,4]) -> f32[16,4] {
  %p = f32[64,4]{1,0} parameter(0)
  %s = f32[64,4]{1,0} all-reduce(%p), channel_id=4, replica_groups=[2,4]<=[8], to_apply=%sum
  %i = s32[] constant(0)
  ROOT %d = f32[16,4]{1,0} dynamic-slice(%s, %i, %i), dynamic_slice_sizes={16,4}
}

'''
  body = '''  %one = f32[64,4]{1,0} fusion(%x), kind=kCustom, calls=%start.1
  %two = f32[64,4]{1,0} fusion(%x), kind=kCustom, calls=%start.2
  ROOT %r = f32[16,4]{1,0} fusion(%two), kind=kCustom, calls=%all-reduce-scatter.1'''
  gather, reduction = program(body, piece % (1, 1) + piece % (2, 2) + scatter).collectives
  assert (gather.kind, gather.moved()) == ('all-gather', 3 * 256)
  assert (reduction.kind, reduction.moved()) == ('reduce-scatter', 3 / 4 * 1024)


def test_traffic_counts_slices_as_slices_and_leaves_out_what_stays_on_the_chip():
  fused = '''%slice (s: f32[100,16,4], i: s32[]) -> f32[16,4] {
  %s = f32[100,16,4]{2,1,0} parameter(0)
  %i = s32[] parameter(1)
  ROOT %d = f32[1,16,4]{2,1,0} dynamic-slice(%s, %i), dynamic_slice_sizes={1,16,4}
}

%put (s: f32[100,16,4], u: f32[1,16,4], i: s32[]) -> f32[100,16,4] {
  %s = f32[100,16,4]{2,1,0} parameter(0)
  %u = f32[1,16,4]{2,1,0} parameter(1)
  %i = s32[] parameter(2)
  ROOT %d = f32[100,16,4]{2,1,0} dynamic-update-slice(%s, %u, %i)
}

'''
  body = '''  %stack = f32[100,16,4]{2,1,0} broadcast(%x), dimensions={1,2}
  %i = s32[] constant(3)
  %layer = f32[1,16,4]{2,1,0} fusion(%stack, %i), kind=kLoop, calls=%slice
  %near = f32[16,4]{1,0:T(8,128)S(1)} add(%x, %x)
  ROOT %back = f32[100,16,4]{2,1,0} fusion(%stack, %layer, %i), kind=kLoop, calls=%put'''
  # The broadcast reads 256 bytes and writes 25,600; then 2 x 256, 2 x 256 of operands only, 2 x 256, and small numbers.
  assert program(body, fused).traffic == pytest.approx(256 + 25600 + 512 + 512 + 512, abs=16)


def test_sizes_of_types():
  assert size_of('(bf16[2,3]{1,0:T(8,128)(2,1)S(1)}, f32[], pred[4])') == 12 + 4 + 4
  assert size_of('bf16[2,3]{1,0:T(8,128)(2,1)S(1)}', main_only=True) == 0


def test_a_text_that_is_no_program_is_refused():
  with pytest.raises(ValueError, match='no ENTRY'):
    Program.parse('HloModule nothing')


def test_a_real_program():
  """Weights split over fsdp are gathered in each of the layers' turns, in both directions."""
  mesh = jax.make_mesh((2, 4), ('data', 'fsdp'), axis_types=(jax.sharding.AxisType.Auto,) * 2)
  layout = lambda *spec: jax.sharding.NamedSharding(mesh, jax.P(*spec))
  shape = lambda dims, *spec: jax.ShapeDtypeStruct(dims, jnp.float32, sharding=layout(*spec))

  def loss(w, x):
    return jnp.sum(jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), ()), x, w)[0] ** 2)

  step = jax.jit(jax.grad(loss), out_shardings=layout(None, 'fsdp'))
  lowered = step.lower(shape((6, 32, 32), None, 'fsdp'), shape((8, 32), ('data', 'fsdp')))
  found = Program.parse(lowered.compile().as_text())
  assert found.partitions == 8 and not found.unknown_loops
  gathers = [c for c in found.collectives if c.kind == 'all-gather' and c.axes(MESH) == ('fsdp',)]
  assert sum(c.times * c.moved() for c in gathers) == pytest.approx(2 * 6 * 3 / 4 * 32 * 32 * 4)
  sums = [c for c in found.collectives if c.kind == 'all-reduce' and 'data' in c.axes(MESH)]
  assert sums and {c.times for c in sums} <= {1, 6}
  assert np.prod(sums[0].groups.shape) == 8
