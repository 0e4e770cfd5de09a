"""TensorBoard's event files, by way of tensorboardX: the one place that knows either.

N samples, C channels, H and W pixels.
"""
from __future__ import annotations

from collections.abc import Mapping
import importlib.util
import os
import pathlib
import socket
import time
from typing import Any

import numpy as np


def check_installed() -> None:
  """Raises ValueError where tensorboardX is missing."""
  if importlib.util.find_spec('tensorboardX') is None:
    raise ValueError('TENSORBOARD = True needs the package tensorboardX: pip install "musiclm_jax[tensorboard]", or '
                     'leave it at False')


class EventFile:
  """Appends to a new event file in `folder`; what earlier files hold of steps after `first_step` no longer counts.

  What a call writes is on the disk when it returns. tensorboardX's own writer hands it to a thread, which loses it
  when the run is killed, and which blocks the run without end once the disk is full.
  """

  def __init__(self, folder: str | os.PathLike, first_step: int = 0):
    import tensorboardX
    from tensorboardX.proto import event_pb2
    pathlib.Path(folder).mkdir(parents=True, exist_ok=True)
    # Files are read in the order of their names.
    name = f'events.out.tfevents.{time.time_ns()}.{socket.gethostname()}'
    self._event = event_pb2.Event
    self._file = tensorboardX.RecordWriter(os.path.join(folder, name))
    self._write(file_version='brain.Event:2')
    start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
    self._write(step=first_step + 1, session_log=start)  # readers drop what they have of this step and later ones

  def scalars(self, step: int, values: Mapping[str, float]) -> None:
    from tensorboardX.proto.summary_pb2 import Summary
    points = [Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()]
    self._write(step=step, summary=Summary(value=points))

  def audio(self, step: int, tag: str, audio_N: np.ndarray, sample_rate: int) -> None:
    """A clip [N] or [N, C] as WAV of 16 bit, of more than two channels their mean; beyond [-1, 1] it is cut off."""
    from tensorboardX import summary
    if audio_N.ndim == 2 and audio_N.shape[1] > 2:
      audio_N = audio_N.mean(axis=1)
    audio_N = np.clip(np.nan_to_num(np.asarray(audio_N, np.float32)), -1.0, 1.0)
    self._write(step=step, summary=summary.audio(tag, audio_N, sample_rate))

  def picture(self, step: int, tag: str, pixels_HxWx3: np.ndarray) -> None:
    """A picture of uint8 [H, W, 3]."""
    from tensorboardX import summary
    self._write(step=step, summary=summary.image(tag, pixels_HxWx3, dataformats='HWC'))

  def close(self) -> None:
    self._file.close()

  def _write(self, **fields: Any) -> None:
    self._file.write(self._event(wall_time=time.time(), **fields).SerializeToString())
    self._file.flush()
