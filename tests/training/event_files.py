"""Reads TensorBoard's event files as TensorBoard does, from their framing alone."""
from __future__ import annotations

import pathlib
import struct

from tensorboardX.proto import event_pb2
from tensorboardX.record_writer import masked_crc32c


def records(path: pathlib.Path):
  """The events of one file; each record is length, its checksum, content, its checksum."""
  data = path.read_bytes()
  while data:
    (length,), (header_sum,) = struct.unpack('<Q', data[:8]), struct.unpack('<I', data[8:12])
    content, (content_sum,) = data[12:12 + length], struct.unpack('<I', data[12 + length:16 + length])
    assert (header_sum, content_sum) == (masked_crc32c(data[:8]), masked_crc32c(content))
    yield event_pb2.Event.FromString(content)
    data = data[16 + length:]


def values(folder: pathlib.Path) -> dict[tuple[str, int], list]:
  """The values by (tag, step), of all files in the order of their names; a restart forgets what comes from its step on.

  A value is a summary_pb2.Summary.Value: `simple_value`, `audio` or `image`.
  """
  found: dict[tuple[str, int], list] = {}
  for path in sorted(folder.glob('*tfevents*')):
    for i, event in enumerate(records(path)):
      assert i > 0 or event.file_version == 'brain.Event:2'
      if event.HasField('session_log'):
        assert event.session_log.status == event_pb2.SessionLog.START
        found = {(tag, step): v for (tag, step), v in found.items() if step < event.step}
      for value in event.summary.value:
        found.setdefault((value.tag, event.step), []).append(value)
  return found
