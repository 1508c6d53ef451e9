"""What no rank may decide alone: to stop, to save, to give up."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist

from titans_train.monitoring import signals
from titans_train.parallel.launch import host_group


def decide(wishes: Mapping[str, float]) -> dict[str, float]:
    """The largest of all ranks' values, by name, the same on every rank. Collective; every rank gives the same names.

    One small message, between the hosts: no device is waited for.
    """
    values = torch.tensor([float(value) for value in wishes.values()], dtype=torch.float64)
    dist.all_reduce(values, op=dist.ReduceOp.MAX, group=host_group())
    return dict(zip(wishes, values.tolist(), strict=True))


def asked_to_stop() -> int:
    """The number of a signal that any rank has got; 0: none. Collective."""
    return int(decide({"stop": signals.received()})["stop"])
