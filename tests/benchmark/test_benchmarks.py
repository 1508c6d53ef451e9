"""The measuring commands run, write what they promise, and compare the same function."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from titans_train.benchmark import main
from titans_train.benchmark.dual_autograd import dual_autograd
from titans_train.benchmark.memory import CASES, by_length, operator_inputs
from titans_train.memory import MemoryState, memory_scan


@pytest.mark.parametrize("norm", [False, True])
def test_the_autograd_peer_computes_the_same_function_and_gradients(norm: bool) -> None:
    torch.manual_seed(0)
    inputs, weights, options = operator_inputs(64, norm)
    leaves = [*inputs, *weights, *options.values()]
    double = [t.detach().double().requires_grad_() for t in leaves]
    x, w, o = double[:6], double[6:8], dict(zip(options, double[8:], strict=True))
    state = MemoryState.start((w[0], w[1]))
    ours, _ = memory_scan(*x, state, chunk_size=16, **o)  # type: ignore[arg-type]
    peer = dual_autograd(*x, state, chunk_size=16, **o)  # type: ignore[arg-type]
    assert (ours - peer).abs().max() < 1e-12
    for a, b in zip(*(torch.autograd.grad(y.square().sum(), double) for y in (ours, peer)), strict=True):
        assert (a - b).abs().max() / b.abs().max() < 1e-11


def test_stability_reports_every_run_and_skips_those_it_has(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "stability.json"
    options = ["--blocks", "lmm", "mac", "--chunks", "64", "--long", "128", "--steps", "3", "--width", "16"]
    main(["stability", *options, "--layers", "1", "--json", str(path)])
    runs = json.loads(path.read_text())
    assert [(r["block"], r["steps"], r["finite"]) for r in runs] == [("lmm", 3, True), ("mac", 3, True)]
    assert 2 < runs[0]["unigram_entropy"] < 4.5 and runs[0]["memory"]["0"]["surprise"] > 0
    capsys.readouterr()
    main(["stability", *options, "--json", str(path)])
    assert capsys.readouterr().out == ""


def test_memory_measures_a_case_in_a_process_of_its_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    case = "ours, operator, b=16"
    assert main(["memory", "--rounds", "1", "--cases", case, "--json", str(tmp_path / "m.json")]) == 0
    figures = json.loads((tmp_path / "m.json").read_text())["cases"][case]
    assert figures["tokens_per_second"] > 10 and 0 < figures["utilisation"] < 1 and case in CASES
    assert 3 < figures["activation_kib_per_token"] < 15  # q, k, v and gates alone are 3.05
    assert case in capsys.readouterr().out


def test_memory_says_how_the_operator_changes_with_the_length() -> None:
    def figures(seconds: float) -> dict[str, float]:
        return {"seconds_per_token": seconds, "peak_mib": 160.0, "activation_kib_per_token": 4.25}

    lines = by_length({"ours, operator, b=64": figures(1e-4), "ours, operator, b=64, 16384": figures(1.05e-4)})
    assert lines == [
        "\nours, operator, b=64, 16384 / at 4096: 1.05x the time per token; "
        "10.0 KiB per token at the peak above the inputs, 4.2 kept with the inputs"
    ]


def test_an_unknown_benchmark_is_answered_with_the_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["nothing"]) == 2
    assert "parity" in capsys.readouterr().out
