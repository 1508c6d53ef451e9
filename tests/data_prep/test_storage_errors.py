import http.server
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from data_prep import storage
from data_prep.storage import StorageError
from tests.data_prep.test_storage import write_data
from tests.s3 import environment, set_environment


@contextmanager
def refusing_server(status: int, code: str) -> Iterator[str]:
    """A server that answers every request as S3 refuses it: a HEAD request gets no text."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            text = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>refused</Message></Error>".encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/xml")
            self.send_header("Content-Length", str(0 if self.command == "HEAD" else len(text)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(text)

        do_HEAD = do_PUT = do_POST = do_DELETE = do_GET

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


REFUSALS = {
    "ExpiredToken": (400, "AWS credentials have expired.*renew them"),
    "InvalidAccessKeyId": (403, "the AWS credentials are wrong"),
    "SignatureDoesNotMatch": (403, "the AWS credentials are wrong"),
    "AccessDenied": (403, "access denied; the AWS credentials are wrong or may not do this: check"),
    "PermanentRedirect": (301, "the bucket is in another region; set AWS_REGION to it"),
}


@pytest.mark.parametrize("code", REFUSALS)
def test_a_refusal_of_s3_is_told_with_the_remedy(monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    status, message = REFUSALS[code]
    with refusing_server(status, code) as address:
        set_environment(environment(address), monkeypatch)
        for action in (storage.list_files, storage.read_bytes, write_data):
            with pytest.raises(StorageError, match=rf"s3://bucket/key: .*{message}"):
                action("s3://bucket/key")


@pytest.mark.parametrize("code", ["ExpiredToken", "AccessDenied"])
def test_a_refusal_to_delete_is_told_with_the_remedy(monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    status, message = REFUSALS[code]
    with refusing_server(status, code) as address:
        set_environment(environment(address), monkeypatch)
        with pytest.raises(StorageError, match=rf"s3://bucket/key: .*{message}"):
            storage.delete("s3://bucket/key")


def without_credentials(address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    set_environment({"AWS_ENDPOINT_URL": address, "AWS_EC2_METADATA_DISABLED": "true"}, monkeypatch)
    monkeypatch.delenv("S3_ENDPOINT_URL", raising=False)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_REGION", "us-east-1")


def test_without_credentials_it_is_told_how_to_give_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with refusing_server(403, "AccessDenied") as address:
        without_credentials(address, tmp_path, monkeypatch)
        with pytest.raises(StorageError, match=r"no AWS credentials were found; set AWS_ACCESS_KEY_ID .*NO_SIGN_REQ"):
            storage.list_files("s3://bucket/key")
