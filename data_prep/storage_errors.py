"""What went wrong with a file or bucket, and what to do about it, from the library's error."""

from __future__ import annotations

import errno

from data_prep.errors import PrepareError
from data_prep.s3 import credentials_exist


class StorageError(PrepareError):
    """A local or remote file cannot be listed, opened, read or written."""


_NO_BUCKET = "no such bucket; check its name and AWS_ENDPOINT_URL"

# What S3 or its client writes -> what to tell. The first line that fits is taken.
_CAUSES = (
    (
        ("ExpiredToken", "TokenRefreshRequired", "RequestExpired"),
        "the AWS credentials have expired; renew them (a new AWS_SESSION_TOKEN, or aws sso login) and run again",
    ),
    (
        ("The config profile",),
        "there is no such AWS profile; set AWS_PROFILE to one of ~/.aws/config, or unset it",
    ),
    (("Unable to parse config file",), "the AWS settings cannot be read; mend the file"),
    (("NO_SUCH_BUCKET", "NoSuchBucket"), _NO_BUCKET),
    (
        ("INVALID_ACCESS_KEY_ID", "InvalidAccessKeyId", "SIGNATURE_DOES_NOT_MATCH", "SignatureDoesNotMatch"),
        "the AWS credentials are wrong; check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
    ),
    (
        ("PermanentRedirect", "AuthorizationHeaderMalformed", "HTTP status 301"),
        "the bucket is in another region; set AWS_REGION to it",
    ),
    (
        ("NETWORK_CONNECTION", "curlCode", "Could not connect", "onnect timeout", "Read timeout"),
        "no connection to the storage; check the network and AWS_ENDPOINT_URL, then run again",
    ),
    (("SLOW_DOWN", "SlowDown", "HTTP status 503"), "the storage is overloaded; run again later or with fewer workers"),
    # The answer to a HEAD request has no text that says more.
    (
        ("HTTP status 400",),
        "the storage refused, most often because the AWS credentials have expired or are wrong; renew them",
    ),
)
_DENIED = ("ACCESS_DENIED", "AccessDenied", "HTTP status 403")
_HAS_KEYS = "; the AWS credentials are wrong or may not do this: check them and the bucket's policy"
_NO_KEYS = (
    ", and no AWS credentials were found; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY or AWS_PROFILE, "
    "or AWS_NO_SIGN_REQUEST=true for a public bucket"
)
_LOCAL: dict[int | None, str] = {
    errno.EACCES: "permission denied; give the permission or leave it out",
    errno.EPERM: "permission denied; give the permission or leave it out",
    errno.ENOENT: "no such file or folder; check the spelling",
    errno.ENOSPC: "the disk is full; free space or name another disk",
    errno.EDQUOT: "the disk quota is used up; free space or name another disk",
    errno.EROFS: "the disk is read-only; name another one",
    errno.EISDIR: "is a folder, expected a file",
    errno.EEXIST: "a part of the path is a file, not a folder; check the spelling",
    errno.ENOTDIR: "a part of the path is a file, not a folder; check the spelling",
}


def describe(path: str, error: Exception, no_bucket: bool) -> str:
    """The sentence for the user; `no_bucket`: the bucket of the URL was looked for and is not there."""
    text = str(error)
    if "://" not in path:
        return f"{path}: {_LOCAL.get(_number(error), f'{text}; check the file and its disk')}"
    if isinstance(error, FileNotFoundError):
        return f"{path}: {_NO_BUCKET if no_bucket else _LOCAL[errno.ENOENT]}"
    for patterns, remedy in _CAUSES:
        if any(pattern in text for pattern in patterns):
            return f"{path}: {remedy} ({text})"
    if any(pattern in text for pattern in _DENIED):
        return f"{path}: access denied{_HAS_KEYS if _have_keys() else _NO_KEYS} ({text})"
    return f"{path}: {text}; check the address and run again"


def _have_keys() -> bool:
    try:
        return credentials_exist()
    except OSError:  # they are there, and cannot be had
        return True


def _number(error: Exception) -> int | None:
    number = getattr(error, "errno", None)
    return errno.ENOENT if number is None and isinstance(error, FileNotFoundError) else number
