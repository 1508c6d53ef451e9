"""The cache's limit, its users, and what killed processes leave in it."""

import contextlib
import errno
import os
import re
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.data.folders import QUICK, open_store, read_all, read_manifest
from tests.data.workers import (
    NOBODY,
    as_user,
    hold_locks,
    open_at_once,
    processes,
    read_again_and_again,
    read_as,
    result,
    write_half,
)
from titans_train.data.cache import MARKER, Cache, host
from titans_train.data.errors import DataError
from titans_train.data.shards import ShardStore

root = pytest.mark.skipif(os.getuid() != 0, reason="needs root, to run as another user")


def start(*args: Any) -> tuple[Any, Any]:
    """A process that runs result(queue, *args), and its queue."""
    context = processes()
    answers = context.Queue()  # type: ignore[attr-defined]
    process = context.Process(target=result, args=(answers, *args))  # type: ignore[attr-defined]
    process.start()
    return process, answers


def finish(process: Any, answers: Any) -> Any:
    answer = answers.get(timeout=120)
    process.join()
    return answer


def held(cache: Cache) -> int:
    """Bytes of this user's files at one moment; one that is just being renamed counts once."""
    sizes = {}
    with cache._lock_file("room"):  # nobody makes room meanwhile
        for folder, _, names in os.walk(cache.folder):
            for name in names:
                with contextlib.suppress(FileNotFoundError):
                    info = os.stat(f"{folder}/{name}")
                    sizes[info.st_ino] = info.st_size
    return sum(sizes.values())


def payload(cache: Cache) -> list[Path]:
    return [path for path in cache.folder.glob("*/*/*/*") if path.suffix != MARKER]


def test_two_processes_with_different_data_stay_below_the_limit_together(
    prepared: Path, sources: dict[str, Path], tmp_path: Path
) -> None:
    cache, both = Cache(tmp_path / "cache", 34_000), (prepared, sources["web"])
    expected = [read_all(open_store(path, tmp_path / "unlimited")) for path in both]
    assert held(Cache(tmp_path / "unlimited" / "cache")) > 1.5 * 34_000
    running = [start(read_again_and_again, path, cache, 4) for path in both]
    most = 0
    while any(process.is_alive() and answers.empty() for process, answers in running):
        most = max(most, held(cache))
        time.sleep(0.002)
    assert [finish(*one) for one in running] == expected
    assert 20_000 < most <= 34_000 + 2 * 256  # a marker just made for each process


def test_the_least_recently_used_files_are_removed_first(prepared: Path, tmp_path: Path) -> None:
    read_all(open_store(prepared, tmp_path))
    cache = Cache(tmp_path / "cache")
    shards = sorted(path for path in payload(cache) if path.name.startswith("shard"))
    for age, path in enumerate([shards[2], shards[0], *shards[3:], shards[1]]):
        os.utime(f"{path}{MARKER}", (0, 1_000_000_000 + age))
    used = held(cache)
    with Cache(cache.root, used).room(shards[2].stat().st_size + shards[0].stat().st_size - 100):
        assert sorted(path for path in payload(cache) if path.name.startswith("shard")) == [shards[1], *shards[3:]]
    read_all(open_store(prepared, tmp_path / ".." / tmp_path.name))
    assert all(time.time() - Path(f"{path}{MARKER}").stat().st_mtime < 60 for path in payload(cache))


def test_a_removed_shard_is_read_on_and_made_anew_by_the_next(prepared: Path, tmp_path: Path) -> None:
    store = open_store(prepared, tmp_path)
    expected = read_all(store)
    cache = Cache(tmp_path / "cache", 200_000)
    with cache.room(199_000):  # of another process, which needs nearly all
        assert payload(cache) == []
        assert read_all(store) == expected  # its files are open
    assert payload(cache) == []
    process = start(read_as, prepared, cache)
    assert finish(*process) == (0, expected)
    assert len(payload(cache)) == len(store.documents_per_shard) + 1


def test_twenty_processes_open_a_shard_at_once_and_make_it_once(prepared: Path, tmp_path: Path) -> None:
    together = processes().Barrier(20)  # type: ignore[attr-defined]
    running = [start(open_at_once, prepared, Cache(tmp_path / "cache"), together) for _ in range(20)]
    inodes = [finish(*one) for one in running]
    assert len(set(inodes)) == 1 and isinstance(inodes[0], int)


def test_a_limit_below_what_is_needed_at_once_is_refused(prepared: Path, tmp_path: Path) -> None:
    store = open_store(prepared, tmp_path)
    need = store.largest_shards(3)
    Cache(tmp_path, need).check_room(need)
    Cache(tmp_path).check_room(need)
    with pytest.raises(DataError, match=r"data\.cache_limit_gib .* is less than the .* GiB .*raise it to at least"):
        Cache(tmp_path, need - 1).check_room(need)
    small = ShardStore(str(prepared), "train", Cache(tmp_path / "small", 5000), None, QUICK)
    with pytest.raises(DataError, match=r"data\.cache_limit_gib .* is less than"):
        read_all(small)


def test_room_that_another_process_fills_is_waited_for(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "cache", 1000)
    cache.make()
    order = []

    def later() -> None:
        with cache.room(500):
            order.append("later")

    with cache.room(600):
        thread = threading.Thread(target=later)
        thread.start()
        time.sleep(0.3)
        order.append("first")
    thread.join(10)
    assert order == ["first", "later"]
    assert list(cache.folder.iterdir()) == [cache.folder / "locks"]


