"""Copies that should be equal, compared bit for bit by checksum: a device whose memory or arithmetic fails is named.

    ZeRO 0 to 2   parameters, over the ranks with the same weights (data-parallel ranks and sequence shards)
    ZeRO 0        Adam's moments as well
    ZeRO 3        of these only the parameters that stay whole; the others exist once
    tensor ranks  parameters that they share: whole, or (ZeRO 3) each rank's part of them

From ZeRO 1 on each step makes the copies anew from parts that exist once: what went wrong before it is not seen.
"""

from __future__ import annotations

import socket
from collections import Counter
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from titans_train.parallel.engine import Engine
from titans_train.parallel.groups import data_group, tensor_group
from titans_train.parallel.launch import gather
from titans_train.parallel.split import split_of

_AT_ONCE = 1 << 22  # numbers whose bits are widened to 64
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def differences(engine: Engine) -> list[str]:
    """What differs and on which ranks, one line each, the same on every rank; [] as it should be. Collective."""
    suspects: dict[str, set[int]] = {}
    for group, copies in _compared(engine):
        sums = torch.stack([checksum(tensor) for tensor in copies.values()])
        low, high = sums.clone(), sums.clone()
        dist.all_reduce(low, op=dist.ReduceOp.MIN, group=group)
        dist.all_reduce(high, op=dist.ReduceOp.MAX, group=group)
        own = {name: int(s) for name, s, lo, hi in zip(copies, sums, low, high, strict=True) if lo != hi}
        members = tuple(dist.get_process_group_ranks(group))
        found: dict[tuple[str, tuple[int, ...]], dict[int, int]] = {}
        for rank, (ranks, differing) in enumerate(gather((members, own))):
            for name, total in differing.items():
                found.setdefault((name, ranks), {})[rank] = total
        for (name, _), totals in found.items():
            odd = _odd(totals)
            suspects[name] = (suspects.get(name, odd) & odd) or odd
    hosts = gather(socket.gethostname()) if suspects else []
    return [f"{name} on {_ranks(odd, hosts)}" for name, odd in suspects.items()]


def _odd(totals: dict[int, int]) -> set[int]:
    """The ranks without the sum that most have; all of them where no sum has more than half."""
    (common, count), *_ = Counter(totals.values()).most_common(1)
    return {rank for rank, total in totals.items() if total != common or 2 * count <= len(totals)}


def _ranks(odd: set[int], hosts: list[str]) -> str:
    return "rank " + " or ".join(f"{rank} ({hosts[rank]})" for rank in sorted(odd))


def _compared(engine: Engine) -> Iterator[tuple[dist.ProcessGroup, dict[str, Tensor]]]:
    """Each group of ranks, and what each of them has a copy of. In the same order on every rank."""
    mesh, named = engine.mesh, list(engine.model.named_parameters())
    if mesh.data * mesh.sequence > 1:
        whole = [(n, p) for n, p in named if engine.stage < 3 or p.ds_persist and p.ds_status.name == "AVAILABLE"]  # type: ignore[attr-defined]
        copies = _with_moments(engine, whole)
        if copies:
            yield data_group(mesh), copies
    if mesh.tensor > 1:
        yield (
            tensor_group(mesh),
            _with_moments(engine, [(n, p) for n, p in named if split_of(p) is None], partition=True),
        )


def _with_moments(
    engine: Engine, named: list[tuple[str, torch.nn.Parameter]], partition: bool = False
) -> dict[str, Tensor]:
    """The parameters (`partition`: of stage 3 this rank's parts), and what of Adam's is stored as they are."""
    copies: dict[str, Tensor] = {}
    for name, parameter in named:
        copies[name] = parameter.ds_tensor if partition and engine.stage == 3 else parameter  # type: ignore[attr-defined]
        if engine.stage == 0:
            state = engine._base.state[parameter]
            copies |= {f"{key} of {name}": state[key] for key in ("exp_avg", "exp_avg_sq")}
    return copies


def checksum(tensor: Tensor) -> Tensor:
    """Of its bits: 0-d int64 on its device. Any change of a single number changes it, and so does any exchange of two.

    Each number's bits, as an integer, times an odd weight for its place, are summed modulo 2^64.
    """
    bits = tensor.detach().contiguous().view(_BITS[tensor.element_size()]).flatten()
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for first in range(0, bits.numel(), _AT_ONCE):
        part = bits[first : first + _AT_ONCE].long()
        place = torch.arange(first, first + part.numel(), device=tensor.device)
        total += (part * (2 * place + 1)).sum()
    return total
