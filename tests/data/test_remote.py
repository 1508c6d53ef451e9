"""Fetching ends in bounded time: with the file, or with an error that names URL, tries, cause and remedy."""

import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from data_prep.addresses import is_remote
from tests.faults import Faults, Kind
from tests.s3 import BUCKET, KEYS, client, environment, free_port, s3_server, set_environment
from titans_train.data.errors import DataError
from titans_train.data.remote import Remote

CONTENT = bytes(range(256)) * 2000
URL = f"s3://{BUCKET}/folder/object.bin"
QUICK = Remote(timeout_seconds=1, attempts=3)  # where every wait is to end; a busy machine may need that for an answer
PATIENT = Remote(timeout_seconds=30, attempts=3)


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with s3_server() as address:
        client(address).put_object(Bucket=BUCKET, Key="folder/object.bin", Body=CONTENT)
        client(address).put_object(Bucket=BUCKET, Key="public.bin", Body=CONTENT, ACL="public-read")
        yield address


def failure(url: str, target: Path, remote: Remote = PATIENT) -> str:
    """The text of the error; nothing may be left behind."""
    with pytest.raises(DataError) as caught:
        remote.fetch(url, target)
    assert list(target.parent.iterdir()) == []
    return str(caught.value)


def test_an_object_is_fetched_whole(faults: Faults, tmp_path: Path) -> None:
    PATIENT.fetch(URL, tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == CONTENT
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert is_remote(URL) and not is_remote("/data/mine")


def test_an_object_larger_than_it_may_be_is_given_up_at_once(faults: Faults, tmp_path: Path) -> None:
    PATIENT.fetch(URL, tmp_path / "file", len(CONTENT))
    (tmp_path / "file").unlink()
    faults.set("none")
    with pytest.raises(DataError, match=r"object\.bin \(1 try, .* has more than the 1,000 bytes that it may have"):
        PATIENT.fetch(URL, tmp_path / "file", 1_000)
    assert list(tmp_path.iterdir()) == [] and len(faults.seen) == 1


@pytest.mark.parametrize("kind", ["unavailable", "throttled", "reset", "truncated", "slow", "silent"])
def test_a_fault_that_passes_heals(faults: Faults, tmp_path: Path, kind: Kind) -> None:
    faults.set(kind, count=2 if kind in ("unavailable", "throttled", "reset") else 1)
    remote = Remote(timeout_seconds=5, attempts=3) if kind in ("slow", "silent") else PATIENT
    remote.fetch(URL, tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == CONTENT
    assert len(faults.seen) == (3 if kind in ("unavailable", "throttled", "reset") else 2)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(("kind", "cause"), [
    ("unavailable", r"\(3 tries, \d+\.\d s\): the server is overloaded or failing \(the server says 503 Service"),
    ("reset", r"\(3 tries, \d+\.\d s\): the connection broke \(.*reset"),
    ("truncated", r"\(3 tries, \d+\.\d s\): the connection broke"),
    ("slow", r"\(3 tries, \d+\.\d s\): the transfer is too slow: only \d+ bytes came in 1\.\d s"),
    ("silent", r"\(3 tries, \d+\.\d s\): the (transfer is too slow: only 0 bytes|server cannot be reached \(Read)"),
])  # fmt: skip
def test_a_fault_that_stays_ends_in_bounded_time(faults: Faults, tmp_path: Path, kind: Kind, cause: str) -> None:
    faults.set(kind)
    started = time.monotonic()
    text = failure(URL, tmp_path / "file", QUICK if kind in ("slow", "silent") else PATIENT)
    assert time.monotonic() - started < 10
    assert re.search(cause, text), text
    assert text.startswith(f"cannot fetch {URL} (")
    assert f"check the network and S3_ENDPOINT_URL={faults.address}, then start again" in text
    assert len(faults.seen) == 3


def test_expired_credentials_are_not_tried_again(faults: Faults, tmp_path: Path) -> None:
    faults.set("expired")
    text = failure(URL, tmp_path / "file")
    assert f"cannot fetch {URL} (1 try, " in text
    assert "the credentials have expired (the server says 400 ExpiredToken: The provided token has expired.)" in text
    assert "renew the credentials" in text
    assert len(faults.seen) == 1


def test_credentials_that_were_renewed_in_their_file_are_used(
    faults: Faults, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A token expires in the middle of a run, and somebody has renewed it in ~/.aws/credentials."""
    keys, folder = tmp_path / "credentials", tmp_path / "data"
    folder.mkdir()
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(keys))
    text = "[default]\naws_access_key_id = {0}\naws_secret_access_key = {0}\n"
    keys.write_text(text.format("old"))
    remote = Remote(timeout_seconds=31, attempts=3)  # other clients than those of other tests
    remote.fetch(URL, folder / "file")
    keys.write_text(text.format("new"))
    faults.set("expired", count=1)
    remote.fetch(URL, folder / "again")
    assert (folder / "again").read_bytes() == CONTENT
    assert len(faults.seen) == 2


@pytest.mark.parametrize(("url", "cause"), [
    (f"s3://{BUCKET}/folder/nothing", "the object is missing (the server says 404 NoSuchKey"),
    ("s3://no-such-bucket/object", "the bucket is missing (the server says 404 NoSuchBucket"),
])  # fmt: skip
def test_a_missing_object_is_not_tried_again(faults: Faults, tmp_path: Path, url: str, cause: str) -> None:
    text = failure(url, tmp_path / "file")
    assert "(1 try, " in text and cause in text and "check data.path" in text
    assert len(faults.seen) == 1


def test_an_unknown_kind_of_storage_is_refused(tmp_path: Path) -> None:
    text = failure("nosuch://bucket/object", tmp_path / "file")
    assert "(1 try, " in text and "Unsupported remote path" in text


def test_without_credentials_requests_are_not_signed(
    faults: Faults, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in KEYS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    remote = Remote(timeout_seconds=32)  # other clients than those of other tests
    text = failure(URL, tmp_path / "file", remote)
    assert "(1 try, " in text and "access is denied (the server says 403" in text and "give credentials" in text
    assert "no credentials were found, so the request was not signed" in text
    remote.fetch(f"s3://{BUCKET}/public.bin", tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == CONTENT


def test_without_a_network_it_ends_soon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    set_environment(environment(f"http://127.0.0.1:{free_port()}"), monkeypatch)
    started = time.monotonic()
    text = failure(URL, tmp_path / "file", QUICK)
    assert time.monotonic() - started < 10
    assert "(3 tries, " in text and "the server cannot be reached" in text
    assert "check the network and S3_ENDPOINT_URL=http://127.0.0.1:" in text


def test_an_address_that_never_answers_ends_soon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as full:  # its queue of connections is full: packets are dropped
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        waiting = [socket.socket() for _ in range(4)]
        for one in waiting:
            one.setblocking(False)
            one.connect_ex(full.getsockname())
        set_environment(environment(f"http://127.0.0.1:{full.getsockname()[1]}"), monkeypatch)
        started = time.monotonic()
        text = failure(URL, tmp_path / "file", QUICK)
        assert time.monotonic() - started < 10 and "(3 tries, " in text
        for one in waiting:
            one.close()


def test_a_forked_process_makes_its_own_connection(faults: Faults, tmp_path: Path) -> None:
    code = (
        "import os, sys; from pathlib import Path; from titans_train.data.remote import Remote; from titans_train.data"
        " import s3; url, folder = sys.argv[1], Path(sys.argv[2]); Remote().fetch(url, folder / 'parent')\n"
        "child = os.fork()\n"
        "if child == 0:\n"
        "    Remote().fetch(url, folder / 'child'); os._exit(0 if len(s3._connections) == 2 else 1)\n"
        "Remote().fetch(url, folder / 'parent2'); sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))"
    )
    subprocess.run([sys.executable, "-c", code, URL, str(tmp_path)], check=True, env=dict(os.environ))
    assert all((tmp_path / name).read_bytes() == CONTENT for name in ("parent", "parent2", "child"))
