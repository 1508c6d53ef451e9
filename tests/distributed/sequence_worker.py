"""Run by torchrun: a model over sequence shards against the same model in one process, in float64.

Argument: a JSON file with cases, replaced by their errors. A case may break something (`zero`: messages of a name, or
their gradients, arrive as zeros), to show that the comparison would see it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from tests.models.shapes import tiny
from titans_train.memory import MemoryState, memory_scan
from titans_train.models import LanguageModel
from titans_train.models.tree import tensors_of
from titans_train.parallel import Mesh, make_parts, mesh_of, process_group
from titans_train.parallel.groups import data_group
from titans_train.parallel.links import Links
from titans_train.parallel.shards import Shards, ShardSettings

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


def causality(case: dict[str, Any], mesh: Mesh) -> dict[str, float]:
    """Largest change of the logits where the last shard's tokens change: before that shard, and within."""
    shape = tiny(case["block"], memory=case["memory"], attention=case["attention"])
    parts = make_parts(mesh, False, ShardSettings(case["shard"], case["pieces"], case["strategy"]))
    torch.manual_seed(3)
    model = LanguageModel(shape, parts).double()
    tokens, _, _ = inputs(case, mesh.sequence)
    other = tokens.clone()
    other[:, -case["shard"] :] = (other[:, -case["shard"] :] + 1) % 29
    with torch.no_grad():
        a, b = (model(parts.shard(t)).logits for t in (tokens, other))
    parts.finish()
    change = float((a - b).abs().max())
    last = mesh.sequence_rank == mesh.sequence - 1
    return {"before": 0.0 if last else change, "within": change if last else 0.0}


def compare_scan(case: dict[str, Any], mesh: Mesh) -> dict[str, float]:
    """The scan alone: its outputs, the state it ends with, and the gradient of every input."""
    shape = tiny("lmm", memory=case["memory"])
    assert shape.memory is not None
    m, d = shape.memory, shape.head_dim
    tokens, starts, _ = inputs(case, mesh.sequence)
    rows, length = tokens.shape
    generator = torch.Generator().manual_seed(11)

    def random(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    sizes = list(pairwise([d, *[m.hidden] * (m.depth - 1), d]))
    weights = [random(2, a, b) * a**-0.5 for a, b in sizes]
    qkv = [F.normalize(random(rows, 2, length, d), dim=-1) for _ in range(3)]
    gates = [random(rows, 2, length).sigmoid() * limit for limit in (0.2, 0.9, 0.3)]
    norm = [random(2, d), random(2, d)] if m.residual_norm else []
    bases = [random(2, a, b) * a**-0.5 for a, b in sizes] if m.forget_to == "start" else []
    d_y, d_end = random(rows, 2, length, d), [random(rows, 2, a, b) for a, b in sizes * 2]

    def run(scan: Any, cut: Any, last: bool) -> list[list[Tensor]]:
        by_token = [cut(t).detach().clone().requires_grad_() for t in (*qkv, *gates)]
        shared = [t.detach().clone().requires_grad_() for t in (*weights, *bases, *norm)]
        gain, bias = shared[-2:] if norm else (None, None)
        start = MemoryState.start(tuple(w[None] for w in shared[: len(weights)])).expand(rows)
        base = tuple(w[None] for w in shared[len(weights) : len(weights) + len(bases)]) or None
        y, end = scan(
            *by_token, start, chunk_size=m.chunk_size, activation=m.activation, gain=gain, bias=bias,
            document_starts=None if starts is None else cut(starts[:, None])[:, 0],
            document_state=None if starts is None else start, base=base, store_every=m.store_every,
        )  # fmt: skip
        ends = [*end.weights, *end.momentum] if last else []
        loss = (y * cut(d_y)).sum()
        for tensor, gradient in zip(ends, d_end, strict=last):
            loss = loss + (tensor * gradient).sum()
        loss.backward()
        return [[y], ends, [t.grad for t in by_token], [t.grad for t in shared]]  # type: ignore[list-item]

    first, last = mesh.sequence_rank * case["shard"], mesh.sequence_rank == mesh.sequence - 1

    def cut(t: Tensor) -> Tensor:
        return t[:, :, first : first + case["shard"]]

    shards = Shards(Links(mesh), 0, ShardSettings(case["shard"], case["pieces"], case["strategy"]))
    want, got = run(memory_scan, lambda t: t, last=True), run(shards.scan, cut, last)
    shards.links.finish()
    outputs = [error(got[0][0], cut(want[0][0])), *(error(a, b) for a, b in zip(got[1], want[1], strict=last))]
    gradients = [error(a, cut(b)) for a, b in zip(got[2], want[2], strict=True)]
    for a, b in zip(got[3], want[3], strict=True):
        dist.all_reduce(a, group=data_group(mesh))
        gradients.append(error(a / mesh.data, b))
    return {"output": max(outputs), "gradient": max(gradients)}


def main(job: Path) -> None:
    wanted = json.loads(job.read_text())
    out = []
    with process_group() as whole:
        for case in wanted:
            with mesh_of(1, case["shards"]) as mesh:
                how = compare_scan if case["block"] == "scan" else causality if case["causality"] else compare
                errors = how(case, mesh)
            values = torch.tensor(list(errors.values()))
            dist.all_reduce(values, op=dist.ReduceOp.MAX)
            out.append(dict(zip(errors, values.tolist(), strict=True)))
        if whole.is_first:
            job.write_text(json.dumps(out))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
