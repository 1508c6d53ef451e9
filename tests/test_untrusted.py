"""What is no file is refused at once, and nothing stays open after it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from titans_train.untrusted import read_bounded


def test_what_is_no_regular_file_or_too_large_is_refused_and_no_descriptor_stays_open(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "large").write_bytes(bytes(101))
    before = os.listdir("/proc/self/fd")
    refusals = [("folder", "Is a directory"), ("pipe", "not a regular file"), ("large", "larger than 100 bytes")]
    for name, refusal in refusals:
        with pytest.raises(OSError, match=refusal):
            read_bounded(tmp_path / name, 100)
    (tmp_path / "large").write_bytes(bytes(range(100)))
    assert read_bounded(tmp_path / "large", 100) == bytes(range(100))
    assert os.listdir("/proc/self/fd") == before
