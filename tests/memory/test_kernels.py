"""The scan's Triton kernels: the exactness tests of test_scan.py and their error in float32, in Triton's interpreter on
the CPU; compiled for a GPU that is not there; on a GPU (marked gpu) exact to what TF32 or bfloat16 allow.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from tests.memory.kernel_cases import cast, counted_launches, errors, results, tame
from tests.memory.test_scan import Case
from titans_train.errors import UserError
from titans_train.memory import memory_scan
from titans_train.memory.kernels import check, choose
from titans_train.shape import beyond_kernels, part_tokens, tile, triton_tokens

FLOOR = 1e-6  # eight roundings of a float32: sums in another order
CHIP = 227 << 10  # bytes of shared memory that a program may have on an H100
# Bytes of a thread's numbers outside registers, a tenth above what there is
STACK, EXACT_STACK, EXACT_WIDE_STACK = 3200, 4800, 5600  # products in float32; of heads 256 wide
ROOT = Path(__file__).parents[2]
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


def interpreted(*command: str) -> str:
    return python(*command, KERNELS="triton", TRITON_INTERPRET="1")


def python(*command: str, **variables: str) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **variables}
    done = subprocess.run(
        [sys.executable, "-m", *command], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


@needs_triton
def test_the_kernels_pass_the_exactness_tests_of_the_scan() -> None:
    chosen = "every_depth and silu and (-1- or -2-) or extreme or 33-16 or documents_take and not 13 or switched_off"
    chosen += " or several_parts"
    said = interpreted("pytest", "-q", "tests/memory/test_scan.py", "-k", chosen)
    assert "passed" in said and "failed" not in said


@needs_triton
def test_their_error_is_at_most_twice_that_of_plain_pytorch() -> None:
    """Of segments of many chunks and of one."""
    found = json.loads(interpreted("tests.memory.interpreted_scan").splitlines()[-1])
    for case in found.values():
        assert case["launches"] == 3  # forward, again before the backward, backward
        assert case["plain"].keys() == case["triton"].keys()
        for name, error in case["triton"].items():
            assert 0 < error <= max(2 * case["plain"][name], FLOOR), (name, error, case["plain"][name])


@needs_triton
@pytest.mark.parametrize(
    "groups",
    [
        ["64 of 256 x 64", "48 x 64, depth 1;32 of 256 x 128, depth 1;16 x 64;exact, 32 x 128, depth 1"],
        pytest.param(
            [
                "64 x 64;32 x 128;48 x 64;16 of 64 x 256;16 of 64 x 256, depth 1",
                "exact, 32 of 64 x 64;exact, 32 x 64;exact, 32 x 128;exact, 16 of 64 x 256",
            ],
            marks=pytest.mark.long,
        ),
    ],
    ids=["some", "others"],
)
def test_they_compile_for_a_gpu_and_fit_on_its_chip(groups: list[str], tmp_path: Path) -> None:
    """As they are launched: at most what a chip has of shared memory, few numbers outside registers, and all registers
    used for them: where ptxas finds no way to share them out it gives up and uses 32.
    """
    for case, kernels in compiled(tmp_path, groups).items():
        assert kernels.keys() == {"scan_forward read", "scan_forward keep", "scan_backward", "_forward", "_backward"}
        for name, needs in kernels.items():
            assert needs["shared"] <= CHIP, (case, name, needs)
            wide = EXACT_WIDE_STACK if "x 256" in case else EXACT_STACK
            assert needs["stack"] <= (wide if "exact" in case else STACK), (case, name, needs)
            assert needs["registers"] > 200 or needs["stack"] == 0, (case, name, needs)


@needs_triton
def test_other_lengths_and_numbers_of_rows_compile_nothing_again(tmp_path: Path) -> None:
    (kernels,) = compiled(tmp_path, ["small"], "--again").values()
    assert {name: needs["compiled"] for name, needs in kernels.items()} == {
        "scan_forward read": 2, "scan_forward keep": 2, "scan_backward": 1, "_forward": 1, "_backward": 1
    }  # fmt: skip


def compiled(folder: Path, groups: list[str], *options: str) -> dict[str, dict[str, dict[str, int]]]:
    """What tests.memory.compiled_kernels finds; a process for each group of cases."""

    def of(group: str) -> dict[str, dict[str, dict[str, int]]]:
        said = python("tests.memory.compiled_kernels", group, *options, TRITON_CACHE_DIR=str(folder))
        return json.loads(said.splitlines()[-1])  # type: ignore[no-any-return]

    with ThreadPoolExecutor() as threads:
        return {case: kernels for found in threads.map(of, groups) for case, kernels in found.items()}


@needs_triton
def test_a_run_s_memory_is_tried() -> None:
    """In the interpreter: it shows that the kernels are launched, by what is there for documents, momentum and norm."""
    assert (
        json.loads(interpreted("tests.memory.interpreted_trial").splitlines()[-1])
        == [["scan_forward", "scan_forward", "scan_backward"]] * 3
    )


def test_asking_for_them_without_a_gpu_is_refused() -> None:
    if torch.cuda.is_available():
        check("triton")
    else:
        with pytest.raises(UserError, match="no CUDA device: .* use auto or plain"):
            check("triton")
    check("auto")


def test_on_a_cpu_that_interprets_nothing_plain_pytorch_does_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert choose("triton", cpu, torch.float32) is None
    chosen = choose("triton", gpu, torch.bfloat16), choose("triton", gpu, torch.float32)
    assert [c.precision for c in chosen if c is not None] == ["tf32", "ieee"]


@pytest.mark.parametrize(
    ("chunk", "width", "exact", "tokens"),
    [
        (64, 64, False, 64), (48, 64, False, 48), (33, 64, False, 33), (32, 128, False, 32), (32, 128, True, 32),
        (1, 128, True, 1), (48, 80, False, 24), (48, 64, True, 24), (256, 64, False, 64), (1024, 64, True, 32),
        (256, 129, False, 16), (130, 64, False, 26), (33, 65, False, None), (74, 128, False, None),
        (127, 64, False, None), (16, 257, False, None),
    ],
)  # fmt: skip
def test_a_chunk_is_walked_over_in_parts_whose_tiles_fit(chunk: int, width: int, exact: bool, tokens: int) -> None:
    """A tile is as large as the next power of two."""
    beyond = beyond_kernels(2, chunk, width, exact)
    assert len(beyond) == (tokens is None) and all(f"here it is {width if width > 256 else chunk}" in b for b in beyond)
    if tokens is not None:
        assert part_tokens(chunk, triton_tokens(width, exact)) == tokens and tile(tokens) * tile(width) <= 4096


@pytest.mark.gpu
@pytest.mark.parametrize("documents", [False, True], ids=["one", "documents"])
@pytest.mark.parametrize(
    ("dtype", "chunk", "d"),
    [("float32", 16, 64), ("float32", 32, 128), ("float32", 64, 64), ("bfloat16", 64, 64), ("bfloat16", 32, 128),
     ("bfloat16", 256, 64), ("bfloat16", 64, 256)],
)  # fmt: skip
@pytest.mark.parametrize("depth,norm,momentum", [(1, False, True), (2, True, True), (2, False, False)])
def test_on_a_gpu_they_equal_plain_pytorch(
    depth: int, norm: bool, momentum: bool, dtype: str, chunk: int, d: int, documents: bool
) -> None:
    """bfloat16 of inputs and outputs: the error is to be at most twice that of plain PyTorch, against float64."""
    case = tame(Case(
        depth=depth, norm=norm, momentum=momentum, documents=documents, length=5 * chunk, chunk=chunk, d=d, hidden=4 * d
    ).build())  # fmt: skip
    exact, given = results(case, torch.float64, "plain"), getattr(torch, dtype)
    plain = errors(results(case, given, "plain", "cuda"), exact)
    assert max(plain.values()) < (1e-6 if dtype == "float32" else 1e-2)
    with counted_launches() as launches:
        ours = errors(results(case, given, "triton", "cuda"), exact)
    assert launches == ["scan_forward", "scan_forward", "scan_backward"]
    for name, error in ours.items():
        assert error <= max(2 * plain[name], FLOOR if dtype == "float32" else 1e-3), (name, error, plain[name])


def step(length: int = 4 * 64) -> tuple[Callable[[], list[torch.Tensor]], int]:
    """Forward and backward of a memory on the GPU, on numbers that stay where they are; and how many tokens."""
    case = tame(Case(depth=2, norm=True, documents=False, length=length, chunk=64, d=64, hidden=256).build())
    cast(case, torch.bfloat16, "cuda")
    x, state = case.leaves, case.state()
    gates, towards = [x[n] for n in ("alpha", "eta", "theta")], torch.ones_like(x["v"])

    def run() -> list[torch.Tensor]:
        y, _ = memory_scan(
            x["q"], x["k"], x["v"], *gates, state, chunk_size=64, gain=x["gain"], bias=x["bias"], store_every=2,
            kernels="triton",
        )  # fmt: skip
        return [y.detach(), *torch.autograd.grad(y, [x["q"], x["k"], x["v"], *gates, x["w0"]], towards)]

    return run, case.batch * case.heads * length


@pytest.mark.gpu
def test_a_cuda_graph_takes_them_in() -> None:
    run, _ = step()
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        run()  # compiles them, which a graph cannot take in
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = run()
    for x in found:
        x.zero_()
    graph.replay()
    for got, want in zip(found, run(), strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.gpu
def test_nothing_waits_for_the_gpu() -> None:
    run, _ = step()
    run()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_memory_per_token_does_not_grow_with_the_length() -> None:
    def per_token(length: int) -> float:
        run, tokens = step(length)
        run()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return (torch.cuda.max_memory_allocated() - before) / tokens

    short, long = per_token(16 * 64), per_token(128 * 64)
    assert long <= 1.05 * short
