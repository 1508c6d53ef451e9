"""launchers/meet.py: the hosts' first meeting, with processes of this machine on loopback."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

MEET = Path(__file__).resolve().parents[2] / "launchers" / "meet.py"


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


class Nodes:
    """Starts nodes and collects what they say."""

    def __init__(self) -> None:
        self.port = free_port()
        self.started: list[subprocess.Popen[str]] = []

    def start(self, rank: int, nodes: int = 2, wait: float = 20, **pairs: str) -> subprocess.Popen[str]:
        command = [sys.executable, str(MEET), str(nodes), str(rank), "127.0.0.1", str(self.port), str(wait)]
        command += [f"{name}={value}" for name, value in {"nodes": str(nodes), **pairs}.items()]
        self.started.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
        return self.started[-1]

    def results(self) -> list[tuple[int, str]]:
        errors = [node.communicate(timeout=60)[1] for node in self.started]
        return [(node.returncode, error) for node, error in zip(self.started, errors, strict=True)]

    def wait_for_listener(self) -> None:
        """Returns when node 0 listens; leaves a stranger's connection behind, which must not disturb."""
        deadline = time.monotonic() + 30
        while True:
            try:
                with socket.create_connection(("127.0.0.1", self.port), timeout=5) as stranger:
                    stranger.sendall(b"GET / HTTP/1.0\r\n\r\n")
                return
            except OSError:
                assert time.monotonic() < deadline, "node 0 does not listen"
                time.sleep(0.05)


@pytest.fixture
def nodes() -> Iterator[Nodes]:
    created = Nodes()
    yield created
    for node in created.started:
        node.kill()
        node.wait()


def test_all_go_on_whichever_starts_first_and_the_port_is_free_again(nodes: Nodes) -> None:
    nodes.start(2, nodes=3)
    nodes.start(0, nodes=3)
    nodes.wait_for_listener()
    nodes.start(1, nodes=3)
    assert nodes.results() == [(0, "")] * 3
    with socket.create_server(("127.0.0.1", nodes.port)):
        pass


def test_a_missing_node_is_named_on_all_that_came(nodes: Nodes) -> None:
    nodes.start(0, nodes=3, wait=2)
    nodes.start(2, nodes=3, wait=20)
    for status, error in nodes.results():
        assert status == 1
        assert f"2 of the 3 nodes asked for came to 127.0.0.1:{nodes.port} within 2 s; missing: node 1" in error
        assert all(word in error for word in ("firewall", "--interface", "--nodes 3"))


def test_node_0_that_stays_away_is_named(nodes: Nodes) -> None:
    nodes.start(1, wait=1)
    [(status, error)] = nodes.results()
    assert status == 1
    assert f"node 1 of the 2 nodes asked for could not reach node 0 at 127.0.0.1:{nodes.port} within 1 s" in error


def test_nodes_that_were_started_differently_are_refused_on_both(nodes: Nodes) -> None:
    nodes.start(0, processes="4")
    nodes.start(1, processes="8")
    for status, error in nodes.results():
        assert status == 1
        assert "processes is 8 on node 1 and 4 on node 0" in error


def test_another_number_of_nodes_is_refused_on_both(nodes: Nodes) -> None:
    nodes.start(0, nodes=2)
    nodes.start(2, nodes=3)
    for status, error in nodes.results():
        assert status == 1
        assert "nodes is 3 on node 2 and 2 on node 0" in error


def test_two_hosts_of_the_same_rank_are_refused(nodes: Nodes) -> None:
    for rank in (0, 1, 1):
        nodes.start(rank, nodes=3)
    for status, error in nodes.results():
        assert status == 1
        assert "two hosts say --node-rank 1" in error


def test_a_node_that_was_started_again_takes_its_old_place(nodes: Nodes) -> None:
    nodes.start(0, nodes=3)
    nodes.wait_for_listener()
    with socket.create_connection(("127.0.0.1", nodes.port), timeout=5) as gone:
        gone.sendall(b'[1, {"nodes": "3"}]\n')
    nodes.start(1, nodes=3)
    nodes.start(2, nodes=3)
    assert nodes.results() == [(0, "")] * 3


def test_a_port_in_use_is_named_on_node_0(nodes: Nodes) -> None:
    with socket.create_server(("127.0.0.1", nodes.port)):
        nodes.start(0)
        [(status, error)] = nodes.results()
    assert status == 1
    assert f"port {nodes.port} is in use on this host, node 0" in error


def test_something_else_at_the_port_is_no_node_0(nodes: Nodes) -> None:
    with socket.create_server(("127.0.0.1", nodes.port)) as server:
        nodes.start(1)
        connection, _ = server.accept()
        with connection:
            connection.sendall(b"SSH-2.0-OpenSSH_9.2\r\n")
        [(status, error)] = nodes.results()
    assert status == 1
    assert "answers, but not as node 0 of this run" in error
