"""Inputs of the peers' rules, and how far an implementation is from scan.py in float64: outputs, state, gradients."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor

from titans_train.memory.peers.kernels import Terms
from titans_train.memory.peers.layer import SHARPEST
from titans_train.memory.peers.scan import linear_scan
from titans_train.shape import PEERS

CHUNK, LENGTH = 16, 147  # more than two of their chunks of 64, the last one ragged
Scan = Callable[[Terms, Tensor, Tensor | None], tuple[Tensor, Tensor]]
CASES = [
    (rule, carried, documents) for rule, carried, documents in product(PEERS, (False, True), (False, True))
]  # rule, a state is carried in, documents start within rows


def leaves(rule: str, carried: bool, dtype: torch.dtype, width: int = 16) -> dict[str, Tensor]:
    """On the CPU, in float64; what kernels take in the model's dtype holds numbers of that dtype."""
    torch.manual_seed(sum(map(ord, rule)))
    batch, heads = 2, 2
    size = (batch, heads, LENGTH, width)
    x = {name: torch.randn(size) for name in "qkv"}
    if rule == "rwkv7":
        x["a"] = F.normalize(torch.randn(size), dim=-1)
        x["b"] = -x["a"] * torch.rand(size)
        x["log_decay"] = -SHARPEST * torch.rand(size)
    elif rule != "deltanet":
        x["log_decay"] = -2 * torch.rand(size[:3]).square()
    if "delta" in rule:
        x["q"], x["k"] = F.normalize(x["q"], dim=-1), F.normalize(x["k"], dim=-1)
        x["beta"] = torch.rand(size[:3])
    x = {name: y.to(dtype) if name in "qkvab" else y for name, y in x.items()}
    x["state"] = torch.randn(batch, heads, width, width) * carried
    return {name: y.double() for name, y in x.items()}


def document_starts() -> Tensor:
    """A row that goes on from the state before and then has two starts, one that starts with a document."""
    starts = torch.zeros(2, LENGTH, dtype=torch.bool)
    starts[0, [32, 80]] = starts[1, 0] = starts[1, 96] = True
    return starts


def errors(
    got: Scan, given: dict[str, Tensor], starts: Tensor | None, dtype: torch.dtype, device: str
) -> dict[str, float]:
    """|got - want| / |want| of y, the state and the gradient of every input, which `got` has in `dtype`."""
    torch.manual_seed(1)
    weights = [torch.randn_like(given["v"]), torch.randn_like(given["state"])]

    def plain(terms: Terms, state: Tensor, starts: Tensor | None) -> tuple[Tensor, Tensor]:
        return linear_scan(*terms.general(), state, chunk_size=CHUNK, document_starts=starts)

    def run(scan: Scan, dtype: torch.dtype, device: str) -> dict[str, Tensor]:
        x = {name: y.to(device, dtype).requires_grad_() for name, y in given.items()}
        terms = Terms(**{name: y for name, y in x.items() if name != "state"})
        y, state = scan(terms, x["state"], None if starts is None else starts.to(device))
        loss = sum((a * w.to(a)).sum() for a, w in zip((y, state), weights, strict=True))
        gradients = torch.autograd.grad(loss, list(x.values()))  # type: ignore[arg-type]
        found = {"y": y, "after": state} | {f"d {n}": g for n, g in zip(x, gradients, strict=True)}
        return {name: value.detach().double().cpu() for name, value in found.items()}

    want, have = run(plain, torch.float64, "cpu"), run(got, dtype, device)
    return {name: float((have[name] - w).norm() / w.norm()) for name, w in want.items()}
