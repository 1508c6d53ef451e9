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

from tests.memory.kernel_cases import errors, results, tame
from tests.memory.test_scan import Case, assert_same
from titans_train.benchmark.counts import compiled_work, operator
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
    case = Case(depth=depth, length=70, chunk=16, d=d, hidden=hidden, norm=norm, momentum=momentum, documents=documents)
    tame(case.build())
    exact = results(case, torch.float64, "plain")
    far = {how: errors(results(case, torch.float32, how), exact) for how in ("plain", "compiled")}
    assert launches == ["forward", "backward"]
    for name, error in far["compiled"].items():
        assert error <= max(2 * far["plain"][name], FLOOR), (name, error, far["plain"][name])


def test_nor_does_it_lose_digits_over_many_chunks() -> None:
    """Of several parts; gain and bias are sums over all tokens."""
    case = Case(batch=1, heads=1, length=8192, chunk=128, d=16, hidden=40, norm=True)
    tame(case.build())
    exact = results(case, torch.float64, "plain")
    plain, ours = (errors(results(case, torch.float32, how), exact) for how in ("plain", "compiled"))
    for name in ("output 0", "gain", "bias", "q", "k", "v", "alpha", "eta", "theta", "w0", "w1"):
        assert ours[name] <= max(2 * plain[name], FLOOR), (name, ours[name], plain[name])


def test_surprises_are_those_of_plain_pytorch() -> None:
    case = Case(batch=2, heads=3, length=3 * 128, chunk=128, norm=True)
    tame(case.build())
    found: dict[str, list[Tensor]] = {"plain": [], "compiled": []}
    for how, surprises in found.items():
        case.run(partial(memory_scan, kernels=how, surprises=surprises))
    for plain, ours in zip(*found.values(), strict=True):
        assert plain.shape == (6, 128)
        torch.testing.assert_close(ours, plain, rtol=1e-12, atol=0)


@pytest.mark.parametrize("depth,hidden,norm", [(1, 6, True), (2, 10, True), (2, 4, False), (3, 9, False)])
@pytest.mark.parametrize("chunk", [31, 32, 33, 64, 72])
def test_chunks_of_several_blocks(chunk: int, depth: int, hidden: int, norm: bool, launches: list[str]) -> None:
    """T x T products leave out the blocks above the diagonal."""
    case = tame(Case(length=2 * chunk, chunk=chunk, depth=depth, d=6, hidden=hidden, norm=norm).build())
    assert_same(case, case.run(scan), case.run(recurrence))
    assert launches == ["forward", "backward"]


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
            with pytest.raises(UserError, match="no compiler 'no-such-compiler': install .*; or use auto or plain"):
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
    compiled._fingerprint.cache_clear()
    try:
        assert "unknown" in str(compiled.why_not())
        assert [f.name for f in tmp_path.iterdir() if f.suffix == ".so"] == []  # nothing that another would load
    finally:
        compiled.why_not.cache_clear()
        compiled._fingerprint.cache_clear()


@pytest.mark.parametrize("damage", ["cut", "empty", "changed"])
def test_a_damaged_library_is_built_anew(damage: str, tmp_path: Path) -> None:
    """In processes of their own: to load half a library ends the process."""
    environment = {**os.environ, "TITANS_TRAIN_CACHE": str(tmp_path)}
    command = [sys.executable, "-c", "from titans_train.memory.kernels import compiled; print(compiled.why_not())"]
    (whole,) = [f for f in compiled.cache().glob(f"scan-{compiled._fingerprint()}-*.so")][:1]
    content = whole.read_bytes()
    bad = {"cut": content[:100_000], "empty": b"", "changed": content[:-1] + bytes([content[-1] ^ 1])}[damage]
    (tmp_path / whole.name).write_bytes(bad)
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and done.stdout.strip() == "None", done.stdout + done.stderr
    good = [f for f in tmp_path.glob("*.so") if f.name == compiled._name(f.read_bytes())]
    assert len(good) == 1 and not list(tmp_path.glob("*.part"))


@pytest.mark.parametrize(
    "chunk,products,flops", [(16, 14.9375, 6_062_080), (64, 4.734375, 6_717_440), (256, 4.734375, 6_717_440)]
)
def test_it_takes_no_more_products_or_flops_than_it_did(chunk: int, products: float, flops: float) -> None:
    """Per token of 4 heads of 64, hidden 256, 2 layers, a state every 1,024 tokens; no clock. The bounds are those of
    tests/benchmark/test_counts.py. (Without recomputation, and with whole T x T matrices: 66 d h + 12 b (d + h) per
    head.)
    """
    made, done = (n / 1024 for n in compiled_work(operator("compiled", 4, 64, 256, chunk, 1024, 1024 // chunk)))
    assert 0.9 * products <= made <= 1.5 * products and 0.9 * flops <= done <= 1.5 * flops


def narrower(x: Tensor, dim: int) -> Tensor:
    return x.detach().narrow(dim, 0, x.shape[dim] - 1).requires_grad_()


@pytest.mark.parametrize("how", ["plain", "compiled"])
@pytest.mark.parametrize(
    "name,dim",
    [("w0", 1), ("w0", 3), ("w1", 2), ("s1", 1), ("s0", 3), ("dw0", 3), ("ds1", 1), ("alpha", 2), ("eta", 1),
     ("gain", 0), ("bias", 1), ("v", 2)],
)  # fmt: skip
def test_shapes_that_do_not_fit_are_refused_before_any_memory_is_read(name: str, dim: int, how: str) -> None:
    case = Case(norm=True, documents=True, heads=3, d=4, hidden=6).build()
    case.leaves[name] = narrower(case.leaves[name], dim)
    with pytest.raises(ValueError, match=r"\["):
        case.run(partial(memory_scan, kernels=how))


def test_the_library_itself_reads_nothing_beyond_its_tensors() -> None:
    x, gate = torch.zeros(2, 8, 4), torch.zeros(2, 8)
    state, wrong = [torch.zeros(2, 4, 4)], [torch.zeros(1, 4, 4)]
    scan(*(x[None] for _ in range(3)), None, None, gate[None], MemoryState((state[0][None],), ()), chunk_size=4)
    call = [x, x, x, gate, None, gate, None, [], None, None, 0, 2, 4, 1, False, 1e-5]
    torch.ops.titans_train.scan_forward(*call, state, torch.empty_like(x), None)
    parts = [[*call[:10], 0, 3, *call[12:]], [*call[:13], 4, *call[14:]]]
    for bad in (*parts, [x.mT, *call[1:]], [*call[:3], gate[:, :4], *call[4:]]):
        with pytest.raises(RuntimeError, match="sizes|contiguous|tokens|are no chunks"):
            torch.ops.titans_train.scan_forward(*bad, state, torch.empty_like(x), None)
    with pytest.raises(RuntimeError, match="the state has sizes"):
        torch.ops.titans_train.scan_forward(*call, wrong, torch.empty_like(x), None)
