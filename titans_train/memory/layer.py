"""The neural memory as a layer: projections, convolutions, gates and the scan (Titans paper, sections 3.1 and 4.4).

Shape legend: B batch, L tokens, D width, H heads, d = D / H, K taps of a convolution.
The layer returns heads [B, L, H, d]; what follows (norm, gate, projection) belongs to the block.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from titans_train.memory.convolution import CausalConvolution, document_positions
from titans_train.memory.learned import Learned
from titans_train.memory.recurrence import memory_mlp
from titans_train.memory.scan import memory_scan
from titans_train.memory.state import MemoryState
from titans_train.shape import ModelShape


@dataclass(frozen=True)
class MemoryLayerState:
    """What the layer carries: the memory, the last K - 1 inputs of each convolution."""

    memory: MemoryState
    tails: tuple[Tensor, Tensor, Tensor]  # of q, k, v: [B, K - 1, D]


class NeuralMemory(nn.Module):
    """x [B, L, D] -> heads [B, L, H, d], reading the memory that it writes.

    Initial values follow measurements of what trains without blowing up: alpha near 0, convolutions near the
    identity, and theta limited to theta_max * (1 - eta), since the step sizes of a chunk and 1 / (1 - eta) multiply.
    """

    def __init__(self, shape: ModelShape, parts: object) -> None:
        super().__init__()
        assert shape.memory is not None
        self.shape, m = shape.memory, shape.memory
        self.heads, self.head_dim = shape.heads, shape.head_dim
        width, std = shape.width, shape.initializer_std
        self.q, self.k, self.v = (parts.column_linear(width, width, std) for _ in range(3))  # type: ignore[attr-defined]
        self.q_conv, self.v_conv = CausalConvolution(width, m.convolution), CausalConvolution(width, m.convolution)
        # A key made of two tokens can stand for the first while the value stands for the second: what recall needs.
        self.k_conv = CausalConvolution(width, m.convolution, (0.7, 0.7) if m.key_start == "pair" else (1.0,))
        gates = [m.forget_bias] * m.forgetting + [m.momentum_bias] * m.momentum + [m.theta_bias] * m.write
        self.gates = parts.gates(width, self.heads, gates, std) if gates else None  # type: ignore[attr-defined]
        sizes = [self.head_dim, *[m.hidden] * (m.depth - 1), self.head_dim]
        self.initial = Learned(
            *(torch.randn(self.heads, a, b) * a**-0.5 for a, b in zip(sizes, sizes[1:], strict=False))
        )
        per_head = (self.heads, self.head_dim)
        self.norm = (
            Learned(torch.full(per_head, self.head_dim**-0.5), torch.zeros(per_head)) if m.residual_norm else None
        )
        self.records: dict[str, Tensor] | None = None  # filled by the forward while monitoring records

    def initial_memory(self, batch: int = 1) -> MemoryState:
        """The state before the first token of a document: learned weights, no momentum."""
        weights = tuple(w[None].to(torch.promote_types(w.dtype, torch.float32)) for w in self.initial())
        return MemoryState.start(weights, self.shape.momentum).expand(batch)

    def gain_and_bias(self) -> tuple[Tensor | None, Tensor | None]:
        """Of the residual layer norm inside the memory, [H, d] each; None without it."""
        if self.norm is None:
            return None, None
        gain, bias = self.norm()
        return gain, bias

    def empty_tails(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        tail = x.new_zeros(x.shape[0], self.shape.convolution - 1, self.heads * self.head_dim)
        return tail, tail, tail

    def initial_state(self, x: Tensor, memory: MemoryState | None = None) -> MemoryLayerState:
        """The state before a document; `memory` replaces the learned initial one."""
        memory = self.initial_memory() if memory is None else memory
        return MemoryLayerState(memory.expand(x.shape[0]), self.empty_tails(x))

    def split(self, x: Tensor) -> Tensor:
        """[B, L, H d] -> [B, H, L, d]"""
        return x.unflatten(-1, (self.heads, self.head_dim)).transpose(1, 2)

    def query(self, x: Tensor, tail: Tensor, positions: Tensor | None) -> tuple[Tensor, Tensor]:
        """l2-normalised queries [B, H, L, d], and the convolution's new tail."""
        q, tail = self.q_conv(self.q(x), tail, positions)
        return F.normalize(self.split(F.silu(q)), dim=-1, eps=1e-6), tail

    def read(self, x: Tensor, memory: MemoryState, tail: Tensor, positions: Tensor | None) -> tuple[Tensor, Tensor]:
        """Reads without writing (MAC's h): heads [B, L, H, d], and the query convolution's new tail."""
        q, tail = self.query(x, tail, positions)
        dtype = memory.weights[0].dtype
        gain, bias = (None if p is None else p.to(dtype) for p in self.gain_and_bias())
        y = memory_mlp(q.to(dtype), memory.weights, self.shape.activation, gain, bias)
        return y.to(x.dtype).transpose(1, 2), tail

    def gate_values(self, x: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor]:
        """alpha, eta, theta, each [B, H, L] in float32 or better; None where switched off."""
        m = self.shape
        dtype = torch.promote_types(x.dtype, torch.float32)
        if self.gates is None:
            return None, None, torch.zeros(x.shape[0], self.heads, x.shape[1], dtype=dtype, device=x.device)
        values = self.gates(x).to(dtype).sigmoid()  # [B, gates, L, H]
        parts = list(values.permute(1, 0, 3, 2).unbind(0))
        alpha = parts.pop(0) if m.forgetting else None
        eta = parts.pop(0) if m.momentum else None
        theta = parts.pop(0) * m.theta_max if m.write else torch.zeros_like(values[:, 0].transpose(1, 2))
        if m.couple_theta and eta is not None:
            theta = theta * (1 - eta)
        return alpha, eta, theta

    def forward(
        self,
        x: Tensor,
        state: MemoryLayerState,
        document_starts: Tensor | None = None,
        document_memory: MemoryState | None = None,
    ) -> tuple[Tensor, MemoryLayerState]:
        """document_starts: [B, L] bool; there the memory restarts from `document_memory`."""
        positions = document_positions(document_starts)
        q, q_tail = self.query(x, state.tails[0], positions)
        k, k_tail = self.k_conv(self.k(x), state.tails[1], positions)
        v, v_tail = self.v_conv(self.v(x), state.tails[2], positions)
        k, v = F.normalize(self.split(F.silu(k)), dim=-1, eps=1e-6), self.split(F.silu(v))
        if self.shape.normalize_values:
            v = F.normalize(v, dim=-1, eps=1e-6)
        alpha, eta, theta = self.gate_values(x)
        surprises: list[Tensor] | None = None if self.records is None else []
        gain, bias = self.gain_and_bias()
        y, memory = memory_scan(
            q, k, v, alpha, eta, theta, state.memory,
            chunk_size=self.shape.chunk_size, activation=self.shape.activation, gain=gain, bias=bias,
            document_starts=document_starts, document_state=document_memory,
            store_every=self.shape.store_every, surprises=surprises,
        )  # fmt: skip
        if self.records is not None and surprises:
            self._record(surprises, alpha, eta, theta, memory)
        return y.transpose(1, 2), MemoryLayerState(memory, (q_tail, k_tail, v_tail))

    @torch.no_grad()
    def _record(
        self, surprises: list[Tensor], alpha: Tensor | None, eta: Tensor | None, theta: Tensor, memory: MemoryState
    ) -> None:
        def norm(weights: tuple[Tensor, ...]) -> Tensor:
            """Mean over batch and heads of the norm of all layers together."""
            squares = [w.float().square().sum((-1, -2)) for w in weights]
            return torch.stack(squares).sum(0).sqrt().mean() if squares else theta.new_zeros(())

        def mean(gate: Tensor | None) -> Tensor:
            return theta.new_zeros(()) if gate is None else gate.mean()

        assert self.records is not None
        self.records.update(
            surprise=torch.cat(surprises, dim=1).mean(), alpha=mean(alpha), eta=mean(eta), theta=mean(theta),
            weight_norm=norm(memory.weights), momentum_norm=norm(memory.momentum),
        )  # fmt: skip
