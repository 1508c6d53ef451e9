"""The verb `submit`: checks a run against the nodes it asks for, and hands it to SLURM. Imports no torch.

What is submitted is one of the files in slurm/; everything else is in sbatch's options and in variables, and
`--dry-run` prints both as a command that does the same wherever it is run.
"""

from __future__ import annotations

import argparse
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from titans_train.config import ConfigError, Problem, load_config
from titans_train.errors import UserError
from titans_train.plan import Plan, make_plan
from titans_train.training import run_folder

ROOT = Path(__file__).resolve().parents[2]
FILES = {"pretrain": "pretrain.sbatch", "evaluate": "evaluate.sbatch", "prepare": "prepare_data.sbatch"}
TIME = re.compile(r"(?:(?P<days>\d+)-)?(?P<a>\d+)(?::(?P<b>\d+))?(?::(?P<c>\d+))?")
UNLIMITED = ("unlimited", "infinite")
# What a job file reads and the shell of whoever submits may have set for something else: submit states all of it.
CLEARED = (
    "VENV", "PYTHON", "CONTAINER_IMAGE", "CONTAINER_MOUNTS", "CONTAINER_PYTHON", "TITANS_ROOT", "TITANS_CPU",
    "PREFLIGHT", "MAX_RESTARTS", "LOG_DIR", "END_SECONDS", "MASTER_ADDR", "MASTER_PORT", "CUDA_VISIBLE_DEVICES",
    "DS_ACCELERATOR", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "SLURM_RESTART_COUNT",
    "SLURM_NTASKS_PER_NODE", "SLURM_CPUS_PER_TASK", "SLURM_GPUS_ON_NODE", "SRUN_CPUS_PER_TASK",
)  # fmt: skip
KEPT = ("LOG_DIR", "END_SECONDS", "CONTAINER_PYTHON")  # for which there is no option: shown in the command
LEAST_SECONDS = 60  # between a job's start and its notice, if it is to train at all


@dataclass
class Submission:
    """A call of sbatch: variables that its job inherits in place of CLEARED, options, job file and its arguments."""

    variables: dict[str, str] = field(default_factory=dict)
    options: list[str] = field(default_factory=list)
    file: Path = Path()
    arguments: list[str] = field(default_factory=list)

    @property
    def command(self) -> list[str]:
        return ["sbatch", *self.options, str(self.file), *self.arguments]

    @property
    def cleared(self) -> list[str]:
        return [name for name in CLEARED if name not in self.variables]

    def text(self) -> str:
        """As a line for a shell, from any directory."""
        lines = [shlex.join(["env", *(word for name in self.cleared for word in ("-u", name))])]
        lines += [f"{name}={shlex.quote(value)}" for name, value in self.variables.items()]
        lines += ["sbatch", *map(shlex.quote, self.options), shlex.join([str(self.file), *self.arguments])]
        return " \\\n  ".join(lines)


def main(args: Sequence[str]) -> int:
    own, rest = list(args), []
    if "--" in own:
        cut = own.index("--")
        own, rest = own[:cut], own[cut + 1 :]
    options = parser().parse_intermixed_args(own)
    submission, warnings = make_submission(options, rest)
    for warning in warnings:
        print(f"warning: {warning}", file=sys.stderr)
    if options.dry_run:
        print(submission.text())
        return 0
    number = hand_in(submission)
    where = next(o.partition("=")[2] for o in submission.options if o.startswith("--chdir="))
    print(f"submitted job {number} ({submission.file.name}); it writes {where}/*-{number}.out")
    return 0


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(
        prog="python -m titans_train submit",
        usage="%(prog)s CONFIG.yaml [key.path=value ...] [options] [-- more arguments of evaluate or data_prep]",
        description=(__doc__ or "").partition("\n")[0],
    )
    add = result.add_argument
    add("config", nargs="?", metavar="CONFIG.yaml", help="of a run (evaluate: or a run or checkpoint; prepare: none)")
    add("overrides", nargs="*", metavar="key.path=value")
    add("--kind", choices=sorted(FILES), default="pretrain", help="default: pretrain")
    add("--nodes", type=int, metavar="N", help="pretrain only")
    add("--gpus-per-node", type=int, metavar="G", help="one rank for each")
    add("--cpu", action="store_true", help="no GPUs: train on CPUs, with --ranks-per-node")
    add("--ranks-per-node", type=int, metavar="R", help="with --cpu")
    add("--cpus", type=int, metavar="C", help="per rank (prepare: worker processes)")
    add("--partition", metavar="P")
    add("--account", metavar="A")
    add("--time", metavar="T", help="limit, as sbatch takes it: minutes, H:MM:SS, D-HH:MM:SS")
    add("--notice", type=int, default=300, metavar="SECONDS", help="before the limit the run saves; default: 300")
    add("--max-restarts", type=int, default=20, metavar="M", help="default: 20")
    python = result.add_mutually_exclusive_group()
    python.add_argument("--venv", metavar="FOLDER", help="virtual environment (default: the Python that runs this)")
    python.add_argument("--container", metavar="IMAGE", help="for srun --container-image (pyxis)")
    add("--mounts", metavar="A:B,...", help="more of the container's")
    add("--share-nodes", action="store_true", help="do not ask for whole nodes and all their memory; CPU jobs never do")
    add("--no-preflight", action="store_true", help="train at once")
    add("--sbatch", action="append", default=[], metavar="OPTION", help="one more for sbatch: --sbatch=--qos=high")
    add("--dry-run", action="store_true", help="print the command that would be run, and run nothing")
    return result


