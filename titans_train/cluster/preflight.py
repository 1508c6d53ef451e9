"""The verb `preflight`: looks at the nodes of a run, as its ranks, and lists all that is found at once.

Started as the training is (srun, launchers/ranks.py, torchrun; alone for one process). Exit status 2 if anything is an
error. It ends in bounded time whatever hangs: a rank that does not answer is named.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from titans_train.cluster import findings
from titans_train.cluster.facts import Facts, gather_facts, marker, sees
from titans_train.cluster.findings import ERROR, WARNING, Finding
from titans_train.config import ConfigError, Problem, load_config
from titans_train.errors import UserError
from titans_train.plan import Plan, make_plan, processes

if TYPE_CHECKING:
    from titans_train.parallel.fabric import Meeting

CLOCK_ROUNDS = 3
LONGEST = 86400.0  # seconds that a rank waits for another


def main(args: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m titans_train preflight", description=__doc__)
    parser.add_argument("config", metavar="CONFIG.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value")
    parser.add_argument("--world", type=int, metavar="N", help="refuse any other number of processes")
    parser.add_argument("--seconds", type=float, default=120, help="how long a rank waits for another; default: 120")
    parser.add_argument("--least-within", type=float, metavar="GB/S", help="all-reduce within nodes; less is an error")
    parser.add_argument("--least-between", type=float, metavar="GB/S", help="between nodes; less is an error")
    options = parser.parse_intermixed_args(list(args))
    if not 0 < options.seconds <= LONGEST:
        raise ConfigError(
            [
                Problem(
                    "--seconds",
                    f"it is {options.seconds:g}; more than 0 and at most {LONGEST:g} can be waited",
                    "leave it out",
                )
            ],
            "the preflight",
        )
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if options.world not in (None, world):
        remedy = f"start {options.world}, or say --world {world}"
        raise ConfigError([Problem("--world", f"{options.world} were asked for, {world} started", remedy)], "the start")
    plan = make_plan(load_config(options.config, options.overrides, world), world)
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    faulthandler.dump_traceback_later(5 * options.seconds + 30, exit=True)  # needs nothing that could hang
    try:
        return look(plan, options)
    finally:
        faulthandler.cancel_dump_traceback_later()


def look(plan: Plan, options: argparse.Namespace) -> int:
    from titans_train.parallel.fabric import Meeting, bandwidths

    least = {"within": options.least_within, "between": options.least_between}
    demanded = {subject: rate * 1e9 for subject, rate in least.items() if rate is not None}
    with ends_by(options.seconds, lambda: print(f"preflight: this rank, {_me()}, hung while meeting", file=sys.stderr)):
        meeting = Meeting(options.seconds)
        meeting.say_where(socket.gethostname())
    try:
        with ends_by(2 * options.seconds, lambda: _say_hung("looking at its device, disk and data")):
            facts, found = facts_and_findings(plan, meeting)
        if not any(each.level == ERROR and each.subject == "devices" for each in found):  # else it would only hang
            hung = [*found, _hung(options.seconds)]
            with ends_by(options.seconds, lambda: report(plan, facts, hung, meeting.is_first)):
                rates = bandwidths(meeting, [fact.host for fact in facts])
            words = meeting.exchange("bandwidths", json.dumps(rates))
            found += findings.fabric([json.loads(word) for word in words], facts, demanded)
    except UserError as error:
        if meeting.is_first:  # the others would say the same
            print(f"preflight: {error}\n  -> drain that node, or look at its network and its log", file=sys.stderr)
        return 2
    report(plan, facts, found, meeting.is_first)
    meeting.leave()
    return 2 if any(each.level == ERROR for each in found) else 0


def facts_and_findings(plan: Plan, meeting: Meeting) -> tuple[list[Facts], list[Finding]]:
    """Of all ranks, on every rank. Collective."""
    mine = gather_facts(plan, meeting.rank, meeting.local_rank)
    facts = [Facts.from_json(word) for word in meeting.exchange("facts", json.dumps(mine, default=vars))]
    word = meeting.exchange("marker", os.urandom(8).hex())[0]
    shared = marker(plan, word)
    if meeting.is_first:
        with suppress(OSError):
            shared.touch()
    ahead = clocks(meeting)  # and so the file is there before anyone looks
    seen = [word == "yes" for word in meeting.exchange("seen", "yes" if meeting.local_rank or sees(shared) else "no")]
    if meeting.is_first:
        with suppress(OSError):
            shared.unlink(missing_ok=True)
    return facts, findings.judge(plan, facts, seen, ahead)


def clocks(meeting: Meeting) -> list[float]:
    """Seconds that each rank's clock is ahead of rank 0's, less what the word took; the best of some rounds."""
    best = float("inf")
    for attempt in range(CLOCK_ROUNDS):
        meeting.exchange(f"ready {attempt}", "")
        if meeting.is_first:
            meeting.store.set(f"time {attempt}", repr(time.time()))
        ahead = time.time() - float(meeting.store.get(f"time {attempt}"))
        best = min(best, ahead, key=abs)
    return [float(word) for word in meeting.exchange("clock", repr(0.0 if meeting.is_first else best))]


def report(plan: Plan, facts: Sequence[Facts], found: Sequence[Finding], is_first: bool) -> None:
    if not is_first:
        return
    hosts = findings.nodes(facts)
    where = f"{len(hosts)} node{'s' * (len(hosts) > 1)} ({', '.join(hosts[:8])}{', ...' * (len(hosts) > 8)})"
    lines = [f"preflight of {plan.config.run.name}: {processes(plan.world_size)} on {where}"]
    lines += map(str, found)
    counts = {level: sum(each.level == level for each in found) for level in (ERROR, WARNING)}
    lines.append("preflight: " + ", ".join(f"{n} {level}{'s' * (n != 1)}" for level, n in counts.items()))
    print("\n".join(lines), flush=True)


@contextmanager
def ends_by(seconds: float, say: Callable[[], None]) -> Iterator[None]:
    """Within, a process that has not come out after `seconds` says so and ends with status 2, whatever it waits in."""

    def end() -> None:
        say()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(2)

    timer = threading.Timer(seconds + 5, end)  # after the waits that name the missing
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _me() -> str:
    return f"rank {os.environ.get('RANK', '0')} on {socket.gethostname()}"


def _say_hung(where: str) -> None:
    print(f"preflight: {_me()} hung while {where}; drain the node, or look at its file systems", file=sys.stderr)


def _hung(seconds: float) -> Finding:
    text = f"none within {seconds:g} s, though every rank answers over TCP: the fabric between the devices hangs"
    remedy = "open all ports between the nodes; NCCL_SOCKET_IFNAME or GLOO_SOCKET_IFNAME name the network's interface"
    return Finding(ERROR, "all-reduce", text, remedy)
