"""The neural memory as a layer: convolutions, gates and the scan (Titans paper, sections 3.1 and 4.4).

Shape legend: B batch, L tokens, H heads (of this device), d head width, K taps of a convolution.
What it is given, the block has projected: "memory_q", "memory_k", "memory_v" [B, L, H d], and the gates
"alpha", "eta", "theta" [B, L, H] before their sigmoid. It returns heads [B, L, H, d]; what follows (norm, gate,
output projection) belongs to the block.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from titans_train.memory.convolution import CausalConvolution, convolve, document_positions, key_start
from titans_train.memory.learned import Learned
from titans_train.memory.recurrence import memory_mlp
from titans_train.memory.scan import memory_scan
from titans_train.memory.state import MemoryState, Weights
from titans_train.shape import MemoryShape, ModelShape

if TYPE_CHECKING:
    from titans_train.models.neighbours import Neighbours
    from titans_train.models.parts import Parts

Inputs = Mapping[str, Tensor]
Scan = Callable[..., tuple[Tensor, MemoryState]]  # as memory_scan


def gate_biases(m: MemoryShape) -> dict[str, float]:
    """The gates in use and where they start."""
    used = {"alpha": (m.forgetting, m.forget_bias), "eta": (m.momentum, m.momentum_bias)}
    used["theta"] = (m.write, m.theta_bias)
    return {name: bias for name, (on, bias) in used.items() if on}


def memory_sections(shape: ModelShape) -> dict[str, int]:
    """What the layer is given, by name, and how wide."""
    assert shape.memory is not None
    qkv = dict.fromkeys(("memory_q", "memory_k", "memory_v"), shape.width)
    if shape.memory.rule != "titans":
        return qkv | shape.peer_gates()
    return qkv | dict.fromkeys(gate_biases(shape.memory), shape.heads)


@dataclass(frozen=True)
class MemoryLayerState:
    """What the layer carries: the memory, the last K - 1 inputs of each convolution."""

    memory: MemoryState
    tails: tuple[Tensor, Tensor, Tensor]  # of q, k, v: [B, K - 1, H d]


class NeuralMemory(nn.Module):
    """Heads of what it is given, reading the memory that it writes.

    Initial values follow measurements of what trains without blowing up: alpha near 0, convolutions near the
    identity, and theta limited to theta_max * (1 - eta), since the step sizes of a chunk and 1 / (1 - eta) multiply.
    """

    def __init__(self, shape: ModelShape, parts: Parts) -> None:
        super().__init__()
        assert shape.memory is not None
        self.shape, m = shape.memory, shape.memory
        self.heads, self.head_dim = parts.share(shape.heads), shape.head_dim

        def convolution(*start: float) -> CausalConvolution:
            return CausalConvolution(shape.width, m.convolution, parts, start, shape.compile)

        self.q_conv, self.k_conv, self.v_conv = convolution(1.0), convolution(*key_start(m)), convolution(1.0)
        biases = gate_biases(m)
        self.gate_bias = None
        if biases:
            start = torch.tensor(list(biases.values()))[:, None].expand(-1, shape.heads).clone()
            self.gate_bias = Learned(parts.parameter(start, 1))  # [gates, H]
        sizes = [shape.head_dim, *[m.hidden] * (m.depth - 1), shape.head_dim]
        self.initial = Learned(
            *(
                parts.parameter(torch.randn(shape.heads, a, b) * a**-0.5, 0)
                for a, b in zip(sizes, sizes[1:], strict=False)
            )
        )
        self.norm = None
        if m.residual_norm:
            gain = torch.full((shape.heads, shape.head_dim), shape.head_dim**-0.5)
            self.norm = Learned(parts.parameter(gain, 0), parts.parameter(torch.zeros_like(gain), 0))
        # While monitoring records: number of rows, and means over them, of each forward.
        self.records: list[tuple[int, dict[str, Tensor]]] | None = None
        self.instead: Scan | None = None  # scans a text's tokens (not persistent ones) in the place of memory_scan

    def initial_memory(self, batch: int = 1) -> MemoryState:
        """The state before the first token of a document: learned weights, no momentum."""
        return MemoryState.start(self._start(), self.shape.momentum).expand(batch)

    def _start(self) -> Weights:
        """The learned initial weights, [1, H, d_in, d_out] in float32 or better."""
        return tuple(w[None].to(torch.promote_types(w.dtype, torch.float32)) for w in self.initial())

    def gain_and_bias(self) -> tuple[Tensor | None, Tensor | None]:
        """Of the residual layer norm inside the memory, [H, d] each; None without it."""
        if self.norm is None:
            return None, None
        gain, bias = self.norm()
        return gain, bias

    def empty_tails(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x: [B, ...] of the model's dtype."""
        tail = x.new_zeros(x.shape[0], self.shape.convolution - 1, self.heads * self.head_dim)
        return tail, tail, tail

    def initial_state(self, x: Tensor, memory: MemoryState | None = None) -> MemoryLayerState:
        """The state before a document; `memory` replaces the learned initial one."""
        memory = self.initial_memory() if memory is None else memory
        return MemoryLayerState(memory.expand(x.shape[0]), self.empty_tails(x))

    def query(self, q: Tensor, tail: Tensor, positions: Tensor | None) -> Tensor:
        """l2-normalised queries [B, H, L, d] of projected ones [B, L, H d]."""
        y: Tensor = self.q_conv(q, tail, positions, self.heads, unit=True)
        return y

    def read(self, q: Tensor, memory: MemoryState, tail: Tensor, positions: Tensor | None) -> tuple[Tensor, Tensor]:
        """Reads without writing (MAC's h): heads [B, L, H, d], and the query convolution's new tail."""
        given, after = q.dtype, self.q_conv.tail(q, tail, positions)
        q = self.query(q, tail, positions)
        dtype = memory.weights[0].dtype
        gain, bias = (None if p is None else p.to(dtype) for p in self.gain_and_bias())
        y = memory_mlp(q.to(dtype), memory.weights, self.shape.activation, gain, bias)
        return y.to(given).transpose(1, 2), after

    def gate_values(self, given: Inputs) -> tuple[Tensor | None, Tensor | None, Tensor]:
        """alpha, eta, theta, each [B, H, L] in float32 or better; None where switched off."""
        m, k = self.shape, given["memory_k"]
        dtype = torch.promote_types(k.dtype, torch.float32)
        gates = {}
        if self.gate_bias is not None:
            (biases,) = self.gate_bias()
            for name, bias in zip(gate_biases(m), biases, strict=True):
                gates[name] = (given[name].to(dtype) + bias.to(dtype)).sigmoid().transpose(1, 2)
        alpha, eta = gates.get("alpha"), gates.get("eta")
        if "theta" not in gates:
            return alpha, eta, torch.zeros(k.shape[0], self.heads, k.shape[1], dtype=dtype, device=k.device)
        theta = gates["theta"] * m.theta_max
        return alpha, eta, theta * (1 - eta) if m.couple_theta and eta is not None else theta

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
        """Heads [B, L, H, d]. document_starts: [B, L] bool; there the memory restarts from `document_memory`.

        across: given, these are a shard's tokens, and `state` is where the first shard starts. record: these are a
        text's tokens, which count for monitoring; ends: the state that this ends with counts there.
        """
        positions = document_positions(document_starts)
        inputs = [given["memory_q"], given["memory_k"], given["memory_v"]]
        (q, k, v), tails = convolve(
            [self.q_conv, self.k_conv, self.v_conv], inputs, state.tails, positions, across, self.heads,
            unit=(True, True, self.shape.normalize_values),
        )  # fmt: skip
        alpha, eta, theta = self.gate_values(given)
        surprises: list[Tensor] | None = [] if record and self.records is not None else None
        gain, bias = self.gain_and_bias()
        scan = memory_scan if across is None else across.scan
        if record and self.instead is not None:
            scan = self.instead
        y, memory = scan(
            q, k, v, alpha, eta, theta, state.memory,
            chunk_size=self.shape.chunk_size, activation=self.shape.activation, gain=gain, bias=bias,
            document_starts=document_starts, document_state=document_memory,
            base=self._start() if self.shape.forget_to == "start" else None,
            store_every=self.shape.store_every, surprises=surprises, kernels=self.shape.kernels,
        )  # fmt: skip
        if surprises:
            self._record(surprises, alpha, eta, theta, memory if ends else None)
        return y.transpose(1, 2), MemoryLayerState(memory, tails)

    @torch.no_grad()
    def _record(
        self, surprises: list[Tensor], alpha: Tensor | None, eta: Tensor | None, theta: Tensor, end: MemoryState | None
    ) -> None:
        def norm(weights: tuple[Tensor, ...]) -> Tensor:
            """Mean over batch and heads of the norm of all layers together."""
            squares = [w.float().square().sum((-1, -2)) for w in weights]
            return torch.stack(squares).sum(0).sqrt().mean() if squares else theta.new_zeros(())

        def mean(gate: Tensor | None) -> Tensor:
            return theta.new_zeros(()) if gate is None else gate.mean()

        assert self.records is not None
        figures = {
            "surprise": torch.cat([s.flatten() for s in surprises]).mean(), "alpha": mean(alpha), "eta": mean(eta),
            "theta": mean(theta),
        }  # fmt: skip
        if end is not None:
            figures |= {"weight_norm": norm(end.weights), "momentum_norm": norm(end.momentum)}
        self.records.append((theta.shape[0], figures))
