"""`benchmark compare OLD NEW`: what has become faster or slower, larger or smaller, between two files of figures.

For each case and metric in both files the ratio new / old, and whether that is better: more tokens per second,
utilisation and MFU are; less of anything else that is measured is. Ratios between other devices, versions or commands
mean little: what differs is said first.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from titans_train.benchmark.record import Cases, read
from titans_train.errors import UserError

MORE_IS_BETTER = ("tokens_per_second", "utilisation", "mfu")
LESS_IS_BETTER = ("seconds", "seconds_per_token", "mib", "kib", "bytes", "kib_per_token", "flops", "launches", "calls")
EQUAL = 0.005  # of a ratio


@dataclass(frozen=True)
class Change:
    case: str
    metric: str
    old: float
    new: float

    @property
    def ratio(self) -> float | None:
        """new / old; None: there is none."""
        return self.new / self.old if self.old else None

    @property
    def worse(self) -> float | None:
        """By what factor, below 1 where it is better; None: there is no better or worse."""
        more = self.metric in MORE_IS_BETTER
        less = any(self.metric == name or self.metric.endswith(f"_{name}") for name in LESS_IS_BETTER)
        if not (more or less) or self.old < 0 or self.new < 0 or self.old == self.new:
            return None
        over, under = (self.old, self.new) if more else (self.new, self.old)
        return over / under if under else math.inf

    @property
    def verdict(self) -> str:
        factor = self.worse
        if factor is None or (factor and abs(math.log(factor)) < EQUAL):
            return ""
        if factor == 0:
            return "better"
        return f"{factor:.2f}x worse" if factor > 1 else f"{1 / factor:.2f}x better"


def changes(old: Cases, new: Cases) -> list[Change]:
    """Of every metric that both have, in the new file's order."""
    return [
        Change(case, metric, float(old[case][metric]), float(value))
        for case, metrics in new.items()
        if case in old
        for metric, value in metrics.items()
        if _is_number(value) and _is_number(old[case].get(metric))
    ]


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def differences(old: dict[str, Any], new: dict[str, Any]) -> Iterator[str]:
    """Between what two files are about, but for the day."""
    for key in dict.fromkeys([*old, *new]):
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            yield from differences(a, b)
        elif a != b and key != "date":
            yield f"{key}: {'-' if a is None else a} -> {'-' if b is None else b}"


def table(found: list[Change]) -> str:
    lines = ["| case | metric | old | new | new / old | |", "|---" * 6 + "|"]
    for c in found:
        ratio = "" if c.ratio is None else f"{c.ratio:.3f}"
        lines.append(f"| {c.case} | {c.metric} | {c.old:,.6g} | {c.new:,.6g} | {ratio} | {c.verdict} |")
    return "\n".join(lines)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m titans_train benchmark compare", description=__doc__)
    parser.add_argument("old", type=Path, metavar="OLD", help="file that a benchmark's --json wrote")
    parser.add_argument("new", type=Path, metavar="NEW", help="another of the same benchmark")
    parser.add_argument("--fail-over", type=float, metavar="F", help="status 1 if anything is F times worse, or gone")
    options = parser.parse_args(argv)
    if options.fail_over is not None and not options.fail_over >= 1:
        raise UserError(f"--fail-over is {options.fail_over}; it is at least 1, such as 1.5")
    (old_about, old), (new_about, new) = read(options.old), read(options.new)
    found = changes(old, new)
    if not found:
        raise UserError(f"{options.old} and {options.new} have no metric of a case in common; compare one benchmark")
    for line in differences(old_about, new_about):
        print(f"differs in {line}")
    if old_about.get("device") != new_about.get("device"):
        print("the devices differ, or one is not named: ratios between devices say little about the code")
    print(table(found))
    for path, own, other in ((options.old, old, new), (options.new, new, old)):
        if left := only_in(own, other):
            print(f"only in {path}: {'; '.join(left)}")
    limit = options.fail_over
    if limit is None:
        return 0
    wrong = [c for c in found if c.worse is not None and c.worse > limit]
    for c in wrong:
        print(f"more than {limit}x worse: {c.case}, {c.metric}: {c.verdict}")
    return 1 if wrong or only_in(old, new) else 0


def only_in(own: Cases, other: Cases) -> list[str]:
    """Cases, and metrics of cases, that the other lacks."""
    cases = [case for case in own if case not in other]
    both = [case for case in own if case in other]
    return cases + [
        f"{case}, {metric}"
        for case in both
        for metric, value in own[case].items()
        if _is_number(value) and not _is_number(other[case].get(metric))
    ]
