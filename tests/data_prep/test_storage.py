import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from data_prep import storage
from data_prep.errors import PrepareError
from data_prep.storage import StorageError
from tests.s3 import BUCKET, environment, s3_server, set_environment


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


def write_data(path: str) -> None:
    storage.write_bytes(path, b"data")


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
    for info in infos:
        storage.delete(info.path)
    assert storage.list_files(root) == [] if os.path.isdir(root) else not storage.exists(root)


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
    for action in (storage.list_files, storage.read_bytes, write_data):
        with pytest.raises(StorageError, match="s3://other/a.txt: no such bucket; check its name and AWS_ENDPOINT_URL"):
            action("s3://other/a.txt")


def test_a_path_that_is_not_utf_8_is_listed_read_and_told(tmp_path: Path) -> None:
    path = os.path.join(tmp_path, os.fsdecode(b"caf\xe9.txt"))
    Path(path).write_text("text")
    assert storage.exists(path) and [info.path for info in storage.list_files(str(tmp_path))] == [path]
    assert storage.list_files(path)[0].path == path and storage.read_bytes(path) == b"text"
    storage.delete(path)
    with pytest.raises(StorageError, match=r"/caf\\xe9\.txt: no such file or folder"):
        storage.read_bytes(path)
    assert storage.printable(path) == f"{tmp_path}/caf\\xe9.txt" and storage.printable("ä/漢.txt") == "ä/漢.txt"


def test_what_changes_with_a_file_is_told(root: str) -> None:
    write_data(f"{root}/a.txt")
    (info,) = storage.list_files(root)
    with storage.open_input(info.path) as file:
        assert file.state == file.state_now()
        assert (file.state.bytes, file.state.mtime_ns // 10**9) == (4, info.mtime_ns // 10**9)
        time.sleep(0.02)
        storage.write_bytes(info.path, b"atad")
        assert file.state != file.state_now()
