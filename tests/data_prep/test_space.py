from __future__ import annotations

import random
from pathlib import Path

import pytest

from data_prep.__main__ import main
from data_prep.errors import PrepareError
from data_prep.sources import SourceFile
from data_prep.space import check_free_space, shard_bytes, text_bytes, token_bytes
from data_prep.tokenizer import load_prepared_tokenizer
from tests.data_prep.runs import content


def test_a_disk_without_room_is_refused_before_writing(tmp_path: Path) -> None:
    pattern = r"MB free, preparing may need 1,000,\d{3},\d{3},\d{3} MB; free space, or name an --output or --work"
    with pytest.raises(PrepareError, match=pattern):
        check_free_space([(tmp_path, 10**18)])
    with pytest.raises(PrepareError, match=pattern):
        check_free_space([(tmp_path, 10**18 // 2), (tmp_path.parent, 10**18 // 2)])  # the same disk
    check_free_space([(tmp_path, 1)])


def test_the_estimate_is_enough_even_for_noise(tmp_path: Path) -> None:
    rng = random.Random(0)
    (tmp_path / "noise").mkdir()
    for number in range(8):
        noise = "".join(chr(rng.randrange(32, 0x800)) for _ in range(20_000))
        (tmp_path / "noise" / f"{number}.txt").write_text(noise)
    size = sum(path.stat().st_size for path in (tmp_path / "noise").iterdir())
    for compression in ("zstd", "none"):
        output = tmp_path / compression
        options = ("--output", str(output), "--validation-share", "0.25", "--compression", compression)
        assert main(["--input", str(tmp_path / "noise"), *options]) == 0
        shards = {name: data for name, data in content(output).items() if not name.startswith("report")}
        written = sum(len(data) for data in shards.values())
        estimate = shard_bytes(token_bytes(size, load_prepared_tokenizer(output)), compression)
        assert written <= estimate < 2 * written


def test_compressed_files_hold_more_text_than_bytes() -> None:
    files = [SourceFile("/a.jsonl.zst", "a.jsonl.zst", 100), SourceFile("/b.txt", "b.txt", 100)]
    assert text_bytes(files, None) == 500 and text_bytes(files, 70) == 70
