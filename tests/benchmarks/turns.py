"""Systems that take turns: each in a process of its own, so that no library's threads or memory disturb another's.

In each turn a system runs once unmeasured and once measured: the first call after a pause finds cold caches and
sleeping cores. Medians of the rounds, and of the ratios of each round, say little about a moment's other load.
"""
from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
import multiprocessing
import statistics
import time
from typing import Any

Calls = dict[str, Callable[[], Any]]
System = Callable[[], tuple[Calls, dict[str, Any]]]  # what can be timed, and what there is to say about it
PRODUCTS, MEMORY = 'ceiling: products', 'ceiling: memory'


def take_turns(systems: Mapping[str, System], wanted: Iterable[str], rounds: int
               ) -> tuple[dict[tuple[str, str], list[float]], dict[str, Any]]:
  """Seconds of each round by (system, what), of what is wanted and the ceilings; and what each says about itself."""
  context = multiprocessing.get_context('spawn')
  pipes, able, about = {}, {}, {}
  for name, make in systems.items():
    here, there = context.Pipe()
    context.Process(target=_serve, args=(make, (*wanted, PRODUCTS, MEMORY), there), daemon=True).start()
    there.close()
    able[name], about[name] = here.recv()
    pipes[name] = here
    print(f'{name}: {about[name]["parameters"] / 1e6:.1f} M parameters', flush=True)
  times: dict[tuple[str, str], list[float]] = {}
  for _ in range(rounds):
    for what in dict.fromkeys(what for names in able.values() for what in names):
      for name in pipes:
        if what in able[name]:
          time.sleep(0.1)  # threads of the one before have gone to sleep
          pipes[name].send(what)
          times.setdefault((name, what), []).append(pipes[name].recv())
  for pipe in pipes.values():
    pipe.send('')
  return times, about


def _serve(make: System, wanted: Iterable[str], pipe) -> None:
  calls, about = make()
  calls = {name: call for name, call in calls.items() if name in wanted}
  for call in calls.values():
    call(), call()
  pipe.send((list(calls), about))
  while name := pipe.recv():
    calls[name]()
    begun = time.perf_counter()
    calls[name]()
    pipe.send(time.perf_counter() - begun)


def torch_step(parameters: Iterable[Any], loss: Callable[[], Any], learning_rate: float) -> Callable[[], float]:
  """A training step in PyTorch, with Adam."""
  import torch
  optimizer = torch.optim.Adam(parameters, learning_rate)

  def run():
    optimizer.zero_grad()
    value = loss()
    value.backward()
    optimizer.step()
    return value.item()

  return run


def times_as_fast(theirs: Iterable[float], ours: Iterable[float]) -> float:
  return statistics.median(a / b for a, b in zip(theirs, ours))


def ceilings(side: int = 2048, dtype: str = 'float32') -> tuple[Calls, dict[str, float]]:
  """What this machine multiplies matrices at and, on an accelerator, copies memory at; and the work of one call."""
  import jax
  # Of random numbers: equal ones are multiplied faster on some chips.
  matrix, words = jax.random.normal(jax.random.key(0), (side, side), dtype), jax.numpy.ones(2 ** 26)
  product, copy = jax.jit(lambda x: x @ x), jax.jit(lambda x: x + 1)
  calls, work = {PRODUCTS: lambda: product(matrix).block_until_ready()}, {PRODUCTS: 2 * side ** 3}
  if jax.default_backend() != 'cpu':  # there most of the bytes never leave the caches
    calls[MEMORY], work[MEMORY] = lambda: copy(words).block_until_ready(), 2 * 4 * 2 ** 26
  return calls, work


def share(work: float, seconds: Iterable[float], ceiling: float, ceiling_seconds: Iterable[float]) -> float:
  """Of the speed at which the ceiling's work is done."""
  return work / statistics.median(seconds) / (ceiling / statistics.median(ceiling_seconds))
