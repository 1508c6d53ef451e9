"""What the memories of a model do while it reads one text, and what the model loses when they are switched off.

Surprise is the norm of a token's inner gradient (Titans paper, eq. 8); alpha, eta and theta are the gates of
forgetting, momentum and step size (eq. 9-14). The text is read twice side by side, with the memory as trained and with
writing off, in pieces with carried state: the model needs the same memory for any length; beside it stay a few numbers
per token.

Shapes: N tokens of the text, H heads, C full chunks.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from titans_train.data.sample import IGNORE
from titans_train.evaluation.perplexity import stretches
from titans_train.evaluation.scoring import PIECE
from titans_train.memory.watch import CHUNK_SERIES, TOKEN_SERIES, memory_off, watching

POINTS = 2000  # of a series, at most
LISTED = 20  # tokens in a list of the most surprising
STRETCHES = 60  # of the text, of which each has one of them at most
BEFORE = 12  # tokens shown in front of one
HEADS = ("mean", "least", "greatest")


class Thinned:
    """Means over equal stretches of a series that comes in parts; the last stretch may be shorter."""

    def __init__(self, total: int, points: int = POINTS) -> None:
        self.total, self.each, self.seen = total, max(1, -(-total // points)), 0
        self.sums = torch.zeros(-(-total // self.each), len(HEADS), dtype=torch.float64)

    def add(self, values: Tensor) -> None:
        """The next n of the series, by heads: [H, n]."""
        over_heads = torch.stack([values.mean(0), values.amin(0), values.amax(0)], 1).double().cpu()
        place = (self.seen + torch.arange(len(over_heads))) // self.each
        self.sums.index_add_(0, place, over_heads)
        self.seen += len(over_heads)

    def means(self) -> Tensor:
        """[points, 3]: mean over heads, the least head, the greatest head."""
        first = torch.arange(len(self.sums)) * self.each
        return self.sums / (self.total - first).clamp(max=self.each)[:, None]


@dataclass(frozen=True)
class Introspection:
    """layers: of each, its series [points, 3] (HEADS); a point is the mean of `tokens_per_point` tokens, or of the ends
    of `chunks_per_point` chunks of `chunk_size` tokens for norms and distance.
    """

    tokens: Tensor  # [N] int64
    labels: Tensor  # [N] int64, the token after each; IGNORE: none, or one that does not count
    layers: list[dict[str, Tensor]]
    tokens_per_point: int
    chunks_per_point: int
    chunk_size: int
    surprise: Tensor  # [N], mean over layers and heads
    on: Tensor  # [N] loss of the label in nats, with the memory as trained; 0 where there is none
    off: Tensor  # [N] the same with the memory switched off

    @property
    def labelled(self) -> Tensor:
        return self.labels != IGNORE

    def most_surprising(self, count: int = LISTED) -> list[int]:
        """Positions, the most surprising first; at most one of each of STRETCHES equal parts of the text: else all
        would be the first few, which meet a memory that knows nothing.
        """
        each = max(1, -(-len(self.surprise) // STRETCHES))
        values = self.surprise.nan_to_num(math.inf)
        parts = torch.nn.functional.pad(values, (0, -len(values) % each), value=-math.inf).view(-1, each)
        greatest, places = parts.max(1)
        return [n * each + int(places[n]) for n in _greatest(greatest, count)]

    def most_missed(self, count: int = LISTED) -> list[int]:
        """Positions whose label's loss rises most when the memory is switched off; only where it does."""
        rise = torch.where(self.labelled, (self.off - self.on).nan_to_num(0.0), -math.inf)
        return [n for n in _greatest(rise, count) if rise[n] > 0]

    def by_position(self) -> list[dict[str, Any]]:
        """{first, last, tokens, on, off}: mean losses over stretches, each twice as long as the one before."""
        rows = []
        for first, end in stretches(len(self.tokens)):
            count = int(self.labelled[first:end].sum())
            if count:
                on, off = (float(x[first:end].sum()) / count for x in (self.on, self.off))
                rows.append({"first": first, "last": end - 1, "tokens": count, "on": on, "off": off})
        return rows


