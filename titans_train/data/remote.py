"""Fetch one file from an object store: in bounded time, again where that can help, with an error that says what can.

s3:// goes through boto3, every other scheme through mosaicml-streaming's downloaders.
"""

from __future__ import annotations

import errno
import os
import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from titans_train.data import s3
from titans_train.data.errors import DataError
from titans_train.data.failures import Failure, TooLarge, TooSlow, explain
from titans_train.data.shim import import_streaming

SLOWEST = 16 << 10  # bytes per second; less than this for timeout_seconds is no transfer
_POLL_SECONDS = 0.05
_BACKOFF_SECONDS = (0.5, 10.0)  # after the first failure (doubled by each more), at most


@dataclass(frozen=True)
class Remote:
    """`timeout_seconds`: an attempt ends when fewer than SLOWEST bytes per second came for so long.

    `attempts`: tries of one file, where the cause may pass.
    """

    timeout_seconds: float = 60
    attempts: int = 5

    def fetch(self, url: str, target: Path, most: int | None = None) -> None:
        """Bring the object at `url` to `target`: whole, or not at all. Until then it is `target` with the try's number.

        `most`: bytes; an object that turns out to have more is given up. DataError: names the URL, tries, time, cause
        and remedy. OSError: the local disk is full.
        """
        started = time.monotonic()
        for attempt in range(1, self.attempts + 1):
            partial = target.with_name(f"{target.name}.{attempt}")
            try:
                _Transfer(url, partial, self.timeout_seconds, most).run()
                os.replace(partial, target)
                return
            except Exception as error:  # each storage client has errors of its own
                failure = explain(error, url)
                if _is_full(error):
                    raise
                renewed = failure.credentials and s3.renewed()
                if attempt == self.attempts or not (failure.passing or renewed):
                    raise self._error(url, failure, attempt, time.monotonic() - started) from error
            finally:
                partial.unlink(missing_ok=True)
            first, longest = _BACKOFF_SECONDS
            time.sleep(min(first * 2 ** (attempt - 1), longest) * random.uniform(0.5, 1.5))

    def _error(self, url: str, failure: Failure, tries: int, seconds: float) -> DataError:
        times = f"{tries} tries" if tries > 1 else "1 try"
        return DataError(f"cannot fetch {url} ({times}, {seconds:.1f} s): {failure.cause}; {failure.remedy}")


class _Transfer:
    """One attempt, in a thread: no storage client bounds the time of a whole transfer.

    A thread that hangs is left behind. It ends with its connection, and its file has no name by then.
    """

    def __init__(self, url: str, target: Path, timeout: float, most: int | None) -> None:
        self._url, self._target, self._timeout, self._most = url, target, timeout, most
        self._stop = threading.Event()
        self._error: BaseException | None = None

    def run(self) -> None:
        """Return when the file is complete. Raises what the storage client raises, TooSlow, TooLarge."""
        work = self._s3 if self._url.startswith("s3://") else self._other(self._url)
        thread = threading.Thread(target=self._work, args=(work,), daemon=True, name="fetch")
        thread.start()
        since, came = time.monotonic(), 0
        while thread.is_alive():
            thread.join(_POLL_SECONDS)
            self._check_size()
            seconds = time.monotonic() - since
            if seconds < self._timeout:
                continue
            now = _size(self._target)
            if thread.is_alive() and now - came < SLOWEST * seconds:
                self._stop.set()
                raise TooSlow(f"only {now - came:,} bytes came in {seconds:.1f} s")
            since, came = time.monotonic(), now
        if self._error is not None:
            raise self._error
        self._check_size()

    def _check_size(self) -> None:
        if self._most is not None and _size(self._target) > self._most:
            self._stop.set()
            raise TooLarge(f"it has more than the {self._most:,} bytes that it may have")

    def _work(self, work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:  # raised again by run
            self._error = error

    def _s3(self) -> None:
        s3.download(self._url, self._target, self._timeout, self._stop)

    def _other(self, url: str) -> Callable[[], None]:
        downloader = import_streaming("streaming.base.storage").CloudDownloader  # takes seconds, which do not count
        return lambda: downloader.direct_download(url, str(self._target), self._timeout)


def _size(target: Path) -> int:
    """Bytes of a file that a storage client may write under its own longer name."""
    total = 0
    for path in target.parent.glob(f"{target.name}*"):
        try:
            total += path.stat().st_size
        except FileNotFoundError:
            continue
    return total


def _is_full(error: Exception) -> bool:
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
