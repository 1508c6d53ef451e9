"""`benchmark layers` measures what it says: time, memory, what is kept from forward to backward, FLOPs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.hostile.refusals import refused
from titans_train.benchmark import main
from titans_train.benchmark.cost import Work, counting_kept
from titans_train.benchmark.layer_cases import LABELS, LAYER_PEERS, Sizes, flops_of, prepared, shape_of
from titans_train.benchmark.layers import cases_of, parser, ratios
from titans_train.benchmark.memory import DIM, HEADS, HIDDEN, operator_flops

SMALL = Sizes(dim=32, heads=2, window=32)


def test_every_case_is_measured_in_a_process_of_its_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "layers.json"
    small = ["--dim", "32", "--heads", "2", "--lengths", "64", "--chunks", "16", "--rounds", "1"]
    assert main(["layers", *small, "--blocks", "lmm", "transformer", "--json", str(path)]) == 0
    found = json.loads(path.read_text())
    assert list(found["cases"]) == ["LMM, b=16, L=64", "Transformer++, L=64"]
    for figures in found["cases"].values():
        assert figures["tokens_per_second"] > 10 and figures["peak_mib"] >= 0 and 0 < figures["utilisation"] < 1
        assert figures["seconds_per_token"] == pytest.approx(1 / figures["tokens_per_second"])
        assert figures["activation_kib_per_token"] > 32 * 4 / 1024 and len(figures["rounds"]) == 1
    assert found["about"]["command"].endswith("--json layers.json") and found["about"]["threads"] == 1
    said = capsys.readouterr().out
    assert "| LMM, b=16, L=64 |" in said and "LMM, b=16, L=64 / Transformer++: " in said


@pytest.mark.gpu
def test_every_block_is_measured_on_a_gpu(tmp_path: Path) -> None:
    path, blocks = tmp_path / "layers.json", [what for what in LABELS if what not in LAYER_PEERS]
    small = ["--dim", "256", "--heads", "4", "--lengths", "1024", "--window", "256", "--rounds", "1"]
    where = ["--device", "cuda", "--dtype", "bfloat16", "--batch", "2"]
    assert main(["layers", *small, *where, "--blocks", *blocks, "--json", str(path)]) == 0
    found = json.loads(path.read_text())
    assert len(found["cases"]) == len(blocks) and found["about"]["device"] == torch.cuda.get_device_name()
    for figures in found["cases"].values():
        assert 0 < figures["utilisation"] < 1 and figures["peak_mib"] > 0 and figures["activation_kib_per_token"] > 0


@pytest.mark.parametrize("what", [what for what in LABELS if what not in LAYER_PEERS])
def test_what_is_kept_for_a_token_does_not_grow_with_the_length(what: str) -> None:
    """Between lengths of whole segments and whole blocks of a window; but for what is there once."""

    def kept(length: int) -> float:
        shape = shape_of(what, 16, length, SMALL)
        return prepared(what, shape, 16, SMALL)(length).kept_bytes()

    short, middle, long = kept(512), kept(1024), kept(1536)
    assert long - middle == pytest.approx(middle - short, rel=0.01) and long - middle < 512 * 100 * 1024


def test_storages_that_are_kept_count_once_and_parameters_do_not() -> None:
    x, w = torch.randn(8, 4, requires_grad=True), torch.randn(4, 4, requires_grad=True)
    with counting_kept([w]) as kept:
        y = (x @ w).exp()
        z = y * y.view(8, 4)
    assert sum(kept.values()) == 2 * 8 * 4 * 4  # x, and y once for the exponential and for the product
    work = Work(lambda: (x @ w).exp(), [x, w], [w])
    assert work.kept_bytes() == 2 * 8 * 4 * 4 and x.grad is None and z.requires_grad


def test_flops_of_blocks_are_those_of_their_products() -> None:
    sizes = Sizes(DIM, HEADS)
    shape, length = shape_of("transformer", 64, 4096, sizes), 4096
    assert shape is not None
    attention = 12 * DIM * (length + 1) / 2  # causal: half of all keys
    assert flops_of("transformer", shape, length) == 6 * (4 * DIM**2 + 3 * DIM * 704) + attention
    for chunk in (16, 64):
        shape = shape_of("lmm", chunk, length, sizes)
        assert shape is not None and shape.memory is not None and shape.memory.hidden == HIDDEN
        layer = flops_of("layer", shape, length)
        assert layer == flops_of("lmm", shape, length) - 6 * 3 * DIM * 704
        projections = 6 * (5 * DIM**2 + 3 * DIM * HEADS)
        assert operator_flops(chunk) + projections < layer < 1.01 * (operator_flops(chunk) + projections)


def test_ratios_stand_beside_full_attention_of_the_same_length_and_layers_beside_layers() -> None:
    blocks = ["lmm", "layer", "transformer", "titans_pytorch"]
    options = parser().parse_args(["--lengths", "64", "128", "--chunks", "8", "16", "--blocks", *blocks])
    cases = cases_of(options)
    results = {name: {"tokens_per_second": float(n + 1), "peak_mib": 2.0} for n, name in enumerate(cases)}
    lines = ratios(cases, results)
    assert [line.partition(":")[0] for line in lines] == [
        f"{name}, L={length} / {beside}"
        for length in (64, 128)
        for name, beside in [
            ("LMM, b=8", "Transformer++"), ("LMM, b=16", "Transformer++"),
            ("LMM layer alone, b=8", "titans-pytorch layer, exact, b=8"),
            ("LMM layer alone, b=16", "titans-pytorch layer, exact, b=16"),
        ]
    ]  # fmt: skip
    assert lines[0].endswith(": 0.20x the tokens/s, 1.00x the memory")


def test_what_cannot_be_measured_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def error(*argv: str) -> str:
        return refused(capsys, "benchmark", "layers", *argv)

    assert "4 heads do not divide model.width 30" in error("--dim", "30")
    assert "100 is not a multiple of memory.chunk_size 64" in error("--lengths", "100")
    assert "--chunks has 0; it is at least 1" in error("--chunks", "0")
    assert "there is no folder" in error("--json", str(tmp_path / "a" / "b.json"))
    if not torch.cuda.is_available():
        assert "torch sees no GPU" in error("--device", "cuda")
        assert "memory.kernels is triton" in error("--kernels", "triton")
