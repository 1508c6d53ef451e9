"""S3 through boto3: clients of this process, and one object to one file."""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep.addresses import endpoint

_BLOCK_BYTES = 64 << 10
_CONNECT_SECONDS = 5.0
_PAYERS = "MOSAICML_STREAMING_AWS_REQUESTER_PAYS"  # buckets, with commas, whose requests we pay for


@dataclass(frozen=True)
class _Connection:
    client: Any
    access: tuple[str | None, ...] | None  # the credentials it began with


_connections: dict[tuple[int, str, float], _Connection] = {}  # by process: none is shared over a fork
_lock = threading.Lock()


def split_url(url: str) -> tuple[str, str]:
    """(bucket, key) of s3://bucket/key."""
    bucket, _, key = url.removeprefix("s3://").partition("/")
    return bucket, key


def client(timeout: float) -> Any:
    """A client that tries once, signs where there are credentials, and waits `timeout` seconds for each answer."""
    return _connection(timeout).client


def download(url: str, target: Path, timeout: float, stop: threading.Event) -> None:
    """Write an object to a file, until `stop` is set. Raises boto's errors, and OSError of the disk."""
    bucket, key = split_url(url)
    response = client(timeout).get_object(Bucket=bucket, Key=key, **_extra(bucket))
    body = response["Body"]
    try:
        if stop.is_set():
            return
        with target.open("wb", buffering=0) as file:
            while not stop.is_set() and (block := body.read(_BLOCK_BYTES)):
                file.write(block)
    finally:
        body.close()


def list_keys(url: str, timeout: float) -> dict[str, int]:
    """Keys and bytes of all objects below a URL that stands for a folder, relative to it."""
    bucket, key = split_url(url)
    prefix = key.rstrip("/") + "/"
    pages = client(timeout).get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix, **_extra(bucket))
    objects = [item for page in pages for item in page.get("Contents", [])]
    return {item["Key"].removeprefix(prefix): int(item["Size"]) for item in objects}


def signs() -> bool:
    """Whether there are credentials to sign requests with."""
    return _credentials()[1] is not None


def renewed() -> bool:
    """Look for credentials anew; whether they are others than those in use (a file that somebody renews)."""
    with _lock:
        used = {connection.access for connection in _connections.values()}
        _connections.clear()
    return bool(used) and _credentials()[1] not in used


def _connection(timeout: float) -> _Connection:
    key = (os.getpid(), endpoint() or "", timeout)
    with _lock:
        if key not in _connections:
            _connections[key] = _connect(timeout)
        return _connections[key]


def _connect(timeout: float) -> _Connection:
    from botocore import UNSIGNED
    from botocore.config import Config

    session, access = _credentials()
    config = Config(
        connect_timeout=min(_CONNECT_SECONDS, timeout),
        read_timeout=timeout,
        retries={"total_max_attempts": 1},
        response_checksum_validation="when_required",
        signature_version=UNSIGNED if access is None else None,
    )
    return _Connection(session.client("s3", config=config, endpoint_url=endpoint()), access)


def _credentials() -> tuple[Any, tuple[str | None, ...] | None]:
    """A session that has just read the credentials, and what they are; None where there are none."""
    from boto3.session import Session

    session: Any = Session()
    found = session.get_credentials()
    if found is None:
        return session, None
    frozen = found.get_frozen_credentials()
    return session, (frozen.access_key, frozen.secret_key, frozen.token)


def _extra(bucket: str) -> dict[str, str]:
    names = [name.strip() for name in os.environ.get(_PAYERS, "").split(",")]
    return {"RequestPayer": "requester"} if bucket in names else {}