def _greatest(values: Tensor, count: int) -> list[int]:
    return values.topk(min(count, len(values))).indices.tolist()


@torch.inference_mode()
def introspect(
    model: Any, tokens: Tensor, labels: Tensor, where: torch.device, piece: int = PIECE,
    tell: Callable[[int], object] = lambda done: None,
) -> Introspection:  # fmt: skip
    """tokens, labels [N] int64: one text, from its start; the label of a token is the one after it, or IGNORE.

    piece: tokens per forward; changes nothing but memory and time. tell: called with the tokens read so far.
    ValueError: the model has no Titans memory.
    """
    count, chunk = len(tokens), model.shape.memory.chunk_size
    surprise, on, off = (torch.zeros(count, dtype=torch.float64) for _ in range(3))
    states = [None, None]
    with watching(model) as watches:
        series = [
            {n: Thinned(count) for n in TOKEN_SERIES} | {n: Thinned(count // chunk) for n in CHUNK_SERIES}
            for _ in watches
        ]

        def read(cut: slice, which: int) -> Tensor:
            given = {"tokens": tokens[None, cut].to(where), "labels": labels[None, cut].to(where)}
            out = model(**given, state=states[which], return_state=True, scores=True)
            states[which] = out.state
            losses: Tensor = out.losses[0].double().cpu()
            return losses

        for begin in range(0, count, piece):
            cut = slice(begin, begin + piece)
            on[cut] = read(cut, 0)
            for watch, of_layer in zip(watches, series, strict=True):
                for name, values in watch.take().items():
                    of_layer[name].add(values[0])
                    if name == "surprise":
                        surprise[cut] += values[0].double().mean(0).cpu() / len(watches)
            with memory_off(model):
                off[cut] = read(cut, 1)
            tell(min(begin + piece, count))
    layers = [{name: thinned.means() for name, thinned in of_layer.items()} for of_layer in series]
    each, chunks = series[0]["surprise"].each, series[0]["distance"].each
    return Introspection(tokens, labels, layers, each, chunks, chunk, surprise, on, off)


def figures(found: Introspection, text_of: Callable[[list[int]], str]) -> dict[str, Any]:
    """For JSON. text_of: the text of token ids. Numbers that are not finite become null."""
    count = max(int(found.labelled.sum()), 1)
    on, off = (float(x.sum()) / count for x in (found.on, found.off))
    tokens = found.tokens.tolist()

    def token(place: int, ids: int, **values: float) -> dict[str, Any]:
        before = text_of(tokens[max(place - BEFORE, 0) : place])
        return {"position": place, "token": ids, "text": text_of([ids]), "before": before, **values}

    surprising = [token(n, tokens[n], surprise=float(found.surprise[n])) for n in found.most_surprising()]
    missed = [
        token(n + 1, int(found.labels[n]), on=float(found.on[n]), off=float(found.off[n])) for n in found.most_missed()
    ]
    series = [
        {name: dict(zip(HEADS, values.T.tolist(), strict=True)) for name, values in layer.items()}
        for layer in found.layers
    ]
    how = (
        f"over heads: {', '.join(HEADS)}; a point is the mean of {found.tokens_per_point} tokens, for "
        f"{', '.join(CHUNK_SERIES)} of the ends of {found.chunks_per_point} chunks; distance: of the weights from "
        "those that the text begins with"
    )
    result = {
        "tokens": len(tokens), "loss": {"on": on, "off": off}, "by_position": found.by_position(),
        "most_surprising": surprising, "most_missed": missed,
        "tokens_per_point": found.tokens_per_point, "chunks_per_point": found.chunks_per_point,
        "chunk_size": found.chunk_size, "series": how, "layers": series,
    }  # fmt: skip
    finite: dict[str, Any] = _finite(result)
    return finite


def _finite(value: Any) -> Any:
    """Six digits are more than a picture shows. JSON has no infinity."""
    if isinstance(value, dict):
        return {name: _finite(x) for name, x in value.items()}
    if isinstance(value, list):
        return [_finite(x) for x in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value
