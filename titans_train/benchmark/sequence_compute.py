"""`benchmark sequence compute`: real work on sequence shards against the whole sequence in one process.

One thread each. In every round, one after the other: each rank works on its part of the tokens as if it were alone
(the most that these cores give), the first rank works on the whole sequence while the others wait, and all work on
their shards. Forward and backward with all gradients; what a training step does once (reduction of the parameters'
gradients, the optimiser) is left out.
"""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from titans_train.memory import MemoryState
from titans_train.models.neighbours import UNCUT

Row = dict[str, Any]
SEED = 5


def shape_of(layout: Row) -> Any:
    from titans_train.config import RunConfig
    from titans_train.plan import resolve_shape

    config = {
        "run": {"name": "sequence"},
        "model": {
            "block": "lmm", "layers": layout["layers"], "width": layout["heads"] * layout["head_dim"],
            "heads": layout["heads"], "vocabulary": 128,
        },
        "memory": {"chunk_size": layout["chunk"], "depth": layout["depth"], "residual_norm": layout["norm"]},
        "data": {"path": "unused"},
        "training": {
            "steps": 1, "sequence_length": layout["tokens"], "global_batch_size": 1, "micro_batch_size": 1,
        },
    }  # fmt: skip
    return resolve_shape(RunConfig.model_validate(config))


class Operators:
    """Scans, each with inputs of its own."""

    def __init__(self, layout: Row, shape: Any, across: Sequence[Any], tokens: slice) -> None:
        self.memory, self.across = shape.memory, across
        generator = torch.Generator().manual_seed(SEED)
        batch, heads, length, d = (layout[key] for key in ("batch", "heads", "tokens", "head_dim"))

        def rows(*size: int) -> Tensor:
            return torch.rand(batch, heads, length, *size, generator=generator)

        def own(whole: Tensor) -> Tensor:
            return whole[:, :, tokens].clone().requires_grad_()

        sizes = [d, *[self.memory.hidden] * (self.memory.depth - 1), d]
        self.inputs: list[list[Tensor]] = []
        self.weights: list[tuple[Tensor, ...]] = []
        self.norm = {}
        if self.memory.residual_norm:
            gain = torch.full((heads, d), d**-0.5, requires_grad=True)
            self.norm = {"gain": gain, "bias": torch.zeros(heads, d, requires_grad=True)}
        for _ in across:
            vectors = [own(F.normalize(rows(d) - 0.5, dim=-1)) for _ in range(3)]
            # Gates near what trained models have; in a chunk the step sizes add up to theta_max * chunk.
            gates = [own(rows() * scale) for scale in (1e-3, 0.9, 0.5 * self.memory.theta_max)]
            self.inputs.append([*vectors, *gates])
            shapes = zip(sizes, sizes[1:], strict=False)
            drawn = [torch.randn(1, heads, a, b, generator=generator) * a**-0.5 for a, b in shapes]
            self.weights.append(tuple(w.requires_grad_() for w in drawn))

    def forward(self) -> Tensor:
        losses = []
        for across, inputs, weights in zip(self.across, self.inputs, self.weights, strict=True):
            y, _ = across.scan(
                *inputs, MemoryState.start(weights), chunk_size=self.memory.chunk_size,
                store_every=self.memory.store_every, **self.norm,
            )  # fmt: skip
            losses.append(y.square().sum())
        return torch.stack(losses).sum()

    def forget(self) -> None:
        for tensor in [t for group in (*self.inputs, *self.weights, self.norm.values()) for t in group]:
            tensor.grad = None


class Blocks:
    """LMM blocks on a residual stream."""

    def __init__(self, layout: Row, shape: Any, across: Sequence[Any], tokens: slice) -> None:
        from titans_train.models import LanguageModel

        torch.manual_seed(SEED)
        self.batch, self.model = layout["batch"], LanguageModel(shape)
        for block, neighbours in zip(self.model.blocks, across, strict=True):
            block.across = neighbours
        generator = torch.Generator().manual_seed(SEED)
        whole = torch.randn(self.batch, layout["tokens"], shape.width, generator=generator)
        self.x = whole[:, tokens].flatten(0, 1).clone().requires_grad_()

    def forward(self) -> Tensor:
        x = self.x
        for block in self.model.blocks:
            x, _ = block(x, self.batch)
        return x.square().sum()

    def forget(self) -> None:
        self.x.grad = None
        self.model.zero_grad()


