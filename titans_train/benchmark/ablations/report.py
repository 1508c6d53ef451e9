"""The table of the ablations, with means and spreads over seeds and the paper's signs beside ours; and pictures."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from titans_train.benchmark.ablations.run import TIMES, Result
from titans_train.benchmark.ablations.variants import REFERENCE, Variant


def _needles(place: int, figures: dict[str, Any]) -> float:
    return float(figures["needles"][place]["accuracy"])


# column: its task, its figure, and whether more is better
COLUMNS: dict[str, tuple[str, Callable[[dict[str, Any]], float], bool]] = {
    "text, loss": ("text", lambda f: float(f["loss"]), False),
    "recall": ("recall", lambda f: float(f["accuracy"]), True),
    **{f"needles at {n}x": ("needles", partial(_needles, place), True) for place, n in enumerate(TIMES)},
}


def values(results: list[Result], variant: str, column: str) -> list[float]:
    """Of the seeds."""
    return list(by_seed(results, variant, column).values())


def by_seed(results: list[Result], variant: str, column: str) -> dict[int, float]:
    task, figure, _ = COLUMNS[column]
    return {r["seed"]: figure(r["figures"]) for r in results if r["variant"] == variant and r["task"] == task}


def _cases(results: list[Result]) -> int:
    """Needles looked for at a length, in the run that has least."""
    return min(r["figures"]["needles"][0]["cases"] for r in results if r["task"] == "needles")


# Two-sided 95 % quantiles of Student's t, for 1, 2, 3 ... degrees of freedom; beyond them the last
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)


def differences(results: list[Result], variant: str, column: str) -> list[float]:
    """To the reference, seed by seed: runs of one seed read the same text in the same order."""
    ours, reference = (by_seed(results, name, column) for name in (variant, REFERENCE))
    return [ours[seed] - reference[seed] for seed in sorted(ours.keys() & reference.keys())]


def noise(results: list[Result], column: str) -> tuple[float, int]:
    """Variance of a difference from seed to seed, as one over all variants with several, and its degrees of freedom."""
    names = {r["variant"] for r in results} - {REFERENCE}
    groups = [found for name in names if len(found := differences(results, name, column)) > 1]
    groups = [found for found in groups if all(map(math.isfinite, found))]
    freedom = sum(len(found) - 1 for found in groups)
    squares = sum((len(found) - 1) * statistics.variance(found) for found in groups)
    return squares / max(freedom, 1), freedom


def sign(results: list[Result], variant: str, column: str) -> str:
    """+ better than the reference, - worse, = no difference beyond the noise at 95 %, ? no seeds to tell the noise by.

    A t test of the differences seed by seed; the noise of needles is at least a binomial one.
    """
    found, (variance, freedom) = differences(results, variant, column), noise(results, column)
    if not found or not freedom or not all(map(math.isfinite, found)):
        return "?"
    if COLUMNS[column][0] == "needles":
        share = statistics.mean(statistics.mean(values(results, name, column)) for name in (variant, REFERENCE))
        variance = max(variance, 2 * share * (1 - share) / _cases(results))
    mean = statistics.mean(found)
    if abs(mean) <= STUDENT[min(freedom, len(STUDENT)) - 1] * math.sqrt(variance / len(found)):
        return "="
    return "+" if (mean > 0) is COLUMNS[column][2] else "-"


def paper_signs(variant: Variant, reference: Variant | None) -> tuple[str, str]:
    """In perplexity and in the long-context score."""
    if variant.paper is None or reference is None or reference.paper is None:
        return "", ""
    if variant.name == reference.name:
        return "0", "0"
    better = (variant.paper[0] < reference.paper[0], variant.paper[1] > reference.paper[1])
    return "+" if better[0] else "-", "+" if better[1] else "-"


def against(found: list[float]) -> str:
    """Mean and spread of differences."""
    if not found:
        return ""
    return f"{statistics.mean(found):+.4f}" + (f" ± {statistics.stdev(found):.4f}" if len(found) > 1 else "")


def cell(found: list[float], column: str) -> str:
    if not found:
        return ""
    share = COLUMNS[column][0] != "text"
    text = f"{statistics.mean(found):.1%}" if share else f"{statistics.mean(found):.4f}"
    if len(found) > 1:
        spread = statistics.stdev(found)
        text += f" ± {100 * spread:.1f}" if share else f" ± {spread:.4f}"
    return text


def table(results: list[Result], variants: list[Variant]) -> str:
    """Markdown. The signs are against lmm: text loss and needles at 4x, ours and the paper's.

    Means of different seeds are no comparison, since each seed reads other text: "to lmm" is seed by seed.
    """
    columns = [c for c in COLUMNS if any(values(results, v.name, c) for v in variants)]
    text = [c for c in columns if COLUMNS[c][0] == "text"]
    head = ["variant", "parameters", *(f"{c}, to lmm" for c in text), *columns]
    head += ["ours: text, needles", "paper: perplexity, long"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    tasks = sorted({r["task"] for r in results}) or [""]  # parameters are those of the text, if it is among them
    reference = next((v for v in variants if v.name == REFERENCE), None)
    for v in variants:
        sizes = {r["parameters"] for r in results if r["variant"] == v.name and r["task"] == tasks[-1]}
        ours = [sign(results, v.name, c) for c in ("text, loss", "needles at 4x")]
        signs = "" if v.name == REFERENCE else ", ".join(ours)
        theirs = ", ".join(filter(None, paper_signs(v, reference)))
        cells = ["" if v.name == REFERENCE else against(differences(results, v.name, c)) for c in text]
        cells += [cell(values(results, v.name, c), c) for c in columns]
        lines.append("| " + " | ".join([v.name, ", ".join(f"{n:,}" for n in sizes), *cells, signs, theirs]) + " |")
    return "\n".join(lines)


def write_pictures(results: list[Result], variants: list[Variant], folder: Path) -> None:
    """ablations.png: a bar for each variant and column, of text the difference; ablations_needles.png: by length."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    folder.mkdir(parents=True, exist_ok=True)
    shown = [c for c in ("text, loss", "recall", "needles at 4x") if any(values(results, v.name, c) for v in variants)]
    size = (4.5 * len(shown), 0.28 * len(variants) + 1.5)
    figure, all_axes = pyplot.subplots(1, len(shown), figsize=size, squeeze=False)
    for axes, column in zip(all_axes[0], shown, strict=True):
        text = COLUMNS[column][0] == "text"
        of = differences if text else values
        for place, v in enumerate(variants):
            found = of(results, v.name, column)
            if found:
                axes.barh(place, statistics.mean(found), color="tab:blue" if v.name != REFERENCE else "tab:orange")
                axes.plot(found, [place] * len(found), "k.", markersize=4)
        axes.set_yticks(range(len(variants)), [v.name for v in variants] if column == shown[0] else [])
        axes.set_ylim(len(variants) - 0.5, -0.5)
        axes.set_title(f"{column} above that of {REFERENCE}, seed by seed" if text else column)
        if not text:
            axes.set_xlim(0, 1)
        axes.grid(axis="x", alpha=0.3)
    figure.tight_layout()
    figure.savefig(folder / "ablations.png", dpi=120)
    pyplot.close(figure)
    if any(r["task"] == "needles" for r in results):
        _lengths(results, variants, folder / "ablations_needles.png")


def _lengths(results: list[Result], variants: list[Variant], path: Path) -> None:
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5))
    columns = [c for c in COLUMNS if c.startswith("needles")]
    styles = ["-", "--", ":", "-."]
    for place, v in enumerate(variants):
        if values(results, v.name, columns[0]):
            means = [statistics.mean(values(results, v.name, c)) for c in columns]
            axes.plot(TIMES, means, styles[place // 10 % 4], marker=".", label=v.name)
    axes.set(xscale="log", xlabel="text length / training length", ylabel="needles found", ylim=(-0.02, 1.02))
    axes.set_xticks(TIMES, [f"{n}x" for n in TIMES])
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7, ncol=2, bbox_to_anchor=(1.01, 1), loc="upper left")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
