"""Input from and output to a real S3 server."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from data_prep import space
from data_prep.claim import NAME as CLAIM
from data_prep.claim import take
from data_prep.manifest import FILE_NAME, Manifest
from tests.data_prep.runs import content, prepare, start, wait_for, wait_until_gone
from tests.s3 import BUCKET, client, environment, s3_server, set_environment, upload

Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with s3_server() as address:
        yield address


@pytest.fixture(autouse=True)
def environment_of_the_server(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    set_environment(environment(address), monkeypatch)


def objects(address: str, prefix: str) -> dict[str, bytes]:
    s3 = client(address)
    pages = s3.get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix=f"{prefix}/")
    keys = [item["Key"] for page in pages for item in page.get("Contents", [])]
    return {key.removeprefix(f"{prefix}/"): s3.get_object(Bucket=BUCKET, Key=key)["Body"].read() for key in keys}


def test_an_upload_that_was_killed_goes_on_and_is_what_a_local_run_writes(
    texts: Path, whole: dict[str, bytes], address: str, tmp_path: Path, capsys: Capture
) -> None:
    url, work = f"s3://{BUCKET}/killed/out", tmp_path / "work"
    process = start(texts, url, "--work", str(work), "--workers", "2")
    wait_for(lambda: len(list((work / "shards").rglob("*.json"))) >= 5, process)
    process.kill()
    process.communicate()
    wait_until_gone(process.pid)
    uploaded = objects(address, "killed/out")
    assert 5 <= len(uploaded) < len(whole) and FILE_NAME not in uploaded
    lost = next(name for name in sorted(uploaded) if name != CLAIM)
    client(address).delete_object(Bucket=BUCKET, Key=f"killed/out/{lost}")
    assert prepare(texts, url, "--work", str(work)) == 0
    assert " shards were written before" in capsys.readouterr().out
    assert objects(address, "killed/out") == whole
    assert not work.exists()
    assert prepare(texts, url) == 0
    assert f"already prepared: {url}" in capsys.readouterr().out


def test_objects_that_are_not_ours_are_left_alone(
    texts: Path, address: str, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    client(address).put_object(Bucket=BUCKET, Key="foreign/thesis.txt", Body=b"precious")
    assert prepare(texts, f"s3://{BUCKET}/foreign") == 2
    error = capsys.readouterr().err
    assert "holds something else (1 objects such as thesis.txt, no manifest.json)" in error
    assert objects(address, "foreign") == {"thesis.txt": b"precious"}


def test_an_output_of_other_settings_or_without_a_shard_is_refused(
    texts: Path, address: str, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    url = f"s3://{BUCKET}/done"
    assert prepare(texts, url) == 0
    assert f"working in {tmp_path}/.done.partial" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []
    assert prepare(texts, url, "--seed", "1") == 2
    assert "was prepared with other settings (seed 0, now 1)" in capsys.readouterr().err
    client(address).delete_object(Bucket=BUCKET, Key="done/train/wiki/shard.00000.mds.zstd")
    assert prepare(texts, url) == 2
    assert f"{url}/train/wiki/shard.00000.mds.zstd is missing" in capsys.readouterr().err


def test_restart_removes_what_was_uploaded(texts: Path, address: str, tmp_path: Path) -> None:
    url, work = f"s3://{BUCKET}/again", tmp_path / "work"
    process = start(texts, url, "--work", str(work), "--workers", "1", "--shard-size", "32kb")
    wait_for(lambda: len(list((work / "shards").rglob("*.json"))) >= 8, process)
    process.kill()
    process.communicate()
    assert len(objects(address, "again")) >= 8
    assert prepare(texts, url, "--work", str(work), "--restart") == 0
    uploaded = objects(address, "again")
    manifest = Manifest.from_text(uploaded[FILE_NAME].decode(), url)
    listed = {name for name, _ in manifest.files()}
    assert uploaded.keys() == listed | {FILE_NAME, "report.md", "report.png", "rejected.jsonl"}


def test_an_output_belongs_to_one_run_at_a_time(
    texts: Path, whole: dict[str, bytes], address: str, tmp_path: Path, capsys: Capture
) -> None:
    """The second run ends before it reads anything; the first one goes on, also after a kill."""
    url, work = f"s3://{BUCKET}/claimed", tmp_path / "work"
    process = start(texts, url, "--work", str(work), "--workers", "2")
    wait_for(lambda: CLAIM in objects(address, "claimed"), process)
    for more in ((), ("--restart",)):
        assert prepare(texts, url, "--work", str(tmp_path / "other"), *more) == 2
        error = capsys.readouterr().err
        assert f"another run is preparing {url}, on host " in error and f" in {work}; wait for it" in error
        assert error.endswith(f"If it is gone for good, remove {url}/{CLAIM} and run again\n")
        assert not (tmp_path / "other").exists()
    wait_for(lambda: len(list((work / "shards").rglob("*.json"))) >= 2, process)
    process.kill()
    process.communicate()
    wait_until_gone(process.pid)
    assert prepare(texts, url, "--work", str(tmp_path / "other")) == 2
    assert prepare(texts, url, "--work", str(work)) == 0
    assert objects(address, "claimed") == whole


def test_a_run_whose_claim_another_took_writes_nothing_more(
    texts: Path, address: str, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, work = f"s3://{BUCKET}/taken", tmp_path / "work"
    (tmp_path / "other").mkdir()

    def steal(needs: object) -> None:
        client(address).delete_object(Bucket=BUCKET, Key=f"taken/{CLAIM}")
        take(url, tmp_path / "other", restart=False)

    with monkeypatch.context() as patch:
        patch.setattr(space, "check_free_space", steal)
        assert prepare(texts, url, "--work", str(work)) == 2
    assert f"another run is preparing {url}" in capsys.readouterr().err
    assert objects(address, "taken").keys() == {CLAIM}
    client(address).put_object(Bucket=BUCKET, Key="taken/train/wiki/shard.00000.mds.zstd", Body=b"theirs")
    assert prepare(texts, url, "--work", str(work), "--restart") == 2
    assert len(objects(address, "taken")) == 2


def test_a_restart_takes_over_what_the_same_folder_had_claimed(
    texts: Path, whole: dict[str, bytes], address: str, tmp_path: Path
) -> None:
    """Though the working folder is gone."""
    url, work = f"s3://{BUCKET}/forgotten", tmp_path / "work"
    work.mkdir()
    take(url, work, restart=False)
    shutil.rmtree(work)
    assert prepare(texts, url, "--work", str(work)) == 2
    assert prepare(texts, url, "--work", str(work), "--restart") == 0
    assert objects(address, "forgotten") == whole


def test_a_restart_for_another_output_removes_what_lies_in_the_first(
    texts: Path, whole: dict[str, bytes], address: str, tmp_path: Path
) -> None:
    work = tmp_path / "work"
    process = start(texts, f"s3://{BUCKET}/one", "--work", str(work), "--workers", "1", "--shard-size", "32kb")
    wait_for(lambda: len(list((work / "shards").rglob("*.json"))) >= 3, process)
    process.kill()
    process.communicate()
    foreign = {"train/wiki/shard.00000.mds.zstd": b"of another run"}
    for name, data in foreign.items():
        client(address).put_object(Bucket=BUCKET, Key=f"two/{name}", Body=data)
    assert prepare(texts, f"s3://{BUCKET}/two", "--work", str(work), "--restart") == 2
    assert objects(address, "two") == foreign and len(objects(address, "one")) <= 1  # one was being uploaded
    assert CLAIM not in objects(address, "one")


def test_input_from_s3_gives_the_shards_of_local_files(
    texts: Path, whole: dict[str, bytes], address: str, tmp_path: Path
) -> None:
    url = upload(address, texts, "input/texts")
    process = start(url, tmp_path / "out", "--workers", "2", environment=dict(os.environ))
    output, error = process.communicate(timeout=60)
    assert process.returncode == 0, error
    assert output.count("rejected: ") == 1
    found = content(tmp_path / "out")
    assert {name for name in whole if found[name] != whole[name]} == {FILE_NAME}  # times of change are the server's


def test_a_bucket_that_is_not_there_is_named(texts: Path, tmp_path: Path, capsys: Capture) -> None:
    assert prepare("s3://nowhere/texts", tmp_path / "out") == 2
    assert "s3://nowhere/texts" in capsys.readouterr().err
    assert prepare(texts, "s3://nowhere/out", "--work", str(tmp_path / "work")) == 2
    captured = capsys.readouterr()
    assert "s3://nowhere/out" in captured.err and "no such bucket" in captured.err
    assert "working in" not in captured.out and not (tmp_path / "work").exists()
