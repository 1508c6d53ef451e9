"""Run under torchrun by test_contracts.py on two ranks: what we rely on in megatron-core and DeepSpeed, as figures.

Usage: contracts_worker.py OUTPUT.json. Every entry is an error that must be tiny, or a bool that must be true.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from titans_train.models.parts import Parts, SingleDevice
from titans_train.parallel import Engine, Mesh, gather, make_parts, mesh_of, process_group
from titans_train.parallel.engine import zero_config
from titans_train.parallel.groups import data_group, tensor_group
from titans_train.parallel.split import join_over_ranks, split_of

TOKENS, WIDTH, HEADS, BATCH = 12, 8, 4, 2
SECTIONS = {"q": 16, "k": 16, "gate": 4}


class Net(nn.Module):
    """Every way into and out of a region, with a norm that all ranks share."""

    def __init__(self, parts: Parts) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.table = parts.table(5, 8, WIDTH, 1.0)
        self.scale = parts.parameter(torch.rand(WIDTH) + 0.5, None)
        self.fixed = parts.parameter(torch.randn(3, WIDTH), None)
        self.columns, self.rows = parts.columns(WIDTH, SECTIONS, 0.3), parts.rows(16, WIDTH, 0.3)
        self.wide = parts.columns(16, {"a": 16}, 0.3)
        self.parts = parts

    def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
        x = self.table(tokens) * self.scale
        y = self.columns(x)
        heads = (y["q"] * y["k"]).tanh().unflatten(0, (BATCH, -1))
        mixed = self.wide(heads, "heads")["a"].tanh()
        at_fixed = self.columns(self.fixed, "fixed", ("q", "k"))
        gate = y["gate"].repeat_interleave(4, -1).unflatten(0, (BATCH, -1))
        heads = heads + mixed * at_fixed["q"].sum(0) * gate
        inner = self.columns(self.rows(heads, "whole"), "whole", ("k",))["k"]
        again = self.rows(at_fixed["k"][None], "fixed")[0] * self.scale
        x = x + self.rows(heads + inner + self.columns(again, "fixed", ("q",))["q"].sum(0))
        return self.parts.cross_entropy_sum(self.table(x, as_head=True), labels)


def batch(seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, 5, (BATCH, TOKENS // BATCH), generator=generator)
    return tokens, tokens.flatten().roll(1).masked_fill(torch.arange(TOKENS) % 3 == 0, -100)


def one_process() -> tuple[float, dict[str, Tensor]]:
    net = Net(SingleDevice())
    loss = net(*batch())
    loss.backward()
    return float(loss), {n: p.grad for n, p in net.named_parameters() if p.grad is not None}


def sharded(mesh: Mesh, sequence_parallel: bool) -> dict[str, float]:
    """Largest errors of the loss and of any gradient against one process."""
    net = Net(make_parts(mesh, sequence_parallel))
    loss = net(*batch())
    loss.backward()
    want_loss, want = one_process()
    got = {n: join_over_ranks(p, p.grad, mesh) for n, p in net.named_parameters() if p.grad is not None}
    assert got.keys() == want.keys()
    return {"loss": abs(float(loss) / want_loss - 1), **{n: float((got[n] - want[n]).abs().max()) for n in want}}


def draws_nothing(mesh: Mesh) -> bool:
    """Megatron's layers take the weights that we cut, and leave the random state alone."""
    after = []
    for parts in (SingleDevice(), make_parts(mesh, False)):
        Net(parts)
        after.append(torch.get_rng_state())
    return torch.equal(*after)


def same_start(mesh: Mesh) -> bool:
    whole = dict(Net(SingleDevice()).named_parameters())
    own = Net(make_parts(mesh, True)).named_parameters()
    return all(torch.equal(join_over_ranks(p, p.data, mesh), whole[n]) for n, p in own)


def engine_of(net: nn.Module, mesh: Mesh, stage: int, accumulation: int) -> Engine:
    settings = zero_config(
        stage=stage, bfloat16=False, micro_batch_size=BATCH, accumulation=accumulation, gradient_clip=1e9, width=WIDTH,
        bucket=10_000, live=10_000,
    )  # fmt: skip
    return Engine(net, torch.optim.AdamW(net.parameters(), lr=0.0), settings, mesh)


def engine_sums(mesh: Mesh, stage: int) -> float:
    """Error of the gradient norm of a plain sum over two micro-batches (and data ranks), shared parameters once."""
    parts = make_parts(mesh, True)
    net = Net(parts)
    engine = engine_of(net, mesh, stage, 2)
    for seed in (0, 1):
        engine.backward(engine(*batch(10 * mesh.data_rank + seed)) * engine.loss_scale())
        engine.step(0.0)
    alone = Net(SingleDevice())
    for data_rank in range(mesh.data):
        for seed in (0, 1):
            alone(*batch(10 * data_rank + seed)).backward()
    want = torch.nn.utils.get_total_norm([p.grad for p in alone.parameters() if p.grad is not None])
    return abs(engine.gradient_norm() / float(want) - 1)


def main(output: Path) -> None:
    found: dict[str, Any] = {}

    def note(name: str, figure: Callable[[], Any]) -> None:
        found[name] = figure()

    with process_group() as whole:
        with mesh_of(tensor=2) as mesh:
            note("the tensor ranks are neighbours", lambda: dist.get_process_group_ranks(tensor_group(mesh)) == [0, 1])
            note("a data group without other data is this rank", lambda: data_group(mesh).size() == 1)
            note("megatron's layers draw nothing", lambda: draws_nothing(mesh))
            note("weights start the same", lambda: same_start(mesh))
            note("parameters know their cut", lambda: [n for n, p in Net(make_parts(mesh, False)).named_parameters()
                                                       if split_of(p) is None] == ["scale", "fixed"])  # fmt: skip
            for shared in (False, True):
                note(f"layers, sequence parallel {shared}", lambda s=shared: sharded(mesh, s))
            for stage in range(4):
                note(f"engine sums, tensor 2, stage {stage}", lambda s=stage: engine_sums(mesh, s))
        with mesh_of() as mesh:
            for stage in range(4):
                note(f"engine sums, data 2, stage {stage}", lambda s=stage: engine_sums(mesh, s))
        everyone = gather(found)
        if whole.is_first:
            output.write_text(json.dumps(everyone))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
