"""Calls of the memory in a model's dtypes, on data like a model's, for the kernels' tests."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from tests.memory.test_scan import Case
from titans_train.memory import memory_scan


def tame(case: Case) -> Case:
    """Numbers that neither overflow nor make more of a rounding than it is: normalised q and k, stable steps."""
    x = case.leaves
    with torch.no_grad():
        for name in "qk":
            x[name].copy_(normalize(x[name], dim=-1))
        x["theta"].mul_((10 if case.norm else 2.5) / case.chunk)
        for i in range(case.depth):
            for name, scale in ((f"w{i}", 2), (f"dw{i}", 2), (f"s{i}", 1), (f"ds{i}", 1)):
                x[name].mul_(scale * x[name].shape[-2] ** -0.5)
        x["gain"].mul_(case.d**-0.5)
    return case


def cast(case: Case, dtype: torch.dtype, device: str = "cpu") -> Case:
    """As a model of this dtype gives them: gates and states are float32 at least."""
    case.leaves = {
        name: leaf.detach().to(device, dtype if name in "qkv" else torch.promote_types(dtype, torch.float32))
        .requires_grad_() for name, leaf in case.leaves.items()
    }  # fmt: skip
    return case


def results(case: Case, dtype: torch.dtype, kernels: str, device: str = "cpu", **options: Any) -> dict[str, Tensor]:
    """Outputs and gradients; the case stays as it is."""
    leaves = dict(case.leaves)
    outputs, gradients = cast(case, dtype, device).run(partial(memory_scan, kernels=kernels), **options)
    case.leaves = leaves
    return {**{f"output {i}": x.detach() for i, x in enumerate(outputs)}, **gradients}


def errors(found: dict[str, Tensor], exact: dict[str, Tensor]) -> dict[str, float]:
    """By result, the norm of the difference over the norm. Results must be finite."""
    assert found.keys() == exact.keys()
    assert all(bool(torch.isfinite(x).all()) for x in (*found.values(), *exact.values()))
    return {name: float((x.cpu().double() - exact[name]).norm() / exact[name].norm()) for name, x in found.items()}


@contextmanager
def counted_launches() -> Iterator[list[str]]:
    """The Triton kernels that are launched inside, by name."""
    from titans_train.memory.kernels import segment

    names, kernels = [], {name: getattr(segment, name) for name in ("scan_forward", "scan_backward")}

    class Counted:
        def __init__(self, name: str) -> None:
            self.name = name

        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            names.append(self.name)
            return kernels[self.name][grid]

    for name in kernels:
        setattr(segment, name, Counted(name))
    try:
        yield names
    finally:
        for name, kernel in kernels.items():
            setattr(segment, name, kernel)
