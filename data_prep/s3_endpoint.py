"""Where S3 is: the same for preparing and for reading."""

from __future__ import annotations

import os

ENDPOINTS = ("AWS_ENDPOINT_URL_S3", "S3_ENDPOINT_URL", "AWS_ENDPOINT_URL")  # the first that is set


def endpoint() -> str | None:
    """The server's address where it is not Amazon's."""
    return next((os.environ[name] for name in ENDPOINTS if os.environ.get(name)), None)
