"""What is exported of each network: pure functions of its arrays, for every platform, with open batch size and lengths.

In the open dimensions: b batch, f frames, q levels, t given positions, l sequence length.
"""
from __future__ import annotations

from collections.abc import Callable, Mapping
import dataclasses
from typing import Any

import jax
from jax import export
import jax.numpy as jnp
import numpy as np

from musiclm_jax.cascade_networks import decode_step
from musiclm_jax.export.weights import Network
from musiclm_jax.token_lm.draw import Numbers
from musiclm_jax.token_lm.model import TokenLM
from musiclm_jax.token_lm.sample import row_nats, sample_rows

PLATFORMS = ('cpu', 'cuda', 'tpu')


@dataclasses.dataclass(frozen=True)
class Function:
  """`run(model, *arguments)`, with the shapes of its arguments: dimensions are numbers, or expressions of open ones.

  Attributes:
    arguments: trees of (dtype, dimension, ...), as (jnp.float32, 'b', '480*f').
    where: what holds for the open dimensions.
  """

  run: Callable[..., Any]
  arguments: tuple[Any, ...]
  where: tuple[str, ...] = ()

  def abstract(self) -> tuple[Any, ...]:
    scope = export.SymbolicScope(self.where)

    def one(leaf):
      dtype, *dimensions = leaf
      shape = export.symbolic_shape(','.join(map(str, dimensions)), scope=scope) if dimensions else ()
      return jax.ShapeDtypeStruct(shape, dtype)

    return jax.tree.map(one, self.arguments, is_leaf=is_leaf)


def is_leaf(x: Any) -> bool:
  """Whether this describes one array in `Function.arguments`."""
  return isinstance(x, tuple) and bool(x) and not isinstance(x[0], (tuple, dict))


def used(network: Network, functions: Mapping[str, Function]) -> set[str]:
  """Names of the arrays that any of the functions looks at: no discriminators, optimizers or counts."""
  names, found = list(network.arrays), set()
  abstract = {name: jax.ShapeDtypeStruct(a.shape, a.dtype) for name, a in network.arrays.items()}
  for function in functions.values():
    run = lambda stored, *arguments, f=function: f.run(network.model(stored), *arguments)
    jaxpr = jax.make_jaxpr(run)(abstract, *function.abstract()).jaxpr
    seen = {id(v) for equation in jaxpr.eqns for v in equation.invars} | {id(v) for v in jaxpr.outvars}
    # A dict is flattened in the order of its keys.
    found |= {name for name, v in zip(sorted(names), jaxpr.invars) if id(v) in seen}
  return found


def exported(network: Network, functions: Mapping[str, Function], kind: str
             ) -> tuple[dict[str, bytes], dict[str, np.ndarray]]:
  """The functions as serialised StableHLO, by name, and the arrays that each takes first, as `kind`."""
  stored = network.stored(kind, used(network, functions))
  abstract = {name: jax.ShapeDtypeStruct(a.shape, a.dtype) for name, a in stored.items()}
  programs = {}
  for name, function in functions.items():
    run = jax.jit(lambda stored, *arguments, f=function: f.run(network.model(stored), *arguments))
    programs[name] = bytes(export.export(run, platforms=PLATFORMS)(abstract, *function.abstract()).serialize())
  return programs, stored


def of_codec(codec: Any) -> dict[str, Function]:
  """Encoder, decoder, and the decoder in steps with its state (a tree of arrays that begin as zeros)."""
  config = codec.config
  channels = (config.channels,) if config.channels > 1 else ()
  codes, some = (jnp.int32, 'b', 'f', 'q'), ('q >= 1', f'q <= {config.levels}')
  begin = jax.eval_shape(lambda: codec.init_state(1)).decoder
  state = jax.tree.map(lambda x: (x.dtype, 'b', *x.shape[1:]), begin)
  return {
      'encode': Function(lambda model, audio: model.encode(audio),
                         ((jnp.float32, 'b', f'{config.stride}*f', *channels),)),
      'decode': Function(lambda model, codes: model.decode(codes), (codes,), some),
      'decode_step': Function(decode_step, (codes, state), some),
  }


def of_semantic(semantic: Any) -> dict[str, Function]:
  """Tokens of audio, of which `length` samples of each clip are valid."""
  samples = semantic.encoder.config.samples_per_frame
  return {'tokens': Function(lambda model, audio, length: model.tokens(audio, length),
                             ((jnp.float32, 'b', f'{samples}*f'), (jnp.int32, 'b')))}


def of_mulan(mulan: Any) -> dict[str, Function]:
  """Embeddings of texts and of one window of audio, where the audio of a text is expected, and tokens of embeddings."""
  config = mulan.encoder.config
  embedding = (jnp.float32, 'b', config.embedding)
  return {
      'embed_text': Function(lambda model, ids: model.embed_text(ids), ((jnp.int32, 'b', config.text.length),)),
      'embed_window': Function(lambda model, audio, length: model.embed_audio(audio, length),
                               ((jnp.float32, 'b', config.audio.window_samples), (jnp.int32, 'b'))),
      'expected_audio': Function(lambda model, x: model.expected_audio(x), (embedding,)),
      'tokens': Function(lambda model, x: model.tokens(x), (embedding,)),
  }


def of_stage(model: TokenLM) -> dict[str, Function]:
  """The sampling loop, plain and with guidance, and the likelihood of a sequence. Keys are their two words."""
  # All sizes are open, or the model's own; but its conditions are whole.
  least = model.stage.conditions[0].levels if model.points else 1
  rows, scalar = (jnp.int32, 'b', 't'), lambda dtype: (dtype,)
  numbers = tuple(map(scalar, (jnp.float32, jnp.int32, jnp.float32, jnp.float32)))
  rest = ((jnp.float32, 2, 'l'), scalar(jnp.int32), (jnp.uint32, 'b', 2), numbers)

  whole = (f't >= {least}', 'l >= t + 1') if least > 1 else ('l >= t + 1',)

  def sample(model, rows_BxT, null_rows_BxT, positions_2xL, condition_length, key_data_Bx2, numbers):
    keys_B = jax.random.wrap_key_data(key_data_Bx2, impl='threefry2x32')
    return sample_rows(model, rows_BxT, null_rows_BxT, positions_2xL, condition_length, keys_B, Numbers(*numbers))

  plain = lambda model, rows, *more: sample(model, rows, None, *more)
  return {
      'sample': Function(plain, (rows, *rest), whole),
      'sample_guided': Function(sample, (rows, rows, *rest), whole),
      'row_nats': Function(row_nats, ((jnp.int32, 'b', 'l'), (jnp.float32, 2, 'l'), scalar(jnp.int32)),
                           (f'l >= {least + 1}',)),
  }
