"""Stretches of element-wise work as one loop each (`model.compile`): of a plain function of tensors by torch.compile.

What is a stretch stands beside the module that uses it, as a function of its inputs and parameters; the module asks for
it here. A collective, the memory's scan and products stay outside.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

from titans_train.errors import UserError

P = ParamSpec("P")
T = TypeVar("T")
FORMS = 32  # of shapes and options, that a function may be compiled for


def fused(function: Callable[P, T], on: bool) -> Callable[P, T]:
    """`function`, or with `on` what torch.compile makes of it: once per process, and again for other shapes."""
    return _compiled(function) if on else function


@functools.cache
def _compiled(function: Callable[P, T]) -> Callable[P, T]:
    # training, evaluation, documents or none, heads that are made unit or not: more forms than the usual 8
    torch._dynamo.config.recompile_limit = max(FORMS, torch._dynamo.config.recompile_limit)
    return torch.compile(function)


def check(device: torch.device) -> None:
    """UserError where torch.compile cannot make a loop for this device."""
    x = torch.ones(64, device=device, requires_grad=True)
    try:
        torch.compile(_trial)(x).sum().backward()
    except Exception as error:  # of many kinds, by what is missing
        said = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise UserError(
            f"model.compile is true, but torch.compile does not work here ({said.strip()}): install a C++ compiler "
            "such as g++ (for a GPU Triton too), or use model.compile=false"
        ) from error


def _trial(x: Tensor) -> Tensor:
    return x * x.sigmoid()
