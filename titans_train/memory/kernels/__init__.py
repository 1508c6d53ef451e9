"""The whole chunks of a segment at once, in place of plain PyTorch's calls one by one: on a CPU compiled C++, on a GPU
one Triton kernel each way.

They compute what ../gates.py, ../chunk.py and ../chunk_backward.py say, with the same names: cpp/ (compiled.py builds
and calls it) row by row; forward.py, backward.py with passes.py, and coefficients.py (segment.py launches them,
tiles.py has what a tile needs) in Triton, also in its interpreter on a CPU. This file can be imported without Triton
and a compiler.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from titans_train.errors import UserError
from titans_train.memory.kernels import compiled
from titans_train.memory.walk import Segment, Sequence, SequenceGradients
from titans_train.shape import beyond_kernels

if TYPE_CHECKING:
    from collections.abc import Callable

    from titans_train.memory.chunk import Adjoints
    from titans_train.shape import MemoryShape


class Kernel(Protocol):
    """For one segment of a call."""

    def forward(
        self, weights: list[Tensor], momentum: list[Tensor], y: Tensor, surprises: list[Tensor] | None = None
    ) -> None:
        """Moves the state over the segment, in place, and fills y [rows, L, D] there; adds each chunk's surprises."""

    def backward(
        self,
        weights: list[Tensor],
        momentum: list[Tensor],
        d_y: Tensor,
        adjoints: Callable[[], Adjoints],
        found: SequenceGradients,
    ) -> None:
        """From the state before the segment. adjoints: asked for, as late as can be, those of the state after it, which
        move to before it, in place. found: filled there, and added to.
        """


@dataclass(frozen=True)
class Chosen:
    """Who does segments, and how Triton's products are to be rounded."""

    name: str  # "compiled" or "triton"
    precision: str = "ieee"  # ieee, tf32 or tf32x3


def choose(kernels: str, device: torch.device, dtype: torch.dtype) -> Chosen | None:
    """None: plain PyTorch. auto: compiled on a CPU that has a compiler. dtype: of the model; bfloat16 inputs and
    outputs are rounded more coarsely than TF32 rounds. On a CPU there is Triton in its interpreter only.
    """
    if kernels == "triton":
        there = device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"
        return Chosen("triton", "tf32" if dtype == torch.bfloat16 else "ieee") if there else None
    if kernels == "plain" or device.type != "cpu":
        return None
    reason = compiled.why_not()
    if reason is None:
        return Chosen("compiled")
    if kernels == "compiled":
        raise UserError(f"memory.kernels is compiled, but {reason}; or use auto or plain")
    return None


def launch(seq: Sequence, segment: Segment, depth: int, surprises: bool = False) -> Kernel | None:
    """The kernel for a segment; None where plain PyTorch is to do it: unasked for, a part of a chunk, or what the
    kernels do not take. surprises: they are asked for, which only the compiled one gives.
    """
    if seq.kernels is None or not segment.whole or seq.base:
        return None
    if seq.kernels.name == "compiled":
        return compiled.Launch(seq, segment)
    if surprises or beyond_kernels(depth, segment.size, seq.k.shape[-1], seq.kernels.precision == "ieee"):
        return None
    from titans_train.memory.kernels.segment import Launch

    return Launch.of(seq, segment, seq.kernels.precision)


@dataclass(frozen=True)
class Trial:
    """A run's memory, for its kernels to be tried on."""

    memory: MemoryShape
    width: int  # of a head
    dtype: torch.dtype  # of the model
    documents: bool  # sequences hold documents of their own

    def run(self, device: torch.device) -> None:
        """Each kernel once, compiled as the run will launch it; raises what it raises."""
        from titans_train.memory.scan import memory_scan
        from titans_train.memory.state import MemoryState

        m, d = self.memory, self.width
        length = 2 * m.chunk_size
        q, k, v = (torch.zeros(1, 1, length, d, device=device, dtype=self.dtype).requires_grad_() for _ in range(3))
        forgetting, momentum, step = (torch.full((1, 1, length), 0.1, device=device) for _ in range(3))
        sizes = [d, *[m.hidden] * (m.depth - 1), d]
        layers = tuple(torch.zeros(1, 1, *s, device=device) for s in zip(sizes, sizes[1:], strict=False))
        state = MemoryState(layers, layers if m.momentum else ())
        norm = torch.ones(1, d, device=device) if m.residual_norm else None
        starts = torch.zeros(1, length, dtype=torch.bool, device=device) if self.documents else None
        y, _ = memory_scan(
            q, k, v, forgetting if m.forgetting else None, momentum if m.momentum else None, step, state,
            chunk_size=m.chunk_size, activation=m.activation, gain=norm, bias=norm, document_starts=starts,
            document_state=state if self.documents else None, store_every=m.store_every, kernels="triton",
        )  # fmt: skip
        y.float().sum().backward()
        assert q.grad is not None
        q.grad.sum().item()  # waits: what fails on the device is known here


def check(kernels: str, trial: Trial | None = None, cuda: bool | None = None) -> str | None:
    """For a training to ask before it starts: builds what is built, and runs Triton's kernels once on `trial`.

    cuda: it will run on a GPU; None: if there is one.
    UserError where what is asked for cannot be had; a remark where `auto` has to take plain PyTorch on a CPU.
    """
    reason, cuda = None, torch.cuda.is_available() if cuda is None else cuda
    if kernels == "compiled":
        reason = "it is for CPUs, and there is a CUDA device" if cuda else compiled.why_not()
    elif kernels == "auto" and not cuda and (without := compiled.why_not()) is not None:
        return f"memory.kernels is auto: plain PyTorch, at less than half the speed, since {without}"
    elif kernels == "triton":
        reason = _no_triton(trial)
    if reason is not None:
        raise UserError(f"memory.kernels is {kernels}, but {reason}; or use auto or plain")
    return None


def _no_triton(trial: Trial | None) -> str | None:
    if not torch.cuda.is_available():
        return "there is no CUDA device: start on a machine with one"
    try:
        import triton

        import titans_train.memory.kernels.segment  # noqa: F401
    except ImportError as error:
        return f"Triton cannot be imported ({error}): install it as your torch wants it"
    if trial is None:
        return None
    try:
        trial.run(torch.device("cuda", torch.cuda.current_device()))
    except (triton.TritonError, RuntimeError) as error:
        told = " ".join(f"{type(error).__name__}: {error}".split())
        return f"its kernels do not run on {torch.cuda.get_device_name()} ({told[:400]}): report it with these words"
    return None
