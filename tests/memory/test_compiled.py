"""The scan's compiled C++: the exactness tests of test_scan.py, its error in float32, threads, and how it is built."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.memory.test_scan import Case, assert_same
from titans_train.errors import UserError
from titans_train.memory import MemoryState, kernels, memory_scan, recurrence
from titans_train.memory.kernels import compiled

FLOOR = 1e-6  # eight roundings of a float32: sums in another order
ROOT = Path(__file__).parents[2]
scan = partial(memory_scan, kernels="compiled")


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    found: list[str] = []
    for name in ("forward", "backward"):
        original = getattr(compiled.Launch, name)

        def counted(*args: object, name: str = name, original: object = original) -> object:
            found.append(name)
            return original(*args)  # type: ignore[operator]

        monkeypatch.setattr(compiled.Launch, name, counted)
    return found


def test_it_passes_the_exactness_tests_of_the_scan() -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "KERNELS": "compiled"}
    command = [sys.executable, "-m", "pytest", "-q", "tests/memory/test_scan.py"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0 and "failed" not in done.stdout, done.stdout[-4000:] + done.stderr[-4000:]


@pytest.mark.parametrize("norm,momentum,documents", [(True, True, True), (False, False, False)])
@pytest.mark.parametrize("depth,d,hidden", [(1, 16, 16), (2, 16, 40), (2, 24, 20), (3, 17, 23)])
def test_its_error_is_at_most_twice_that_of_plain_pytorch(
    depth: int, d: int, hidden: int, norm: bool, momentum: bool, documents: bool, launches: list[str]
) -> None:
    case = Case(
        depth=depth, length=70, chunk=16, d=d, hidden=hidden, norm=norm, momentum=momentum, documents=documents
    ).build()
    with torch.no_grad():  # widths of 16 to 40 want smaller weights and steps than those of test_scan.py
        for name, x in case.leaves.items():
            if name[0] in "qkwd" or name == "theta":
                x.mul_(0.3)
    leaves = dict(case.leaves)

    def results(dtype: torch.dtype, how: str) -> dict[str, Tensor]:
        case.leaves = {name: leaf.detach().to(dtype).requires_grad_() for name, leaf in leaves.items()}
        outputs, gradients = case.run(partial(memory_scan, kernels=how))
        return {**{f"output {i}": x for i, x in enumerate(outputs)}, **gradients}

    exact = results(torch.float64, "plain")
    far = {
        how: {name: float(((x - exact[name]).norm() / exact[name].norm()).detach()) for name, x in found.items()}
        for how in ("plain", "compiled")
        for found in [results(torch.float32, how)]
    }
    assert launches == ["forward", "backward"] and all(x.isfinite().all() for x in exact.values())
    for name, error in far["compiled"].items():
        assert error <= max(2 * far["plain"][name], FLOOR), (name, error, far["plain"][name])


def test_threads_share_the_rows_and_change_nothing() -> None:
    case, threads = Case(batch=3, heads=5, norm=True, documents=True).build(), torch.get_num_threads()
    found = []
    try:
        for number in (1, 2):
            torch.set_num_threads(number)
            found.append(case.run(scan, store_every=2))
    finally:
        torch.set_num_threads(threads)
    (outputs, gradients), (outputs_2, gradients_2) = found
    assert all(torch.equal(a, b) for a, b in zip(outputs, outputs_2, strict=True))
    assert all(torch.equal(gradients[name], gradients_2[name]) for name in gradients)


def test_gradients_of_the_final_state_may_have_any_order() -> None:
    """A loss of the transposed state has a gradient with the strides of a transposed one."""

    def transposed(*args: object, **options: object) -> tuple[Tensor, MemoryState]:
        y, state = (scan if options.pop("ours") else recurrence)(*args, **options)  # type: ignore[arg-type]
        weights = tuple(w.mT for w in state.weights)
        return y, MemoryState(weights, tuple(s.mT for s in state.momentum), None, state.offset)

    case = Case(norm=True, length=32).build()
    assert_same(case, case.run(partial(transposed, ours=True)), case.run(partial(transposed, ours=False)))


def test_one_call_each_way_does_a_whole_segment(launches: list[str]) -> None:
    case = Case(length=37, chunk=8).build()
    case.run(scan, store_every=4)
    assert launches == ["forward", "backward"]  # the 5 tokens left over are plain PyTorch's
    launches.clear()
    case.run(scan, store_every=2)
    assert launches == ["forward"] * 2 + ["backward"] * 2


def test_without_a_compiler_auto_is_plain_and_asking_for_it_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, launches: list[str]
) -> None:
    monkeypatch.setenv("TITANS_TRAIN_CACHE", str(tmp_path))
    monkeypatch.setenv("CXX", "no-such-compiler")
    compiled.why_not.cache_clear()
    try:
        case = Case(norm=True).build()
        assert_same(case, case.run(partial(memory_scan, kernels="auto")), case.run(recurrence))
        assert not launches
        for ask in (lambda: case.run(scan), lambda: kernels.check("compiled")):
            with pytest.raises(UserError, match="no compiler 'no-such-compiler': install .* CXX; or use auto or plain"):
                ask()
    finally:
        compiled.why_not.cache_clear()


def test_a_source_that_does_not_compile_says_what_the_compiler_said(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    source = tmp_path / "cpp"
    source.mkdir()
    (source / "scan.cpp").write_text("int main() { return unknown; }\n")
    monkeypatch.setattr(compiled, "SOURCE", source)
    monkeypatch.setenv("TITANS_TRAIN_CACHE", str(tmp_path))
    compiled.why_not.cache_clear()
    try:
        assert "unknown" in str(compiled.why_not())
        assert [f.name for f in tmp_path.iterdir() if f.suffix == ".so"] == []  # nothing that another would load
    finally:
        compiled.why_not.cache_clear()


@pytest.mark.parametrize("chunk,products,flops", [(16, 14.9375, 6_062_080), (64, 3.734375, 7_045_120)])
def test_it_takes_no_more_products_or_flops_than_it_did(chunk: int, products: float, flops: float) -> None:
    """Per token of 4 heads of 64, hidden 256, 2 layers, a state every 16 chunks; no clock. The bounds are those of
    tests/benchmark/test_counts.py. (Without recomputation: 66 d h + 12 b (d + h) per head.)
    """
    heads, d, hidden, length = 4, 64, 256, 1024

    def rows(*shape: int) -> Tensor:
        return torch.rand(1, heads, length, *shape, requires_grad=True)

    weights = tuple(torch.randn(1, heads, a, b) * a**-0.5 for a, b in ((d, hidden), (hidden, d)))
    state = MemoryState.start(tuple(w.requires_grad_() for w in weights))
    norm = {name: torch.rand(heads, d, requires_grad=True) for name in ("gain", "bias")}
    given = [rows(d), rows(d), rows(d), rows(), rows(), rows()]
    scan(*given, state, chunk_size=chunk, **norm)[0].sum()  # built
    before = torch.ops.titans_train.scan_work()
    scan(*given, state, chunk_size=chunk, **norm)[0].sum().backward()
    made, done = ((after - b) / length for after, b in zip(torch.ops.titans_train.scan_work(), before, strict=True))
    assert 0.9 * products <= made <= 1.5 * products and 0.9 * flops <= done <= 1.5 * flops
