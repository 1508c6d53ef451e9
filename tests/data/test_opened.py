"""Open files: the most recently used ones, few at a time, and none that the cache has removed."""

import os
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from titans_train.data import opened
from titans_train.data.mds import MdsFile


@pytest.fixture
def make(tmp_path: Path) -> Callable[[int], Callable[[], tuple[MdsFile, Path]]]:
    """What opens the file of a number."""

    def of(number: int) -> Callable[[], tuple[MdsFile, Path]]:
        path, marker = tmp_path / f"{number}.mds", tmp_path / f"{number}.checked"
        path.write_bytes(np.array([1, 12, 20], "<u4").tobytes() + bytes(8))
        marker.touch()
        return lambda: (MdsFile(path, 1), marker)

    return of


Make = Callable[[int], Callable[[], tuple[MdsFile, Path]]]


def test_the_least_recently_used_file_is_closed_first(make: Make, tmp_path: Path) -> None:
    files = [opened.opened(("lru", number), make(number)) for number in range(opened.LARGEST)]
    assert opened.opened(("lru", 0), make(0)) is files[0]
    opened.opened(("lru", opened.LARGEST), make(opened.LARGEST))
    assert opened.opened(("lru", 0), make(0)) is files[0]
    assert opened.opened(("lru", 1), make(1)) is not files[1]
    del files
    mine = [path for path in Path("/proc/self/fd").iterdir() if os.path.realpath(path).startswith(str(tmp_path))]
    assert len(mine) == opened.LARGEST


def test_a_removed_file_is_closed_when_the_next_is_opened(make: Make) -> None:
    first, second = (opened.opened(("gone", number), make(number)) for number in (1, 2))
    first.path.unlink()
    assert opened.opened(("gone", 1), make(3)) is first  # nobody needs its place yet
    opened.opened(("gone", 4), make(4))
    assert opened.opened(("gone", 1), make(1)) is not first
    assert opened.opened(("gone", 2), make(2)) is second


def test_a_file_that_changed_is_opened_again(make: Make) -> None:
    file = opened.opened(("changed", 1), make(1))
    opened.close(("changed", 1))
    assert opened.opened(("changed", 1), make(1)) is not file


def test_a_file_in_use_tells_so(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = opened.opened(("used", 7), make(7))
    os.utime(tmp_path / "7.checked", (time.time() - 1000,) * 2)
    monkeypatch.setattr(opened, "_NOTED_SECONDS", 0.0)  # as if a minute had passed
    assert opened.opened(("used", 7), make(7)) is file
    assert time.time() - (tmp_path / "7.checked").stat().st_mtime < 60
