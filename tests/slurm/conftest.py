"""One cluster for all tests of this folder; each test leaves it empty and its nodes idle."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from tests.slurm.cluster import SlurmCluster, missing_programs
from tests.torchrun import ROOT


@pytest.fixture(scope="session")
def whole_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmCluster]:
    if missing := missing_programs():
        pytest.skip(
            f"SLURM is not installed ({', '.join(missing)}); launchers/install_system.sh says why, or installs it"
        )
    with SlurmCluster(tmp_path_factory.mktemp("slurm")) as cluster:
        cluster.environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        yield cluster
    assert cluster.processes() == []


@pytest.fixture
def cluster(whole_cluster: SlurmCluster) -> Iterator[SlurmCluster]:
    yield whole_cluster
    whole_cluster.run("scancel", f"--user={whole_cluster.user}", check=False)
    deadline = time.monotonic() + 30
    while whole_cluster.run("squeue", "-h").stdout.strip() and time.monotonic() < deadline:
        time.sleep(0.1)
    for node in whole_cluster.nodes:
        if node not in whole_cluster.daemons:
            whole_cluster.start_node(node)
    whole_cluster.wait_nodes()
