"""SeqIO mixtures of registered tasks."""
from __future__ import annotations

from collections.abc import Mapping

import seqio


def register(name: str, rates: Mapping[str, float]) -> seqio.Mixture:
  """A mixture of tasks or mixtures, each drawn in proportion to its rate."""
  return seqio.MixtureRegistry.add(name, list(rates.items()))