def make_submission(options: argparse.Namespace, rest: Sequence[str]) -> tuple[Submission, list[str]]:
    """What would be submitted, and warnings. ConfigError and UserError before anything is written."""
    warnings: list[str] = []
    problems = check_options(options, rest)
    if problems:
        raise ConfigError(problems, "the submission")
    result = Submission(file=ROOT / "slurm" / FILES[options.kind])
    result.variables = {
        **{name: os.environ[name] for name in KEPT if os.environ.get(name)},
        "TITANS_ROOT": str(ROOT),
        **python_variables(options),
        "MAX_RESTARTS": str(options.max_restarts),
    }
    if options.cpu:
        result.variables["TITANS_CPU"] = "1"
    result.options = [f"--chdir={Path.cwd()}", "--export=ALL"]
    if options.kind == "pretrain":
        ranks = options.ranks_per_node if options.cpu else options.gpus_per_node
        world = options.nodes * ranks
        plan = make_plan(load_config(options.config, options.overrides, world), world)
        run_folder.check(plan)
        warnings = notices(plan, options.nodes, ranks)
        result.options += [f"--job-name={plan.config.run.name}", f"--nodes={options.nodes}"]
        result.options += [f"--ntasks-per-node={ranks}"]
        if options.no_preflight:
            result.variables["PREFLIGHT"] = "0"
    elif options.kind == "evaluate" and not Path(options.config).is_dir():
        load_config(options.config, options.overrides)
    result.options += resources(options)
    result.arguments = [*([options.config] if options.config else []), *options.overrides, *rest]
    return result, warnings


def check_options(options: argparse.Namespace, rest: Sequence[str]) -> list[Problem]:
    """Everything that is wrong with the options themselves, all at once."""
    found = []
    if options.kind != "prepare" and options.config is None:
        found.append(Problem("CONFIG.yaml", f"{options.kind} needs one", "name a config"))
    if options.kind == "prepare":
        if options.config is not None:
            found.append(Problem(options.config, "prepare takes no config", "write data_prep's arguments after --"))
        if not rest:
            found.append(Problem("--", "prepare needs data_prep's arguments", "write -- --input ... --output ..."))
    if options.kind == "pretrain":
        found += check_ranks(options)
    else:
        for name in ("nodes", "ranks_per_node"):
            if (value := getattr(options, name)) is not None:
                message = f"it is {value}, but {options.kind} runs as one process on one node"
                found.append(Problem(f"--{name.replace('_', '-')}", message, "leave it out"))
    if options.kind == "evaluate" and options.cpu == (options.gpus_per_node is not None):
        both = "there are both" if options.cpu else "there is none"
        found.append(Problem("--gpus-per-node or --cpu", f"{both}; one is needed", "write --gpus-per-node 1 or --cpu"))
    for name in ("cpus", "notice", "max_restarts"):
        value, least = getattr(options, name), 0 if name == "max_restarts" else 1
        if value is not None and value < least:
            found.append(Problem(f"--{name.replace('_', '-')}", f"it is {value}; the least is {least}", "give more"))
    if options.time is not None:
        found += check_time(options.time, options.notice if options.kind != "evaluate" else 0)
    return found


def check_ranks(options: argparse.Namespace) -> list[Problem]:
    found = []
    devices = ("--ranks-per-node", "ranks_per_node") if options.cpu else ("--gpus-per-node", "gpus_per_node")
    for name, key in (("--nodes", "nodes"), devices):
        value = getattr(options, key)
        if value is None or value < 1:
            found.append(Problem(name, f"it is {value}, and at least 1 is needed", f"write {name} N"))
    if options.cpu and options.gpus_per_node is not None:
        found.append(Problem("--gpus-per-node", "--cpu means no GPUs", "leave one of the two out"))
    if not options.cpu and options.ranks_per_node is not None:
        found.append(Problem("--ranks-per-node", "each GPU has one rank", "leave it out, or say --cpu"))
    return found


