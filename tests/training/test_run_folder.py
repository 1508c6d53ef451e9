"""A run's folder belongs to one job, and whatever a kill leaves in it, the next start copes with or explains."""

from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.data.corpus import run_config
from titans_train.errors import UserError
from titans_train.monitoring.metrics import Metrics, read_metrics
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


def test_what_reading_and_a_killed_start_leave_is_no_foreign_folder(plan: Plan) -> None:
    with ExitStack() as held:
        run_folder.own(plan, held)
    (plan.run_directory / "cache").mkdir()
    (plan.run_directory / "plan.json.half").write_text("{")
    run_folder.check(plan)
    (plan.run_directory / "thesis.txt").write_text("precious")
    with pytest.raises(UserError, match="is not empty and not a run"):
        run_folder.check(plan)


def test_a_damaged_plan_is_named_with_the_remedy(plan: Plan) -> None:
    plan.run_directory.mkdir(parents=True)
    run_folder.write(plan)
    run_folder.check(plan)
    record = plan.run_directory / "plan.json"
    record.write_text(record.read_text()[:300])
    with pytest.raises(UserError, match=r"plan\.json is damaged .*; remove it if .*config\.yaml is the run's"):
        run_folder.check(plan)


def test_writing_leaves_whole_files_only(plan: Plan) -> None:
    plan.run_directory.mkdir(parents=True)
    run_folder.write(plan)
    assert sorted(path.name for path in plan.run_directory.iterdir()) == ["config.yaml", "plan.json", "plan.txt"]


def test_a_cut_last_line_of_the_metrics_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 2.5}\n{"step": 2, "loss": 2.25}\n{"step": 3, "lo')
    assert [line["step"] for line in read_metrics(path)] == [1, 2]
    metrics = Metrics(tmp_path, first_step=1, tensorboard=False)
    metrics.write(2, {"loss": 2.125})
    metrics.close()
    assert read_metrics(path) == [{"step": 1, "loss": 2.5}, {"step": 2, "loss": 2.125}]
