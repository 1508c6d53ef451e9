"""A small corpus of every kind of record, and `data_prep` runs over it: in this process or in one of their own."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from data_prep.__main__ import main
from data_prep.manifest import FILE_NAME, Manifest
from titans_train.data.shim import import_streaming

SOURCES = ("wiki", "code/python", "code python", None)
OPTIONS = ("--validation-share", "0.25", "--shard-size", "256kb", "--source-field", "meta.source")


def write_corpus(folder: Path, megabytes: float = 3.0, seed: int = 0) -> Path:
    """Two JSON Lines files: sources, some duplicates, one line in 500 broken. The second file has half the text."""
    folder.mkdir(parents=True)
    rng = random.Random(seed)
    words = ["".join(rng.choices("abcdefghij ä\n", k=rng.randrange(2, 9))) for _ in range(500)]
    texts: list[str] = []
    for name, share in (("a.jsonl", 2 / 3), ("b.jsonl", 1 / 3)):
        with (folder / name).open("w", encoding="utf-8") as stream:
            while stream.tell() < share * megabytes * 1e6:
                texts.append(" ".join(rng.choices(words, k=rng.randrange(1, 400))))
                text = rng.choice(texts[-50:]) if rng.random() < 0.05 else texts[-1]
                record = {"text": text, "meta": {"source": rng.choice(SOURCES)}}
                stream.write(json.dumps(record, ensure_ascii=False) + "\n" if rng.random() > 0.002 else "{broken\n")
    return folder


def prepare(texts: Path | str, output: Path | str, *more: str) -> int:
    """In this process, which imports streaming once for all tests."""
    return main(["--input", str(texts), "--output", str(output), "--workers", "1", *OPTIONS, *more])


def start(
    texts: Path | str, output: Path | str, *more: str, environment: Mapping[str, str] | None = None
) -> subprocess.Popen[str]:
    """In a process group of its own."""
    command = [sys.executable, "-B", "-m", "data_prep", "--input", str(texts), "--output", str(output), *OPTIONS, *more]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        env={**os.environ, **(environment or {})},
    )  # fmt: skip


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str], seconds: float = 60) -> None:
    """Until it holds; fails when the process ends before."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, f"ended with {process.returncode}: {process.communicate()}"
        assert time.monotonic() < deadline
        time.sleep(0.002)


def alive(group: int) -> list[int]:
    """Processes of a process group that still run."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, pgrp = path.read_text().rpartition(")")[2].split()[:3]
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(pgrp) == group and state != "Z":
            found.append(int(path.parent.name))
    return found


def wait_until_gone(group: int, seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while left := alive(group):
        assert time.monotonic() < deadline, f"processes {left} outlived the main process by {seconds} s"
        time.sleep(0.05)


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def manifest_of(folder: Path) -> Manifest:
    return Manifest.from_text((folder / FILE_NAME).read_text(), str(folder))


def documents_of(folder: Path, split: str, source: str = "text", dtype: str = "<u2") -> dict[str, list[int]]:
    """What streaming itself reads (it wants compressed shards decompressed beside their index)."""
    place = folder / split / source
    with tempfile.TemporaryDirectory() as copy:
        for path in place.iterdir():
            data = path.read_bytes()
            if path.suffix == ".zstd":
                data = import_streaming("streaming.base.compression").decompress("zstd:7", data)
            (Path(copy) / path.name.removesuffix(".zstd")).write_bytes(data)
        dataset = import_streaming("streaming").LocalDataset(local=copy)
        return {sample["name"]: np.frombuffer(sample["tokens"], dtype).tolist() for sample in dataset}
