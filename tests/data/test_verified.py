"""Shards from an object store: the right tokens, or an error that names the object, never other tokens."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from data_prep.manifest import Manifest
from tests.data.folders import flip, open_store, read_all
from tests.faults import Faults, Kind
from tests.s3 import BUCKET, client, s3_server, upload
from titans_train.data.cache import Cache
from titans_train.data.errors import DataError
from titans_train.data.remote import Remote
from titans_train.data.tokenizer import open_tokenizer

NAMES = {"compressed": "shard.00001.mds.zstd", "raw": "shard.00001.mds"}


@pytest.fixture(scope="module")
def server(prepared: Path, prepared_raw: Path) -> Iterator[str]:
    with s3_server() as address:
        upload(address, prepared, "compressed")
        upload(address, prepared_raw, "raw")
        yield address


@pytest.fixture(params=NAMES)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def local(kind: str, prepared: Path, prepared_raw: Path) -> Path:
    return prepared if kind == "compressed" else prepared_raw


def url(kind: str) -> str:
    return f"s3://{BUCKET}/{kind}"


def put(server: str, kind: str, name: str, content: bytes) -> None:
    client(server).put_object(Bucket=BUCKET, Key=f"{kind}/train/text/{name}", Body=content)


def test_a_remote_folder_reads_as_the_local_one(
    faults: Faults, prepared: Path, prepared_raw: Path, tmp_path: Path, kind: str
) -> None:
    store, same = open_store(url(kind) + "/", tmp_path), open_store(local(kind, prepared, prepared_raw), tmp_path / "l")
    assert read_all(store) == read_all(same)
    assert store.fingerprint == same.fingerprint
    assert open_tokenizer(url(kind), Cache(tmp_path / "t"), Remote()).decode([104, 105, 256]) == "hi"
    entries = same.manifest.splits["train"]["text"].shards  # a compressed one is fetched beside its raw form
    sizes = [entry.raw.bytes + (entry.compressed.bytes if entry.compressed else 0) for entry in entries]
    assert store.largest_shards(1) == max(sizes)
    kept = [path.name for path in (tmp_path / "cache").rglob("*") if path.is_file() and "zstd" in path.name]
    assert kept == []  # nothing is kept twice


def test_what_is_in_the_cache_is_not_fetched_again(faults: Faults, tmp_path: Path, kind: str) -> None:
    read_all(open_store(url(kind), tmp_path))
    faults.set("none")
    read_all(open_store(url(kind), tmp_path / ".." / tmp_path.name))  # as of another process
    assert [Path(path.partition("?")[0]).name for path in faults.seen] == ["manifest.json"]


@pytest.mark.parametrize("place", [0, 3, 4, 5, 9, 21, 90, 0.1, 0.25, 0.5, 0.75, 0.9, -4, -1])
@pytest.mark.parametrize("bit", [0, 7])
def test_a_flipped_bit_in_a_remote_shard_is_caught(
    server: str, faults: Faults, prepared: Path, prepared_raw: Path, tmp_path: Path, kind: str, place: float, bit: int
) -> None:
    name = NAMES[kind]
    content = (local(kind, prepared, prepared_raw) / "train" / "text" / name).read_bytes()
    (tmp_path / name).write_bytes(content)
    flip(tmp_path / name, place, bit)
    put(server, kind, name, (tmp_path / name).read_bytes())
    faults.set("none", match=name)
    store = open_store(url(kind), tmp_path)
    try:
        with pytest.raises(
            DataError, match=rf"{url(kind)}/train/text/{name}, fetched 3 times, is damaged: xxh64 \w+, expected \w+"
        ):
            store.tokens(int(store.documents_per_shard[0]), 0, 1)
        assert len(faults.seen) == 3
        assert not list(tmp_path.glob(f"cache/*/*/train/text/{NAMES['raw']}*"))
    finally:
        put(server, kind, name, content)


@pytest.mark.parametrize("fault", ["short", "flipped", "truncated", "reset", "unavailable"])
def test_a_fault_of_one_transfer_heals(faults: Faults, prepared: Path, tmp_path: Path, kind: str, fault: Kind) -> None:
    expected = read_all(open_store(prepared, tmp_path / "local"))
    store = open_store(url(kind), tmp_path)
    faults.set(fault, count=1, match="shard.")
    assert read_all(store) == expected
    assert len(faults.seen) == len(store.documents_per_shard) + 1


@pytest.mark.parametrize(("fault", "message"), [
    ("short", r"shard\.00000\.mds\S*, fetched 3 times, has \d+ bytes, expected \d+"),
    ("flipped", r"shard\.00000\.mds\S*, fetched 3 times, is damaged: xxh64 \w+, expected \w+"),
    ("expired", r"shard\.00000\.mds\S* \(1 try, .*the credentials have expired"),
    ("unavailable", r"shard\.00000\.mds\S* \(3 tries, .*503"),
])  # fmt: skip
def test_a_fault_that_stays_is_an_error(faults: Faults, tmp_path: Path, kind: str, fault: Kind, message: str) -> None:
    store = open_store(url(kind), tmp_path)
    faults.set(fault, match="shard.")
    with pytest.raises(DataError, match=message):
        store.tokens(0, 0, 1)


def test_a_missing_remote_shard_is_an_error(
    server: str, faults: Faults, prepared: Path, prepared_raw: Path, tmp_path: Path, kind: str
) -> None:
    key, name = f"{kind}/train/text/{NAMES[kind]}", NAMES[kind]
    client(server).delete_object(Bucket=BUCKET, Key=key)
    try:
        with pytest.raises(
            DataError, match=rf"cannot fetch {url(kind)}/train/text/{name} \(1 try, .*object is missing"
        ):
            read_all(open_store(url(kind), tmp_path))
    finally:
        put(server, kind, name, (local(kind, prepared, prepared_raw) / "train" / "text" / name).read_bytes())


def test_a_remote_manifest_is_fetched_with_every_start(
    server: str, faults: Faults, prepared: Path, tmp_path: Path
) -> None:
    manifest = (prepared / "manifest.json").read_bytes()
    stored = Manifest.from_text(manifest.decode(), "here")
    assert open_store(url("compressed"), tmp_path).manifest.tool == stored.tool
    changed = replace(stored, tool="another").to_text().encode()
    client(server).put_object(Bucket=BUCKET, Key="compressed/manifest.json", Body=changed)
    try:
        assert open_store(url("compressed"), tmp_path).manifest.tool == "another"
    finally:
        client(server).put_object(Bucket=BUCKET, Key="compressed/manifest.json", Body=manifest)
    with pytest.raises(
        DataError, match=rf"cannot fetch s3://{BUCKET}/nothing/manifest\.json \(1 try.*check data\.path"
    ):
        open_store(url("nothing"), tmp_path)
