"""Shared memory of a run that was killed with all its helpers is removed at the next start; that of others is not."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from titans_train.data.cache import Cache
from titans_train.data.shared_memory import remove

SHARED = Path("/dev/shm")


def start(cache: Path) -> tuple[subprocess.Popen[str], list[Path]]:
    """A process in a group of its own, with its resource tracker, and what it holds."""
    code = f"from tests.data.workers import hold_shared_memory; hold_shared_memory({str(cache)!r})"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert process.stdout is not None
    held = [SHARED / name for name in process.stdout.readline().split()]
    assert len(held) > 3 and all(path.exists() for path in held)
    return process, held


def kill(process: subprocess.Popen[str]) -> None:
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs /dev/shm")
def test_what_a_killed_group_of_processes_held_is_removed(tmp_path: Path) -> None:
    (dead, left), (living, used) = start(tmp_path), start(tmp_path)
    try:
        assert Cache(tmp_path).clean() == 0
        kill(dead)
        assert all(path.exists() for path in left)  # nobody was there to remove them
        torn = SHARED / f"torch_{dead.pid}_1_2"  # its name lives for a moment only
        torn.touch()
        assert Cache(tmp_path).clean() == len(left) + 1
        assert not torn.exists() and not any(path.exists() for path in left)
        assert all(path.exists() for path in used)
        assert Cache(tmp_path).clean() == 0
    finally:
        kill(living)
        assert Cache(tmp_path).clean() == len(used)


def test_a_note_that_was_cut_short_removes_nothing() -> None:
    for text in ("", "{", '{"semaphores": 3}', "[]"):
        assert remove(text) == 0
