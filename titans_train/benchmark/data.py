"""`benchmark data PART`: reading and preparing beside the plainest code that does the same.

read       tokens/s of one reader process, warm and cold, beside numpy on a memory-mapped file of the same tokens
wait       share of a training step that waits for data, of a real run, by its own metrics
start      time to open a data set and to read the first batch, with few and with many shards
resident   memory of a reader process over many batches
prepare    text to shards beside the same tokenizer called alone
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from titans_train.benchmark.data_worker import BATCH, DOCUMENT_BYTES, LENGTH

Row = dict[str, Any]


def prepare_pieces(folder: Path, megabytes: int, shard_size: str) -> Path:
    """The standard library's text in documents of about a thousand bytes, prepared with one token per byte."""
    from data_prep.__main__ import main as prepare

    output, texts = folder / f"shards-{shard_size}-{megabytes}", folder / f"texts-{megabytes}.jsonl"
    if not texts.exists():
        write_pieces(texts, megabytes << 20)
    if not output.exists() and prepare(["--input", str(texts), "--output", str(output), "--shard-size", shard_size]):
        raise RuntimeError(f"preparing {output} failed")
    return output


def write_pieces(path: Path, size: int) -> None:
    import sysconfig

    written = 0
    with path.open("w", encoding="utf-8") as out:
        for source in sorted(Path(sysconfig.get_paths()["stdlib"]).rglob("*.py")):
            text = source.read_text("utf-8", errors="ignore")
            for begin in range(0, len(text), DOCUMENT_BYTES):
                out.write(json.dumps({"text": f"{source.name} {begin}\n{text[begin : begin + DOCUMENT_BYTES]}"}) + "\n")
            written += len(text)
            if written > size:
                return


def worker(what: str, *arguments: object) -> Row:
    """A measurement in a process of its own."""
    command = [sys.executable, "-m", "titans_train.benchmark.data_worker", what, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
    found: Row = json.loads(done.stdout.splitlines()[-1])
    return found


def medians(rows: list[Row]) -> Row:
    return {key: median(row[key] for row in rows) for key in rows[0]}


def read(folder: Path, options: argparse.Namespace) -> Row:
    prepared = prepare_pieces(folder, options.megabytes, "16mb")
    flat = folder / f"flat-{options.megabytes}.bin"
    worker("flatten", prepared, flat)
    warm = medians([worker("warm", prepared, flat, folder / "cache") for _ in range(options.rounds)])
    cold = medians([worker("cold", prepared, flat, folder / f"cold-{n}") for n in range(options.rounds)])
    found = {"warm": warm, "cold": cold}
    print(f"| sequences of {LENGTH}, batches of {BATCH} | ours, M tokens/CPU-s | numpy | ratio | wall: ours | numpy |")
    print("|---|---|---|---|---|---|")
    for name, row in found.items():
        ours, numpy = row["ours"] / 1e6, row["numpy"] / 1e6
        wall = f"{row['ours_wall'] / 1e6:.1f} | {row['numpy_wall'] / 1e6:.1f}"
        print(f"| {name} | {ours:.1f} | {numpy:.1f} | {ours / numpy:.2f} | {wall} |")
    return found


def start(folder: Path, options: argparse.Namespace) -> list[Row]:
    rows = []
    print("| shards | open, s | first batch, no reader process, s | with one, s | again: open, s | first batch, s |")
    print("|---|---|---|---|---|---|")
    for shards in (10, 1000):  # two bytes for a token, a token for a byte; 5 % are in the validation split
        size = f"{max(1900 * options.megabytes // shards, 4)}kb"
        prepared = prepare_pieces(folder, options.megabytes, size)
        caches = [folder / f"start-{size}-{n}" for n in range(options.rounds)]
        first = medians([worker("start", prepared, cache, 0) for cache in caches])
        again = medians([worker("start", prepared, cache, 0) for cache in caches])
        one = medians([worker("start", prepared, folder / f"one-{size}-{n}", 1) for n in range(options.rounds)])
        row = {"first": first, "again": again, "reader": one}
        rows.append(row)
        print(
            f"| {first['shards']:,} | {first['open']:.2f} | {first['batch']:.2f} | {one['batch']:.2f} | "
            f"{again['open']:.2f} | {again['batch']:.2f} |"
        )
    return rows


def resident(folder: Path, options: argparse.Namespace) -> Row:
    prepared = prepare_pieces(folder, options.megabytes, "1mb")
    row = worker("resident", prepared, folder / "cache", options.batches)
    points = row["resident_mib"]
    print(f"{row['batches']:,} batches, {row['epochs']:.1f} epochs, {row['shards']} shards: resident MiB")
    print("  " + ", ".join(f"{at:,}: {mib:.0f}" for at, mib in points))
    half = [mib for at, mib in points if at >= row["batches"] / 2]
    print(f"  second half: {min(half):.1f} to {max(half):.1f}")
    return row


def wait(folder: Path, options: argparse.Namespace) -> Row:
    """A run of the config, two processes with a reader each; needs its data prepared."""
    rows = []
    for number in range(options.rounds):
        settings = [f"run.folder={folder}", f"run.name=wait-{number}", "training.steps=40", "optimizer.warmup_steps=4"]
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        command += ["-m", "titans_train", "train", options.config, *settings]
        subprocess.run(command, check=True, capture_output=True)
        lines = (folder / f"wait-{number}" / "metrics.jsonl").read_text().splitlines()
        logged = [found for line in lines if "data_wait" in (found := json.loads(line))][1:]  # the first step apart
        rows.append({key: median(row[key] for row in logged) for key in ("data_wait", "tokens_per_second")})
    found = medians(rows)
    share, speed = found["data_wait"], found["tokens_per_second"]
    print(f"{options.config}: {share:.3%} of a step waits for data, {speed:,.0f} tokens/s")
    return found


def prepare(folder: Path, options: argparse.Namespace) -> Any:
    from titans_train.benchmark.data_prepare import prepare_speed

    return prepare_speed(folder, options.megabytes, options.rounds)


PARTS: dict[str, Callable[[Path, argparse.Namespace], Any]] = {
    "read": read, "wait": wait, "start": start, "resident": resident, "prepare": prepare,
}  # fmt: skip


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m titans_train benchmark data",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--megabytes", type=int, default=64, help="of text (default: 64)")
    parser.add_argument("--batches", type=int, default=100_000, help="resident: how many (default: 100,000)")
    parser.add_argument("--rounds", type=int, default=3, help="medians are over so many (default: 3)")
    parser.add_argument("--config", default="configs/quickstart.yaml", help="wait: the run config")
    parser.add_argument("--folder", type=Path, help="keep prepared data here (default: a temporary folder)")
    parser.add_argument("--json", type=Path, help="file in which the part's figures are kept beside other parts'")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        found = PARTS[options.part](folder, options)
    if options.json:
        kept = json.loads(options.json.read_text()) if options.json.exists() else {}
        options.json.write_text(json.dumps({**kept, options.part: found}, indent=1) + "\n")
    return 0
