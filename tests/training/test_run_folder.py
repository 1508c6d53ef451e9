"""A run's folder belongs to one job, and whatever a kill leaves in it, the next start copes with or explains."""

import json
import shutil
import threading
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.data.corpus import run_config
from titans_train.config import dump_config
from titans_train.errors import UserError
from titans_train.plan import Plan, make_plan
from titans_train.training import run_folder


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    return make_plan(run_config(Path("data"), tmp_path))


def test_two_jobs_do_not_train_in_one_folder(plan: Plan) -> None:
    with ExitStack() as one:
        run_folder.own(plan, one)
        with ExitStack() as other, pytest.raises(UserError, match="another job trains in .*/test; wait until it ends"):
            run_folder.own(plan, other)
    with ExitStack() as later:
        run_folder.own(plan, later)


def test_a_start_that_slurm_made_again_waits_for_the_lock_of_the_last(
    plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    with ExitStack() as last, ExitStack() as again:
        run_folder.own(plan, last)
        end = threading.Timer(0.3, last.close)
        end.start()
        run_folder.own(plan, again)
        end.join()
    monkeypatch.setattr(run_folder, "OLD_LOCK_SECONDS", 0.1)
    with ExitStack() as one, ExitStack() as other, pytest.raises(UserError, match="another job trains"):
        run_folder.own(plan, one)
        run_folder.own(plan, other)


def test_what_reading_and_a_killed_start_leave_is_no_foreign_folder(plan: Plan) -> None:
    with ExitStack() as held:
        run_folder.own(plan, held)
    (plan.run_directory / "cache").mkdir()
    (plan.run_directory / "plan.json.123.writing").write_text("{")
    run_folder.check(plan)
    (plan.run_directory / "thesis.txt").write_text("precious")
    with pytest.raises(UserError, match="is not empty and not a run"):
        run_folder.check(plan)
    run_folder.write(plan)
    assert not (plan.run_directory / "plan.json.123.writing").exists()


@pytest.mark.parametrize("damage", ["cut", "missing", "folder"])
def test_without_its_plan_a_run_is_known_by_its_config(plan: Plan, damage: str) -> None:
    plan.run_directory.mkdir(parents=True)
    run_folder.write(plan)
    record, copy = plan.run_directory / "plan.json", plan.run_directory / "config.yaml"
    whole = record.read_text()
    record.unlink()
    if damage == "cut":
        record.write_text(whole[:300])
    elif damage == "folder":
        record.mkdir()
    run_folder.check(plan)
    changed = plan.config.optimizer.model_copy(update={"learning_rate": 0.125})
    other = make_plan(plan.config.model_copy(update={"optimizer": changed}))
    with pytest.raises(UserError, match="other settings:\n  - optimizer.learning_rate: .* there, 0.125 here"):
        run_folder.check(other)
    copy.write_text("model: [")
    said = "is missing" if damage == "missing" else r"is damaged \(.*\)"
    with pytest.raises(
        UserError, match=rf"plan\.json {said} and config\.yaml cannot be read [\s\S]*put the run's config"
    ):
        run_folder.check(plan)
    copy.unlink()
    (plan.run_directory / "checkpoints").mkdir()
    with pytest.raises(UserError, match=r"config\.yaml is missing, so nothing says"):
        run_folder.check(plan)
    if damage != "folder":
        copy.write_text(dump_config(plan.config))  # as the error says
        run_folder.check(plan)
        run_folder.write(plan)
        assert record.read_text() == whole


def test_a_summary_is_of_its_steps_and_one_that_cannot_be_written_is_named(plan: Plan) -> None:
    plan.run_directory.mkdir(parents=True)
    path = plan.run_directory / "summary.json"
    assert run_folder.summarised_steps(plan) is None
    for text in ("{", "[]", "{}", '{"steps": "7"}'):
        path.write_text(text)
        assert run_folder.summarised_steps(plan) is None
    run_folder.write_summary(plan, {"steps": 7, "loss": 2.5})
    assert run_folder.summarised_steps(plan) == 7 and json.loads(path.read_text())["loss"] == 2.5
    assert list(plan.run_directory.iterdir()) == [path]
    shutil.rmtree(plan.run_directory)
    with pytest.raises(UserError, match=r"summary\.json cannot be written \(No such file .*saved: free space"):
        run_folder.write_summary(plan, {"steps": 7})


def test_writing_leaves_whole_files_only(plan: Plan) -> None:
    plan.run_directory.mkdir(parents=True)
    run_folder.write(plan)
    assert sorted(path.name for path in plan.run_directory.iterdir()) == ["config.yaml", "plan.json", "plan.txt"]
