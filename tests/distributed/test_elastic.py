"""The tokens that reach the model are the same on every layout and over every kill: real processes, real kills.

One run of one process is the reference. Another run is killed (SIGKILL) again and again, in the middle of a shard, at
the end of a source's epoch and at the change of the weights, and goes on each time on other ranks and reader processes.
Compared are hashes of the tensors that `LanguageModel.forward` was given, row by row, of every step.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.data.corpus import LATER, mixed_config, prepare_sources
from tests.s3 import environment as environment_of
from tests.s3 import s3_server, set_environment, upload
from tests.torchrun import ROOT, torchrun
from titans_train.config import RunConfig, dump_config
from titans_train.data import TokenDataset, open_dataset

WORKER = str(Path(__file__).with_name("elastic_worker.py"))
STEPS, BATCH, LENGTH, CHANGE = 24, 4, 256, 17


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    found = prepare_sources(tmp_path_factory.mktemp("sources"))
    shards = sum(len(list(path.glob("train/text/shard.*"))) for path in found.values())
    assert len(found) == 3 and shards >= 20
    return found


def config_of(folders: dict[str, Path], runs: Path, packing: str) -> RunConfig:
    mixed = mixed_config(
        folders, runs, CHANGE, packing=packing, length=LENGTH, micro=1, steps=STEPS, batch=BATCH, seed=5
    )
    changed = mixed.model_dump(mode="json")
    changed["checkpoint"] |= {"every": 1, "asynchronous": False}  # a step that was begun finds the one before saved
    changed["monitoring"] |= {"validation_sequences": 4, "peak_flops": 1e9, "tensorboard": False}
    return RunConfig.model_validate(changed)


def write(config: RunConfig, path: Path) -> Path:
    path.write_text(dump_config(config))
    return path


def run(config: Path, out: Path, ranks: int, kill: int = 0, victim: int = -1, *overrides: str) -> None:
    """Trains to the end, or until it is killed at step `kill`."""
    arguments = [WORKER, str(config), str(out), str(kill), str(victim), *overrides]
    if ranks == 1:
        command = [sys.executable, *arguments]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, env=environment())
    else:
        done = torchrun(ranks, *arguments)
    assert (done.returncode != 0) == (kill > 0), done.stderr[-3000:]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}


def given(out: Path, sequence: int = 1, tensor: int = 1, killed: int = 0) -> dict[int, list[str]]:
    """For each step the hashes of the rows of its global batch, in order, of what the model was given last.

    Ranks come as tensor within sequence within data: tensor ranks were all given the same, and the parts of sequence
    ranks are put together. Step `killed` is left out: it may have reached the models of some ranks only.
    """
    rows: dict[int, dict[int, list[tuple[list[int], list[int], list[bool]]]]] = defaultdict(lambda: defaultdict(list))
    for path in sorted(out.parent.glob(f"{out.name}-*.jsonl")):
        for line in path.read_text().splitlines():
            found = json.loads(line)
            if found["step"] == killed:
                continue
            starts = found["starts"] or [[]] * len(found["tokens"])
            rows[found["step"]][found["rank"]] += zip(found["tokens"], found["labels"], starts, strict=True)
    return {step: _global(ranks, sequence, tensor) for step, ranks in sorted(rows.items())}


def _global(ranks: dict[int, list[tuple[list[int], list[int], list[bool]]]], sequence: int, tensor: int) -> list[str]:
    hashes = []
    for first in range(0, len(ranks), sequence * tensor):
        group = [ranks[first + n] for n in range(sequence * tensor)]
        for n in range(0, len(group), tensor):
            assert all(other == group[n] for other in group[n : n + tensor])
        for parts in zip(*group[::tensor], strict=True):
            joined = [sum(column, []) for column in zip(*parts, strict=True)]
            hashes.append(hashlib.sha256(json.dumps(joined).encode()).hexdigest())
    return hashes


Reference = tuple[RunConfig, dict[int, list[str]]]


@pytest.fixture(scope="module")
def reference(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Reference]:
    """By packing: a config, and what the model of one process was given in an uninterrupted run of it."""

    @functools.cache
    def made(packing: str) -> Reference:
        folder = tmp_path_factory.mktemp(packing)
        config = config_of(folders, folder / "runs", packing)
        run(write(config, folder / "config.yaml"), folder / "out", 1)
        found = given(folder / "out")
        assert list(found) == list(range(1, STEPS + 1)) and all(len(rows) == BATCH for rows in found.values())
        assert len({row for rows in found.values() for row in rows}) > 0.9 * STEPS * BATCH
        return config, found

    return made


def kills(config: RunConfig) -> list[int]:
    """Steps to be killed in: in the middle of a shard, at an epoch's end, at the change of weights, and others."""
    dataset = open_dataset(config)
    assert isinstance(dataset, TokenDataset)
    numbers = [n for n in range(STEPS * BATCH) if dataset.place(n)[1] == dataset.place(n)[0].sequences_total]
    epoch_end = numbers[0] // BATCH + 1  # the step in which a source begins its second epoch
    middle = 4
    stream, place = dataset.place((middle - 1) * BATCH)
    document = int(stream.pieces([place]).document[0])
    borders = set(stream.store.documents_per_shard.cumsum().tolist())
    assert document > 0 and not {document, document + 1} & borders  # neither the first nor the last of its shard
    change = CHANGE + 1
    assert 1 < middle < epoch_end < change < 20
    return [middle, epoch_end, change, 20, 21, 22]  # fewer layouts are killed fewer times


