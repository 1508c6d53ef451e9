"""A real S3 server on the loopback, for tests: `moto_server` in its own process."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

BUCKET = "corpus"
KEYS = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def s3_server() -> Iterator[str]:
    """The address of a running server with an empty bucket BUCKET."""
    port = free_port()
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        _wait(port, process)
        address = f"http://127.0.0.1:{port}"
        client(address).create_bucket(Bucket=BUCKET)
        yield address
    finally:
        process.kill()
        process.wait()


def client(address: str) -> Any:
    import boto3

    return boto3.client(
        "s3",
        endpoint_url=address,
        aws_access_key_id=KEYS["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=KEYS["AWS_SECRET_ACCESS_KEY"],
        region_name=KEYS["AWS_DEFAULT_REGION"],
    )


def environment(address: str) -> dict[str, str]:
    """What a user sets to reach this server."""
    return {**KEYS, "S3_ENDPOINT_URL": address, "AWS_ENDPOINT_URL": address}


def upload(address: str, folder: Path, prefix: str) -> str:
    """Puts all files below `folder` into the bucket; their URL."""
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            client(address).upload_file(str(path), BUCKET, f"{prefix}/{path.relative_to(folder).as_posix()}")
    return f"s3://{BUCKET}/{prefix}"


def _wait(port: int, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise RuntimeError(f"moto_server ended with {process.returncode}; is moto[server] installed?")
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            return
        time.sleep(0.1)
    raise RuntimeError("moto_server does not answer")


def set_environment(values: dict[str, str], into: Any) -> None:
    """`into`: pytest's monkeypatch."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        into.delenv(name)
    for name, value in values.items():
        into.setenv(name, value)
