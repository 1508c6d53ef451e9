"""How far preparing is: a line on stderr, in place on a terminal, every ten seconds elsewhere."""

from __future__ import annotations

import sys
import time
from typing import TextIO

_SECONDS = 10.0
_TERMINAL_SECONDS = 0.5


class Progress:
    """Counts what tasks report (see pool.advance) and says it. Silent when `quiet`."""

    def __init__(self, quiet: bool, stream: TextIO | None = None) -> None:
        self._stream = sys.stderr if stream is None else stream
        self._quiet = quiet
        self._terminal = self._stream.isatty()
        self._written = False
        self.begin("", 0)

    def begin(self, phase: str, total: float, done: float = 0) -> None:
        """`total` and `done` in bytes: of text while tokenising, of tokens while writing."""
        self.end()
        self._phase, self.total, self._before = phase, total, done
        self._start = time.monotonic()
        self._said = self._start
        self.done, self.tokens = 0.0, 0

    def add(self, size: float, tokens: int) -> None:
        self.done += size
        self.tokens += tokens
        now = time.monotonic()
        if not self._quiet and now - self._said >= (_TERMINAL_SECONDS if self._terminal else _SECONDS):
            self._said = now
            self._say(self.line(now - self._start))

    def line(self, seconds: float) -> str:
        """As: tokenise  43 %  12.3 MB/s  1,234,567 tokens  0:01:23 left"""
        share = min((self._before + self.done) / self.total, 1.0) if self.total else 0.0
        speed = self.done / max(seconds, 1e-9)
        left = _clock((self.total - self._before - self.done) / speed) if speed else "?"
        return f"{self._phase:8} {share:4.0%}  {speed / 1e6:.1f} MB/s  {self.tokens:,} tokens  {left} left"

    def end(self) -> None:
        """The line on a terminal makes room for others."""
        if self._written and self._terminal:
            self._stream.write("\r\x1b[K")
            self._stream.flush()
        self._written = False

    def _say(self, line: str) -> None:
        self._stream.write(f"\r{line}\x1b[K" if self._terminal else f"data_prep: {line}\n")
        self._stream.flush()
        self._written = True


def _clock(seconds: float) -> str:
    whole = max(0, int(seconds))
    return f"{whole // 3600}:{whole // 60 % 60:02}:{whole % 60:02}"
