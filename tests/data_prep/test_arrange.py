from __future__ import annotations

import itertools
import json
import random
import re
from pathlib import Path

import numpy as np
import pytest

from data_prep.arrange import document_name, folder_names, later_copies, rows_within, sample_bytes, shard_ends
from data_prep.columns import Columns
from data_prep.settings import COMPRESSION
from data_prep.shards import COLUMNS, HASH, head_bytes
from data_prep.units import WHOLE_FILE
from titans_train.data.shim import import_streaming


def columns(tokens: list[int], lines: list[int]) -> Columns:
    count = len(tokens)
    zeros = np.zeros(count, np.int64)
    return Columns(
        zeros, zeros, np.array(tokens, np.uint32), zeros, zeros, np.array(lines, np.int64), zeros,
        np.zeros(count, np.bool_), ["text"],
    )  # fmt: skip


@pytest.mark.parametrize(("compression", "limit"), [("none", 4096), ("zstd", 5000), ("zstd", 70_000)])
def test_shards_end_where_streaming_would_end_them(compression: str, limit: int, tmp_path: Path) -> None:
    rng = random.Random(limit)
    tokens = [rng.choice([1, 40, 300, 1999, 2000, 2001, rng.randrange(1, 9000)]) for _ in range(300)]
    lines = [rng.choice([WHOLE_FILE, 9, 10, 99, 100, 12345, 10**9]) for _ in tokens]
    names = [document_name("größe.txt", line) for line in lines]
    writer = import_streaming("streaming").MDSWriter(
        out=str(tmp_path), columns=COLUMNS, compression=COMPRESSION[compression], hashes=[HASH], size_limit=limit
    )
    with writer:
        for name, count in zip(names, tokens, strict=True):
            writer.write({"name": name, "tokens": bytes(2 * count)})
    shards = json.loads((tmp_path / "index.json").read_text())["shards"]
    sizes = sample_bytes(columns(tokens, lines), ["größe.txt"], itemsize=2)
    head = head_bytes(compression, limit)
    ends = shard_ends(sizes, limit - head)
    assert ends == list(itertools.accumulate(shard["samples"] for shard in shards)) and len(ends) > 5
    raw = [head + int(part.sum()) for part in np.split(sizes, ends[:-1])]
    assert raw == [shard["raw_data"]["bytes"] for shard in shards]


def test_copies_are_found_by_both_halves_of_the_hash_and_the_first_stays() -> None:
    high = np.array([1, 2, 1, 1, 2, 3, 1], np.uint64)
    low = np.array([7, 7, 7, 8, 7, 7, 7], np.uint64)
    assert later_copies(high, low).tolist() == [False, False, True, False, True, False, True]
    assert later_copies(high[:0], low[:0]).tolist() == []


def test_documents_are_taken_up_to_the_one_that_would_pass_the_limit() -> None:
    sizes = np.array([5, 5, 1, 10], np.uint32)
    assert [rows_within(sizes, limit) for limit in (4, 5, 9, 11, 20, 21, None)] == [0, 1, 1, 3, 3, 4, 4]


def test_folder_names_are_safe_and_different() -> None:
    names = ["wiki", "Wiki", "a b", "a/b", "a-b", "..", "", "x" * 70, "x" * 71, "日本", "中国", ".hidden"]
    folders = folder_names(names)
    assert all(re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,63}", name) for name in folders)
    assert len({name.casefold() for name in folders}) == len(names)
    assert folders[1] == "Wiki" and folders[4] == "a-b" and folders[11] == "hidden"
    assert folder_names(["a b"]) == ["a-b"]
    shuffled = random.Random(0).sample(range(len(names)), len(names))
    assert folder_names([names[index] for index in shuffled]) == [folders[index] for index in shuffled]


def test_a_name_that_is_the_hashed_spelling_of_another_is_different_too() -> None:
    hashed = [name for name in folder_names(["a/b", "a b", "a-b"]) if name != "a-b"]
    meant = ["a/b", "a b", "a-b", *hashed, hashed[0].upper()]
    folders = folder_names(meant)  # names that are the hashed spelling of others
    assert len({name.casefold() for name in folders}) == len(meant) and folders[2] == "a-b"
    assert folder_names(meant[::-1]) == folders[::-1]
