"""How a process ends that has used PyTorch."""

from __future__ import annotations

import atexit
import os
import sys
import threading
from typing import NoReturn


def leave(status: int) -> NoReturn:
    """Ends the process as Python does, threads and exit functions included, but for the end of the interpreter itself:
    other threads that drop a tensor or come back from PyTorch in it (Gloo's, a reader's) abort a process that has done
    all it had to (PyTorch issues 38228, 190489).
    """
    if "torch" not in sys.modules:
        sys.exit(status)
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            status = status or 120  # Python's own for it
    os._exit(status)
