"""python -m titans_train <verb> …: one line per verb, then the verb's own package.

`check` and `plan` run on a login node: they import neither torch nor anything that does. At module level only what is
quick to import: a signal to `train` is caught before the rest is.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING

from titans_train.ending import leave
from titans_train.errors import UserError
from titans_train.monitoring import signals

if TYPE_CHECKING:
    from titans_train.plan import Plan

USAGE = """usage: python -m titans_train <verb> ...

  check     CONFIG.yaml [key.path=value ...] [--world N]    is this config right? every problem at once
  plan      CONFIG.yaml [key.path=value ...] [--world N] [--json]    parameters, FLOPs, memory, disk
  train     CONFIG.yaml [key.path=value ...] [--world N]    under torchrun, or alone; resumes by itself
  submit    -h    hands a training, an evaluation or a preparation of data to SLURM; --dry-run prints the command
  preflight CONFIG.yaml [key.path=value ...] [--world N]    on the nodes of a run, as its ranks: can they train it?
  verify-data PATH|URL    is every byte of prepared data as it was written? and what is in it
  show-data CONFIG.yaml --step N    a global batch in words, as the model sees it
  evaluate  -h    loss, perplexity and bits per byte of a checkpoint
  generate  -h    text from a checkpoint
  export    CHECKPOINT OUT [--dtype float32|bfloat16]    its model in one folder: safetensors, config, tokenizer
  inspect   CHECKPOINT|RUN|EXPORT [--json]    what is inside, parameter by parameter
  benchmark -h    speed and memory, beside peers
"""


def _parser(verb: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"python -m titans_train {verb}")
    parser.add_argument("config", metavar="CONFIG.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value")
    return parser


def _read_plan(verb: str, args: Sequence[str]) -> tuple[argparse.Namespace, Plan]:
    from titans_train.config import load_config
    from titans_train.plan import make_plan

    parser = _parser(verb)
    parser.add_argument("--world", type=int, default=1, metavar="N", help="number of processes (default: 1)")
    if verb == "plan":
        parser.add_argument("--json", action="store_true", help="print the plan as JSON")
    options = parser.parse_intermixed_args(list(args))
    config = load_config(options.config, options.overrides, options.world)
    return options, make_plan(config, options.world)


def check(args: Sequence[str]) -> None:
    from titans_train.plan import processes

    options, checked = _read_plan("check", args)
    size = f"{checked.shape.block}, {checked.parameter_count:,} parameters"
    print(f"{options.config} is right: {size}, {processes(checked.world_size)}")


def plan(args: Sequence[str]) -> None:
    options, planned = _read_plan("plan", args)
    print(json.dumps(planned.to_dict(), indent=2) if options.json else planned.describe())


def train(args: Sequence[str]) -> object:
    from titans_train.config import ConfigError, load_config
    from titans_train.config.errors import Problem
    from titans_train.plan import make_plan

    parser = _parser("train")
    parser.add_argument("--world", type=int, metavar="N", help="refuse any other number of processes (default: any)")
    options = parser.parse_intermixed_args(list(args))
    world_size = _world_size()
    if options.world not in (None, world_size):
        message = f"{options.world} processes were asked for, but {world_size} started (WORLD_SIZE={world_size})"
        remedy = f"start {options.world} (torchrun: --nnodes times --nproc-per-node), or say --world {world_size}"
        raise ConfigError([Problem("--world", message, remedy)], "the start")
    run_plan = make_plan(load_config(options.config, options.overrides, world_size), world_size)
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # read when torch is imported
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if os.path.exists("/dev/nvidia0") else "cpu")
    try:
        from titans_train.training.loop import train as run

        return run(run_plan)
    except signals.Requeue:
        raise
    except BaseException as error:
        if world_size > 1 and not getattr(error, "agreed", False):
            _end_alone(error)
        raise


def _end_alone(error: BaseException) -> None:
    """Of one rank among several: the process ends at once. What it would wait for on its way out may never come.

    The launcher then ends the others.
    """
    if isinstance(error, UserError):
        print(error, file=sys.stderr)
    else:
        traceback.print_exception(error)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(2 if isinstance(error, UserError) else 1)


def evaluate(args: Sequence[str]) -> object:
    from titans_train.evaluation import main as run

    return run(list(args))


def generate(args: Sequence[str]) -> object:
    from titans_train.inference import main as run

    return run(list(args))


def export(args: Sequence[str]) -> object:
    from titans_train.inference.export import main as run

    return run(list(args))


def inspect(args: Sequence[str]) -> object:
    from titans_train.inspection import main as run

    return run(list(args))


def submit(args: Sequence[str]) -> object:
    from titans_train.cluster.submit import main as run

    return run(args)


def preflight(args: Sequence[str]) -> object:
    from titans_train.cluster.preflight import main as run

    return run(args)


def verify_data(args: Sequence[str]) -> object:
    from titans_train.data.verify import main as run

    return run(list(args))


def show_data(args: Sequence[str]) -> object:
    from titans_train.data.show import main as run

    return run(list(args))


def benchmark(args: Sequence[str]) -> object:
    from titans_train.benchmark import main as run

    return run(list(args))


VERBS: dict[str, Callable[[Sequence[str]], object]] = {
    "check": check, "plan": plan, "train": train, "submit": submit, "preflight": preflight,
    "verify-data": verify_data, "show-data": show_data,
    "evaluate": evaluate, "generate": generate, "export": export, "inspect": inspect, "benchmark": benchmark,
}  # fmt: skip


def _world_size() -> int:
    """Number of processes, as torchrun and its like state it in WORLD_SIZE; without it, 1."""
    text = os.environ.get("WORLD_SIZE", "1")
    if not text.isdigit():
        from titans_train.config.errors import ConfigError, Problem

        raise ConfigError([Problem("WORLD_SIZE", f"{text!r} is not a number of processes", "start with torchrun")])
    return int(text)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a verb. Exit status: 0, what the verb returns as an integer, 2 for refused input, 75 to be started again."""
    verb, *args = list(sys.argv[1:] if argv is None else argv) or [""]
    if verb in ("-h", "--help", "help"):
        print(USAGE, end="")
        return 0
    if verb not in VERBS:
        from titans_train.config.errors import closest

        similar = closest(verb, VERBS)
        hint = f"did you mean {similar}?" if similar else "verbs: " + ", ".join(VERBS)
        print(f"{USAGE}\nthere is no verb {verb!r}; {hint}" if verb else USAGE, file=sys.stderr)
        return 2
    try:
        with signals.caught() if verb == "train" else nullcontext():
            result = VERBS[verb](args)
    except signals.Requeue:
        return signals.REQUEUE
    except UserError as error:
        if not error.agreed or os.environ.get("RANK", "0") == "0":  # what all ranks raise, one prints
            print(error, file=sys.stderr, flush=True)
        else:
            time.sleep(2)  # the launcher ends all ranks with the first that leaves: let the one that prints be it
        return 2
    return result if isinstance(result, int) else 0


if __name__ == "__main__":
    leave(main())
