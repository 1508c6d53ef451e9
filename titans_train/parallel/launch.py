"""Joining the other processes, and deciding things together with them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from titans_train.errors import UserError
from titans_train.host import flush_denormals
from titans_train.monitoring.signals import Requeue
from titans_train.parallel.groups import data_group, leave_groups, make_groups
from titans_train.parallel.mesh import Mesh

T = TypeVar("T")
TIMEOUT = timedelta(minutes=10)
_hosts: list[dist.ProcessGroup] = []  # beside NCCL's world: one for the hosts


def device() -> torch.device:
    """This process's device: its GPU by LOCAL_RANK, or the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


@contextmanager
def process_group(
    tensor: int = 1, sequence: int = 1, timeout: timedelta = TIMEOUT, world_timeout: timedelta = TIMEOUT
) -> Iterator[Mesh]:
    """Joins the group that torchrun describes in the environment, or a group of one; leaves it at the end.

    timeout: how long a rank waits for those that it shares a model with; world_timeout: for any other. ValueError if
    the processes form no mesh. After an error of this rank alone the group is not left, which may take for ever: the
    process is to end.
    """
    flush_denormals()
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(device())
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        dist.init_process_group(backend, timeout=world_timeout)
    else:
        os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed insists on it
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=world_timeout)
    if backend == "nccl":
        _hosts.append(dist.new_group(backend="gloo", timeout=world_timeout))
    with _left_together(dist.destroy_process_group), mesh_of(tensor, sequence, timeout) as mesh:
        yield mesh


@contextmanager
def mesh_of(tensor: int = 1, sequence: int = 1, timeout: timedelta = TIMEOUT) -> Iterator[Mesh]:
    """The processes that have joined as a mesh, with its groups. Collective."""
    mesh = Mesh(dist.get_rank(), dist.get_world_size(), tensor, sequence)
    make_groups(mesh, timeout)
    with _left_together(lambda: leave_groups(mesh)):
        yield mesh


@contextmanager
def _left_together(leave: Callable[[], None]) -> Iterator[None]:
    """Leaves a group unless this rank alone has failed: the others are still in it, and leaving may wait for them."""
    try:
        yield
    except BaseException as error:
        if together(error):
            leave()
        raise
    leave()


def together(error: BaseException) -> bool:
    """Whether every rank raises it, at the same place."""
    agreed = error.agreed if isinstance(error, UserError) else isinstance(error, Requeue)
    return agreed or dist.get_world_size() == 1


def host_group() -> dist.ProcessGroup | None:
    """All ranks, for tensors on the CPU, whose exchange waits for no device; None: the world's own."""
    return _hosts[0] if _hosts else None


def gather(value: T) -> list[T]:
    """Every rank's value (a small picklable object), in rank order, on every rank."""
    values: list[T] = [value] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def agree(check: Callable[[], T], on: Mesh, first_only: bool = False) -> T:
    """Runs `check` (on the first rank only, if asked; its result is then everyone's) and raises on all ranks or none.

    A rank that fails alone would leave the others waiting in their next collective.
    """
    result, failure = None, None
    if on.is_first or not first_only:
        try:
            result = check()
        except (UserError, OSError) as error:
            failure = str(error)
    outcomes = gather((failure, result if first_only else None))
    failures = [f for f, _ in outcomes if f is not None]
    if failures:
        raise UserError(failures[0], agreed=True)
    return outcomes[0][1] if first_only else result  # type: ignore[return-value]


def sum_over_data(values: Tensor, mesh: Mesh) -> Tensor:
    """Sum over the ranks that see different tokens, in place; no host synchronisation."""
    dist.all_reduce(values, group=data_group(mesh))
    return values


def mean_over_ranks(values: Tensor) -> Tensor:
    """Mean over all ranks, in place."""
    dist.all_reduce(values)
    return values.div_(dist.get_world_size())
