"""Where the ranks of one host meet: a free port that no other launcher takes."""

from __future__ import annotations

import random
import socket

PORTS = range(20000, 32768, 2)  # below those that systems give to outgoing connections
TRIES = 200


def is_free(port: int) -> bool:
    try:
        with socket.create_server(("", port)):
            return True
    except OSError:
        return False


def claim_port() -> tuple[int, socket.socket]:
    """A free port, and the one above it, held: two launchers that start together never take the same pair.

    OSError: none of many tried was free.
    """
    for port in random.SystemRandom().sample(PORTS, TRIES):
        try:
            claim = socket.create_server(("127.0.0.1", port + 1))
        except OSError:
            continue
        if is_free(port):
            return port, claim
        claim.close()
    raise OSError(f"no free port among {TRIES} tried from {PORTS.start} to {PORTS.stop}; name one with --port")
