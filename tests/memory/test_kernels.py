"""The scan's Triton kernels: the exactness tests of test_scan.py and their error in float32, in Triton's interpreter on
the CPU; on a GPU (marked gpu) compiled, and exact to what TF32 or bfloat16 allow.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

from tests.memory.test_scan import Case
from titans_train.errors import UserError
from titans_train.memory import memory_scan
from titans_train.memory.kernels import check

FLOOR = 1e-6  # eight roundings of a float32: sums in another order
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
    said = interpreted("pytest", "-q", "tests/memory/test_scan.py", "-k", chosen)
    assert "passed" in said and "failed" not in said


@needs_triton
def test_their_error_is_at_most_twice_that_of_plain_pytorch() -> None:
    found = json.loads(interpreted("tests.memory.interpreted_scan").splitlines()[-1])
    for case in found.values():
        assert case["launches"] == 2  # forward, and again before the backward
        assert case["plain"].keys() == case["triton"].keys()
        for name, error in case["triton"].items():
            assert 0 < error <= max(2 * case["plain"][name], FLOOR), (name, error, case["plain"][name])


@needs_triton
def test_they_compile_for_a_gpu_and_fit_on_its_chip(tmp_path: Path) -> None:
    needs = json.loads(python("tests.memory.compiled_kernels", TRITON_CACHE_DIR=str(tmp_path)).splitlines()[-1])
    assert len(needs) == 4 and max(needs.values()) <= 227 << 10, needs


def test_asking_for_them_without_a_gpu_is_refused() -> None:
    if torch.cuda.is_available():
        check("triton")
    else:
        with pytest.raises(UserError, match="no CUDA device: .* use auto or plain"):
            check("triton")
    check("auto")


@pytest.mark.gpu
@pytest.mark.parametrize("documents", [False, True], ids=["one", "documents"])
@pytest.mark.parametrize("dtype,chunk,d", [("float32", 16, 64), ("bfloat16", 64, 64), ("bfloat16", 32, 128)])
@pytest.mark.parametrize("depth,norm,momentum", [(1, False, True), (2, True, True), (2, False, False)])
def test_on_a_gpu_they_equal_plain_pytorch(
    depth: int, norm: bool, momentum: bool, dtype: str, chunk: int, d: int, documents: bool
) -> None:
    """bfloat16 of inputs and outputs: the error is to be at most twice that of plain PyTorch, against float64."""
    case = Case(
        depth=depth, norm=norm, momentum=momentum, documents=documents, length=5 * chunk, chunk=chunk, d=d, hidden=4 * d
    ).build()
    leaves = dict(case.leaves)

    def results(of: torch.dtype, kernels: str, device: str) -> dict[str, torch.Tensor]:
        case.leaves = {
            name: leaf.detach().to(device).to(of if name in "qkv" else torch.promote_types(of, torch.float32))
            .requires_grad_() for name, leaf in leaves.items()
        }  # fmt: skip
        outputs, gradients = case.run(partial(memory_scan, kernels=kernels))
        return {**{f"output {i}": x for i, x in enumerate(outputs)}, **gradients}

    exact, given = results(torch.float64, "plain", "cpu"), getattr(torch, dtype)
    far = {
        kernels: {
            name: float((x.cpu().double() - exact[name]).norm() / exact[name].norm())
            for name, x in results(given, kernels, "cuda").items()
        }
        for kernels in ("plain", "triton")
    }
    floor = 1e-6 if dtype == "float32" else 1e-3
    for name, error in far["triton"].items():
        assert error <= max(2 * far["plain"][name], floor), (name, error, far["plain"][name])
