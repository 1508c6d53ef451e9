"""Ctrl-C while `python -m data_prep` still imports its modules: a line instead of a traceback. Imported first."""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType


def end() -> None:
    """From here on the command hears signals itself."""
    if signal.getsignal(signal.SIGINT) is _stop:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _stop(number: int, frame: FrameType | None) -> None:
    os.write(2, b"data_prep: stopped before it began\n")
    os._exit(128 + number)


_program = getattr(getattr(sys.modules["__main__"], "__spec__", None), "name", None)
if _program == "data_prep.__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, _stop)
