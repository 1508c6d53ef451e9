"""`benchmark compare` says what became worse, and by how much; and figures are written without names of machines."""

from __future__ import annotations

import json
from math import inf
from pathlib import Path
from typing import Any

import pytest

from tests.hostile.refusals import refused
from titans_train.benchmark import main
from titans_train.benchmark.compare import changes
from titans_train.benchmark.record import about, command, read, write

Capture = pytest.CaptureFixture[str]
SLOW = {"tokens_per_second": 100.0, "peak_mib": 10.0, "chunk": 16, "how": "dual", "rounds": [{"peak_mib": 9.0}]}
FAST = {"tokens_per_second": 250.0, "peak_mib": 16.0, "chunk": 16, "how": "dual", "rounds": [{"peak_mib": 1.0}]}


def files(folder: Path, old: dict[str, Any], new: dict[str, Any], device: str = "A") -> list[str]:
    what = {"device": "A", "date": "2026-01-01", "versions": {"torch": "2.12"}}
    write(folder / "old.json", what, old)
    write(folder / "new.json", what | {"device": device, "date": "2026-01-02", "versions": {"torch": "2.13"}}, new)
    return [str(folder / "old.json"), str(folder / "new.json")]


def test_more_tokens_are_better_and_more_memory_is_worse(tmp_path: Path, capsys: Capture) -> None:
    paths = files(tmp_path, {"a": SLOW, "gone": SLOW}, {"a": FAST, "come": FAST})
    assert main(["compare", *paths]) == 0
    said = capsys.readouterr().out
    assert "| a | tokens_per_second | 100 | 250 | 2.500 | 2.50x better |" in said
    assert "| a | peak_mib | 10 | 16 | 1.600 | 1.60x worse |" in said
    assert "| a | chunk | 16 | 16 | 1.000 |  |" in said and "how" not in said
    assert "differs in torch: 2.12 -> 2.13" in said and "date" not in said and "devices" not in said
    assert f"only in {paths[0]}: gone" in said and f"only in {paths[1]}: come" in said


def test_what_is_worse_by_more_than_the_limit_fails(tmp_path: Path, capsys: Capture) -> None:
    paths = files(tmp_path, {"a": SLOW}, {"a": FAST}, device="B")
    assert main(["compare", *paths, "--fail-over", "1.7"]) == 0
    assert main(["compare", *paths, "--fail-over", "1.5"]) == 1
    said = capsys.readouterr().out
    assert "more than 1.5x worse: a, peak_mib: 1.60x worse" in said and "more than 1.7x" not in said
    assert "the devices differ, or" in said and "differs in device: A -> B" in said
    assert main(["compare", *reversed(paths), "--fail-over", "2"]) == 1  # 2.5 times fewer tokens


def test_nothing_left_is_infinitely_worse_and_sizes_are_neither_better_nor_worse() -> None:
    for metric, old, new, worse in (
        ("peak_mib", 0.0, 5.0, inf), ("peak_mib", 5.0, 0.0, 0.0), ("peak_mib", 0.0, 0.0, None),
        ("tokens_per_second", 5.0, 0.0, inf), ("chunk", 1.0, 100.0, None),
    ):  # fmt: skip
        (change,) = changes({"a": {metric: old}}, {"a": {metric: new}})
        assert change.worse == worse and change.verdict == {inf: "infx worse", 0.0: "better", None: ""}[worse]


def test_a_case_or_a_metric_that_is_gone_fails(tmp_path: Path) -> None:
    less = {name: value for name, value in FAST.items() if name != "peak_mib"}
    for new in ({"a": FAST}, {"a": FAST, "b": less}):
        paths = files(tmp_path, {"a": FAST, "b": FAST}, new)
        assert main(["compare", *paths]) == 0 and main(["compare", *paths, "--fail-over", "9"]) == 1


def test_what_is_no_file_of_figures_is_refused(tmp_path: Path, capsys: Capture) -> None:
    good, other, bad = tmp_path / "good.json", tmp_path / "other.json", tmp_path / "bad.json"
    write(good, {}, {"a": SLOW})
    write(other, {}, {"b": SLOW})
    for content, why in (("{", "is not JSON"), ("[]", "has no metrics by case"), ('{"cases": [1]}', "has no metrics")):
        bad.write_text(content)
        assert why in refused(capsys, "benchmark", "compare", str(good), str(bad))
    missing = refused(capsys, "benchmark", "compare", str(tmp_path / "none.json"), str(good))
    assert "none.json cannot be read: No such file" in missing and "--json" in missing
    assert "no metric of a case in common" in refused(capsys, "benchmark", "compare", str(good), str(other))
    limit = refused(capsys, "benchmark", "compare", str(good), str(good), "--fail-over", "0.5")
    assert "--fail-over is 0.5; it is at least 1" in limit


def test_a_record_repeats_its_command_and_names_no_folder_of_the_machine(tmp_path: Path) -> None:
    argv = ["--json", str(tmp_path / "x.json"), "data.path=/home/me/data", "configs/a.yaml", "--cases", "two words"]
    assert command("layers", argv) == (
        "python -m titans_train benchmark layers --json x.json data.path=data configs/a.yaml --cases 'two words'"
    )
    what = about("layers", argv, "cpu", "float32", rows=2)
    assert what["threads"] == 1 and what["rows"] == 2 and what["device"] and len(what["date"]) == 10
    assert {"python", "torch", "titans-train"} <= what["versions"].keys()
    write(tmp_path / "x.json", what, {"a": SLOW})
    assert read(tmp_path / "x.json") == (what, {"a": SLOW})
    assert str(tmp_path) not in json.dumps(what)