def check_time(text: str, notice: int) -> list[Problem]:
    seconds = parse_time(text)
    if seconds is None:
        return [Problem("--time", f"{text!r} is no time limit of sbatch's", "write minutes, H:MM:SS or D-HH:MM:SS")]
    if seconds < notice + LEAST_SECONDS:
        remedy = f"give --time at least {notice + LEAST_SECONDS} s, or a shorter --notice"
        return [Problem("--time", f"{seconds} s is too short for a job that saves {notice} s before", remedy)]
    return []


def parse_time(text: str) -> float | None:
    """Seconds of a time limit as sbatch reads it: M, M:S, H:M:S, D-H, D-H:M, D-H:M:S, UNLIMITED; None if it is none."""
    if text.lower() in UNLIMITED:
        return math.inf
    match = TIME.fullmatch(text)
    if match is None:
        return None
    numbers = [int(match[name]) for name in "abc" if match[name] is not None]
    if match["days"] is not None:
        hours, minutes, seconds = [*numbers, 0, 0][:3]
        return ((int(match["days"]) * 24 + hours) * 60 + minutes) * 60 + seconds
    hours, minutes, seconds = {1: [0, *numbers, 0], 2: [0, *numbers], 3: numbers}[len(numbers)]
    return (hours * 60 + minutes) * 60 + seconds


def python_variables(options: argparse.Namespace) -> dict[str, str]:
    """Which Python the job runs. UserError if it is not there."""
    if options.container:
        return {"CONTAINER_IMAGE": options.container} | ({"CONTAINER_MOUNTS": options.mounts} if options.mounts else {})
    if options.mounts:
        raise UserError("--mounts is for --container; leave it out")
    if options.venv is None:
        return {"PYTHON": sys.executable}
    venv = Path(options.venv).absolute()
    if not (venv / "bin" / "python").exists():
        raise UserError(
            f"--venv {options.venv}: there is no {venv / 'bin' / 'python'}; make it on a disk of every node"
        )
    return {"VENV": str(venv)}


def resources(options: argparse.Namespace) -> list[str]:
    given = [f"--{name}={value}" for name in ("partition", "account", "time") if (value := getattr(options, name))]
    if options.kind == "pretrain":
        given.append(f"--signal=B:USR1@{options.notice}")
    if options.cpus:
        given.append(f"--cpus-per-task={options.cpus}")
    if options.gpus_per_node:
        given.append(f"--gpus-per-node={options.gpus_per_node}")
        if not options.share_nodes and options.kind == "pretrain":
            given += ["--exclusive", "--mem=0"]
    return [*given, *options.sbatch]


def notices(plan: Plan, nodes: int, ranks: int) -> list[str]:
    """What works and may not be meant."""
    found, parallel, data = [], plan.config.parallel, plan.config.data
    if nodes > 1 and parallel.tensor > ranks:
        found.append(
            f"parallel.tensor {parallel.tensor} is more than the {ranks} ranks of a node: every layer's messages cross "
            f"the network; a divisor of {ranks} keeps them within"
        )
    elif nodes > 1 and ranks % parallel.tensor:
        found.append(
            f"parallel.tensor {parallel.tensor} does not divide the {ranks} ranks of a node: some groups of tensor "
            "ranks lie on two nodes, and all wait for those"
        )
    paths = [data.path] if data.path else [source.path for source in (data.sources or {}).values()]
    missing = [p for p in paths if "://" not in p and not Path(p, "manifest.json").is_file()]
    if data.source == "shards" and missing:
        found.append(f"no manifest.json is seen from here in {', '.join(missing)}; the nodes must see it")
    return found


def hand_in(submission: Submission) -> str:
    """Runs sbatch; the job's number."""
    if shutil.which("sbatch") is None:
        raise UserError(
            "there is no sbatch on PATH: this is no SLURM cluster's login node; --dry-run shows the command"
        )
    inherited = {name: value for name, value in os.environ.items() if name not in CLEARED}
    environment = inherited | submission.variables
    command = [*submission.command[:1], "--parsable", *submission.command[1:]]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise UserError(f"sbatch refused it: {done.stderr.strip()}\nthe command was\n{submission.text()}")
    return done.stdout.strip().split(";")[0]
