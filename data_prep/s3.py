"""The S3 client: endpoint, region and credentials as the AWS tools take them, with limits on waiting."""

from __future__ import annotations

import functools
import os
from urllib.parse import urlsplit

import boto3
import pyarrow.fs as pafs
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

from data_prep.addresses import endpoint

_CREDENTIALS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_PROFILE")
# Together under a minute where nothing answers.
_CONNECT_SECONDS, _REQUEST_SECONDS, _ATTEMPTS = 5, 10, 4


def client(bucket: str) -> pafs.S3FileSystem:
    """The client for a bucket under today's environment; the same one within a process as long as that stays."""
    address = endpoint()
    region = os.environ.get("AWS_REGION") or _session().region_name
    if not region and not address:
        region = _region_of(bucket)
    anonymous = os.environ.get("AWS_NO_SIGN_REQUEST", "").lower() in ("true", "yes", "1") and not credentials_exist()
    credentials = tuple(os.environ.get(name) for name in _CREDENTIALS)
    return _client(os.getpid(), address, region, anonymous, credentials)


def credentials_exist() -> bool:
    """Whether AWS credentials are found anywhere (environment, files, sign-on, instance); OSError: set up wrong."""
    try:
        return _session().get_credentials() is not None
    except BotoCoreError as error:
        raise OSError(str(error)) from error


def delete_object(path: str) -> None:
    """Remove the object BUCKET/KEY; nothing happens where there is none. OSError when S3 refuses or does not answer.

    With boto3: pyarrow would leave an empty object that stands for the folder.
    """
    bucket, _, key = path.partition("/")
    waiting = Config(
        connect_timeout=_CONNECT_SECONDS, read_timeout=_REQUEST_SECONDS, retries={"total_max_attempts": _ATTEMPTS}
    )
    try:
        _session().client("s3", endpoint_url=endpoint(), config=waiting).delete_object(Bucket=bucket, Key=key)
    except (ClientError, BotoCoreError) as error:
        raise OSError(str(error)) from error


def _session() -> boto3.Session:
    """OSError when the AWS settings are not as they should be, as a profile that is not there."""
    try:
        return boto3.Session()
    except BotoCoreError as error:
        raise OSError(str(error)) from error


@functools.cache
def _region_of(bucket: str) -> str:
    return str(pafs.resolve_s3_region(bucket))


@functools.cache
def _client(
    process: int, address: str | None, region: str | None, anonymous: bool, credentials: tuple[str | None, ...]
) -> pafs.S3FileSystem:
    """`process` and `credentials` only tell clients apart: the client looks for its credentials by itself."""
    server = urlsplit(address) if address else None
    return pafs.S3FileSystem(
        anonymous=anonymous,
        region=region,
        scheme=server.scheme if server else "https",
        endpoint_override=server.netloc if server else None,
        connect_timeout=_CONNECT_SECONDS,
        request_timeout=_REQUEST_SECONDS,
        retry_strategy=pafs.AwsStandardS3RetryStrategy(max_attempts=_ATTEMPTS),
    )
