"""The same tokens in the same order on every layout, proven on the tensors a rank receives."""

import hashlib
import multiprocessing
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.data.corpus import mixed_config, run_config
from tests.data.test_shards import flip
from tests.launchers.test_ranks import wait_until
from tests.slurm.cluster import command_line, variable
from titans_train.config.schema import RunConfig
from titans_train.data import Batch, DataError, TokenDataset, loader, open_dataset
from titans_train.plan import make_plan

LAYOUTS = [(ranks, workers) for ranks in (1, 2, 4) for workers in (0, 2)]


def digest(batches: list[Batch]) -> str:
    """Hash of all rows a global batch is made of, in order; micro-batch borders do not count."""
    rows = hashlib.sha256()
    for batch in batches:
        for row in range(len(batch.tokens)):
            rows.update(batch.tokens[row].numpy().tobytes() + batch.labels[row].numpy().tobytes())
            if batch.document_starts is not None:
                rows.update(batch.document_starts[row].numpy().tobytes())
    return rows.hexdigest()


def global_batches(config: RunConfig, ranks: int, start: int = 0, alignment: int = 1) -> list[str]:
    """The hash of each global batch, put together from what each rank's loader gives."""
    plan = make_plan(config, world_size=ranks)
    readers = [loader(open_dataset(config, "train", alignment), plan, rank, start) for rank in range(ranks)]
    return [digest([batch for micro in step for batch in micro]) for step in zip(*readers, strict=True)]


