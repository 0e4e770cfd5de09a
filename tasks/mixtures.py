"""SeqIO mixtures of registered tasks."""
from __future__ import annotations

from collections.abc import Mapping

import seqio

from musiclm_jax.data import seqio_source
from musiclm_jax.data.batches import TEXT_RATES


def register(name: str, rates: Mapping[str, float]) -> seqio.Mixture:
  """A mixture of tasks or mixtures, each drawn in proportion to its rate."""
  return seqio.MixtureRegistry.add(name, list(rates.items()))


def register_text_kinds(name: str, record_dir: str, rates: Mapping[str, float] = TEXT_RATES) -> seqio.Mixture:
  """Music with its texts as one task a kind, `name`_tags and so on, drawn at 2:2:1:1 (arXiv 2208.12415, section 3).

  A clip is in each task of whose kind it has a text. Raises ValueError, and registers nothing, where no clip has a text
  of a kind: give the rates of those that there are.
  """
  for kind in rates:
    seqio_source.RecordSource(record_dir, kind)
  for kind in rates:
    seqio_source.add_task(f'{name}_{kind}', record_dir, kind='audio', text_kind=kind)
  return register(name, {f'{name}_{kind}': rate for kind, rate in rates.items()})
