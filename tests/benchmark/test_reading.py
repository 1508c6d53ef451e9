"""`benchmark reading` measures every block at every context, and shows that a Titans state does not grow."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.hostile.refusals import refused
from titans_train.benchmark import main
from titans_train.benchmark.reading import CONTEXTS

Capture = pytest.CaptureFixture[str]


def test_every_block_is_measured_and_a_titans_state_does_not_grow_with_the_context(
    tmp_path: Path, capsys: Capture
) -> None:
    path, picture = tmp_path / "r.json", tmp_path / "r.png"
    small = ["--layers", "1", "--width", "16", "--repeats", "2", "--decode", "3", "--attention-limit", "2048"]
    contexts = ["--contexts", "1024", "2048", "3072"]
    assert main(["reading", *small, *contexts, "--json", str(path), "--picture", str(picture)]) == 0
    found = json.loads(path.read_text())
    rows = {(r["block"], r["context"]): r for r in found["rows"]}
    titans = ("lmm", "mag", "mac", "mal")
    expected = {(block, context) for block in titans for context in (1024, 2048, 3072)}
    assert rows.keys() == expected | {("transformer", 1024), ("transformer", 2048)}
    for block in titans:
        assert len({rows[block, context]["state_bytes"] for context in (1024, 2048, 3072)}) == 1
    keys = 2 * 16 * 4 + 1  # of a token: key and value, and whether it counts
    assert [rows["transformer", c]["state_bytes"] for c in (1024, 2048)] == [1024 * keys, 2048 * keys]
    for row in found["rows"]:
        assert row["prefill_us"] > 0 and row["decode_us"] > 0 and row["peak_bytes"] >= 0 and row["parameters"] > 1000
    assert found["about"]["decode"] == 3 and found["about"]["seed"] == 0 and CONTEXTS[0] == 1024
    printed = capsys.readouterr().out
    assert "| mac | 3,072 |" in printed and "up to 2,048 tokens; left out: [3072]" in printed
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_what_cannot_be_measured_is_refused(tmp_path: Path, capsys: Capture) -> None:
    def error(*argv: str) -> str:
        return refused(capsys, "benchmark", "reading", *argv)

    assert "--contexts has 1000; all but the largest" in error("--contexts", "1000", "2048")
    assert "--decode is 0" in error("--decode", "0")
    assert "there is no folder" in error("--json", str(tmp_path / "a" / "b.json"))
    assert "is a folder" in error("--json", str(tmp_path))
    assert "ends in one of .png" in error("--picture", str(tmp_path / "a.foo"))
    assert "4 heads do not divide model.width 30" in error("--width", "30")
    assert "rotary positions need it even" in error("--blocks", "mag", "--width", "12")
    assert "--width is 0" in error("--width", "0")
    above = error("--blocks", "transformer", "--contexts", "100000")
    assert "--contexts are all above --attention-limit 65,536" in above
