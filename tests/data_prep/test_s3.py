import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from data_prep import storage
from data_prep.storage import StorageError
from tests.data_prep.test_storage_errors import without_credentials
from tests.s3 import BUCKET, KEYS, client, environment, free_port, s3_server, set_environment


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with s3_server() as address:
        yield address


@pytest.mark.parametrize("name", ["AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "S3_ENDPOINT_URL"])
def test_each_name_of_the_endpoint_is_known(server: str, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    set_environment(KEYS, monkeypatch)
    monkeypatch.delenv("S3_ENDPOINT_URL", raising=False)
    monkeypatch.setenv(name, server)
    client(server).put_object(Bucket=BUCKET, Key="key", Body=b"data")
    assert storage.read_bytes(f"s3://{BUCKET}/key") == b"data"


def test_no_connection_is_told_in_well_under_a_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    set_environment(environment(f"http://127.0.0.1:{free_port()}"), monkeypatch)
    begin = time.monotonic()
    for action in (storage.list_files, storage.delete):
        with pytest.raises(StorageError, match="no connection to the storage; check the network and AWS_ENDPOINT_URL"):
            action("s3://bucket/folder")
    assert time.monotonic() - begin < 30


@pytest.mark.long
def test_a_server_that_never_answers_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        set_environment(environment(f"http://127.0.0.1:{silent.getsockname()[1]}"), monkeypatch)
        begin = time.monotonic()
        with pytest.raises(StorageError, match="no connection to the storage"):
            storage.list_files("s3://bucket/folder")
        assert time.monotonic() - begin < 60


def test_a_public_bucket_is_read_unsigned(server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    client(server).put_object(Bucket=BUCKET, Key="public", Body=b"data", ACL="public-read")
    without_credentials(server, tmp_path, monkeypatch)
    monkeypatch.setenv("AWS_NO_SIGN_REQUEST", "true")
    assert storage.read_bytes(f"s3://{BUCKET}/public") == b"data"


def test_importing_makes_no_client() -> None:
    code = "import sys, data_prep.readers, data_prep.s3 as s3; sys.exit(s3._client.cache_info().currsize)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_profile_that_is_not_there_is_told(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    set_environment({"AWS_PROFILE": "nope", "AWS_ENDPOINT_URL": server}, monkeypatch)
    monkeypatch.delenv("AWS_REGION", raising=False)
    for action in (storage.list_files, storage.read_bytes, storage.delete):
        with pytest.raises(
            StorageError, match=r"s3://bucket/a: there is no such AWS profile; set AWS_PROFILE.*\(nope\)"
        ):
            action("s3://bucket/a")
