"""A run that ends on the way, however it ends: nothing is lost, nothing is doubled, no process stays."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from data_prep import space
from data_prep.errors import PrepareError
from tests.data_prep.runs import OPTIONS, content, prepare, start, wait_for, wait_until_gone, write_corpus

Capture = pytest.CaptureFixture[str]


def units(work: Path) -> int:
    return len(list((work / "units").glob("*.json")))


def shards(work: Path) -> int:
    return len(list((work / "shards").rglob("*.json")))


MOMENTS: dict[str, Callable[[Path], bool]] = {
    "at the start": lambda work: work.is_dir(),
    "while the first units are read": lambda work: units(work) >= 1,
    "in the middle of tokenising": lambda work: units(work) >= 6,
    "before the last units": lambda work: units(work) >= 11,
    "with the first shard": lambda work: shards(work) >= 1,
    "before the last shards": lambda work: shards(work) >= 20,
    "when the manifest is written": lambda work: (work / "output" / "report.md").exists(),
}


def test_kills_at_any_moment_change_nothing(texts: Path, whole: dict[str, bytes], tmp_path: Path) -> None:
    work = tmp_path / ".out.partial"
    for moment, reached in MOMENTS.items():
        process = start(texts, tmp_path / "out", "--workers", "2")
        wait_for(lambda reached=reached: reached(work), process)  # type: ignore[misc]
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL, moment
        wait_until_gone(process.pid)
        assert not (tmp_path / "out").exists()
    assert prepare(texts, tmp_path / "out") == 0
    assert content(tmp_path / "out") == whole
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_signal_to_all_processes_ends_them_and_says_how_to_go_on(
    number: signal.Signals, texts: Path, whole: dict[str, bytes], tmp_path: Path, capsys: Capture
) -> None:
    """As Ctrl-C in a terminal, or a batch system that ends a job."""
    process = start(texts, tmp_path / "out", "--workers", "2")
    wait_for(lambda: units(tmp_path / ".out.partial") >= 3, process)
    os.killpg(process.pid, number)
    _, error = process.communicate(timeout=20)
    assert process.returncode == 128 + number
    assert error == (
        f"data_prep: stopped; what is done is kept in {tmp_path / '.out.partial'}: run the same command again to go "
        "on\n"
    )
    wait_until_gone(process.pid)
    capsys.readouterr()
    assert prepare(texts, tmp_path / "out") == 0
    assert " of 12 units were tokenised before" in capsys.readouterr().out
    assert content(tmp_path / "out") == whole


def test_a_full_disk_keeps_what_is_done(texts: Path, whole: dict[str, bytes], tmp_path: Path) -> None:
    """Here no file may grow beyond 100 kilobytes, less than a unit's tokens."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    command = [sys.executable, "-B", "-m", "data_prep", "--input", str(texts), "--output", str(tmp_path / "out")]
    done = subprocess.run([*command, *OPTIONS], preexec_fn=limit, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert "File too large; what is done is kept in" in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()
    assert prepare(texts, tmp_path / "out") == 0
    assert content(tmp_path / "out") == whole


def stopped(texts: Path, output: Path, reached: Callable[[Path], bool]) -> Path:
    """The working folder of a run that was killed."""
    work = output.parent / f".{output.name}.partial"
    process = start(texts, output, "--workers", "2")
    wait_for(lambda: reached(work), process)
    process.kill()
    process.communicate()
    wait_until_gone(process.pid)
    return work


def test_damaged_intermediates_are_made_anew(texts: Path, whole: dict[str, bytes], tmp_path: Path) -> None:
    """Tokens, table and rejected records of three units: cut short, and with another byte."""
    work = stopped(texts, tmp_path / "out", lambda work: units(work) >= 8)
    tokens, documents, rejected = (
        sorted((work / "units").glob(f"*.{kind}"))[number]
        for number, kind in enumerate(("tokens", "documents", "json"))
    )
    tokens.write_bytes(tokens.read_bytes()[:-2])
    data = bytearray(documents.read_bytes())
    data[0] ^= 1
    documents.write_bytes(data)
    rejected.write_text(rejected.read_text()[:-10])
    other = sorted((work / "units").glob("*.tokens"))[3]
    data = bytearray(other.read_bytes())
    data[100] ^= 1
    other.write_bytes(data)
    assert prepare(texts, tmp_path / "out") == 0
    assert content(tmp_path / "out") == whole


def test_lost_and_damaged_shards_are_made_anew(
    texts: Path, whole: dict[str, bytes], tmp_path: Path, capsys: Capture
) -> None:
    work = stopped(texts, tmp_path / "out", lambda work: shards(work) >= 9)
    first, second, third = sorted((work / "output").rglob("*.zstd"))[:3]
    first.unlink()
    second.write_bytes(second.read_bytes()[:-1])
    data = bytearray(third.read_bytes())
    data[len(data) // 2] ^= 1
    third.write_bytes(data)
    count = shards(work)
    assert prepare(texts, tmp_path / "out") == 0
    assert f"\n{count - 3} of " in capsys.readouterr().out
    assert content(tmp_path / "out") == whole


def test_work_of_other_settings_is_refused_and_can_be_thrown_away(texts: Path, tmp_path: Path, capsys: Capture) -> None:
    work = stopped(texts, tmp_path / "out", lambda work: units(work) >= 2)
    assert prepare(texts, tmp_path / "out", "--seed", "1") == 2
    error = capsys.readouterr().err
    assert f"{work} holds unfinished work of other settings or another input (seed 0, now 1)" in error
    assert "--restart to throw it away" in error and units(work) >= 2
    assert prepare(texts, tmp_path / "out", "--seed", "1", "--restart") == 0
    assert "tokenised before" not in capsys.readouterr().out
    assert prepare(texts, tmp_path / "other", "--seed", "1") == 0
    assert content(tmp_path / "out") == content(tmp_path / "other")


def test_files_that_changed_since_the_work_began_are_named(tmp_path: Path, capsys: Capture) -> None:
    corpus = write_corpus(tmp_path / "texts", megabytes=0.3)
    with (corpus / "a.jsonl").open("a") as stream:
        stream.write("{broken\n")
    assert prepare(corpus, tmp_path / "out", "--max-bad-share", "0") == 2
    (corpus / "a.jsonl").write_text('{"text": "other"}\n')
    (corpus / "b.jsonl").unlink()
    for name in "cde":
        (corpus / f"{name}.jsonl").write_text('{"text": "new"}\n')
    capsys.readouterr()
    assert prepare(corpus, tmp_path / "out") == 2
    error = capsys.readouterr().err
    changes = f"{corpus}/a.jsonl changed, {corpus}/b.jsonl vanished, {corpus}/c.jsonl appeared and 2 more"
    assert f": {changes}); give the same ones to go on with it" in error


def test_other_settings_begin_anew_where_nothing_is_finished(
    texts: Path, whole: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(needs: object) -> None:
        raise PrepareError("no room")

    work = tmp_path / "work"
    with monkeypatch.context() as patch:
        patch.setattr(space, "check_free_space", refuse)
        assert prepare(texts, tmp_path / "first", "--work", str(work), "--seed", "1") == 2
    assert work.is_dir() and units(work) == 0
    assert prepare(texts, tmp_path / "out", "--work", str(work)) == 0
    assert content(tmp_path / "out") == whole
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_killed_processes_left_in_shared_memory_is_removed(texts: Path, tmp_path: Path) -> None:
    """Also the resource tracker is killed, which would have removed it."""
    work = tmp_path / ".out.partial"
    process = start(texts, tmp_path / "out", "--workers", "2")
    wait_for(lambda: units(work) >= 1, process)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    wait_until_gone(process.pid)
    noted = json.loads((work / "shared_memory.json").read_text())["semaphores"]
    left = [path for path in (Path("/dev/shm") / name for name in noted) if path.exists()]
    assert len(left) >= 3
    assert prepare(texts, tmp_path / "out") == 0
    assert not any(path.exists() for path in left)


def test_the_working_folder_may_lie_elsewhere(texts: Path, whole: dict[str, bytes], tmp_path: Path) -> None:
    process = start(texts, tmp_path / "a" / "out", "--work", str(tmp_path / "b" / "work"), "--workers", "2")
    wait_for(lambda: units(tmp_path / "b" / "work") >= 3, process)
    process.kill()
    process.communicate()
    wait_until_gone(process.pid)
    assert prepare(texts, tmp_path / "a" / "out", "--work", str(tmp_path / "b" / "work")) == 0
    assert content(tmp_path / "a" / "out") == whole
    assert sorted(path.name for path in tmp_path.rglob("*") if path.parent.name in "ab") == ["out"]


def test_a_foreign_working_folder_is_left_alone(texts: Path, tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.txt").write_text("precious")
    for more in ((), ("--restart",)):
        assert prepare(texts, tmp_path / "out", "--work", str(tmp_path / "thesis"), *more) == 2
        assert "holds something else; name an empty folder" in capsys.readouterr().err
    assert (tmp_path / "thesis" / "thesis.txt").read_text() == "precious"
