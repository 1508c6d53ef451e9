"""Speed of `data_prep` beside its own tokenizer called alone: the same text, batches, cores and number of processes.

The peer has all texts in memory and calls `encode_batch_fast` in a loop, in each of N processes; it reads, checks,
splits, sorts out and writes nothing. Ours is the whole command, from starting Python to the last file. Both take
turns, so that a busy minute of the machine hits both; medians over rounds.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import re
import resource
import shutil
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from data_prep.shards import PRELOAD
from data_prep.units import BATCH_BYTES, BATCH_DOCUMENTS

SUFFIXES = (".py", ".txt", ".md", ".rst", ".pyi")
VOCABULARY = 16_384
TRAINED_ON = 20_000_000  # bytes of text
_COST = re.compile(
    r"([\d.,]+) s, .* ([\d.,]+) s of CPU time; peak memory: main process ([\d,]+) MB, worker ([\d,]+) MB"
)


def installed_texts(limit: int) -> Iterator[str]:
    """Different texts of the running Python and its packages, `limit` bytes of them together at most."""
    seen: set[int] = set()
    paths = sysconfig.get_paths()
    files = (Path(folder, name) for root in (paths["stdlib"], paths["purelib"]) for folder, _, names in os.walk(root)
             for name in sorted(names) if name.endswith(SUFFIXES))  # fmt: skip
    for path in files:
        try:
            text = path.read_text("utf-8")
        except (OSError, UnicodeDecodeError):
            continue
        size = len(text.encode("utf-8"))
        if not text.strip() or hash(text) in seen or size > 2 << 20:
            continue
        seen.add(hash(text))
        limit -= size
        if limit < 0:
            return
        yield text


def batches(texts: Sequence[str]) -> Iterator[list[str]]:
    """As data_prep makes them."""
    batch: list[str] = []
    size = 0
    for text in texts:
        batch.append(text)
        size += len(text.encode("utf-8"))
        if size >= BATCH_BYTES or len(batch) >= BATCH_DOCUMENTS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _encode_alone(corpus: str, tokenizer: str, share: tuple[int, int], barrier: Any, results: Any) -> None:
    """One process of the peer: every N-th text. Puts (begin, end, CPU seconds)."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    import tokenizers

    encoder = tokenizers.Tokenizer.from_file(tokenizer)
    encoder.encode_special_tokens = True  # as data_prep does: it is the same work
    with open(corpus, encoding="utf-8") as stream:
        texts = [json.loads(line)["text"] for number, line in enumerate(stream) if number % share[1] == share[0]]
    own = list(batches(texts))
    barrier.wait()
    begin, cpu = time.monotonic(), time.process_time()
    for batch in own:
        encoder.encode_batch_fast(batch, add_special_tokens=False)
    results.put((begin, time.monotonic(), time.process_time() - cpu))


def tokenizer_alone(corpus: Path, tokenizer: Path, workers: int) -> dict[str, float]:
    """Wall and CPU seconds of the peer."""
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(workers), context.SimpleQueue()
    processes = [
        context.Process(target=_encode_alone, args=(str(corpus), str(tokenizer), (n, workers), barrier, results))
        for n in range(workers)
    ]
    for process in processes:
        process.start()
    spans = [results.get() for _ in processes]
    for process in processes:
        process.join()
    wall = max(end for _, end, _ in spans) - min(begin for begin, _, _ in spans)
    return {"wall": wall, "cpu": sum(cpu for _, _, cpu in spans)}


def whole_command(corpus: Path, tokenizer: Path, workers: int, output: Path) -> dict[str, float]:
    """Wall and CPU seconds of `python -m data_prep`, and peak memory of the main process and of a worker in MB."""
    command = [sys.executable, "-m", "data_prep", "--input", str(corpus), "--output", str(output),
               "--tokenizer", str(tokenizer), "--workers", str(workers)]  # fmt: skip
    begin = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True)
    wall = time.monotonic() - begin
    if done.returncode:
        raise RuntimeError(f"data_prep failed:\n{done.stdout[-1000:]}{done.stderr[-1000:]}")
    cost = _COST.search(done.stdout)
    assert cost is not None, done.stdout
    inside, cpu, main, worker = (float(value.replace(",", "")) for value in cost.groups())
    shutil.rmtree(output)
    return {"wall": wall, "inside": inside, "cpu": cpu, "main_mb": main, "worker_mb": worker}


