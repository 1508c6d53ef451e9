"""Pictures of a memory at work: one PNG with all panels, and single figures for TensorBoard."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data_prep.durable import whole_file
from titans_train.errors import UserError
from titans_train.evaluation.introspection import Introspection
from titans_train.memory.watch import CHUNK_SERIES

MARKS = 10  # tokens named above the heat map
DRAWN = 200  # points of a line, at most: gates change from token to token, and lines would hide each other
GATES = {"alpha": "alpha, forgetting", "eta": "eta, momentum", "theta": "theta, step size"}
NORMS = {"weight_norm": "norm of the weights", "momentum_norm": "norm of the momentum"}
NORMS |= {"distance": "distance from the text's start"}
BANDS = 4  # layers at most, of which the range over heads is shown
NAMED = 8  # layers at most in a legend

Text = Callable[[list[int]], str]


def visible(text: str) -> str:
    """Of what a text holds, nothing that moves a cursor or breaks a line."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def in_context(found: Introspection, place: int, text_of: Text, width: int = 10) -> str:
    """The token there, in brackets, after the end of what stands before it."""
    tokens = found.tokens[max(place - width, 0) : place + 1].tolist()
    before = visible(text_of(tokens[:-1]))[-width:].lstrip()
    return f"{before}[{visible(text_of(tokens[-1:]))[:width]}]"


