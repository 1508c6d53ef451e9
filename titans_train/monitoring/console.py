"""Progress for people: one changing line in a terminal, plain lines in a log."""

from __future__ import annotations

import sys
import time
from contextlib import suppress


def duration(seconds: float) -> str:
    minutes, s = divmod(int(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}h{m:02d}m" if hours else f"{m}m{s:02d}s"


class Console:
    """Speaks on the first rank only. A log on a full disk, or a reader that has gone, does not end a run."""

    def __init__(self, speaks: bool, first_step: int, steps: int) -> None:
        self.speaks, self.first, self.steps = speaks, first_step, steps
        self.started = time.monotonic()
        self.terminal = sys.stdout.isatty()

    def progress(self, step: int, loss: float, norm: float, rate: float, tokens_per_second: float) -> None:
        done = step - self.first
        left = (time.monotonic() - self.started) / max(done, 1) * (self.steps - step)
        line = (
            f"step {step}/{self.steps}  loss {loss:.4f}  grad norm {norm:.3f}  lr {rate:.2e}  "
            f"{tokens_per_second:,.0f} tokens/s  {duration(left)} left"
        )
        if self.speaks:
            self._print(f"\r{line}\x1b[K" if self.terminal else line, end="" if self.terminal else "\n")

    def say(self, text: str) -> None:
        if self.speaks:
            self._print(f"\n{text}" if self.terminal else text)

    def _print(self, text: str, end: str = "\n") -> None:
        with suppress(OSError):
            print(text, end=end, flush=True)
