"""A memory with another paper's update rule, in the place of the Titans memory: same convolutions, same frame.

Shape legend: B batch, L tokens, H heads (of this device), d head width. As `memory/layer.py`, it is given what the
block has projected and returns heads [B, L, H, d]. Its state is a matrix per head, kept as the weights of a linear
memory without momentum.

    deltanet        arXiv 2406.06484   beta = sigmoid
    gated_deltanet  arXiv 2412.06464   and a decay exp(-A softplus(. + bias)) per head
    mamba2          arXiv 2405.21060   dt = softplus(. + bias), decay exp(-A dt), values dt x, output + D x; every head
                                       has queries (C) and keys (B) of its own
    rwkv7           arXiv 2503.14456   decay exp(-e^-1/2 sigmoid(.)) and rate per channel, removal key kappa, output +
                                       (r . rho k) v; convolutions where it mixes each token with the last, projections
                                       of full rank
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from titans_train.memory.convolution import CausalConvolution, convolve, document_positions, key_start
from titans_train.memory.learned import Learned
from titans_train.memory.peers.kernels import Terms, scan
from titans_train.memory.state import MemoryState
from titans_train.shape import ModelShape

if TYPE_CHECKING:
    from titans_train.memory.layer import Inputs, MemoryLayerState
    from titans_train.models.neighbours import Neighbours
    from titans_train.models.parts import Parts

SHARPEST = math.exp(-0.5)  # RWKV-7: the logarithm of a decay is above minus this


def _start(name: str, size: tuple[int, ...]) -> Tensor:
    """Where the papers' code starts: A of 1 to 16, steps of 0.001 to 0.1 (log-uniform), RWKV-7's decays spread."""
    if name == "A":
        return torch.empty(size).uniform_(1, 16).log()
    if name == "bias" and len(size) == 1:
        step = torch.empty(size).uniform_(math.log(1e-3), math.log(1e-1)).exp()
        return step + (-torch.expm1(-step)).log()  # softplus of it is the step
    if name == "bias":
        return torch.linspace(-6, -1, size[1]).expand(size).clone()
    return torch.full(size, {"D": 1.0, "removal": 0.85, "mix": 1.0, "bonus": 0.0}[name])


def _wide(x: Tensor) -> Tensor:
    """In float32 or better, as the recurrence, its gates and its state are."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class PeerMemory(nn.Module):
    def __init__(self, shape: ModelShape, parts: Parts) -> None:
        super().__init__()
        assert shape.memory is not None
        self.shape, m = shape.memory, shape.memory
        self.heads, self.head_dim = parts.share(shape.heads), shape.head_dim
        starts = ((1.0,), key_start(m), (1.0,))
        convolutions = (CausalConvolution(shape.width, m.convolution, parts, start, shape.compile) for start in starts)
        self.q_conv, self.k_conv, self.v_conv = convolutions
        constants = shape.peer_constants()
        self.names = list(constants)
        self.constants = Learned(*(parts.parameter(_start(name, size), 0) for name, size in constants.items()))

    def initial_memory(self, batch: int = 1) -> MemoryState:
        """Nothing is known before a document's first token."""
        device = self.q_conv.weight.device if self.shape.convolution > 1 else None
        return MemoryState((torch.zeros(batch, self.heads, self.head_dim, self.head_dim, device=device),), ())

    def empty_tails(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x: [B, ...] of the model's dtype."""
        tail = x.new_zeros(x.shape[0], self.shape.convolution - 1, self.heads * self.head_dim)
        return tail, tail, tail

    def _split(self, x: Tensor) -> Tensor:
        """[B, L, H d] -> [B, H, L, d], in float32 or better"""
        return _wide(x).unflatten(-1, (self.heads, self.head_dim)).transpose(1, 2)

    def forward(
        self,
        given: Inputs,
        state: MemoryLayerState,
        document_starts: Tensor | None = None,
        document_memory: MemoryState | None = None,
        across: Neighbours | None = None,
        record: bool = True,
        ends: bool = True,
    ) -> tuple[Tensor, MemoryLayerState]:
        """As `NeuralMemory.forward`; a document starts from nothing, whatever `document_memory` says."""
        inputs = [given["memory_q"], given["memory_k"], given["memory_v"]]
        convolutions, positions = [self.q_conv, self.k_conv, self.v_conv], document_positions(document_starts)
        made, tails = convolve(
            convolutions, inputs, state.tails, positions, across, self.heads, unit=(False, False, False)
        )
        q, k, v = (_wide(x) for x in made)
        constants = {name: x.to(q.dtype) for name, x in zip(self.names, self.constants(), strict=True)}
        gates = {name: given[name].to(q.dtype) for name in given if name in ("beta", "decay", "rate")}
        before = tuple(w.to(q.dtype) for w in state.memory.weights)
        if across is not None:
            before = tuple(across.receive("state", before))
        terms, beside = self._rule(q, k, v, gates, constants)
        y, after = scan(
            terms, before[0], chunk_size=self.shape.chunk_size, document_starts=document_starts,
            kernels=self.shape.peer_kernels, dtype=inputs[0].dtype,
        )  # fmt: skip
        y = y if beside is None else y + beside
        if across is not None:
            y = across.send("state", y, [after])
        return y.to(inputs[0].dtype).transpose(1, 2), replace(state, memory=MemoryState((after,), ()), tails=tails)

    def _rule(
        self, q: Tensor, k: Tensor, v: Tensor, gates: dict[str, Tensor], c: dict[str, Tensor]
    ) -> tuple[Terms, Tensor | None]:
        """q, k, v after their convolutions, [B, H, L, d]; gates [B, L, H] or [B, L, H d].

        Returns the recurrence, and what comes to its outputs beside.
        """
        rule = self.shape.rule
        if rule == "rwkv7":
            log_decay = -SHARPEST * (self._split(gates["decay"]) + c["bias"][:, None]).sigmoid()
            rate = self._split(gates["rate"]).sigmoid()
            removal = F.normalize(k * c["removal"][:, None], dim=-1, eps=1e-6)
            k = k * (1 + (rate - 1) * c["mix"][:, None])
            beside = (q * k * c["bonus"][:, None]).sum(-1, keepdim=True) * v
            return Terms(q, k, v, log_decay, removal, -removal * rate), beside
        steps, decay = None, None  # [B, H, L]
        if "decay" in gates:
            steps = F.softplus(gates["decay"] + c["bias"]).transpose(1, 2)
            decay = -c["A"].exp()[:, None] * steps
        if rule == "mamba2":
            assert steps is not None
            return Terms(q, k, v * steps[..., None], decay), c["D"][:, None, None] * v
        q, k = F.normalize(q, dim=-1, eps=1e-6), F.normalize(k, dim=-1, eps=1e-6)
        return Terms(q, k, v, decay, beta=gates["beta"].sigmoid().transpose(1, 2)), None
