"""Counts of operator calls, FLOPs and bytes: what a clock cannot say on a busy machine. They fail on a regression."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from titans_train.__main__ import main
from titans_train.benchmark.counts import Counts, count, operator

# Of one token, forward and backward, 4 heads of 64, hidden 256, 2 layers, 1,024 tokens, a state every 16 chunks
COMMITTED = {
    16: Counts(calls=21.06, flops=6_733_824, bytes=3_335_095),
    64: Counts(calls=5.93, flops=7_839_744, bytes=1_706_390),
}
MOST = 1.5  # times the committed counts, before it is a regression
LEAST = 0.9  # below this they are to be committed anew


@pytest.mark.parametrize("chunk", COMMITTED)
def test_the_operator_takes_no_more_calls_flops_or_bytes_than_it_did(chunk: int) -> None:
    found = count(operator("dual", 4, 64, 256, chunk, 1024)).per(1024)
    for name, was in vars(COMMITTED[chunk]).items():
        assert LEAST * was <= getattr(found, name) <= MOST * was, (name, getattr(found, name), was)


def test_flops_are_those_of_the_formula_and_bytes_those_of_operands_and_results() -> None:
    a, b, out = (torch.empty(2, 8, 8, device="meta") for _ in range(3))
    found = count(lambda: out.baddbmm_(a, b).mT.unsqueeze(0).add(1))
    assert found == Counts(2, 2 * 2 * 8**3, 4 * 128 * (3 + 1 + 1 + 1))  # views are no calls


def test_a_roofline_names_what_bounds_each_way(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, picture = tmp_path / "roofline.json", tmp_path / "roofline.png"
    options = ["--sizes", "340M", "--expansions", "2", "--chunks", "16", "256", "--json", str(out)]
    assert main(["benchmark", "roofline", *options, "--picture", str(picture)]) == 0
    found, said = json.loads(out.read_text()), capsys.readouterr().out
    assert list(found["cases"])[0] == "340M, hidden 128, chunk 16, recurrence" and found["about"]["rows"] == 1
    cases = list(found["cases"].values())
    assert [(r["chunk"], r["how"]) for r in cases] == [
        (16, "recurrence"), (16, "dual"), (16, "compiled"), (16, "triton"), (256, "recurrence"), (256, "dual"),
        (256, "compiled"), (256, "triton"),
    ]  # fmt: skip
    for r in cases:
        assert f"| {r['chunk']} | {r['how']} |" in said
        assert r["seconds"]["65536"] == 65536 * max(r["floors"].values())
    recurrence, dual, compiled, triton = cases[:4]
    assert recurrence["cache"] > 4 * dual["cache"] > 4 * triton["cache"]
    assert dual["flops"] > compiled["flops"] > 66 * 64 * 128
    assert dual["flops"] >= 66 * 64 * 128 and picture.stat().st_size > 1000
