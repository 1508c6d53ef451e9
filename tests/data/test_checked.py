"""A check that passed is remembered for as long as the file, the host's start and the expected hash are the same."""

import json
import os
import time
from dataclasses import replace
from pathlib import Path

import pytest

from data_prep.manifest import FileEntry, describe_file
from titans_train.data.cache import Cache
from titans_train.data.checked import difference, problem, remembered


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(tmp_path / "cache")


def checked(cache: Cache, name: str = "file") -> tuple[Path, FileEntry, Path]:
    """(file, entry, marker) of a file in the cache that was found right."""
    path = cache.make() / name
    path.write_bytes(b"content")
    entry, marker = describe_file(path), path.with_name(f"{name}.checked")
    assert not remembered(path, entry, marker)
    assert problem(path, entry, marker, cache) is None
    assert remembered(path, entry, marker)
    return path, entry, marker


def test_another_hash_or_a_rewritten_file_is_not_remembered(cache: Cache) -> None:
    path, entry, marker = checked(cache)
    assert not remembered(path, replace(entry, xxh64="0" * 16), marker)
    before = path.stat()
    path.write_bytes(b"CONTENT")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert not remembered(path, entry, marker)
    assert str(problem(path, entry, marker, cache)).startswith("is damaged: xxh64 ")


def test_a_marker_of_this_host_ends_with_its_start_and_one_of_another_host_does_not(cache: Cache) -> None:
    path, entry, marker = checked(cache)
    content = json.loads(marker.read_text())
    marker.write_text(json.dumps({**content, "boot": "an earlier one"}))
    assert not remembered(path, entry, marker)
    marker.write_text(json.dumps({**content, "boot": "an earlier one", "host": "another"}))
    assert remembered(path, entry, marker)
    for text in ("", "{", "[]", '{"host": 1}'):
        marker.write_text(text)
        assert not remembered(path, entry, marker)


def test_a_file_elsewhere_that_has_just_been_written_is_checked_again(cache: Cache, tmp_path: Path) -> None:
    path, marker = tmp_path / "file", cache.make() / "file.checked"
    path.write_bytes(b"content")
    entry = describe_file(path)
    assert problem(path, entry, marker, cache) is None
    assert not marker.exists()  # another write at the same tick of the clock would not be seen
    time.sleep(0.15)
    assert problem(path, entry, marker, cache) is None
    assert remembered(path, entry, marker)


def test_a_markers_time_follows_its_use_once_a_minute(cache: Cache) -> None:
    path, entry, marker = checked(cache)
    for age, moves in ((50, False), (70, True)):
        os.utime(marker, (time.time() - age,) * 2)
        assert remembered(path, entry, marker)
        assert (time.time() - marker.stat().st_mtime < 40) == moves


def test_what_is_wrong_is_said(cache: Cache) -> None:
    path, entry, _ = checked(cache)
    assert difference(path, entry) is None
    assert difference(path.with_name("none"), entry) == "is missing"
    assert difference(path.parent, replace(entry, bytes=path.parent.stat().st_size)) == "is not a regular file"
    assert difference(path, replace(entry, bytes=9)) == "has 7 bytes, expected 9"
