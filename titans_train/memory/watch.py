"""Looking into the memories of a model while it reads, and reading with their writing switched off.

Both put a scan of their own in the place of `memory_scan` for the tokens of a text; persistent tokens are written as
ever and do not count. For sequences in one piece, not for shards. Shapes: B batch, H heads, L tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from titans_train.memory.layer import NeuralMemory, Scan
from titans_train.memory.recurrence import memory_mlp
from titans_train.memory.scan import memory_scan
from titans_train.memory.state import MemoryState, Weights

TOKEN_SERIES = ("surprise", "alpha", "eta", "theta")
CHUNK_SERIES = ("weight_norm", "momentum_norm", "distance")


class Watch:
    """A scan, chunk by chunk, that keeps what it saw since it was last asked.

    By token: surprise (norm of the inner gradient over all layers of the memory), alpha, eta, theta; 0 where a gate is
    switched off. By chunk, once it is full: norms of weights and momentum over all layers of the memory, and the
    distance of the weights from those before the first token that was watched.
    """

    def __init__(self) -> None:
        self.start: Weights | None = None
        self._seen: dict[str, list[Tensor]] = {}

    def take(self) -> dict[str, Tensor]:
        """Since the last call: TOKEN_SERIES [B, H, L]; CHUNK_SERIES [B, H, full chunks], left out if there is none."""
        seen, self._seen = self._seen, {}
        return {name: torch.cat(parts, -1) for name, parts in seen.items()}

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, alpha: Tensor | None, eta: Tensor | None, theta: Tensor,
        state: MemoryState, *, chunk_size: int, document_starts: Tensor | None = None,
        surprises: list[Tensor] | None = None, **options: Any,
    ) -> tuple[Tensor, MemoryState]:  # fmt: skip
        if self.start is None:
            self.start = tuple(w.detach() for w in state.weights)
        outputs, norms, begin, length = [], [], 0, q.shape[2]
        for name, gate in (("alpha", alpha), ("eta", eta), ("theta", theta)):
            self._keep(name, torch.zeros_like(theta) if gate is None else gate)
        while begin < length:
            end = min(begin + chunk_size - state.offset, length)
            cut = (slice(None), slice(None), slice(begin, end))
            found: list[Tensor] = []
            y, state = memory_scan(
                q[cut], k[cut], v[cut], None if alpha is None else alpha[cut], None if eta is None else eta[cut],
                theta[cut], state, chunk_size=chunk_size,
                document_starts=None if document_starts is None else document_starts[:, begin:end],
                surprises=found, **options,
            )  # fmt: skip
            outputs.append(y)
            norms += found
            if state.offset == 0:
                self._keep_state(state)
            begin = end
        surprise = torch.cat(norms, -1)
        self._keep("surprise", surprise.unflatten(0, q.shape[:2]))
        if surprises is not None:
            surprises.append(surprise)
        return torch.cat(outputs, 2), state

    def _keep(self, name: str, values: Tensor) -> None:
        self._seen.setdefault(name, []).append(values.detach())

    @torch.no_grad()
    def _keep_state(self, state: MemoryState) -> None:
        assert self.start is not None
        moved = tuple(w - start for w, start in zip(state.weights, self.start, strict=True))
        for name, tensors in zip(CHUNK_SERIES, (state.weights, state.momentum, moved), strict=True):
            squares = [t.square().sum((-1, -2)) for t in tensors] or [torch.zeros_like(state.weights[0][..., 0, 0])]
            self._keep(name, torch.stack(squares).sum(0).sqrt()[..., None])


def read_only_scan(
    q: Tensor, k: Tensor, v: Tensor, alpha: Tensor | None, eta: Tensor | None, theta: Tensor, state: MemoryState,
    *, chunk_size: int, activation: str = "silu", gain: Tensor | None = None, bias: Tensor | None = None,
    document_starts: Tensor | None = None, document_state: MemoryState | None = None, **_: Any,
) -> tuple[Tensor, MemoryState]:  # fmt: skip
    """`memory_scan` of a memory that nothing is written into and that forgets nothing: theta = alpha = 0, no momentum.

    Its state moves on in the chunk only, so that writing can go on after it.
    """
    if not q.shape[2]:
        return v.clone(), state
    dtype = torch.promote_types(torch.promote_types(q.dtype, torch.float32), state.weights[0].dtype)
    norm = [None if p is None else p.to(dtype) for p in (gain, bias)]

    def read(memory: MemoryState) -> Tensor:
        return memory_mlp(q.to(dtype), tuple(w.to(dtype) for w in memory.weights), activation, *norm)

    y, after = read(state), state.expand(q.shape[0])
    same_chunk = state.offset and state.offset + q.shape[2] < chunk_size
    anchor = after.anchor if same_chunk else None
    if document_starts is not None:
        assert document_state is not None
        begun = document_starts.cumsum(1) > 0  # [B, L]
        y = torch.where(begun[:, None, :, None], read(document_state), y)
        after = after.at_border().replace_rows(begun[:, -1], document_state)
    offset = (state.offset + q.shape[2]) % chunk_size
    inside = (anchor or after.weights) if offset else None
    return y.to(q.dtype), MemoryState(after.weights, after.momentum, inside, offset)


@contextmanager
def _instead(model: nn.Module, make: Callable[[], Scan]) -> Iterator[list[Any]]:
    """A scan for each memory of the model, in the order of its layers. ValueError: it has no Titans memory."""
    memories = [m for m in model.modules() if isinstance(m, NeuralMemory)]
    if not memories:
        raise ValueError("the model has no Titans memory")
    before = [memory.instead for memory in memories]
    scans = [make() for _ in memories]
    try:
        for memory, scan in zip(memories, scans, strict=True):
            memory.instead = scan
        yield scans
    finally:
        for memory, earlier in zip(memories, before, strict=True):
            memory.instead = earlier


@contextmanager
def watching(model: nn.Module) -> Iterator[list[Watch]]:
    """Within, a `Watch` for each layer sees what its memory does. ValueError: the model has no Titans memory."""
    with _instead(model, Watch) as watches:
        yield watches


@contextmanager
def memory_off(model: nn.Module) -> Iterator[None]:
    """Within, the memories are read but not written: each stays as it was, at a text's start as its persistent tokens
    leave it. Carried states work across the border both ways. ValueError: the model has no Titans memory.
    """
    with _instead(model, lambda: read_only_scan):
        yield