# (ranks, reader processes, sequence shards, tensor ranks), one after the other
LAYOUTS = {
    "concatenate": [(1, 0, 1, 1), (2, 2, 1, 1), (4, 0, 1, 1), (1, 2, 1, 1), (4, 2, 2, 2), (4, 2, 1, 1), (2, 0, 1, 1)],
    "isolate": [(2, 0, 1, 1), (4, 2, 2, 2), (1, 2, 1, 1), (4, 0, 1, 1)],
}


@pytest.mark.parametrize("packing", LAYOUTS)
def test_killed_and_resumed_on_every_layout_the_model_is_given_the_same(
    reference: Callable[[str], Reference], tmp_path: Path, packing: str
) -> None:
    config, expected = reference(packing)
    changed = config.model_copy(update={"run": config.run.model_copy(update={"folder": str(tmp_path / "runs")})})
    path = write(changed, tmp_path / "config.yaml")
    done = 0
    layouts = LAYOUTS[packing]
    ends = [*kills(config)[: len(layouts) - 1], 0]
    for part, ((ranks, workers, sequence, tensor), kill) in enumerate(zip(layouts, ends, strict=True)):
        out = tmp_path / f"out{part}"
        victim = ranks - 1 if part % 2 else -1
        layout = [f"parallel.sequence={sequence}", f"parallel.tensor={tensor}"]
        run(path, out, ranks, kill, victim, f"data.workers={workers}", *layout)
        whole = given(out, sequence, tensor, kill)
        assert whole, f"ranks {ranks}, workers {workers}: no step"
        assert min(whole) == max(done, 1) and max(whole) == (kill - 1 if kill else STEPS)
        for step, rows in whole.items():
            assert rows == expected[step], f"ranks {ranks}, workers {workers}, step {step}"
        done = kill
    assert done == 0


