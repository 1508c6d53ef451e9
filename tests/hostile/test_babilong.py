"""Files for `evaluate --task babilong`."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from tests.hostile.refusals import DEEP, little_memory, pickled, refused, zipped
from tests.inference.checkpoints import config, write_checkpoint

Capture = pytest.CaptureFixture[str]
GOOD = '{"input": "Mary went to the garden.", "question": "Where is Mary?", "target": "garden"}'


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(config(tmp_path_factory.mktemp("run") / "runs"))


def changed(name: str, value: object) -> str:
    return json.dumps(json.loads(GOOD) | {name: value})


# content of the file, and what the refusal says; the first record is good where a second is
BAD: dict[str, tuple[str | bytes, str]] = {
    "nothing": ("", "holds no record"),
    "an empty list": ("[]", "holds no record"),
    "spaces": (" \n" * 3_000_000, "holds no record"),
    "zeros": (b"\0" * 10_000_000, "record 1"),
    "a number": ("1", "record 1"),
    "words": (f"{GOOD}\nhello", "record 2"),
    "an object of objects": ('{"qa1": [' + GOOD + "]}", "record 1"),
    "a list of lists": (f"[[{GOOD}]]", "record 1"),
    "a list without commas": (f"[{GOOD} {GOOD}]", "record 2"),
    "a list without end": (f"[{GOOD}, {GOOD}", "record 3"),
    "a list that ends with a comma": (f"[{GOOD},]", "record 2"),
    "two lists": (f"[{GOOD}] [{GOOD}]", "follows the end of its list"),
    "lines with commas": (f"{GOOD},\n{GOOD}", "record 2"),
    "half a record": (f"{GOOD}\n{GOOD[:40]}", "record 2"),
    "a string without end": (GOOD + '{"input": "' + "x" * 5_000_000, "record 2"),
    "a deep list": (DEEP, "record 1"),
    "a deep object": ('{"a":' * 100_000, "record 1"),
    "deep within a record": (GOOD + '{"input": ' + DEEP, "record 2"),
    "NaN": (GOOD + changed("more", float("nan")), "record 2"),
    "a field twice": (f'{GOOD}{GOOD[:-1]}, "input": "x"}}', "record 2"),
    "no target": (GOOD + '{"input": "x", "question": "y"}', "record 2"),
    "an empty target": (changed("target", " \n"), "record 1"),
    "an empty question": (changed("question", ""), "record 1"),
    "a number as target": (changed("target", 3), "record 1"),
    "null as text": (changed("input", None), "record 1"),
    "a list as text": (changed("input", ["x"]), "record 1"),
    "half a surrogate pair": (changed("input", "\ud800"), "record 1"),
    "a control character": (GOOD.replace("Mary went", "Mary\x1b[2Jwent"), "record 1"),
    "bytes that are no UTF-8": (GOOD.encode() + GOOD.encode().replace(b"garden", b"g\xff"), "record 2"),
    "UTF-16": (GOOD.encode("utf-16"), "record 1"),
    "a byte order mark": (GOOD.encode("utf-8-sig"), "begins with a byte order mark"),
    "a number of thousands of digits": (f'{GOOD}{GOOD[:-1]}, "more": {"9" * 5000}}}', "record 2"),
    "a list with such a number": (f"[{GOOD}, {'9' * 5000}]", "record 2"),
    "an archive": (zipped(b"x"), "record 1"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_is_refused_by_its_record(name: str, checkpoint: Path, tmp_path: Path, capsys: Capture) -> None:
    content, problem = BAD[name]
    (tmp_path / "qa1").mkdir()
    (tmp_path / "qa1" / "4k.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    with little_memory():
        error = refused(capsys, "evaluate", str(checkpoint), "--task", "babilong", "--folder", str(tmp_path))
    assert problem in error and "4k.json" in error


def test_what_is_no_file_is_refused_and_nothing_is_unpickled(checkpoint: Path, tmp_path: Path, capsys: Capture) -> None:
    path, mark = tmp_path / "qa1" / "4k.json", tmp_path / "mark"
    path.parent.mkdir()
    command = ["evaluate", str(checkpoint), "--task", "babilong", "--folder", str(tmp_path)]
    os.mkfifo(path)
    assert "regular file" in refused(capsys, *command)
    path.unlink()
    path.mkdir()
    assert "regular file" in refused(capsys, *command)
    path.rmdir()
    path.symlink_to("/dev/zero")
    assert "regular file" in refused(capsys, *command)
    path.unlink()
    path.write_bytes(pickled(mark))
    assert "record 1" in refused(capsys, *command)
    assert not mark.exists()


def test_an_endless_record_is_refused_before_it_is_held(checkpoint: Path, tmp_path: Path, capsys: Capture) -> None:
    path = tmp_path / "qa1" / "4k.json"
    path.parent.mkdir()
    with path.open("wb") as file:
        file.write(b'{"input": "')
        for _ in range(3):
            file.write(b"x" * (100 << 20))
    with little_memory(2 << 30):
        error = refused(capsys, "evaluate", str(checkpoint), "--task", "babilong", "--folder", str(tmp_path))
    assert "record 1" in error and "larger than" in error
    path.unlink()


@pytest.mark.parametrize("name", ["../x", "qa0", "qa1/../..", "qa1\x1b[2J", "qa100", ""])
def test_a_name_that_is_no_task_is_refused(name: str, checkpoint: Path, tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "qa1").mkdir()
    (tmp_path / "qa1" / "4k.json").write_text(GOOD)
    command = ["evaluate", str(checkpoint), "--task", "babilong", "--folder", str(tmp_path)]
    for option in ("--tasks", "--lengths"):
        assert "names no task or length" in refused(capsys, *command, option, name)
