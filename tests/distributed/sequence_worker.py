"""Run by torchrun: a model over sequence shards against the same model in one process, in float64.

Argument: a JSON file with cases, replaced by their errors. A case may break something (`zero`: messages of a name, or
their gradients, arrive as zeros), to show that the comparison would see it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tests.models.shapes import tiny
from titans_train.models import LanguageModel
from titans_train.models.tree import tensors_of
from titans_train.parallel import Mesh, make_parts, mesh_of, process_group
from titans_train.parallel.groups import data_group
from titans_train.parallel.links import Links
from titans_train.parallel.shards import ShardSettings

VOCABULARY = 32


def inputs(case: dict[str, Any], shards: int) -> tuple[Tensor, Tensor | None, Tensor]:
    """Tokens, document starts, weights of the logits in the loss."""
    rows, length = case["rows"], case["shard"] * shards - case["ragged"]
    generator = torch.Generator().manual_seed(7)
    tokens = torch.randint(0, 29, (rows, length), generator=generator)
    weights = torch.randn(rows, length, 29, generator=generator, dtype=torch.float64)
    if not case["documents"]:
        return tokens, None, weights
    align, starts = case["align"], torch.zeros(rows, length, dtype=torch.bool)
    starts[0, case["shard"] - align] = True  # crosses the first border (and the second, if there is one)
    starts[1, case["shard"]] = True  # begins with a shard
    starts[1, -1 - (length - 1) % align] = True  # in the last chunk
    return tokens, starts, weights


def loss_of(model: LanguageModel, tokens: Tensor, starts: Tensor | None, weights: Tensor, last: bool) -> Any:
    out = model(tokens, document_starts=starts, return_state=True)
    loss = (out.logits * weights).sum()
    if last:
        generator = torch.Generator().manual_seed(9)
        for tensor in tensors_of(out.state):
            if tensor.is_floating_point() and tensor.numel():
                loss = loss + (tensor * torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype)).sum()
    loss.backward()
    return out


@contextmanager
def broken(zero: dict[str, Any] | None) -> Iterator[None]:
    right = Links._unpack

    def wrong(self: Links, expected: Any) -> list[Tensor]:
        tensors = right(self, expected)
        assert zero is not None
        if expected.label.name == zero["name"] and expected.label.gradient == zero["gradient"]:
            for tensor in tensors:
                tensor.zero_()
        return tensors

    if zero:
        Links._unpack = wrong  # type: ignore[method-assign]
    try:
        yield
    finally:
        Links._unpack = right  # type: ignore[method-assign]


def error(got: Tensor, want: Tensor) -> float:
    """Largest difference, of the largest value but at least of 1."""
    if want.dtype == torch.bool:
        return float((got != want).sum())
    return float((got - want).abs().max()) / max(1.0, float(want.abs().max())) if want.numel() else 0.0


def compare(case: dict[str, Any], mesh: Mesh) -> dict[str, float]:
    shape = tiny(case["block"], memory=case["memory"], attention=case["attention"])
    tokens, starts, weights = inputs(case, mesh.sequence)
    torch.manual_seed(3)
    one = LanguageModel(shape).double()
    want = loss_of(one, tokens, starts, weights, last=True)
    settings = ShardSettings(case["shard"], case["pieces"], case["strategy"])
    parts = make_parts(mesh, False, settings)
    torch.manual_seed(3)
    many = LanguageModel(shape, parts).double()
    many.activation_checkpointing = case["checkpointing"]
    last = mesh.sequence_rank == mesh.sequence - 1
    with broken(case["zero"]):
        own = None if starts is None else parts.shard(starts)
        got = loss_of(many, parts.shard(tokens), own, parts.shard(weights.flatten(2)), last)
        parts.finish()
    errors = {"output": error(got.logits, parts.shard(want.logits)), "state": 0.0, "gradient": 0.0}
    if last:
        pairs = zip(tensors_of(got.state), tensors_of(want.state), strict=True)
        errors["state"] = max(error(a[..., : b.shape[-1]], b) for a, b in pairs)
    for (name, a), b in zip(many.named_parameters(), one.parameters(), strict=True):
        assert a.grad is not None, f"{name} has no gradient on rank {mesh.rank}"
        dist.all_reduce(a.grad, group=data_group(mesh))
        assert b.grad is not None
        errors["gradient"] = max(errors["gradient"], error(a.grad / mesh.data, b.grad))
    return errors


def main(job: Path) -> None:
    wanted = json.loads(job.read_text())
    out = []
    with process_group() as whole:
        for case in wanted:
            with mesh_of(1, case["shards"]) as mesh:
                errors = compare(case, mesh)
            values = torch.tensor(list(errors.values()))
            dist.all_reduce(values, op=dist.ReduceOp.MAX)
            out.append(dict(zip(errors, values.tolist(), strict=True)))
        if whole.is_first:
            job.write_text(json.dumps(out))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
