"""A signal to any process of a run: all ranks save the same step and ask to be started again, and nothing is lost."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from tests.data.corpus import prepare_folder
from tests.training.ranks import Ranks
from tests.training.worker import plan_of
from titans_train.config import dump_config
from titans_train.monitoring.metrics import read_metrics
from titans_train.monitoring.signals import REQUEUE, caught, received, stopped

STEPS = 14


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("signals")
    plan = plan_of(
        folder, prepare_folder(tmp_path_factory.mktemp("corpus")), "run", 1, 2, data={"workers": 1},
        training={"steps": STEPS}, checkpoint={"every": 1000},
        monitoring={"validate_every": None, "sample_every": None, "tensorboard": False},
    )  # fmt: skip
    path = folder / "config.yaml"
    path.write_text(dump_config(plan.config))
    return path


def steps(run: Path) -> list[tuple[int, float]]:
    return [(line["step"], line["loss"]) for line in read_metrics(run / "metrics.jsonl") if "loss" in line]


def test_any_signal_to_any_process_saves_at_once_and_the_run_goes_on_as_if_never_stopped(
    config: Path, tmp_path: Path
) -> None:
    """To one rank, to all ranks with their reader processes, while the libraries are still being imported."""
    whole, parts = config.parent / "whole", config.parent / "parts"
    command = ("-m", "titans_train", "train", str(config))
    with Ranks(2, tmp_path / "whole", *command, "run.name=whole") as ranks:
        assert ranks.statuses() == [0, 0], ranks.text() + ranks.text(1)
    cases = [(signal.SIGUSR1, [1], False, 2), (signal.SIGTERM, [0, 1], True, 5), (signal.SIGUSR2, [0, 1], True, 8)]
    for number, to, whole_group, step in cases:
        with Ranks(2, tmp_path / f"{number}", *command, "run.name=parts") as ranks:
            ranks.until(lambda step=step: len(steps(parts)) >= step)
            done = len(steps(parts))
            ranks.signal(number, to, whole_group)
            assert ranks.statuses() == [REQUEUE, REQUEUE], ranks.text() + ranks.text(1)
            saved = int((parts / "checkpoints" / "latest").read_text().removeprefix("step-"))
            assert done <= saved == len(steps(parts)) <= done + 2
            assert f"{number.name}: stopped after step {saved}" in ranks.text()
            assert "Traceback" not in ranks.text() + ranks.text(1)
    before = steps(parts)
    with Ranks(2, tmp_path / "early", *command, "run.name=parts") as ranks:
        ranks.until(lambda: all(handles(p.pid, signal.SIGUSR1) for p in ranks.processes))
        ranks.signal(signal.SIGUSR1, [1])
        assert ranks.statuses() == [REQUEUE, REQUEUE], ranks.text() + ranks.text(1)
        assert "SIGUSR1: stopped before the first step" in ranks.text(0) and "stopped" not in ranks.text(1)
    assert steps(parts) == before
    with Ranks(2, tmp_path / "rest", *command, "run.name=parts") as ranks:
        assert ranks.statuses() == [0, 0], ranks.text() + ranks.text(1)
    assert steps(parts) == steps(whole)
    assert [step for step, _ in steps(whole)] == list(range(1, STEPS + 1))


def handles(pid: int, number: int) -> bool:
    lines = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return bool(int(lines["SigCgt"], 16) >> (number - 1) & 1)


def test_the_first_signal_is_remembered_and_further_ones_do_no_harm() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with caught():
        assert received() == 0
        for number in (signal.SIGUSR2, signal.SIGTERM, signal.SIGTERM):
            signal.raise_signal(number)
        assert received() == signal.SIGUSR2
    assert received() == 0 and signal.getsignal(signal.SIGTERM) == before


def test_the_last_line_says_what_is_saved_and_what_is_not() -> None:
    cases = {
        (3, 5, 5): "stopped after step 5, which is saved;",
        (3, 5, 3): "stopped after step 5, the newest checkpoint is of step 3;",
        (0, 5, 0): "stopped after step 5, there is no checkpoint;",
        (5, 5, 5): "stopped before the first step; nothing was trained since step 5, which is saved;",
        (0, 0, 0): "stopped before the first step; this start has trained nothing;",
    }
    for (first, step, saved), line in cases.items():
        assert stopped(signal.SIGTERM, first, step, saved).startswith(f"SIGTERM: {line} exit status 75: ")
