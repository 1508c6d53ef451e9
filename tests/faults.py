"""A real HTTP proxy on the loopback that spoils answers: in front of the S3 server, for tests."""

from __future__ import annotations

import contextlib
import http.client
import socket
import struct
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Literal
from urllib.parse import urlsplit

Kind = Literal[
    "none", "unavailable", "throttled", "expired", "reset", "truncated", "short", "flipped", "slow", "silent"
]

_ANSWERS = {
    "unavailable": (503, "ServiceUnavailable", "Please try again later"),
    "throttled": (503, "SlowDown", "Please reduce your request rate."),
    "expired": (400, "ExpiredToken", "The provided token has expired."),
}


@dataclass
class Faults:
    """`kind` spoils the next `count` requests (None: all) whose path contains `match`. `seen`: such paths, in order."""

    address: str = ""
    kind: Kind = "none"
    count: int | None = None
    match: str = ""
    seen: list[str] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def set(self, kind: Kind, count: int | None = None, match: str = "") -> None:
        with self.lock:
            self.kind, self.count, self.match = kind, count, match
            self.seen.clear()

    def take(self, path: str) -> Kind:
        """What happens to a request."""
        with self.lock:
            if self.match not in path:
                return "none"
            self.seen.append(path)
            if self.count is None:
                return self.kind
            self.count -= 1
            return self.kind if self.count >= 0 else "none"


@contextlib.contextmanager
def proxy(upstream: str) -> Iterator[Faults]:
    """A running proxy before the server at `upstream`, http://host:port."""
    faults, target = Faults(), urlsplit(upstream).netloc

    class Handler(_Handler):
        state, upstream = faults, target

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    faults.address = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield faults
    finally:
        server.shutdown()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    state: Faults
    upstream: str
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        """Quiet."""

    def do_GET(self) -> None:
        kind = self.state.take(self.path)
        with contextlib.suppress(OSError):  # the client may have given up
            if kind == "silent":
                time.sleep(30)
                self.close_connection = True
            elif kind in _ANSWERS:
                self._refuse(*_ANSWERS[kind])
            else:
                self._forward(kind)

    do_PUT = do_HEAD = do_POST = do_DELETE = do_GET

    def _refuse(self, status: int, code: str, message: str) -> None:
        body = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>{message}</Message></Error>".encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/xml")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _forward(self, kind: Kind) -> None:
        size = int(self.headers.get("Content-Length", 0))
        connection = http.client.HTTPConnection(self.upstream, timeout=30)
        headers = {name: value for name, value in self.headers.items() if name.lower() != "connection"}
        connection.request(self.command, self.path, self.rfile.read(size), headers)
        answer = connection.getresponse()
        body = answer.read()
        connection.close()
        if kind == "short":  # a whole answer, with half of the content
            body = body[: len(body) // 2]
        if kind == "flipped":
            body = body[:-1] + bytes([body[-1] ^ 1])
        self.send_response_only(answer.status)
        for name, value in answer.getheaders():
            if name.lower() not in ("content-length", "connection", "transfer-encoding"):
                self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self._send(kind, body)

    def _send(self, kind: Kind, body: bytes) -> None:
        if kind not in ("reset", "truncated", "slow"):
            self.wfile.write(body)
            return
        self.close_connection = True
        if kind == "slow":
            for byte in body[:600]:
                self.wfile.write(bytes([byte]))
                time.sleep(0.05)
            return
        self.wfile.write(body[: len(body) // 2])
        self.wfile.flush()
        if kind == "reset":  # closing then sends RST
            time.sleep(0.05)
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
