"""What an address says, and where S3 is: the same for preparing and for reading."""

from __future__ import annotations

import os

_ENDPOINTS = ("AWS_ENDPOINT_URL_S3", "S3_ENDPOINT_URL", "AWS_ENDPOINT_URL")


def is_remote(path: str) -> bool:
    return "://" in path


def endpoint_variable() -> str | None:
    """The environment variable that names the server, where it is not Amazon's: the first that is set."""
    return next((name for name in _ENDPOINTS if os.environ.get(name)), None)


def endpoint() -> str | None:
    """The server's address where it is not Amazon's."""
    name = endpoint_variable()
    return None if name is None else os.environ[name]
