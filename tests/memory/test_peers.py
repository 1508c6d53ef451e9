"""Rules of other papers: the chunked form against the recurrence, and that against flash-linear-attention's own."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.models.shapes import tiny
from titans_train.memory.layer import MemoryLayerState
from titans_train.memory.peers.layer import SHARPEST, PeerMemory
from titans_train.memory.peers.recurrence import recurrence
from titans_train.memory.peers.scan import linear_scan
from titans_train.memory.recurrence import recurrence as titans
from titans_train.memory.state import MemoryState
from titans_train.models.parts import SingleDevice
from titans_train.shape import PEERS

B, H, L, D = 2, 3, 37, 8


def fla(path: str) -> ModuleType:
    """A file of reference formulas in plain PyTorch; the package itself wants Triton."""
    spec = importlib.util.find_spec("fla")
    assert spec is not None and spec.submodule_search_locations, "fla-core is part of the extra `peers`"
    file = Path(spec.submodule_search_locations[0]) / path
    found = importlib.util.spec_from_file_location(f"fla_reference_{file.parent.name}", file)
    assert found is not None and found.loader is not None
    module = importlib.util.module_from_spec(found)
    sys.modules[found.name] = module
    found.loader.exec_module(module)
    return module


def inputs(decay: str, removes: bool, dtype: torch.dtype = torch.float64) -> dict[str, Tensor | None]:
    torch.manual_seed(0)
    q, k, v = (torch.randn(B, H, L, D, dtype=dtype) for _ in range(3))
    a = F.normalize(torch.randn(B, H, L, D, dtype=dtype), dim=-1) if removes else None
    b = None if a is None else -a * torch.rand(B, H, L, 1, dtype=dtype)
    size = {"none": None, "head": (B, H, L), "channel": (B, H, L, D)}[decay]
    log_decay = None if size is None else -torch.rand(size, dtype=dtype) * (3.0 if decay == "head" else SHARPEST)
    state = torch.randn(B, H, D, D, dtype=dtype)
    return {"q": q, "k": k, "v": v, "log_decay": log_decay, "a": a, "b": b, "state": state}


@pytest.mark.parametrize("documents", [False, True], ids=["one document", "documents"])
@pytest.mark.parametrize("chunk", [1, 4, 16, 64])
@pytest.mark.parametrize("removes", [False, True], ids=["adds", "removes"])
@pytest.mark.parametrize("decay", ["none", "head", "channel"])
def test_chunks_equal_the_recurrence(decay: str, removes: bool, chunk: int, documents: bool) -> None:
    given = {name: None if x is None else x.requires_grad_() for name, x in inputs(decay, removes).items()}
    starts = None
    if documents:
        starts = torch.zeros(B, L, dtype=torch.bool)
        starts[0, [0, 16]], starts[1, 32] = True, chunk < 64
        starts[0, 16] = chunk < 64
    want = recurrence(**given, document_starts=starts)  # type: ignore[arg-type]
    got = linear_scan(**given, chunk_size=chunk, document_starts=starts)  # type: ignore[arg-type]
    weights = [torch.randn_like(x) for x in want]
    leaves = [x for x in given.values() if x is not None]
    for a, b in zip(want, got, strict=True):
        assert (a - b).abs().max() <= 1e-12 * a.abs().max()
    sums = [sum((x * w).sum() for x, w in zip(out, weights, strict=True)) for out in (want, got)]
    for a, b in zip(*(torch.autograd.grad(s, leaves) for s in sums), strict=True):  # type: ignore[arg-type]
        assert (a - b).abs().max() <= 1e-12 * max(float(a.abs().max()), 1)


def test_strong_decays_stay_finite_and_exact() -> None:
    """e^-60 per token: no factor of the chunked form may overflow, and gradients neither."""
    given = inputs("head", True, torch.float32)
    decay = torch.full((B, H, L), -60.0, requires_grad=True)
    given["log_decay"] = decay
    want = recurrence(**{n: None if x is None else x.double() for n, x in given.items()})  # type: ignore[arg-type]
    got = linear_scan(**given, chunk_size=16)  # type: ignore[arg-type]
    assert (want[0] - got[0]).abs().max() <= 1e-5
    (gradient,) = torch.autograd.grad(got[0].sum(), decay)
    assert gradient.isfinite().all()


def test_a_document_within_a_chunk_is_refused() -> None:
    starts = torch.zeros(B, L, dtype=torch.bool)
    starts[0, 5] = True
    with pytest.raises(ValueError, match="at a multiple of 4 tokens"):
        linear_scan(**inputs("none", False), chunk_size=4, document_starts=starts)  # type: ignore[arg-type]


def test_deltanet_is_that_of_flash_linear_attention() -> None:
    x = inputs("none", False, torch.float32)
    q, k, v, beta = x["q"], F.normalize(x["k"], dim=-1), x["v"], torch.rand(B, H, L)  # type: ignore[arg-type]
    want, state = fla("ops/delta_rule/naive.py").delta_rule_recurrence(q * D**0.5, k, v, beta, x["state"])
    got = linear_scan(q, k, beta[..., None] * v, None, k, -beta[..., None] * k, x["state"], chunk_size=16)
    assert torch.allclose(got[0], want, atol=1e-5) and torch.allclose(got[1], state, atol=1e-5)


def test_gated_deltanet_is_that_of_flash_linear_attention_and_ours_in_other_symbols() -> None:
    """And the Titans memory's at depth 1, chunk 1, without momentum: 1 - alpha = a, theta = a beta, v' = v / a."""
    x = inputs("head", False)
    q, k, v, g, s = x["q"], F.normalize(x["k"], dim=-1), x["v"], x["log_decay"] / 10, x["state"]  # type: ignore
    beta, a = torch.rand(B, H, L, dtype=torch.float64), g.exp()
    got = linear_scan(q, k, beta[..., None] * v, g, k, -(a * beta)[..., None] * k, s, chunk_size=16)
    theirs = fla("ops/gated_delta_rule/naive.py").naive_recurrent_gated_delta_rule
    want, state = theirs(
        *(y.transpose(1, 2) for y in (q, k, v, beta, g)), scale=1.0, initial_state=s, output_final_state=True
    )
    assert torch.allclose(got[0].float(), want.transpose(1, 2), atol=1e-5)
    assert torch.allclose(got[1].float(), state, atol=1e-5)
    start = MemoryState.start((s,), momentum=False)
    ours, end = titans(q, k, v / a[..., None], 1 - a, None, a * beta, start, chunk_size=1)
    assert torch.allclose(ours, got[0], atol=1e-12) and torch.allclose(end.weights[0], got[1], atol=1e-12)


def test_mamba2_is_the_gated_linear_attention_of_flash_linear_attention() -> None:
    x = inputs("head", False, torch.float32)
    theirs = fla("ops/simple_gla/naive.py").naive_recurrent_simple_gla
    qkvg = (y.transpose(1, 2) for y in (x["q"], x["k"], x["v"], x["log_decay"]))  # type: ignore[union-attr]
    want, state = theirs(*qkvg, scale=1.0, initial_state=x["state"], output_final_state=True)
    got = linear_scan(**x, chunk_size=16)  # type: ignore[arg-type]
    assert torch.allclose(got[0], want.transpose(1, 2), atol=1e-5) and torch.allclose(got[1], state, atol=1e-5)


def test_rwkv7_is_the_recurrence_of_flash_linear_attention() -> None:
    x = inputs("channel", True, torch.float32)
    theirs = fla("ops/generalized_delta_rule/dplr/naive.py").dplr_recurrence
    want, state = theirs(x["q"] * D**0.5, x["k"], x["v"], x["a"], x["b"], x["log_decay"], x["state"])  # type: ignore
    got = linear_scan(**x, chunk_size=16)  # type: ignore[arg-type]
    assert torch.allclose(got[0], want, atol=1e-5) and torch.allclose(got[1], state, atol=1e-5)


@pytest.mark.parametrize("depth", [1, 2], ids=["TTT-linear", "TTT-MLP"])
def test_ttt_is_the_titans_memory_without_momentum_and_forgetting(depth: int) -> None:
    """arXiv 2407.04620, eq. 4 and 7: W_t = W_{t-1} - eta_t grad l(W_t'; x_t), t' the last token of the chunk before,
    f(x) = x + LN(f_W(x)), l = |f(k) - v|^2 (theirs without our half).
    """
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, H, 24, D, dtype=torch.float64) for _ in range(3))
    step = torch.rand(1, H, 24, dtype=torch.float64) / 8
    gain, bias = torch.rand(H, D).double(), torch.randn(H, D).double()
    sizes = [D, D] if depth == 1 else [D, 4 * D, D]
    weights = tuple(torch.randn(1, H, a, b, dtype=torch.float64) / a for a, b in zip(sizes, sizes[1:], strict=False))
    options = {"chunk_size": 8, "activation": "gelu", "gain": gain, "bias": bias}
    got, _ = titans(q, k, v, None, None, 2 * step, MemoryState.start(weights, momentum=False), **options)  # type: ignore

    def f(x: Tensor, w: list[Tensor]) -> Tensor:
        h = x @ w[0] if depth == 1 else F.gelu(x @ w[0]) @ w[1]
        return x + F.layer_norm(h, (D,), eps=1e-2) * gain[:, None] + bias[:, None]

    now, outputs = [w.clone() for w in weights], []
    for t in range(24):
        if t % 8 == 0:
            anchor = [w.detach().clone().requires_grad_() for w in now]
        loss = (f(k[:, :, t : t + 1], anchor) - v[:, :, t : t + 1]).square().sum()
        grads = torch.autograd.grad(loss, anchor)
        now = [w - step[:, :, t, None, None] * g for w, g in zip(now, grads, strict=True)]
        outputs.append(f(q[:, :, t : t + 1], now))
    assert torch.allclose(got, torch.cat(outputs, 2), atol=1e-12)


@pytest.mark.parametrize("rule", PEERS)
def test_every_rule_starts_with_memory_and_has_gradients_everywhere(rule: str) -> None:
    torch.manual_seed(0)
    shape = tiny(f"lmm-{rule}")
    memory = PeerMemory(shape, SingleDevice()).double()
    widths = {"memory_q": 16, "memory_k": 16, "memory_v": 16, **shape.peer_gates()}
    given = {name: torch.randn(2, 20, width, dtype=torch.float64, requires_grad=True) for name, width in widths.items()}
    start = MemoryLayerState(memory.initial_memory(2), memory.empty_tails(given["memory_q"]))
    heads, state = memory(given, start)
    assert heads.shape == (2, 20, 2, 8) and state.memory.weights[0].norm() > 0
    gradients = torch.autograd.grad(heads.square().sum(), [*given.values(), *memory.parameters()])
    assert all(g.isfinite().all() and g.norm() > 0 for g in gradients)