@pytest.fixture(scope="module")
def reference(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    runs = tmp_path_factory.mktemp("runs")
    configs = {p: run_config(prepared, runs, packing=p) for p in ("concatenate", "isolate")}
    return {packing: global_batches(config, 1, alignment=64) for packing, config in configs.items()}


@pytest.mark.parametrize("packing", ["concatenate", "isolate"])
@pytest.mark.parametrize(("ranks", "workers"), LAYOUTS)
def test_global_batches_do_not_depend_on_ranks_and_workers(
    prepared: Path, tmp_path: Path, reference: dict[str, list[str]], packing: str, ranks: int, workers: int
) -> None:
    config = run_config(prepared, tmp_path, packing=packing, workers=workers)
    dataset = open_dataset(config, "train", 64)
    assert dataset.sequences_total < 24 * 8 < 2 * dataset.sequences_total  # an epoch ends on the way
    found = global_batches(config, ranks, alignment=64)
    assert found == reference[packing]
    assert len(set(found)) == len(found) == 24


@pytest.fixture(scope="module")
def mixed(sources: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    config = mixed_config(sources, tmp_path_factory.mktemp("mixed"), packing="isolate", steps=60)
    found = global_batches(config, 1, alignment=64)
    dataset = open_dataset(config, "train", 64)
    assert isinstance(dataset, TokenDataset)
    read = dataset.figures(60 * 8)
    assert read["source_books"]["repeats"] >= 1 and len(set(found)) == 60  # an epoch ends on the way
    return found


@pytest.mark.parametrize(("ranks", "workers"), LAYOUTS)
@pytest.mark.parametrize("start", [0, 9])  # where the weights change
def test_mixed_sources_do_not_depend_on_ranks_workers_and_a_resume(
    sources: dict[str, Path], tmp_path: Path, mixed: list[str], ranks: int, workers: int, start: int
) -> None:
    config = mixed_config(sources, tmp_path, packing="isolate", workers=workers, steps=60)
    assert global_batches(config, ranks, start, alignment=64) == mixed[start:]


def test_sequence_shards_read_their_part_only_and_together_the_whole(sources: dict[str, Path], tmp_path: Path) -> None:
    config = mixed_config(sources, tmp_path, packing="isolate", micro=2)
    quarters = config.model_copy(update={"parallel": config.parallel.model_copy(update={"sequence": 4})})
    whole = loader(open_dataset(config, "train", 32), make_plan(config, 1))
    parts = [loader(open_dataset(config, "train", 32), make_plan(quarters, 4), shard=shard) for shard in range(4)]
    for step in whole:
        for micro, quarter in zip(zip(*[next(part) for part in parts], strict=True), step, strict=True):
            for name in ("tokens", "labels", "document_starts"):
                joined = torch.cat([getattr(part, name) for part in micro], 1)
                assert torch.equal(joined, getattr(quarter, name))


@pytest.mark.parametrize("micro", [1, 4, 8])
def test_global_batches_do_not_depend_on_the_micro_batch(
    prepared: Path, tmp_path: Path, reference: dict[str, list[str]], micro: int
) -> None:
    assert global_batches(run_config(prepared, tmp_path, micro=micro), 1) == reference["concatenate"]


@pytest.mark.parametrize("start", [1, 11, 20, 21, 24])
def test_a_resume_goes_on_with_the_batches_of_the_uninterrupted_run(
    prepared: Path, tmp_path: Path, reference: dict[str, list[str]], start: int
) -> None:
    assert global_batches(run_config(prepared, tmp_path), 2, start) == reference["concatenate"][start:]


def test_a_resume_on_another_layout_goes_on_with_the_same_batches(
    prepared: Path, tmp_path: Path, reference: dict[str, list[str]]
) -> None:
    config = run_config(prepared, tmp_path, packing="isolate", micro=1, workers=2)
    assert global_batches(config, 4, 17, alignment=64) == reference["isolate"][17:]


def test_a_rank_gets_a_contiguous_slice_in_micro_batches(prepared: Path, tmp_path: Path) -> None:
    config = run_config(prepared, tmp_path)
    step = next(loader(open_dataset(config), make_plan(config, world_size=2), data_rank=1, start_step=3))
    assert [batch.sample_ids for batch in step] == [[28, 29], [30, 31]]
    for batch in step:
        assert batch.tokens.shape == batch.labels.shape == (2, 128)
        assert batch.tokens.dtype == batch.labels.dtype == torch.int64
        assert torch.equal(batch.tokens[:, 1:], batch.labels[:, :-1])


@pytest.mark.parametrize("workers", [0, 2])
def test_a_damaged_shard_ends_the_run_with_an_error_that_names_it(prepared: Path, tmp_path: Path, workers: int) -> None:
    folder = Path(shutil.copytree(prepared, tmp_path / "damaged"))
    flip(folder / "train" / "text" / "shard.00002.mds.zstd", 0.5)
    config = run_config(folder, tmp_path, workers=workers)
    with pytest.raises(
        DataError, match=r"^shard .*train/text/shard\.00002\.mds\.zstd is damaged: xxh64 \w+, expected \w+;"
    ):
        list(loader(open_dataset(config), make_plan(config, world_size=1)))


def test_workers_that_open_the_same_shards_at_once_do_not_disturb_each_other(
    prepared: Path, tmp_path: Path, reference: dict[str, list[str]]
) -> None:
    config = run_config(prepared, tmp_path, workers=2)
    for attempt in range(5):
        shutil.rmtree(tmp_path / "test" / "cache", ignore_errors=True)
        assert global_batches(config, 1) == reference["concatenate"], attempt
    assert not list(tmp_path.glob("test/cache/*/train/text/*.zstd"))


def in_a_process(function: str, *args: object) -> list[str]:
    """The lines that a function of tests.data.workers prints; its process must end in time."""
    code = f"from tests.data import workers; workers.{function}(*{tuple(map(str, args))})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=90)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_a_stopped_reader_with_queued_batches_ends_the_run_in_time(prepared: Path, tmp_path: Path) -> None:
    message, seconds = in_a_process("meet_a_stopped_reader", prepared, tmp_path, "go on")
    assert message.startswith("no batch for data.timeout_seconds 8 (reader process ") and "it is stopped" in message
    assert float(seconds) < 14


def test_a_run_ends_while_a_reader_is_stopped(prepared: Path, tmp_path: Path) -> None:
    (seconds,) = in_a_process("meet_a_stopped_reader", prepared, tmp_path, "end")
    assert float(seconds) < 12


def test_a_killed_reader_is_named(prepared: Path, tmp_path: Path) -> None:
    config = run_config(prepared, tmp_path, workers=2, steps=500)
    before = multiprocessing.active_children()
    reading = loader(open_dataset(config), make_plan(config, world_size=1))
    next(reading)
    killed, other = (process for process in multiprocessing.active_children() if process not in before)
    killed.kill()
    began = time.monotonic()
    with pytest.raises(DataError, match=r"a reader process ended \(.*\); was it killed, perhaps for memory\?"):
        list(reading)
    assert time.monotonic() - began < 30
    other.join(5)
    assert not other.is_alive()


def test_no_process_outlives_a_rank_that_is_killed_while_its_readers_start(tmp_path: Path) -> None:
    """The reader is forked, and takes its time to unpickle what it is to read; its own parent ends with the rank."""
    code = "from tests.data import workers; workers.start_a_slow_reader()"

    def marked() -> list[str]:
        """Command lines of the processes with the mark; one that has ended has none."""
        pids = [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]
        return list(filter(None, (command_line(pid) for pid in pids if variable(pid, "TITANS_TEST") == str(tmp_path))))

    rank = subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "TITANS_TEST": str(tmp_path)})
    wait_until(lambda: sum("forkserver" in line for line in marked()) == 2)  # what readers are forked from, and one
    rank.kill()
    rank.wait()
    wait_until(lambda: not marked())


def test_readers_that_cannot_start_are_an_error(prepared: Path, tmp_path: Path) -> None:
    (message,) = in_a_process("fail_to_start_readers", prepared, tmp_path)
    assert "data.workers 2 reader processes cannot start (" in message and "set data.workers to 0" in message


def test_a_batch_that_does_not_divide_is_refused(prepared: Path, tmp_path: Path) -> None:
    config = run_config(prepared, tmp_path)
    plan = make_plan(config, world_size=2)
    with pytest.raises(ValueError, match="data rank 2 is not among the 2"):
        loader(open_dataset(config), plan, data_rank=2)
