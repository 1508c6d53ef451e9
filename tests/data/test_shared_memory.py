"""Shared memory of a run that was killed with all its helpers is removed at the next start; that of others is not."""

import errno
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from tests.data.folders import open_store
from titans_train.data.cache import clean_shared_memory, note_shared_memory
from titans_train.data.shared_memory import remove

SHARED = Path("/dev/shm")


def start(temporary: Path) -> tuple[subprocess.Popen[str], list[Path]]:
    """A process in a group of its own, with its resource tracker, and what it holds."""
    code = f"from tests.data.workers import hold_shared_memory; hold_shared_memory({str(temporary)!r})"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert process.stdout is not None
    held = [SHARED / name for name in process.stdout.readline().split()]
    assert len(held) > 3 and all(path.exists() for path in held)
    return process, held


def kill(process: subprocess.Popen[str]) -> None:
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs /dev/shm")
def test_what_a_killed_group_of_processes_held_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By any next start of this user, whatever its cache."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    (dead, left), (living, used) = start(tmp_path), start(tmp_path)
    try:
        assert clean_shared_memory() == 0
        kill(dead)
        assert all(path.exists() for path in left)  # nobody was there to remove them
        torn = SHARED / f"torch_{dead.pid}_1_2"  # its name lives for a moment only
        torn.touch()
        assert clean_shared_memory() == len(left) + 1
        assert not torn.exists() and not any(path.exists() for path in left)
        assert all(path.exists() for path in used)
        assert clean_shared_memory() == 0
    finally:
        kill(living)
        assert clean_shared_memory() == len(used)
    (notes,) = tmp_path.iterdir()
    assert notes.name == f"titans-{os.getuid()}" and notes.stat().st_mode & 0o7777 == 0o700
    assert list(notes.iterdir()) == []


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs /dev/shm")
def test_the_start_of_another_run_removes_it(prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    dead, left = start(tmp_path)
    kill(dead)
    open_store(prepared, tmp_path / "new run")
    assert not any(path.exists() for path in left)


def test_a_process_has_one_note(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    for _ in range(3):
        note_shared_memory()
    (note,) = tmp_path.glob("*/*")
    assert clean_shared_memory() == 0 and note.exists()  # it lives


def test_a_folder_of_notes_that_others_may_write_to_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    folder = tmp_path / f"titans-{os.getuid()}"
    folder.mkdir()
    folder.chmod(0o777)
    note_shared_memory()
    assert list(folder.iterdir()) == [] and clean_shared_memory() == 0
    folder.rmdir()
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    folder.symlink_to(tmp_path / "elsewhere")
    note_shared_memory()
    assert list(folder.iterdir()) == [] and clean_shared_memory() == 0


def test_a_note_that_cannot_be_written_ends_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(Path, "write_text", full)
    note_shared_memory()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "none"))
    note_shared_memory()
    assert clean_shared_memory() == 0


def test_a_note_that_was_cut_short_removes_nothing() -> None:
    for text in ("", "{", '{"semaphores": 3}', "[]"):
        assert remove(text) == 0
