"""What a fault did to a run, and the table of all of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median


@dataclass(frozen=True)
class Trial:
    case: str  # where and when the fault was injected
    survived: bool  # every later loss equals the uninterrupted run's, and what the row promises beside it
    steps_lost: int | None = None  # trained a second time; None: no training
    seconds: float | None = None  # from the fault until no process was left, or until it was named; None: no end
    note: str = ""
    partial: int = 0  # checkpoints that were resumed from and were not whole
    tokens: int = 0  # tokens that the model was given, where they were noted
    wrong_tokens: int = 0  # of these, others than in the uninterrupted run


@dataclass
class Row:
    name: str
    text: str
    trials: list[Trial] = field(default_factory=list)
    absent: str = ""  # why there are none, or no more
    excused: bool = False  # that there are none: this machine cannot do what the row needs
    seconds: float = 0.0  # that the row took

    @property
    def survived(self) -> int:
        return sum(trial.survived for trial in self.trials)

    @property
    def kept(self) -> bool:
        """Whether every trial was survived, and there were some or could be none."""
        return self.survived == len(self.trials) and (bool(self.trials) or self.excused)


HEAD = (
    "| fault | trials | survived | steps lost: mean, most | seconds to detect: median, most |",
    "|---|---|---|---|---|",
)


def _line(row: Row) -> str:
    lost = [trial.steps_lost for trial in row.trials if trial.steps_lost is not None]
    seconds = [trial.seconds for trial in row.trials if trial.seconds is not None]
    steps = f"{sum(lost) / len(lost):.1f}, {max(lost)}" if lost else ""
    times = f"{median(seconds):.1f}, {max(seconds):.1f}" if seconds else ""
    return f"| {row.text} | {len(row.trials)} | {row.survived} | {steps} | {times} |"


def _short(note: str) -> str:
    """One line; a traceback's first and last."""
    lines = [line.strip() for line in note.splitlines() if line.strip()] or ["other losses"]
    return lines[0] if len(lines) == 1 else f"{lines[0]} … {lines[-1]}"


def table(rows: Sequence[Row]) -> str:
    """Markdown: a line for each fault, the totals, then what did not survive or was not tried, and why."""
    lines = [*HEAD, *map(_line, rows)]
    trials = [trial for row in rows for trial in row.trials]
    survived = sum(trial.survived for trial in trials)
    tokens, wrong = sum(trial.tokens for trial in trials), sum(trial.wrong_tokens for trial in trials)
    lines += [
        f"| **all** | {len(trials)} | {survived} | | |",
        "",
        f"Partial checkpoints accepted: {sum(trial.partial for trial in trials)}. "
        f"Wrong tokens: {wrong:,} of {tokens:,} that were compared.",
    ]
    fell = [f"* {row.text}: {t.case}: {_short(t.note)}" for row in rows for t in row.trials if not t.survived]
    fell += [f"* {row.text}: not tried: {row.absent}" for row in rows if row.absent]
    return "\n".join([*lines, *(["", "What falls short:", *fell] if fell else [])])