def draw_surprise(figure: Any, axes: Any, found: Introspection, text_of: Text) -> None:
    """Layer by position, each layer relative to its own mean; the most surprising tokens by their text."""
    values = torch.stack([layer["surprise"][:, 0] for layer in found.layers])
    means = values.mean(1, keepdim=True)
    relative, count = values / means.clamp(min=1e-30), len(found.tokens)
    top = max(float(relative.nan_to_num(0, 0, 0).quantile(0.995)), 1.0)
    layers = len(values)
    image = axes.imshow(
        relative.numpy(), aspect="auto", origin="lower", cmap="magma", vmin=0, vmax=top, interpolation="nearest",
        extent=(0, len(relative[0]) * found.tokens_per_point, -0.5, layers - 0.5),
    )  # fmt: skip
    figure.colorbar(image, ax=axes, label="surprise / mean of the layer", pad=0.01, extend="max")
    shown = range(0, layers, max(1, -(-layers // 12)))
    axes.set_yticks(list(shown), [f"{n} (mean {float(means[n]):.3g})" for n in shown])
    axes.set(xlabel="position, tokens", ylabel="layer", xlim=(0, count))
    places = sorted(found.most_surprising(MARKS))
    for slot, place in enumerate(places):
        axes.annotate(
            in_context(found, place, text_of), (place + 0.5, layers - 0.5),
            ((slot + 0.25) / len(places), 1.12), textcoords="axes fraction", fontsize=7.5, family="monospace",
            rotation=30, ha="left", va="bottom", annotation_clip=False, parse_math=False,
            arrowprops={"arrowstyle": "-", "lw": 0.7, "color": "0.4", "relpos": (0, 0), "shrinkA": 0, "shrinkB": 0},
        )  # fmt: skip
    axes.set_title("Surprise over the text, and its most surprising tokens", loc="left", pad=86, fontweight="bold")


def draw_series(all_axes: Any, found: Introspection, names: dict[str, str], title: str) -> None:
    """One panel for each series, one line for each layer; with few layers also the range over heads."""
    from matplotlib import colormaps

    colours = colormaps["viridis"].resampled(max(len(found.layers), 2))
    named = set(range(0, len(found.layers), max(1, -(-len(found.layers) // NAMED))))
    for axes, (name, label) in zip(all_axes, names.items(), strict=True):
        for n, layer in enumerate(found.layers):
            values, at = coarse(layer[name]), coarse(positions(found, name))
            marker = "." if len(at) == 1 else None
            legend = f"layer {n}" if n in named else None
            axes.plot(at, values[:, 0], color=colours(n), lw=1.1, label=legend, marker=marker)
            if len(found.layers) <= BANDS:
                axes.fill_between(at, values[:, 1], values[:, 2], color=colours(n), alpha=0.13, lw=0)
        axes.set(xlabel="position, tokens", ylabel=label, xlim=(0, len(found.tokens)))
        axes.locator_params(axis="x", nbins=5)
        axes.grid(alpha=0.3)
    all_axes[0].set_title(title, loc="left", fontweight="bold")
    all_axes[-1].legend(fontsize=8)


def coarse(points: Tensor) -> Tensor:
    """Means of neighbouring points, [n, ...] -> [DRAWN at most, ...]."""
    each = max(1, -(-len(points) // DRAWN))
    return torch.stack([part.mean(0) for part in points.split(each)]) if len(points) else points


def positions(found: Introspection, name: str) -> Tensor:
    """Where the points of a series stand: the middle of their tokens, or of the ends of their chunks."""
    index = torch.arange(len(found.layers[0][name]), dtype=torch.float64)
    if name in CHUNK_SERIES:
        return (index * found.chunks_per_point + (found.chunks_per_point + 1) / 2) * found.chunk_size
    return (index + 0.5) * found.tokens_per_point


def draw_loss(axes: Any, missed: Any, found: Introspection, text_of: Text) -> None:
    """Loss by position with the memory on and off; beside it the tokens whose loss rises most, as a list."""
    rows = found.by_position()
    at = [math.sqrt((r["first"] + 1) * (r["last"] + 1)) for r in rows]
    for name, label in (("on", "memory as trained"), ("off", "memory switched off (read, not written)")):
        axes.plot(at, [r[name] for r in rows], marker="o", label=label, color="C0" if name == "on" else "C3")
    axes.set(xscale="log", xlabel="tokens read before (log)", ylabel="loss, nats per token")
    axes.set_title("Loss with the memory on and off", loc="left", fontweight="bold")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    missed.axis("off")
    missed.set_title("Whose loss rises most without it", loc="left", fontweight="bold")
    lines = ["position     on     off  token"]
    lines += [f"{n + 1:>8,}  {found.on[n]:5.2f}   {found.off[n]:5.2f}  {label_in_context(found, n, text_of)}"
              for n in found.most_missed(14)]  # fmt: skip
    text = "\n".join(lines if len(lines) > 1 else ["none does"])
    missed.text(0, 0.98, text, family="monospace", fontsize=8, va="top", parse_math=False)


def label_in_context(found: Introspection, place: int, text_of: Text, width: int = 16) -> str:
    """The label of the token there, in brackets, after the end of what stands before it."""
    before = visible(text_of(found.tokens[max(place + 1 - width, 0) : place + 1].tolist()))[-width:]
    return f"{before}[{visible(text_of([int(found.labels[place])]))[:width]}]"


def picture(found: Introspection, path: Path, title: str, text_of: Text) -> None:
    """All panels in one PNG. OSError: it cannot be written."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 16), layout="constrained")
    figure.suptitle(visible(title), fontsize=14, parse_math=False)
    grid = figure.add_gridspec(4, 6, height_ratios=[1.25, 1, 1, 1.15])
    draw_surprise(figure, figure.add_subplot(grid[0, :]), found, text_of)
    for row, names, head in ((1, GATES, "Gates over time"), (2, NORMS, "The memory's state after each chunk")):
        draw_series([figure.add_subplot(grid[row, 2 * n : 2 * n + 2]) for n in range(3)], found, names, head)
    draw_loss(figure.add_subplot(grid[3, :3]), figure.add_subplot(grid[3, 3:]), found, text_of)
    with whole_file(path) as stream, _glyphs_may_lack():
        figure.savefig(stream, dpi=150, format="png")


def single_figures(found: Introspection, text_of: Text) -> dict[str, Any]:
    """The same panels, each a matplotlib figure, by its TensorBoard name."""
    from matplotlib.figure import Figure

    made = {}
    for name, size in (("surprise", (13, 5)), ("gates", (13, 4)), ("norms", (13, 4)), ("loss", (13, 4.5))):
        made[name] = Figure(figsize=size, layout="constrained")
    draw_surprise(made["surprise"], made["surprise"].subplots(), found, text_of)
    draw_series(made["gates"].subplots(1, 3), found, GATES, "Gates over time")
    draw_series(made["norms"].subplots(1, 3), found, NORMS, "The memory's state after each chunk")
    left, right = made["loss"].subplots(1, 2)
    draw_loss(left, right, found, text_of)
    return {f"memory/{name}": figure for name, figure in made.items()}


def to_tensorboard(found: Introspection, folder: Path, step: int, text_of: Text) -> None:
    """UserError: the folder cannot be written."""
    from torch.utils.tensorboard import SummaryWriter

    try:
        with SummaryWriter(str(folder)) as writer, _glyphs_may_lack():  # type: ignore[no-untyped-call]
            for name, figure in single_figures(found, text_of).items():
                writer.add_figure(name, figure, step)  # type: ignore[no-untyped-call]
            writer.flush()  # type: ignore[no-untyped-call]
    except OSError as error:
        raise UserError(f"--tensorboard {folder} cannot be written: {error}") from error


@contextmanager
def _glyphs_may_lack() -> Iterator[None]:
    """The font has not every script; the texts are in the JSON file."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        yield
