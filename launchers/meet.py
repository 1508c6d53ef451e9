"""The hosts of a run meet before its ranks start: all are there and were started alike, or an error says what is not.

Usage: meet.py NODES NODE_RANK HOST PORT WAIT NAME=VALUE ...

Node 0 listens on PORT; each node, node 0 too, connects to HOST:PORT and says which one it is and its NAME=VALUE pairs.
When all are there and their pairs agree, each is told to go on and PORT is free again, for rank 0.
"""

from __future__ import annotations

import errno
import json
import socket
import sys
import time
from dataclasses import dataclass
from typing import Any, NoReturn

LONGEST_LINE = 65536
PAUSE = 0.3  # between two attempts to reach node 0
STRANGER_SECONDS = 5.0  # for a connection that says nothing
GRACE_SECONDS = 10.0  # beyond the wait, for node 0's answer


@dataclass(frozen=True)
class Meeting:
    nodes: int
    node_rank: int
    host: str
    port: int
    wait: float
    pairs: dict[str, str]  # must be the same on every node

    @property
    def place(self) -> str:
        return f"{self.host}:{self.port}"

    @property
    def checks(self) -> str:
        lines = (
            f"every host runs the same command (--nodes {self.nodes}, --address {self.place}) with its own --node-rank",
            f"{self.host} is an address of node 0, on a network that all hosts share",
            f"no firewall stops port {self.port}",
            "--interface names that network's interface",
        )
        return "\ncheck that\n" + "\n".join(f"  - {line}" for line in lines)


def fail(message: str) -> NoReturn:
    sys.exit(f"error: {message}")


def send(connection: socket.socket, value: object) -> None:
    connection.sendall(json.dumps(value).encode() + b"\n")


def receive(connection: socket.socket, seconds: float) -> object:
    """The other side's line. OSError, ValueError or None if there is no such line."""
    connection.settimeout(seconds)
    with connection.makefile("rb") as lines:
        line = lines.readline(LONGEST_LINE)
    return json.loads(line) if line else None


def listen(meeting: Meeting) -> socket.socket:
    try:
        family = socket.getaddrinfo(meeting.host, meeting.port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server(("", meeting.port), family=family, backlog=max(128, meeting.nodes))
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            fail(
                f"port {meeting.port} is in use on this host, node 0: another run, or a rest of one? "
                f"End it, or choose another port on every host: --address {meeting.host}:PORT"
            )
        fail(f"node 0 cannot listen at {meeting.place}: {error}{meeting.checks}")


def connect(meeting: Meeting) -> socket.socket:
    """A connection to node 0, which may start later than this node."""
    deadline = time.monotonic() + meeting.wait
    while True:
        left = max(deadline - time.monotonic(), PAUSE)
        try:
            return socket.create_connection((meeting.host, meeting.port), timeout=left)
        except OSError as error:
            if meeting.node_rank == 0:
                fail(f"node 0 cannot reach itself at {meeting.place} ({error}){meeting.checks}")
            if left <= PAUSE:
                fail(
                    f"node {meeting.node_rank} of the {meeting.nodes} nodes asked for could not reach node 0 at "
                    f"{meeting.place} within {meeting.wait:g} s ({error}){meeting.checks}"
                )
        time.sleep(PAUSE)


def is_open(connection: socket.socket) -> bool:
    """Does the other side still wait? It has said its line, so what can be read is its end."""
    connection.setblocking(False)
    try:
        return connection.recv(1, socket.MSG_PEEK) != b""
    except BlockingIOError:
        return True
    except OSError:
        return False


def difference(meeting: Meeting, rank: int, pairs: dict[str, str]) -> str:
    for name in meeting.pairs:
        mine, other = meeting.pairs[name], pairs.get(name)
        if other != mine:
            return (
                f"the nodes were not started alike: {name} is {other} on node {rank} and {mine} on node 0. "
                f"Run the same command, with the same config, on every host; only --node-rank differs"
            )
    return ""


def gather(meeting: Meeting, server: socket.socket) -> tuple[list[socket.socket], str]:
    """Waits for all nodes. Everyone who came, and what is wrong (empty: nothing)."""
    came: list[socket.socket] = []
    nodes: dict[int, socket.socket] = {}
    deadline = time.monotonic() + meeting.wait
    while True:
        if len(nodes) == meeting.nodes:
            nodes = {rank: connection for rank, connection in nodes.items() if is_open(connection)}
        if len(nodes) == meeting.nodes:
            return came, ""
        try:
            server.settimeout(max(deadline - time.monotonic(), 0.001))
            connection, (address, *_) = server.accept()
        except TimeoutError:
            missing = ", ".join(str(n) for n in range(meeting.nodes) if n not in nodes)
            return came, (
                f"{len(nodes)} of the {meeting.nodes} nodes asked for came to {meeting.place} within "
                f"{meeting.wait:g} s; missing: node {missing}{meeting.checks}"
            )
        try:
            said: Any = receive(connection, STRANGER_SECONDS)
            rank, pairs = int(said[0]), dict(said[1])
        except (OSError, ValueError, TypeError, LookupError):
            connection.close()  # a stranger, such as a port scanner
            continue
        came.append(connection)
        if wrong := difference(meeting, rank, pairs):
            return came, wrong
        if rank in nodes and is_open(nodes[rank]):
            return came, f"two hosts say --node-rank {rank}, the second from {address}; each host has its own, from 0"
        nodes[rank] = connection


def meet(meeting: Meeting) -> None:
    server = listen(meeting) if meeting.node_rank == 0 else None
    own = connect(meeting)
    send(own, [meeting.node_rank, meeting.pairs])
    if server is not None:
        connections, wrong = gather(meeting, server)
        for connection in connections:
            try:
                connection.settimeout(STRANGER_SECONDS)
                send(connection, {"wrong": wrong})
            except OSError:
                pass  # it left; the ranks' own wait will tell
            connection.close()
        server.close()
        if wrong:
            fail(wrong)
    try:
        answer = receive(own, meeting.wait + GRACE_SECONDS)
    except (OSError, ValueError) as error:
        fail(f"{meeting.place} answers, but not as node 0 of this run ({error}){meeting.checks}")
    if not isinstance(answer, dict):
        fail(f"node 0 at {meeting.place} ended before all {meeting.nodes} nodes were there; see its output")
    if answer.get("wrong"):
        fail(str(answer["wrong"]))


def main(arguments: list[str]) -> None:
    nodes, node_rank, host, port, wait, *pairs = arguments
    split = (pair.partition("=") for pair in pairs)
    meet(Meeting(int(nodes), int(node_rank), host, int(port), float(wait), {name: value for name, _, value in split}))


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except KeyboardInterrupt:
        sys.exit(130)
