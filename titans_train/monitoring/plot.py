"""loss.png: training and validation loss over tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from data_prep.durable import whole_file


def plot_loss(lines: list[dict[str, Any]], path: Path, title: str) -> None:
    """From the lines of metrics.jsonl. OSError: it cannot be written; a picture that was there is untouched."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4))
    for key, label in (("loss", "training"), ("validation_loss", "validation")):
        points = [(line["tokens"], line[key]) for line in lines if key in line and "tokens" in line]
        if points:
            axes.plot(*zip(*points, strict=True), label=label, marker="o" if key != "loss" else None)
    axes.set(xlabel="tokens", ylabel="loss (nats per token)", title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    try:
        with whole_file(path) as stream:
            figure.savefig(stream, dpi=120, format="png")
    finally:
        pyplot.close(figure)
