"""Run as a rank by test_hangs.py: a real training in which one rank goes wrong in step 3.

Usage: hang_worker.py RANK (sleep | lock | raise) CONFIG.yaml [key.path=value ...]
sleep: it hangs, and could answer. lock: it hangs, and nothing of Python runs any more. raise: an exception of its own.
"""

from __future__ import annotations

import ctypes
import os
import sys
import time
from typing import Any

from titans_train.__main__ import main as verb
from titans_train.training import loop


def main(rank: str, what: str, *args: str) -> int:
    one_step = loop.Run._one_step

    def wrong(self: loop.Run, batches: Any) -> None:
        if self.progress.step == 2 and os.environ["RANK"] == rank:
            if what == "sleep":
                time.sleep(600)
            if what == "lock":
                ctypes.PyDLL(None).sleep(600)  # unlike CDLL, it keeps the interpreter's lock
            raise RuntimeError("of this rank alone")
        one_step(self, batches)

    loop.Run._one_step = wrong  # type: ignore[method-assign]
    return verb(["train", *args])


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
