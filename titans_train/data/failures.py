"""What the errors of storage clients mean: the cause in plain words, the remedy, and whether another try can help."""

from __future__ import annotations

import http.client
import os
from dataclasses import dataclass
from typing import Any

from data_prep.addresses import endpoint_variable
from titans_train.data import s3

_EXPIRED = {"ExpiredToken", "ExpiredTokenException", "TokenRefreshRequired", "RequestExpired", "InvalidToken"}
_MISSING = {"NoSuchKey", "NoSuchBucket", "404", "NotFound"}
_THROTTLED = {
    "SlowDown", "Throttling", "ThrottlingException", "ThrottledException", "RequestLimitExceeded", "RequestTimeout",
    "TooManyRequests", "TooManyRequestsException", "BandwidthLimitExceeded", "InternalError", "ServiceUnavailable",
}  # fmt: skip
_RENEW = "renew the credentials (AWS_ACCESS_KEY_ID and its like, or ~/.aws/credentials) and start again"
_PATH = "check data.path, and that all of the prepared folder was copied there"


class TooSlow(TimeoutError):
    """A transfer made no headway."""


class TooLarge(Exception):
    """More came than the object may have."""


@dataclass(frozen=True)
class Failure:
    """`passing`: another try may help. `credentials`: other credentials may."""

    cause: str
    remedy: str
    passing: bool = False
    credentials: bool = False


def explain(error: Exception, url: str) -> Failure:
    """The failure behind a storage client's error while it fetched `url`."""
    if url.startswith("s3://"):
        from botocore.exceptions import BotoCoreError, ClientError

        if isinstance(error, ClientError):
            return _answered(error.response)
        if isinstance(error, BotoCoreError):
            return _not_answered(error)
    return _general(error, url)


def _answered(response: dict[str, Any]) -> Failure:
    """The server said no."""
    code = str(response.get("Error", {}).get("Code", ""))
    status = int(response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
    said = f"the server says {status} {code}: {response.get('Error', {}).get('Message', '')}".rstrip(": ")
    if code in _EXPIRED:
        return Failure(f"the credentials have expired ({said})", _RENEW, credentials=True)
    if code in _THROTTLED or status >= 500 or status == 429:
        return Failure(f"the server is overloaded or failing ({said})", _reach(), passing=True)
    if code in _MISSING or status == 404:
        what = "bucket" if code == "NoSuchBucket" else "object"
        return Failure(f"the {what} is missing ({said})", _PATH)
    if status in (401, 403):
        unsigned = "" if s3.signs() else "; no credentials were found, so the request was not signed"
        remedy = "give credentials that may read the bucket (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, or ~/.aws)"
        return Failure(f"access is denied ({said}{unsigned})", remedy, credentials=True)
    return Failure(said, f"check data.path, the region (AWS_DEFAULT_REGION) and {_endpoint()}")


def _not_answered(error: Exception) -> Failure:
    """boto could not ask, or got no whole answer."""
    from botocore import exceptions as boto

    broken = (boto.IncompleteReadError, boto.ResponseStreamingError, boto.ConnectionClosedError)
    if isinstance(error, broken):
        return Failure(f"the connection broke ({error})", _reach(), passing=True)
    if isinstance(error, boto.ConnectionError | boto.HTTPClientError):
        return Failure(f"the server cannot be reached ({error})", _reach(), passing=True)
    return Failure(f"{type(error).__name__}: {error}", _RENEW, credentials=True)


def _general(error: Exception, url: str) -> Failure:
    """Errors of other storage clients, and of the network in general."""
    status = _status(error)
    text = f"{type(error).__name__}: {error}"
    if isinstance(error, FileNotFoundError) or status == 404:
        return Failure(f"the object is missing ({text})", _PATH)
    if status in (401, 403):
        return Failure(f"access is denied ({text})", f"give credentials that may read {url.partition('://')[0]}://")
    if isinstance(error, TooLarge):
        return Failure(str(error), "copy it again from where the data was prepared, or prepare the data again")
    if isinstance(error, TooSlow):
        return Failure(f"the transfer is too slow: {error}", _reach(), passing=True)
    if isinstance(error, ImportError | ValueError | PermissionError):
        return Failure(text, "check data.path; another scheme than s3:// may need a package of its own")
    if isinstance(error, OSError) and error.filename is not None and not isinstance(error, ConnectionError):
        return Failure(f"cannot write here ({text})", "check the disk of data.cache, or set data.cache to another one")
    network = isinstance(error, OSError | http.client.HTTPException)
    return Failure(f"the connection broke ({text})" if network else text, _reach(), passing=True)


def _status(error: Exception) -> int | None:
    """The HTTP status that most storage clients give their errors."""
    places = (error, getattr(error, "response", None))
    for name in ("status_code", "code", "status"):
        for place in places:
            if isinstance(value := getattr(place, name, None), int):
                return value
    return None


def _endpoint() -> str:
    name = endpoint_variable()
    return f"{name}={os.environ[name]}" if name else "the endpoint (S3_ENDPOINT_URL, where it is not Amazon's)"


def _reach() -> str:
    return f"check the network and {_endpoint()}, then start again"
