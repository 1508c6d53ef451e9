"""report.md and report.png: what lies in a prepared folder, for people. The same data give the same bytes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_prep.manifest import SPLITS, Manifest

TEXT_NAME, PICTURE_NAME = REPORT_NAMES = ("report.md", "report.png")
_DRAWN = 8  # sources in the picture; the smaller ones are drawn together
_BINS = 60

Lengths = dict[str, NDArray[np.int64]]  # source -> tokens of each document, both splits


def write_report(folder: Path, manifest: Manifest, lengths: Lengths) -> None:
    """Both files, into `folder`."""
    (folder / TEXT_NAME).write_text(_text(manifest, lengths), "utf-8")
    _draw(folder / PICTURE_NAME, lengths)


def _text(manifest: Manifest, lengths: Lengths) -> str:
    report = manifest.report
    lines = [
        "# Prepared data", "",
        f"{manifest.tokenizer.kind} tokenizer, vocabulary {manifest.tokenizer.vocabulary:,}, sha256 "
        f"{manifest.tokenizer.sha256}. Written by titans-train {manifest.tool}. Tokens count one end-of-document "
        "token per document.", "",
        "| split | source | documents | tokens | MB of text | bytes per token | share of tokens | shards | MB stored |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|", *_split_rows(manifest), "",
        "## Tokens per document", "",
        "| source | documents | median | 90 % | 99 % | longest |", "|---|---:|---:|---:|---:|---:|",
        *(f"| {name} | {len(values):,} | {_quantiles(values)} |" for name, values in _with_total(lengths)), "",
        f"![Lengths of documents, tokens per source]({PICTURE_NAME})", "",
        "## Read", "",
        f"{report['files']:,} files of {report['bytes'] / 1e6:,.1f} MB, {report['records']:,} records. "
        f"{report['duplicates']:,} exact duplicates were "
        + ("kept." if manifest.settings["keep_duplicates"] else "left out."), "",
    ]  # fmt: skip
    lines += [f"* source folder `{folder}`: {name}" for folder, name in sorted(report["source_names"].items())]
    if report["source_names"]:
        lines.append("")
    if report["without_source"]:
        field = manifest.settings["source_field"]
        lines += [f"{report['without_source']:,} documents name no source in the field `{field}`.", ""]
    if report["left_out"]:
        lines += [*(f"* left out: {count:,} x {why}" for why, count in sorted(report["left_out"].items())), ""]
    if report["rejected"]:
        lines += ["| rejected | records | first |", "|---|---:|---|"]
        lines += [f"| {why} | {entry['records']:,} | {entry['first']} |" for why, entry in report["rejected"].items()]
    return "\n".join(lines).rstrip() + "\n"


def _split_rows(manifest: Manifest) -> list[str]:
    rows = []
    for split in SPLITS:
        all_tokens = sum(entry.tokens for entry in manifest.splits[split].values())
        for source, entry in manifest.splits[split].items():
            stored = sum(shard.stored.bytes for shard in entry.shards)
            rows.append(
                f"| {split} | {source} | {entry.documents:,} | {entry.tokens:,} | {entry.text_bytes / 1e6:,.2f} | "
                f"{entry.text_bytes / entry.tokens:.2f} | {entry.tokens / all_tokens:.1%} | {len(entry.shards):,} | "
                f"{stored / 1e6:,.2f} |"
            )
    return rows


def _with_total(lengths: Lengths) -> list[tuple[str, NDArray[np.int64]]]:
    named = sorted(lengths.items())
    return named if len(named) == 1 else [*named, ("all", np.concatenate([values for _, values in named]))]


def _quantiles(values: NDArray[np.int64]) -> str:
    found = np.quantile(values, [0.5, 0.9, 0.99, 1.0], method="nearest")
    return " | ".join(f"{int(value):,}" for value in found)


def _draw(path: Path, lengths: Lengths) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    shown = _largest(lengths)
    figure = Figure(figsize=(10, 4), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    longest = max(int(values.max()) for values in shown.values())
    bins = np.geomspace(1, max(longest, 10) + 1, _BINS + 1)
    for name, values in shown.items():
        left.hist(values, bins=bins, histtype="step", label=name, linewidth=1.4)
    left.set(xscale="log", xlabel="tokens per document", ylabel="documents", title="Lengths of documents")
    left.set_xlim(float(bins[0]), float(bins[-1]))
    left.grid(alpha=0.3)
    left.legend(fontsize="small")
    names = list(shown)[::-1]
    colours = [f"C{number}" for number in range(len(names))][::-1]
    right.barh(names, [int(shown[name].sum()) for name in names], color=colours)
    right.set(xlabel="tokens", title="Tokens per source", ylim=(-1, max(len(names), 3)))
    right.xaxis.set_major_formatter(EngFormatter(sep=""))
    right.grid(alpha=0.3, axis="x")
    figure.savefig(path, metadata={"Software": None})


def _largest(lengths: Lengths) -> Lengths:
    """By tokens, largest first; beyond _DRAWN the rest together."""
    order = sorted(lengths, key=lambda name: (-int(lengths[name].sum()), name))
    if len(order) <= _DRAWN:
        return {name: lengths[name] for name in order}
    rest: Sequence[str] = order[_DRAWN - 1 :]
    shown = {name: lengths[name] for name in order[: _DRAWN - 1]}
    return {**shown, f"{len(rest)} smaller ones": np.concatenate([lengths[name] for name in rest])}