def step_of(module: Operators | Blocks, links: Any = None) -> Callable[[], Row]:
    """A forward and backward. Gives the loss, CPU seconds, and where there are links the bytes sent each way."""

    def step() -> Row:
        started = time.process_time()
        module.forget()
        loss = module.forward()
        forward = Counter() if links is None else Counter(links.bytes)
        loss.backward()  # type: ignore[no-untyped-call]
        backward: Counter[Any] = Counter()
        if links is not None:
            links.finish()
            backward = Counter(links.bytes)
            backward.subtract(forward)
            links.bytes.clear()
        sent = [{name: size for (_, name), size in each.items() if size} for each in (forward, backward)]
        return {"loss": float(loss.detach()), "cpu": time.process_time() - started, "sent": sent}

    return step


def compute(mesh: Any, layout: Row) -> Row:
    """Seconds of every round; bytes that a rank sends for a layer (the most of any rank, headers included)."""
    from titans_train.benchmark.sequence_worker import OtherWork, together
    from titans_train.parallel import gather
    from titans_train.parallel.links import Links
    from titans_train.parallel.shards import Shards, ShardSettings

    shape, links, layers = shape_of(layout), Links(mesh), layout["layers"]
    length = layout["tokens"] // mesh.sequence
    settings = ShardSettings(length, layout["pieces"], layout["strategy"])
    own, everything = slice(mesh.sequence_rank * length, (mesh.sequence_rank + 1) * length), slice(None)
    kind = Operators if layout["level"] == "operator" else Blocks
    uncut = [UNCUT] * layers
    steps = {
        "alone": step_of(kind(layout, shape, uncut, own)),
        "sharded": step_of(kind(layout, shape, [Shards(links, n, settings) for n in range(layers)], own), links),
    }
    if mesh.is_first:
        steps["whole"] = step_of(kind(layout, shape, uncut, everything))
    results: dict[str, Row] = {}

    def run(name: str) -> None:
        if name in steps:
            results[name] = steps[name]()

    def round_() -> dict[str, float]:
        return {name: together(partial(run, name)) for name in ("alone", "whole", "sharded")}

    round_()  # the first is slow
    with OtherWork() as others:
        rounds = [round_() for _ in range(layout["rounds"])]
    found = gather(results)
    whole = found[0]["whole"]
    times = {name: statistics.median(r[name] for r in rounds) for name in rounds[0]}
    both = [_most([rank["sharded"]["sent"][way] for rank in found], layers) for way in (0, 1)]
    return {
        **times, "rounds_seconds": rounds, "others": others.cores,
        "speed_up": statistics.median(r["whole"] / r["sharded"] for r in rounds),
        "ceiling": statistics.median(r["whole"] / r["alone"] for r in rounds),
        "predicted": predicted(layout, shape), "forward_bytes": both[0], "backward_bytes": both[1],
        "whole_cpu": whole["cpu"], "sharded_cpu": [rank["sharded"]["cpu"] for rank in found],
        "loss_apart": abs(sum(rank["sharded"]["loss"] for rank in found) / whole["loss"] - 1),
    }  # fmt: skip


def _most(sent: list[dict[str, int]], layers: int) -> dict[str, float]:
    names = dict.fromkeys(name for one in sent for name in one)
    return {name: max(one.get(name, 0) for one in sent) / layers for name in names}


def predicted(layout: Row, shape: Any) -> float:
    """Speed-up that counts of products lead the plan to expect; of scans alone if that is what is measured."""
    from titans_train import plan_sequence as plan

    work = replace(plan.work(shape, layout["tokens"], layout["ranks"]), head=0.0)
    if layout["level"] == "operator":
        work = replace(work, layer=work.chain, slowest=work.chain)
    affine = layout["strategy"] == "affine"
    rows = layout["batch"] * layout["heads"]
    efficiency = plan.efficiency(
        work, layout["layers"], layout["ranks"], 1, layout["pieces"], 1, affine=affine, rows=rows
    )
    return float(layout["ranks"] * efficiency)
