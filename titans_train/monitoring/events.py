"""TensorBoard's files of events, without the thread of its own writer, which a full disk ends for good."""

from __future__ import annotations

import io
import os
import socket
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from titans_train.monitoring.appended import Appended


class Events:
    """A new file in `folder`; what files before it hold of `first_step` and later is no longer shown."""

    def __init__(self, folder: Path, first_step: int, say: Callable[[str], object]) -> None:
        from tensorboard.compat.proto.event_pb2 import SessionLog  # type: ignore[import-untyped]

        now = time.time_ns()
        name = f"{now // 10**9:010d}.{now % 10**9:09d}.{socket.gethostname()}.{os.getpid()}"  # read in this order
        self._file = Appended(folder / f"events.out.tfevents.{name}", say)
        version, start = {"file_version": "brain.Event:2"}, {"session_log": SessionLog(status=SessionLog.START)}
        self._file.write(_record(first_step, version) + _record(first_step, start))

    def scalars(self, step: int, figures: Mapping[str, float]) -> None:
        from torch.utils.tensorboard.summary import scalar

        records = [_record(step, {"summary": scalar(n, x)}) for n, x in figures.items()]  # type: ignore[no-untyped-call]
        self._file.write(b"".join(records))

    def text(self, step: int, name: str, text: str) -> None:
        from torch.utils.tensorboard.summary import text as summary

        self._file.write(_record(step, {"summary": summary(name, text)}))  # type: ignore[no-untyped-call]

    def close(self) -> None:
        self._file.close()


def _record(step: int, what: dict[str, Any]) -> bytes:
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.summary.writer.record_writer import RecordWriter  # type: ignore[import-untyped]

    stream = io.BytesIO()
    RecordWriter(stream).write(Event(wall_time=time.time(), step=step, **what).SerializeToString())
    return stream.getvalue()
