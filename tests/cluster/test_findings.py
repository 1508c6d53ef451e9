"""What the preflight makes of its facts, on nodes that no test has: GPUs, many nodes, clocks that are wrong."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tests.data.corpus import run_config
from titans_train.cluster.facts import Device, Disk, Facts
from titans_train.cluster.findings import ERROR, OK, WARNING, Finding, fabric, judge
from titans_train.plan import Plan, make_plan

GPU = Device("cuda", "H100", 2, 80 << 30, True)
VERSIONS = {"python": "3.11.7", "torch": "2.13.0", "nccl": "2.27.5", "driver": "580"}


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    return make_plan(run_config(Path("data"), tmp_path_factory.mktemp("runs")), 4)


@pytest.fixture
def facts(plan: Plan) -> list[Facts]:
    """Two nodes with two GPUs each, all well."""
    disk = Disk("/runs", 100 * plan.checkpoint_bytes, 1e9)
    return [
        Facts(rank, rank % 2, 2, f"node{rank // 2 + 1}", VERSIONS, "c0", GPU, None if rank % 2 else disk, "f0")
        for rank in range(4)
    ]


def bad(found: list[Finding]) -> list[tuple[str, str]]:
    return [(each.level, each.subject) for each in found if each.level != OK]


def look(plan: Plan, facts: list[Facts], seen: tuple[bool, ...] = (True,) * 4, ahead: float = 0.0) -> list[Finding]:
    return judge(plan, facts, seen, [0.0, 0.0, ahead, ahead])


def test_what_is_well_is_listed_with_its_values(plan: Plan, facts: list[Facts]) -> None:
    found = look(plan, facts)
    assert bad(found) == []
    assert [each.subject for each in found] == ["devices", "kernels", "memory", "software", "clock", "disk", "data"]


@pytest.mark.parametrize(
    ("rank", "changes", "level", "subject", "text"),
    [
        (3, {"device": replace(GPU, right=False)}, ERROR, "devices", "node2, rank 3, device 1 (H100): a product"),
        (2, {"device": replace(GPU, right=False, error="ECC")}, ERROR, "devices", "ECC"),
        (2, {"device": replace(GPU, count=1)}, ERROR, "devices", "node2 shows 1 GPUs for 2 ranks"),
        (3, {"device": replace(GPU, name="A100")}, WARNING, "devices", "H100 on node1, node2; A100 on node2"),
        (2, {"ready_error": "no compiler"}, ERROR, "kernels", "on node2: no compiler"),
        (2, {"ready": "plain PyTorch"}, WARNING, "kernels", "on node2: plain PyTorch"),
        (1, {"device": replace(GPU, memory=1000)}, ERROR, "memory", "1000 B there (least: node1)"),
        (2, {"versions": {**VERSIONS, "nccl": "2.20.5"}}, ERROR, "software", "2.27.5 on node1, node2; 2.20.5 on node2"),
        (2, {"versions": {"python": "3.11.7"}}, ERROR, "software", "torch differs"),
        (2, {"config": "c1"}, ERROR, "config", "c1 on node2"),
        (2, {"disk": Disk("/runs", error="Read-only file system")}, ERROR, "disk", "node2 cannot write in /runs"),
        (0, {"disk": Disk("/runs", 1000, 1e9)}, ERROR, "disk", "1000 B free at /runs"),
        (2, {"data_error": "no manifest"}, ERROR, "data", "from node2: no manifest"),
        (2, {"data": "f1"}, ERROR, "data", "different data at the same path: node1, node2"),
    ],
)
def test_what_is_wrong_is_an_error_that_names_the_node(
    plan: Plan, facts: list[Facts], rank: int, changes: dict[str, object], level: str, subject: str, text: str
) -> None:
    facts[rank] = replace(facts[rank], **changes)  # type: ignore[arg-type]
    found = [each for each in look(plan, facts) if each.level != OK]
    assert {(each.level, each.subject) for each in found} == {(level, subject)}
    assert any(text in each.text for each in found)
    assert all(each.remedy for each in found)


def test_a_disk_for_fewer_checkpoints_than_are_kept_is_a_warning(plan: Plan, facts: list[Facts]) -> None:
    facts[2] = replace(facts[2], disk=Disk("/runs", 2 * plan.checkpoint_bytes, 1e9))
    assert bad(look(plan, facts)) == [(WARNING, "disk")]


def test_a_folder_that_is_not_shared_is_an_error(plan: Plan, facts: list[Facts]) -> None:
    found = look(plan, facts, seen=(True, True, False, True))
    assert bad(found) == [(ERROR, "disk")]
    assert "a file that node1 wrote in /runs is not seen from node2" in str(found)


@pytest.mark.parametrize(("ahead", "level"), [(0.9, OK), (-2.0, WARNING), (61.0, ERROR)])
def test_a_clock_that_is_off_is_named(plan: Plan, facts: list[Facts], ahead: float, level: str) -> None:
    [clock] = [each for each in look(plan, facts, ahead=ahead) if each.subject == "clock"]
    assert clock.level == level
    assert f"node2 is {abs(ahead):.3f} s from node1" in clock.text


def test_slow_links_are_warnings_or_errors_where_more_is_demanded(facts: list[Facts]) -> None:
    rates = [{"within": 100e9, "between": 40e9, "all": 50e9}, {"within": 100e9}, {"within": 3e9, "between": 1e9}, {}]
    found = fabric(rates, facts, {})
    assert [(each.level, each.text.split(":")[0]) for each in found] == [
        (WARNING, "within nodes"), (WARNING, "between nodes"), (OK, "over all ranks"),
    ]  # fmt: skip
    assert "3.00 GB/s (slowest: node2), at least 20 expected" in found[0].text
    assert [each.level for each in fabric(rates, facts, {"between": 10e9})] == [WARNING, ERROR, OK]
    assert [each.level for each in fabric(rates, facts, {"between": 0.5e9, "within": 1e9})] == [OK, OK, OK]


def test_a_fabric_that_fails_is_an_error_of_its_rank(facts: list[Facts]) -> None:
    found = fabric([{}, {"error": "NCCL: no route"}, {}, {}], facts, {})
    assert [(each.level, each.text) for each in found] == [(ERROR, "node1, rank 1: NCCL: no route")]
