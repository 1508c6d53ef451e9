"""The eye on a trainer's files sees each thing that is done to a checkpoint, and can kill at any of them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.torchrun import ROOT

SAVES = """
import os, shutil, sys
from pathlib import Path
from titans_train.benchmark.faults.observed import Files, Notes
folder = Path(sys.argv[1])
die = {"after": "step-2", "rank": 0, "number": int(sys.argv[2]), "all": False}
Files(Notes(folder.parent, "files"), str(folder), die).start()
for step in (1, 2):
    temporary = folder / f"step-{step}.tmp"
    temporary.mkdir()
    with (temporary / "part").open("wb") as file:
        file.write(b"part")
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(folder / f"step-{step}")
    (folder.parent / "elsewhere").write_text("not a checkpoint")
shutil.rmtree(folder / "step-1")
"""
DONE = [
    ("mkdir", "step-2.tmp"), ("open w", "step-2.tmp/part"), ("fsync", "step-2.tmp/part"), ("rename", "step-2.tmp"),
]  # fmt: skip


def saved(folder: Path, number: int) -> tuple[int, list[dict[str, Any]]]:
    """Exit status of a process that saves two checkpoints, and what was seen of the second."""
    (folder / "checkpoints").mkdir(parents=True)
    command = [sys.executable, "-c", SAVES, str(folder / "checkpoints"), str(number)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert not done.stderr
    lines = (folder / "files-0.jsonl").read_text().splitlines()
    return done.returncode, [json.loads(line) for line in lines]


def test_everything_that_is_done_to_files_of_a_checkpoint_is_seen_in_order(tmp_path: Path) -> None:
    status, seen = saved(tmp_path, -1)
    assert status == 0
    assert [(event["event"], event["path"]) for event in seen][:4] == DONE
    assert ("remove", "step-1/part") in [(event["event"], event["path"]) for event in seen[4:]]
    assert ("rmdir", "step-1") in [(event["event"], event["path"]) for event in seen[4:]]


def test_a_process_is_killed_right_before_the_event_that_is_asked_for(tmp_path: Path) -> None:
    for number, (event, _) in enumerate(DONE):
        status, seen = saved(tmp_path / str(number), number)
        checkpoints = tmp_path / str(number) / "checkpoints"
        assert status == -9 and len(seen) == number, event
        assert (checkpoints / "step-2.tmp").exists() == (number > 0)
        assert (checkpoints / "step-2.tmp" / "part").exists() == (number > 1)
        assert not (checkpoints / "step-2").exists() and (checkpoints / "step-1").exists()
