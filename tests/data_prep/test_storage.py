import http.server
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from data_prep import storage
from data_prep.errors import PrepareError
from data_prep.storage import StorageError
from tests.s3 import BUCKET, KEYS, client, environment, free_port, s3_server, set_environment


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with s3_server() as address:
        yield address


@pytest.fixture(params=["local", "s3"])
def root(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A folder of each kind, with nothing in it."""
    if request.param == "local":
        return str(tmp_path / "folder")
    set_environment(environment(request.getfixturevalue("server")), monkeypatch)
    return f"s3://{BUCKET}/{tmp_path.name}"


def write_all(root: str, *names: str) -> None:
    for name in names:
        storage.write_bytes(storage.join(root, name), name.encode())


def test_what_is_written_is_read_listed_and_deleted(root: str, tmp_path: Path) -> None:
    write_all(root, "b.txt", "a/z.txt", "a/y/ä x.txt")
    big = bytes(range(256)) * 50_000  # S3 takes it in several parts
    (tmp_path / "big").write_bytes(big)
    storage.upload(tmp_path / "big", storage.join(root, "big"))
    infos = storage.list_files(root)
    assert [(info.path.removeprefix(root), info.bytes) for info in infos] == [
        ("/a/y/ä x.txt", 12), ("/a/z.txt", 7), ("/b.txt", 5), ("/big", len(big)),
    ]  # fmt: skip
    assert all(abs(info.mtime_ns / 1e9 - time.time()) < 600 for info in infos)
    assert storage.list_files(storage.join(root, "b.txt")) == [infos[2]]
    assert storage.read_bytes(infos[3].path) == big
    with storage.open_input(infos[3].path) as file:
        assert (file.size, file.seek(-3, 2), file.read(10)) == (len(big), len(big) - 3, big[-3:])
    storage.delete(infos[2].path)
    storage.delete(infos[2].path)
    assert storage.exists(infos[1].path) and not storage.exists(infos[2].path)
    assert len(storage.list_files(root)) == 3


def test_hidden_and_skipped_names_are_left_out_below_the_root(root: str) -> None:
    write_all(root, ".top/a.txt", ".top/.hidden/b.txt", ".top/.c.txt", ".top/skip/d.txt", ".top/e/skip/f.txt")
    assert [info.path for info in storage.list_files(f"{root}/.top/", {"skip"})] == [f"{root}/.top/a.txt"]


def test_writing_again_replaces(root: str) -> None:
    write_all(root, "a.txt")
    storage.write_bytes(f"{root}/a.txt", b"new")
    assert storage.read_bytes(f"{root}/a.txt") == b"new" and len(storage.list_files(root)) == 1


def test_what_is_not_there_is_told_with_the_remedy(root: str) -> None:
    for action in (storage.list_files, storage.open_input, storage.read_bytes):
        with pytest.raises(StorageError, match=r"nowhere\.txt: no such file or folder; check the spelling"):
            action(f"{root}/nowhere.txt")
    assert not storage.exists(f"{root}/nowhere.txt")


def test_links_to_folders_are_not_followed(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a/b.txt").write_text("text")
    (tmp_path / "a/loop").symlink_to(tmp_path / "a")
    (tmp_path / "a/broken").symlink_to(tmp_path / "nowhere")
    assert [info.path for info in storage.list_files(str(tmp_path))] == [str(tmp_path / "a/b.txt")]


def test_a_local_write_that_fails_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("text")
    with pytest.raises(StorageError, match=r"file/b: .*not a folder; check the spelling"):
        storage.write_bytes(str(tmp_path / "file/b"), b"data")
    (tmp_path / "folder").mkdir()
    with pytest.raises(StorageError, match="folder: is a folder, expected a file"):
        storage.write_bytes(str(tmp_path / "folder"), b"data")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]


@pytest.mark.parametrize("path", ["gs://bucket/key", "https://host/file", "s3://", "s3:///key"])
def test_an_unknown_address_is_refused(path: str) -> None:
    with pytest.raises(PrepareError, match="not a known address; known are local paths and s3://BUCKET/KEY"):
        storage.list_files(path)


def test_a_bucket_that_is_not_there_is_told(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    set_environment(environment(server), monkeypatch)
    for action in (storage.list_files, storage.read_bytes, lambda path: storage.write_bytes(path, b"data")):
        with pytest.raises(StorageError, match="s3://other/a.txt: no such bucket; check its name and AWS_ENDPOINT_URL"):
            action("s3://other/a.txt")


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
    with pytest.raises(StorageError, match="no connection to the storage; check the network and AWS_ENDPOINT_URL"):
        storage.list_files("s3://bucket/folder")
    assert time.monotonic() - begin < 30


@pytest.mark.long
def test_a_server_that_never_answers_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        set_environment(environment(f"http://127.0.0.1:{silent.getsockname()[1]}"), monkeypatch)
        begin = time.monotonic()
        with pytest.raises(StorageError, match="no connection to the storage"):
            storage.list_files("s3://bucket/folder")
        assert time.monotonic() - begin < 60


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

        do_HEAD = do_PUT = do_POST = do_GET

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
        for action in (storage.list_files, storage.read_bytes, lambda path: storage.write_bytes(path, b"data")):
            with pytest.raises(StorageError, match=rf"s3://bucket/key: .*{message}"):
                action("s3://bucket/key")


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


def test_a_public_bucket_is_read_unsigned(server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    client(server).put_object(Bucket=BUCKET, Key="public", Body=b"data", ACL="public-read")
    without_credentials(server, tmp_path, monkeypatch)
    monkeypatch.setenv("AWS_NO_SIGN_REQUEST", "true")
    assert storage.read_bytes(f"s3://{BUCKET}/public") == b"data"


def test_importing_makes_no_client() -> None:
    code = "import sys, data_prep.readers, data_prep.s3 as s3; sys.exit(s3._client.cache_info().currsize)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
