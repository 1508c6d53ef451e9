"""Causes in plain words, and which of them another try can mend."""

import errno

import pytest

from titans_train.data.failures import TooSlow, explain


class Answer(Exception):
    """As the storage clients of Google, Azure and others raise."""

    def __init__(self, status: int) -> None:
        super().__init__(f"{status} answered")
        self.status_code = status


@pytest.mark.parametrize(("error", "cause", "passing"), [
    (FileNotFoundError("no such file"), "the object is missing", False),
    (Answer(404), "the object is missing", False),
    (Answer(403), "access is denied", False),
    (Answer(503), "Answer: 503 answered", True),
    (TooSlow("only 3 bytes came in 60.0 s"), "the transfer is too slow: only 3 bytes", True),
    (ConnectionResetError("reset by peer"), "the connection broke", True),
    (TimeoutError("timed out"), "the connection broke", True),
    (ValueError("Unsupported remote path: x://y"), "Unsupported remote path", False),
    (ImportError("no module named paramiko"), "no module named paramiko", False),
    (OSError(errno.EROFS, "Read-only file system", "/cache/x"), "cannot write here", False),
    (RuntimeError("of a library nobody knows"), "RuntimeError: of a library", True),
])  # fmt: skip
def test_errors_of_other_storage(error: Exception, cause: str, passing: bool) -> None:
    failure = explain(error, "gs://bucket/object")
    assert cause in failure.cause and failure.passing is passing and failure.remedy
    assert not failure.credentials


def test_errors_of_boto_before_any_answer() -> None:
    from botocore import exceptions as boto

    broken = boto.IncompleteReadError(actual_bytes=1, expected_bytes=2)
    assert explain(broken, "s3://bucket/object").passing
    assert explain(boto.EndpointConnectionError(endpoint_url="http://x"), "s3://b/o").passing
    missing = explain(boto.NoCredentialsError(), "s3://bucket/object")
    assert not missing.passing and missing.credentials and "renew the credentials" in missing.remedy
