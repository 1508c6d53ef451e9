"""What the adapters rely on in megatron-core and DeepSpeed: an upgrade that changes it fails here, with its name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.torchrun import ROOT, torchrun

NAMES = [
    "the tensor ranks are neighbours", "a data group without other data is this rank",
    "megatron's layers draw nothing", "weights start the same", "parameters know their cut",
    "layers, sequence parallel False", "layers, sequence parallel True",
    *(f"engine sums, {mesh}, stage {stage}" for mesh in ("tensor 2", "data 2") for stage in range(4)),
]  # fmt: skip


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    output = Path(tmp_path_factory.mktemp("contracts")) / "found.json"
    done = torchrun(2, str(ROOT / "tests/parallel/contracts_worker.py"), str(output))
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-5000:]
    return list(json.loads(output.read_text()))


@pytest.mark.parametrize("name", NAMES)
def test_what_we_rely_on_holds(found: list[dict[str, Any]], name: str) -> None:
    for rank in found:
        assert rank.keys() == set(NAMES)
        figures = rank[name].values() if isinstance(rank[name], dict) else [rank[name]]
        for figure in figures:
            assert figure is True or (figure is not False and figure < 2e-5), rank[name]
