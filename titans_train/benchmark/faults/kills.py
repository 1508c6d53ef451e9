"""Ranks that the kernel kills: at any moment, and at every stage of a save and of a load."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from titans_train.benchmark.faults.lab import Lab, dice
from titans_train.benchmark.faults.run import EVERY, FIRST, LAYOUTS, RANKS, STEPS
from titans_train.benchmark.faults.trial import Trial

_SAVED = 3 * EVERY  # the third save: it removes the first checkpoint, too
_LONGEST_STEP = 0.15  # seconds
Events = list[dict[str, str]]


def random_kills(lab: Lab) -> Iterator[Trial]:
    """A random rank, at a random moment of a random step; the layouts take turns."""
    layouts = list(LAYOUTS)
    for seed in range(lab.seeds):
        chance, layout = dice("kill", seed), layouts[seed % len(layouts)]
        rank, step, pause = chance.randrange(RANKS), chance.randrange(STEPS - 1), chance.random() * _LONGEST_STEP
        if not step:  # while it starts
            pause *= 30
        where = f"after step {step}" if step else "after its start"
        case = f"{layout}: rank {rank}, {pause * 1000:.0f} ms {where}"
        yield lab.attempt(case, partial(_kill, lab, layout, case, step, rank, pause))


def _kill(lab: Lab, layout: str, case: str, step: int, rank: int, pause: float) -> Trial:
    lab.reference(layout)
    trial = lab.new_run("kill", layout)
    job = lab.start(trial)
    job.wait_for(lambda: len(job.ranks()) == RANKS)
    if step:
        job.wait_logged(trial.folder, step)
    victim = job.rank(rank)
    time.sleep(pause)
    return lab.outcome(trial, case, job.signal(signal.SIGKILL, victim), statuses=[137])


def spread(events: Sequence[Any], count: int) -> list[int]:
    """Numbers of at most `count` events, evenly spread, the first and the last among them."""
    if len(events) <= count:
        return list(range(len(events)))
    return sorted({round(n * (len(events) - 1) / (count - 1)) for n in range(count)})


def before(events: Events, step: int) -> Events:
    """Those before the first that names a step's checkpoint."""
    return events[: next((n for n, event in enumerate(events) if f"{step:08d}" in event["path"]), len(events))]


def of_the_save(lab: Lab, layout: str, rank: int) -> Events:
    """What a rank does to files in the third save, in order."""
    events = lab.reference(layout, "checkpoint.keep=2").files[rank]
    return before(events, _SAVED + EVERY)[len(before(events, _SAVED)) :]


def saves(lab: Lab) -> Iterator[Trial]:
    """At each thing that the first rank or the other does to a file while it saves: it alone, or all at once."""
    cases: list[tuple[str, int, int]] = []
    for layout in [FIRST, "tensor 2"][: 1 if lab.quick else 2]:
        for rank in range(RANKS):
            numbers = spread(of_the_save(lab, layout, rank), (16 if layout == FIRST else 4) if rank == 0 else 3)
            cases += [(layout, rank, number) for number in numbers]
    if lab.quick:
        cases = cases[len(cases) // 3 :][:1]
    for turn, (layout, rank, number) in enumerate(cases):
        events, everyone = of_the_save(lab, layout, rank), turn % 2 == 0
        die = {"after": f"{_SAVED:08d}", "rank": rank, "number": number, "all": everyone}
        case = f"{layout}: rank {rank}, {_described(events, number, everyone)}"
        yield lab.attempt(case, partial(_struck, lab, "save", layout, case, die, None))


def loads(lab: Lab) -> Iterator[Trial]:
    """At what the ranks do to files while they resume from a checkpoint."""
    probe = lab.new_run("load", FIRST, "data.workers=0", start=lab.base())
    job = lab.start(probe, {})
    job.wait_logged(probe.folder, 2 * EVERY + 2)
    reading = {rank: before(lab.notes(job, "files", rank), _SAVED) for rank in range(RANKS)}
    job.kill()
    cases = [(rank, number) for rank in range(RANKS) for number in spread(reading[rank], 6)]
    if lab.quick:
        cases = cases[len(cases) // 2 :][:1]
    for turn, (rank, number) in enumerate(cases):
        everyone = turn % 2 == 1
        die = {"rank": rank, "number": number, "all": everyone}
        case = f"{FIRST}: rank {rank}, {_described(reading[rank], number, everyone)}"
        yield lab.attempt(case, partial(_struck, lab, "load", FIRST, case, die, lab.base()))


def _described(events: Events, number: int, everyone: bool) -> str:
    event = events[number]
    who = "all die" if everyone else "it dies"
    return f"{number + 1} of {len(events)}, before {event['event']} {event['path']}: {who}"


def _struck(lab: Lab, name: str, layout: str, case: str, die: dict[str, Any], start: Path | None) -> Trial:
    """The moment is when a rank or the launcher is first seen to be gone."""
    trial = lab.new_run(name, layout, "data.workers=0", start=start)
    job = lab.start(trial, {"die": die})
    job.wait_for(lambda: len(job.ranks()) == RANKS)
    job.wait_for(lambda: len(job.ranks()) < RANKS)
    return lab.outcome(trial, case, time.monotonic(), statuses=[137])