def preload_seconds() -> float:
    """CPU seconds of the process that shard writers are forked from: the command's own sum is without them."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-c", f"import {PRELOAD}"], check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def prepare_speed(folder: Path, megabytes: int, rounds: int, workers: int | None = None) -> dict[str, Any]:
    """All rounds of both, and the medians; prints the table. Corpus and tokenizer are made below `folder` for the time.

    `megabytes` of text; `workers`: processes, None for one per CPU.
    """
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        found = _measure(Path(temporary), megabytes, rounds, workers or os.cpu_count() or 1)
    print(table(found))
    return found


def _measure(folder: Path, megabytes: int, rounds: int, workers: int) -> dict[str, Any]:
    from data_prep import train_tokenizer

    corpus, tokenizer = folder / "corpus.jsonl", folder / "tokenizer.json"
    size = count = 0
    with corpus.open("w", encoding="utf-8") as stream:
        for text in installed_texts(megabytes * 1_000_000):
            stream.write(json.dumps({"text": text}) + "\n")
            size += len(text.encode("utf-8"))
            count += 1
    options = ["--input", str(corpus), "--output", str(tokenizer), "--vocabulary", str(VOCABULARY)]
    with contextlib.redirect_stdout(sys.stderr):
        if train_tokenizer.main([*options, "--max-bytes", str(TRAINED_ON)]):
            raise RuntimeError("the tokenizer could not be trained; its message is above")
    alone, whole = [], []
    for number in range(rounds):
        alone.append(tokenizer_alone(corpus, tokenizer, workers))
        row = whole_command(corpus, tokenizer, workers, folder / f"out-{number}")
        whole.append({**row, "cpu": row["cpu"] + (preload_seconds() if workers > 1 else 0.0)})
    medians = {
        name: {key: statistics.median(row[key] for row in rows) for key in rows[0]}
        for name, rows in (("alone", alone), ("whole", whole))
    }
    return {
        "text_mb": size / 1e6, "documents": count, "vocabulary": VOCABULARY, "workers": workers,
        "rounds": {"alone": alone, "whole": whole}, "medians": medians,
        "wall_ratio": medians["alone"]["wall"] / medians["whole"]["wall"],
        "cpu_ratio": medians["alone"]["cpu"] / medians["whole"]["cpu"],
    }  # fmt: skip


def table(found: dict[str, Any]) -> str:
    """As Markdown."""
    size, alone, whole = found["text_mb"], found["medians"]["alone"], found["medians"]["whole"]
    lines = [
        f"{size:,.0f} MB of text, {found['documents']:,} documents, byte-level BPE of {found['vocabulary']:,} tokens, "
        f"{found['workers']} processes, medians of {len(found['rounds']['whole'])} rounds", "",
        "| | wall s | MB/s | CPU s | MB per CPU s | peak memory, main / worker |", "|---|---:|---:|---:|---:|---:|",
    ]  # fmt: skip
    memory = f"{whole['main_mb']:,.0f} / {whole['worker_mb']:,.0f} MB"
    for name, row, peak in (("tokenizer alone", alone, ""), ("data_prep", whole, memory)):
        lines.append(
            f"| {name} | {row['wall']:.1f} | {size / row['wall']:.2f} | {row['cpu']:.1f} | {size / row['cpu']:.2f} | "
            f"{peak} |"
        )
    lines.append(f"| share | | {found['wall_ratio']:.2f} | | {found['cpu_ratio']:.2f} | |")
    return "\n".join(lines)
