"""The model of `benchmark checkpoint`, and a state of it that every rank can tell by itself."""

from __future__ import annotations

import hashlib
import math
from typing import Any

import torch
from torch import Tensor

from titans_train.config import RunConfig
from titans_train.parallel import Engine, gather
from titans_train.parallel.pieces import KINDS, Piece
from titans_train.plan import Plan, make_plan

SEQUENCES, LENGTH = 4, 32
STEP = 7  # Adam's count of steps in what is saved


def plan_of(job: dict[str, Any], tensor: int, zero: int, ranks: int, name: str, asynchronous: bool = True) -> Plan:
    config = {
        "run": {"name": name, "folder": job["folder"]},
        "model": {
            "block": "mag", "layers": job["layers"], "width": job["width"], "heads": max(4, job["width"] // 64),
            "vocabulary": 32 * job["width"],
        },
        "memory": {"chunk_size": 32},
        "attention": {"window": 32},
        "parallel": {"tensor": tensor, "zero_stage": zero},
        "data": {"source": "recall", "recall": {"pairs": 4, "keys": 64, "values": 64, "gap": 16}, "workers": 0},
        "training": {
            "steps": 10**6, "sequence_length": LENGTH, "global_batch_size": SEQUENCES,
            "micro_batch_size": SEQUENCES * tensor // ranks,
        },
        "checkpoint": {"keep": 1, "asynchronous": asynchronous},
    }  # fmt: skip
    return make_plan(RunConfig.model_validate(config), ranks)


class Known:
    """Random numbers for every element of the parameters and moments that this rank's optimiser holds."""

    def __init__(self, engine: Engine) -> None:
        shapes, self.engine = whole_shapes(engine), engine
        self.values = {
            (kind, p.name): cut(_numbers(f"{kind}/{p.name}", shapes[p.name]), p).clone()
            for p in engine.pieces.held() for kind in KINDS
        }  # fmt: skip

    def set(self) -> None:
        self.engine.restore(lambda kind, piece: self.values[kind, piece.name], STEP)

    def forget(self) -> None:
        self.engine.restore(lambda kind, piece: torch.zeros(piece.count), 0)

    def difference(self) -> float:
        """Largest of any element on any rank, infinite where Adam's count of steps is another. Collective."""
        pieces, value = self.engine.pieces.held(), self.engine.pieces.value
        found = [float((value(kind, p) - self.values[kind, p.name]).abs().max()) for p in pieces for kind in KINDS]
        return max(gather(max(found, default=0.0) if self.engine.optimizer_step() == STEP else math.inf))


def _numbers(key: str, shape: tuple[int, ...]) -> Tensor:
    seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:7])
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def cut(whole: Tensor, piece: Piece) -> Tensor:
    """The elements of a piece [count] of a whole tensor."""
    share = whole if piece.split is None else piece.split.share(whole, piece.part)
    return share.reshape(-1)[piece.start : piece.end]


def whole_shapes(engine: Engine) -> dict[str, tuple[int, ...]]:
    """Of the parameters."""
    return {name: shape for name, (shape, _) in engine.pieces.wholes().items()}
