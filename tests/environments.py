"""Environments with some of this one's packages and nothing else, made without a network."""
from __future__ import annotations

from collections.abc import Iterable
import importlib.metadata
import os
import pathlib
import subprocess
import sys

from packaging.requirements import Requirement


def linked(folder: str | os.PathLike, requirements: Iterable[str]) -> pathlib.Path:
  """The Python of a new environment in `folder` with what installing the requirements would bring."""
  folder = pathlib.Path(folder)
  subprocess.run([sys.executable, '-m', 'venv', '--without-pip', folder], check=True)
  site = next((folder / 'lib').glob('python*')) / 'site-packages'
  for distribution in _needed(requirements):
    for file in distribution.files:
      if (top := file.parts[0]) not in ('..', '__pycache__') and not os.path.lexists(site / top):
        (site / top).symlink_to(distribution.locate_file(top))
  return folder / 'bin' / 'python'


def _needed(requirements: Iterable[str]) -> list[importlib.metadata.Distribution]:
  found, left = {}, list(requirements)
  while left:
    requirement = Requirement(left.pop())
    wanted = requirement.marker is None or requirement.marker.evaluate({'extra': ''})
    if wanted and requirement.name not in found:
      found[requirement.name] = importlib.metadata.distribution(requirement.name)
      left.extend(found[requirement.name].requires or ())
  return list(found.values())
