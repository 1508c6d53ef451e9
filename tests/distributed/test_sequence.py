"""A model over sequence shards equals one process, in float64: outputs, final state, every parameter's gradient.

And what crosses a border matters: where it arrives as zeros, the comparison sees it a thousand times over.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.torchrun import torchrun
from titans_train.shape import BLOCKS

TOLERANCE = 1e-12
LINEAR = {"depth": 1, "residual_norm": False, "forget_to": "zero"}


def case(block: str, shards: int, **options: Any) -> dict[str, Any]:
    """Three chunks (MAC: segments of two chunks) to a shard, unless said otherwise."""
    mac = block == "mac"
    attention: dict[str, Any] = {} if block == "transformer" else {"window": 6, "segment": 8}
    return {
        "block": block, "shards": shards, "rows": 3, "shard": 24 if mac else 12, "align": 8 if mac else 4,
        "ragged": 0, "documents": False, "pieces": 1, "strategy": "wavefront", "checkpointing": False, "zero": None,
        "causality": False, "memory": {}, "attention": attention,
    } | options  # fmt: skip


def name(c: dict[str, Any]) -> str:
    words = [c["block"], f"{c['shards']}shards", f"{c['pieces']}pieces", c["strategy"]]
    words += [f"depth{c['memory']['depth']}"] if "depth" in c["memory"] else []
    words += [f"window{c['attention']['window']}"] if c["attention"].get("window") else []
    words += [w for w in ("documents", "checkpointing", "causality") if c[w]] + (["ragged"] if c["ragged"] else [])
    if c["zero"]:
        words += ["zeroed", c["zero"]["name"], *(["gradient"] if c["zero"]["gradient"] else [])]
    return "-".join(words)


def cases_of(shards: int) -> list[dict[str, Any]]:
    """Every block plain, in pieces, with documents over borders, ragged at the end, repeated by checkpointing."""
    out: list[dict[str, Any]] = []
    for block in BLOCKS:
        has_memory = block != "transformer"
        out += [
            case(block, shards, ragged=2),
            case(block, shards, documents=True, pieces=2, checkpointing=True),
            case(block, shards, pieces=3, memory={"depth": 1} if has_memory else {}, documents=True, ragged=3),
            case(block, shards, pieces=4, memory={"depth": 3} if has_memory else {}, checkpointing=True, ragged=1),
        ]
    for block in ("mag", "mal", "transformer"):  # a window over several neighbours
        out += [case(block, shards, attention={"window": 30}, documents=d, checkpointing=d) for d in (False, True)]
    for depth, pieces in ((1, 1), (2, 4), (3, 6)):  # the scan alone, every input's gradient
        memory = {"depth": depth, "residual_norm": depth > 1}
        out += [case("scan", shards, memory=memory, pieces=pieces, documents=depth == 2, ragged=depth)]
    out += [case("scan", shards, memory=LINEAR, strategy="affine", documents=d, ragged=3 * d) for d in (False, True)]
    for block in ("lmm", "mag", "mal"):
        out += [
            case(block, shards, strategy="affine", memory=LINEAR, ragged=2),
            case(block, shards, strategy="affine", memory={**LINEAR, "momentum": False}, documents=True),
            case(block, shards, strategy="affine", memory=LINEAR, documents=True, checkpointing=True),
            case(block, shards, memory=LINEAR, pieces=6),
        ]
    return out


def zeroed(shards: int) -> list[dict[str, Any]]:
    names = {"lmm": ["state", "tails"], "mac": ["chain"], "transformer": ["window"]}
    both = ["state", "tails", "window"]
    return [
        case(block, shards, zero={"name": n, "gradient": gradient})
        for block in BLOCKS
        for n in names.get(block, both)
        for gradient in (False, True)
    ]


TWO, FOUR = [*cases_of(2), *zeroed(2)], cases_of(4)
CAUSAL = [case(block, 4, causality=True, pieces=2) for block in BLOCKS]
CAUSAL += [case("lmm", 4, causality=True, strategy="affine", memory=LINEAR)]
FOUR += CAUSAL
EIGHT = [case(block, 8, pieces=2) for block in BLOCKS]
EIGHT += [case("lmm", 8, strategy="affine", memory=LINEAR), case("mag", 8, attention={"window": 40}, documents=True)]

EXACT = [c for c in [*TWO, *FOUR, *EIGHT] if not c["zero"] and not c["causality"]]


def errors(folder: Path, cases: list[dict[str, Any]], ranks: int) -> list[dict[str, float]]:
    job = folder / f"{ranks}.json"
    job.write_text(json.dumps(cases))
    done = torchrun(ranks, "-m", "tests.distributed.sequence_worker", str(job))
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-5000:]
    found: list[dict[str, float]] = json.loads(job.read_text())
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, float]]:
    """By the case's name; the processes of a number of ranks start once."""
    folder = tmp_path_factory.mktemp("sequence")
    rows = [*errors(folder, TWO, 2), *errors(folder, FOUR, 4), *errors(folder, EIGHT, 8)]
    return {name(c): row for c, row in zip([*TWO, *FOUR, *EIGHT], rows, strict=True)}


@pytest.mark.parametrize("wanted", EXACT, ids=name)
def test_shards_equal_one_process(found: dict[str, dict[str, float]], wanted: dict[str, Any]) -> None:
    assert max(found[name(wanted)].values()) <= TOLERANCE, found[name(wanted)]


@pytest.mark.parametrize("wanted", CAUSAL, ids=name)
def test_no_shard_sees_what_is_to_its_right(found: dict[str, dict[str, float]], wanted: dict[str, Any]) -> None:
    """Other tokens in the last shard change nothing before it, and something within."""
    assert found[name(wanted)]["before"] == 0 and found[name(wanted)]["within"] > 0


@pytest.mark.parametrize("wanted", [c for c in TWO if c["zero"]], ids=name)
def test_what_crosses_a_border_is_seen(found: dict[str, dict[str, float]], wanted: dict[str, Any]) -> None:
    assert max(found[name(wanted)].values()) >= 1000 * TOLERANCE, found[name(wanted)]