def test_another_batch_size_after_a_resume_reads_every_sequence_once(
    reference: Callable[[str], Reference], tmp_path: Path
) -> None:
    """4 sequences a step, from step 7 on 6."""
    config, expected = reference("concatenate")
    changed = config.model_copy(update={"run": config.run.model_copy(update={"folder": str(tmp_path / "runs")})})
    path = write(changed, tmp_path / "config.yaml")
    run(path, tmp_path / "a", 1, 7)
    run(path, tmp_path / "b", 2, 0, -1, "training.global_batch_size=6", "training.steps=13")
    read = [row for out in ("a", "b") for step, rows in given(tmp_path / out).items() for row in rows]
    assert [len(rows) for rows in given(tmp_path / "b").values()] == [6] * 7
    assert read == [row for rows in expected.values() for row in rows][: 6 * 4 + 7 * 6]
    # The run goes on: weights may be changed for steps to come, and for no other.
    later = config.data.model_copy(update={"weights_from": {"9": LATER}})
    record = tmp_path / "runs" / "test"
    kept = {path.name: path.read_bytes() for path in record.iterdir() if path.is_file()}
    refused = write(changed.model_copy(update={"data": later}), tmp_path / "refused.yaml")
    done = subprocess.run(
        [sys.executable, "-m", "titans_train", "train", str(refused), "training.global_batch_size=6"],
        cwd=ROOT, capture_output=True, text=True, timeout=120, env=environment(),
    )  # fmt: skip
    assert done.returncode == 2 and "weights may change from step 14 on only" in done.stderr, done.stderr[-2000:]
    assert {path.name: path.read_bytes() for path in record.iterdir() if path.is_file()} == kept


def test_a_shard_damaged_on_the_way_ends_all_ranks_with_one_message_that_names_it(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    copies = {name: Path(shutil.copytree(path, tmp_path / name)) for name, path in folders.items()}
    config = config_of(copies, tmp_path / "runs", "concatenate")
    dataset = open_dataset(config)
    assert isinstance(dataset, TokenDataset)
    shards: list[set[tuple[str, int]]] = [set() for _ in range(STEPS)]
    for number in range(STEPS * BATCH):
        stream, place = dataset.place(number)
        ends = stream.store.documents_per_shard.cumsum()
        documents = stream.pieces([place]).document
        shards[number // BATCH] |= {(stream.name, int(n)) for n in ends.searchsorted(documents, side="right")}
    step = next(n for n in range(5, STEPS) if shards[n] - set().union(*shards[:n]))
    name, shard = min(shards[step] - set().union(*shards[:step]))
    (damaged,) = copies[name].glob(f"train/text/shard.{shard:05}.mds*")
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 1
    damaged.write_bytes(content)
    started = time.monotonic()
    path = write(config, tmp_path / "config.yaml")
    done = torchrun(2, WORKER, str(path), str(tmp_path / "out"), "0", "-1", "data.workers=1")
    assert done.returncode != 0 and time.monotonic() - started < 120
    found = re.findall(rf"shard[^\n]*{re.escape(damaged.name)}[^\n]* is damaged: xxh64 \w+, expected \w+", done.stderr)
    assert len(found) == 1, done.stderr
    trained = given(tmp_path / "out")
    assert all(len(rows) == BATCH for rows in list(trained.values())[:step]) and max(trained) <= step + 1
    latest = (tmp_path / "runs" / "test" / "checkpoints" / "latest").read_text()
    assert latest == f"step-{step:08d}"  # nothing that was written is lost


def test_a_run_goes_on_when_its_data_have_moved_to_s3(
    folders: dict[str, Path], reference: Callable[[str], Reference], tmp_path: Path
) -> None:
    config, expected = reference("isolate")
    changed = config.model_copy(update={"run": config.run.model_copy(update={"folder": str(tmp_path / "runs")})})
    path = write(changed, tmp_path / "config.yaml")
    run(path, tmp_path / "a", 1, 4)
    with s3_server() as address, pytest.MonkeyPatch.context() as patch:
        moved = [f"data.sources.{name}.path={upload(address, folder, name)}" for name, folder in folders.items()]
        set_environment(environment_of(address), patch)
        run(path, tmp_path / "b", 2, 0, -1, "data.workers=1", "training.steps=6", "monitoring.sample_every=6", *moved)
    found = given(tmp_path / "a", killed=4) | given(tmp_path / "b")
    assert found == {step: expected[step] for step in range(1, 7)}
