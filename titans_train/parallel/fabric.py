"""What connects the ranks, before anything relies on it: who is there, what each says, how fast an all-reduce is.

Words go through a store on rank 0's host (TCP), so that they arrive even where the fabric between the devices hangs.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from titans_train.errors import UserError

PAUSE = 0.05  # seconds between two looks for a word
BYTES = {"cuda": 256 << 20, "cpu": 8 << 20}  # of a gradient bucket's order; a CPU's loopback takes longer
ROUNDS = 5


class Meeting:
    """Ranks that exchange words. `seconds`: how long one waits for another; UserError then names those missing."""

    def __init__(self, seconds: float) -> None:
        self.rank = int(os.environ.get("RANK", "0"))
        self.world_size = int(os.environ.get("WORLD_SIZE", "1"))
        self.local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        self.seconds = seconds
        if self.world_size == 1:
            self.store: dist.Store = dist.HashStore()
            return
        address, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT")
        if address is None or port is None:
            raise UserError("MASTER_ADDR and MASTER_PORT are not set; start with launchers/ranks.py, torchrun or srun")
        try:
            self.store = dist.TCPStore(
                address, int(port), self.world_size, self.rank == 0, timedelta(seconds=seconds), wait_for_workers=False
            )
        except (RuntimeError, ValueError) as error:
            verb = "listen" if self.rank == 0 else "reach rank 0"
            raise UserError(
                f"rank {self.rank} could not {verb} at {address}:{port} within {seconds:g} s "
                f"({str(error).splitlines()[0]}); is that node up, the port free and open between the nodes?"
            ) from error

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def exchange(self, subject: str, word: str) -> list[str]:
        """Every rank's word, in rank order, on every rank."""
        self.store.set(f"{subject}/{self.rank}", word)
        keys = [f"{subject}/{rank}" for rank in range(self.world_size)]
        deadline = time.monotonic() + self.seconds
        try:
            while missing := [rank for rank, key in enumerate(keys) if not self.store.check([key])]:
                if time.monotonic() > deadline:
                    raise UserError(f"{subject}: no word within {self.seconds:g} s from {self._names(missing)}")
                time.sleep(PAUSE)
            return [self.store.get(key).decode() for key in keys]
        except RuntimeError as error:
            raise UserError(f"{subject}: rank 0, which keeps the words, is gone ({error})") from error

    def say_where(self, host: str) -> None:
        """Before the first exchange, so that a missing rank's host can be named."""
        self.store.set(f"host/{self.rank}", host)

    def _names(self, ranks: Sequence[int]) -> str:
        hosts = {r: self.store.get(f"host/{r}").decode() for r in ranks if self.store.check([f"host/{r}"])}
        shown = [f"rank {r} ({hosts[r]})" if r in hosts else f"rank {r} (which never came)" for r in ranks[:8]]
        return ", ".join(shown) + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")

    def leave(self) -> None:
        """The first rank keeps the words until all others have read theirs."""
        if self.world_size > 1:
            self.store.set(f"left/{self.rank}", "")
            deadline = time.monotonic() + 10
            while self.is_first and time.monotonic() < deadline:
                if all(self.store.check([f"left/{rank}"]) for rank in range(self.world_size)):
                    return
                time.sleep(PAUSE)


def bandwidths(meeting: Meeting, hosts: Sequence[str]) -> dict[str, Any]:
    """Bytes per second that each rank moves in an all-reduce: of "all" ranks, and where this rank takes part, "within"
    its node and "between" the first ranks of the nodes. `hosts`: of every rank. Collective.

    The usual "bus bandwidth": 2 (n - 1) / n of the buffer passes each rank's link. Medians. Where it fails, "error"
    says how.
    """
    try:
        return _bandwidths(meeting, hosts)
    except (RuntimeError, ValueError) as error:
        return {"error": str(error).splitlines()[0]}


def _bandwidths(meeting: Meeting, hosts: Sequence[str]) -> dict[str, Any]:
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(kind, meeting.local_rank) if kind == "cuda" else torch.device(kind)
    if kind == "cuda":
        torch.cuda.set_device(device)
    timeout = timedelta(seconds=meeting.seconds)
    dist.init_process_group(
        "nccl" if kind == "cuda" else "gloo", store=dist.PrefixStore("fabric", meeting.store), rank=meeting.rank,
        world_size=meeting.world_size, timeout=timeout,
    )  # fmt: skip
    nodes = {host: [rank for rank, of in enumerate(hosts) if of == host] for host in dict.fromkeys(hosts)}
    subjects: list[tuple[str, list[int]]] = [("within", ranks) for ranks in nodes.values()]
    subjects += [("between", [ranks[0] for ranks in nodes.values()]), ("all", list(range(meeting.world_size)))]
    buffer = torch.ones(BYTES[kind] // 4, device=device)
    found = {}
    for subject, ranks in subjects:
        group = dist.new_group(ranks, timeout=timeout)  # every process makes every group
        if meeting.rank in ranks and len(ranks) > 1:
            found[subject] = _bandwidth(buffer, group, len(ranks))
        dist.barrier()
    dist.destroy_process_group()
    return found


def _bandwidth(buffer: torch.Tensor, group: Any, ranks: int) -> float:
    seconds = []
    for attempt in range(ROUNDS + 1):
        buffer.fill_(1.0)
        _synchronize(buffer)
        started = time.perf_counter()
        dist.all_reduce(buffer, group=group)
        _synchronize(buffer)
        if attempt > 0:  # the first makes the connections
            seconds.append(time.perf_counter() - started)
    if not bool((buffer == ranks).all()):
        raise ValueError(f"an all-reduce of ones over {ranks} ranks did not give {ranks} everywhere")
    return 2 * (ranks - 1) / ranks * buffer.numel() * buffer.element_size() / statistics.median(seconds)


def _synchronize(buffer: torch.Tensor) -> None:
    if buffer.is_cuda:
        torch.cuda.synchronize(buffer.device)