def test_what_a_killed_process_left_is_cleaned_and_its_locks_are_free(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "cache", 1500)
    started = processes().Event()  # type: ignore[attr-defined]
    process, _ = start(write_half, cache, started)
    assert started.wait(60)
    assert cache.clean() == 0 and len(list(cache.folder.rglob("*~*"))) == 2  # it lives
    assert not _is_free(cache)
    process.kill()
    process.join()
    assert len(list(cache.folder.rglob("*~*"))) == 2
    assert _is_free(cache)
    with cache.room(1400):  # the dead one's room is free, even before it is cleaned
        pass
    assert cache.clean() == 2
    assert list(cache.folder.rglob("*~*")) == []


def _is_free(cache: Cache) -> bool:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("titans_train.data.cache._WAIT_SECONDS", 0.0)
        try:
            with cache.lock("shard"):
                return True
        except DataError:
            return False


def test_a_lock_file_that_cannot_be_made_is_an_error_with_a_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("titans_train.data.cache.FileLock.acquire", full)
    with (
        pytest.raises(DataError, match=r"lock file /.*/locks/\d+ \(No space left on device\); free .* set data\.cache"),
        Cache(tmp_path / "cache").lock("shard"),
    ):
        pass


def test_a_lock_that_a_stopped_process_holds_is_waited_for_with_a_limit(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    held, cache = processes().Event(), Cache(tmp_path / "cache")  # type: ignore[attr-defined]
    process, _ = start(hold_locks, cache, [f"{number:03}" for number in range(256)], held)
    assert held.wait(60)
    os.kill(process.pid, signal.SIGSTOP)
    monkeypatch.setattr("titans_train.data.cache._WAIT_SECONDS", 0.4)
    monkeypatch.setattr("titans_train.data.cache._SILENT_SECONDS", 0.2)
    try:
        with pytest.raises(
            DataError, match=r"locks/(\d+) was held by another process for 0 s.*find it with fuser /.*/locks/\1 and end"
        ):
            read_all(open_store(prepared, tmp_path))
        assert re.search(r"^waiting for /.*/locks/\d+, which another process", capsys.readouterr().err)
    finally:
        process.kill()
        process.join()
    assert read_all(open_store(prepared, tmp_path))
    assert capsys.readouterr().err == ""


def test_what_another_host_is_making_stays_for_a_day(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "cache")
    one, other = (cache.temporary(cache.make() / name) for name in ("one", "other"))
    foreign = [path.with_name(path.name.replace(host(), "0123456789abcdef")) for path in (one, other)]
    for path in foreign:
        path.write_bytes(b"half")
    os.utime(foreign[1], (time.time() - 90_000,) * 2)
    assert cache.clean() == 1
    assert foreign[0].exists() and not foreign[1].exists()


@pytest.fixture
def shared() -> Iterator[Path]:
    """A folder that everybody can reach."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o1777)
        yield Path(folder)


@root
@pytest.mark.parametrize("first", [0, NOBODY])
def test_two_users_share_a_cache_folder(prepared: Path, shared: Path, first: int) -> None:
    data = Path(shutil.copytree(prepared, shared / "data"))
    data.chmod(0o755)
    cache, expected = Cache(shared / "cache"), read_all(open_store(prepared, shared / "other"))
    for user in (first, NOBODY - first):
        assert finish(*start(as_user, user, read_as, data, cache)) == (0, expected)
    assert [path.name for path in sorted((shared / "cache").iterdir())] == ["u0", f"u{NOBODY}"]
    running = [start(as_user, user, read_as, data, Cache(shared / "both")) for user in (0, NOBODY, 0, NOBODY)]
    assert [finish(*one) for one in running] == [(0, expected)] * 4
    assert {path.stat().st_mode & 0o7777 for path in (shared / "both").iterdir()} == {0o700}


@root
def test_a_cache_that_cannot_be_written_is_refused(prepared: Path, shared: Path) -> None:
    data = Path(shutil.copytree(prepared, shared / "data"))
    data.chmod(0o755)
    (shared / "closed").mkdir(mode=0o755)
    (shared / "taken" / f"u{NOBODY}").mkdir(parents=True)
    (shared / "taken" / f"u{NOBODY}").chmod(0o777)
    text = finish(*start(as_user, NOBODY, read_as, data, Cache(shared / "closed")))
    assert text.startswith("DataError: cannot write to the data cache") and "set data.cache to another" in text
    text = finish(*start(as_user, NOBODY, read_as, data, Cache(shared / "taken")))
    assert f"belongs to user 0, this process runs as {NOBODY}; set data.cache" in text


@root
def test_a_full_disk_is_an_error_with_the_numbers(prepared: Path, tmp_path: Path) -> None:
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", str(folder)], capture_output=True).returncode:
        pytest.skip("no file system can be mounted here")
    try:
        (folder / "other").write_bytes(b"x" * 36_000)
        store = open_store(prepared, folder)
        with pytest.raises(DataError, match=r"the disk of the data cache .*\d MB free.*free space, set data\.cache"):
            read_all(store)
        assert not list(folder.rglob("*~*"))
        entries = read_manifest(prepared).splits["train"]["text"].shards
        limit = 3 * max(entry.raw.bytes + entry.stored.bytes for entry in entries)
        (folder / "other").unlink()
        shutil.rmtree(folder / "cache")
        limited = ShardStore(str(prepared), "train", Cache(folder / "cache", limit), None, QUICK)
        assert len(read_all(limited)) == limited.documents
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)
