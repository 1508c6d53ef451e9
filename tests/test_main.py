"""The command line: verbs, exit statuses, and that login nodes need neither torch nor patience."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from titans_train.__main__ import VERBS, main

ROOT = Path(__file__).parent.parent
QUICKSTART = str(ROOT / "configs" / "quickstart.yaml")

HEAVY_MODULES = """
import sys
from titans_train.__main__ import main
status = main(sys.argv[1:])
heavy = {"torch", "megatron", "deepspeed", "streaming", "transformers", "numpy"} & set(sys.modules)
sys.exit(f"imported {heavy}" if heavy else status)
"""


def run(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *args], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize("verb", ["check", "plan"])
def test_check_and_plan_import_nothing_heavy_and_take_less_than_2_cpu_seconds(verb: str) -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    result = run("-c", HEAVY_MODULES, verb, QUICKSTART, "training.steps=50", "--world", "2")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert result.returncode == 0, result.stderr
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 2


def test_nothing_slow_is_imported_before_a_signal_to_train_is_caught() -> None:
    slow = "{'pydantic', 'yaml', 'titans_train.config', 'titans_train.plan', 'torch'} & set(sys.modules)"
    seen = f"lambda args: print(signal.getsignal(signal.SIGTERM) != signal.SIG_DFL, {slow} or 'none')"
    code = f"import signal, sys, titans_train.__main__ as m; m.VERBS['train'] = {seen}; m.main(['train'])"
    assert run("-c", code).stdout == "True none\n"


def test_python_m_refuses_a_config_with_status_2_and_every_problem() -> None:
    result = run("-m", "titans_train", "check", QUICKSTART, "model.heads=5", "model.blok=mag")
    assert result.returncode == 2
    assert result.stdout == ""
    assert "2 problems" in result.stderr
    assert "Traceback" not in result.stderr


def test_check_says_what_was_checked(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", QUICKSTART]) == 0
    out = capsys.readouterr().out
    assert "quickstart.yaml is right: mag" in out
    assert "1 process" in out


def test_plan_prints_text_or_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", QUICKSTART]) == 0
    assert "memory per process" in capsys.readouterr().out
    assert main(["plan", QUICKSTART, "--json", "training.steps=70", "--world", "2"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert (data["config"]["training"]["steps"], data["mesh"]["world_size"]) == (70, 2)


@pytest.mark.parametrize("verb", ["check", "plan"])
def test_a_world_that_does_not_fit_is_refused(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([verb, QUICKSTART, "--world", "3"]) == 2
    assert "3 data-parallel ranks" in capsys.readouterr().err


@pytest.mark.parametrize("world", ["3", "two"])
def test_train_refuses_a_world_before_anything_starts(
    world: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", world)
    monkeypatch.chdir(tmp_path)
    assert main(["train", QUICKSTART]) == 2
    assert world in capsys.readouterr().err
    assert os.listdir(tmp_path) == []


def test_an_unknown_verb_is_refused_with_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["trian", QUICKSTART]) == 2
    assert "did you mean train?" in capsys.readouterr().err


def test_no_verb_is_refused_and_help_lists_all(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert main(["--help"]) == 0
    usage = capsys.readouterr().out
    assert all(verb in usage for verb in VERBS)


def test_a_missing_config_argument_is_refused() -> None:
    with pytest.raises(SystemExit) as raised:
        main(["check"])
    assert raised.value.code == 2
