"""evaluate --task memory: its series against plain computations, its pictures through real readers, its refusals."""

from __future__ import annotations

import argparse
import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib.image
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # type: ignore[import-untyped]
from torch import Tensor

from tests.data.corpus import prepare_folder
from tests.inference.checkpoints import config, write_checkpoint
from tests.models.shapes import tiny
from titans_train.__main__ import main
from titans_train.errors import UserError
from titans_train.evaluation.context import opened
from titans_train.evaluation.introspection import POINTS, Introspection, Thinned, figures, introspect
from titans_train.evaluation.introspection_plot import coarse, positions, visible
from titans_train.evaluation.memory_task import check
from titans_train.inference.source import find
from titans_train.memory.watch import CHUNK_SERIES, TOKEN_SERIES, memory_off
from titans_train.models import LanguageModel
from titans_train.parallel import Mesh

Capture = pytest.CaptureFixture[str]
BLOCKS = ("lmm", "mac", "mag", "mal")
LENGTH, CHUNK = 27, 4  # ragged chunks, and ragged segments of 8
CPU = torch.device("cpu")
TEXT = "Some $x_1^2$ and 漢字 \x1b[31m\x00 words; " + "the same words again, the same words again. " * 4


def build(block: str) -> LanguageModel:
    torch.manual_seed(0)
    return LanguageModel(tiny(block)).double()


def text(length: int = LENGTH) -> tuple[Tensor, Tensor]:
    tokens = torch.randint(0, 29, (length + 1,), generator=torch.Generator().manual_seed(1))
    return tokens[:-1], tokens[1:].clone()


def states_after(model: LanguageModel, tokens: Tensor) -> list[list[Any]]:
    """By token, the memory's state in each layer, decoded token by token."""
    found, state = [], None
    for token in tokens:
        state = model(token[None, None], state=state, return_state=True).state
        found.append([block.memory.memory for block in state.blocks])
    return found


def begins_with(model: LanguageModel, layer: int) -> Any:
    """The memory that a text begins with: the learned one, after the persistent tokens where they are written."""
    block = model.blocks[layer]
    if model.shape.block == "mac":
        return block.memory.initial_memory()
    where = block if model.shape.block == "mag" else block.mixer
    return where.branch.after_persistent(block.fixed(where.project))[0]


def norms(tensors: Any) -> Tensor:
    """[H]"""
    return torch.cat([t[0].flatten(1) for t in tensors], 1).norm(dim=1)


@pytest.mark.parametrize("block", BLOCKS)
def test_series_do_not_depend_on_how_the_text_is_cut(block: str) -> None:
    model, (tokens, labels) = build(block), text()
    whole = introspect(model, tokens, labels, CPU)
    for piece in (1, 5, 7, 16):
        cut = introspect(model, tokens, labels, CPU, piece)
        for a, b in zip(whole.layers, cut.layers, strict=True):
            assert {name: len(values) for name, values in a.items()} == {
                name: LENGTH if name in TOKEN_SERIES else LENGTH // CHUNK for name in (*TOKEN_SERIES, *CHUNK_SERIES)
            }
            assert all((a[name] - b[name]).abs().max() <= 1e-10 for name in a)
        for name in ("surprise", "on", "off"):
            assert (getattr(whole, name) - getattr(cut, name)).abs().max() <= 1e-10, name


@pytest.mark.parametrize("block", BLOCKS)
def test_state_series_are_those_of_the_states_of_decoding(block: str) -> None:
    model, (tokens, labels) = build(block), text()
    found = introspect(model, tokens, labels, CPU)
    with torch.no_grad():
        states = states_after(model, tokens)
        for layer in range(2):
            start = begins_with(model, layer)
            for chunk in range(LENGTH // CHUNK):
                state = states[(chunk + 1) * CHUNK - 1][layer]
                moved = [w - w0 for w, w0 in zip(state.weights, start.weights, strict=True)]
                for name, tensors in (
                    ("weight_norm", state.weights), ("momentum_norm", state.momentum), ("distance", moved),
                ):  # fmt: skip
                    values = norms(tensors)
                    wanted = torch.stack([values.mean(), values.min(), values.max()])
                    assert (found.layers[layer][name][chunk] - wanted).abs().max() <= 1e-10, name


@pytest.mark.parametrize("block", BLOCKS)
def test_losses_are_cross_entropies_with_the_memory_on_and_off(block: str) -> None:
    model, (tokens, labels) = build(block), text()
    labels[[3, 20]] = -100
    found = introspect(model, tokens, labels, CPU, 10)
    with torch.no_grad():
        on = torch.nn.functional.cross_entropy(model(tokens[None]).logits[0], labels, reduction="none")
        with memory_off(model):
            off = torch.nn.functional.cross_entropy(model(tokens[None]).logits[0], labels, reduction="none")
    assert (found.on - on).abs().max() <= 1e-10 and (found.off - off).abs().max() <= 1e-10
    first, second = found.by_position()
    assert (first["first"], first["last"], first["tokens"]) == (0, 15, 15)
    assert (second["first"], second["last"], second["tokens"]) == (16, 26, 10)
    assert second["off"] == pytest.approx(float(off[16:].sum()) / 10, abs=1e-10)
    missed = found.most_missed(100)
    assert missed and not {3, 20} & set(missed) and all(off[n] > on[n] for n in missed)
    assert float(off[missed[0]] - on[missed[0]]) == float((off - on).max())
    layers = torch.stack([layer["surprise"][:, 0] for layer in found.layers])
    assert (found.surprise - layers.mean(0)).abs().max() <= 1e-10
    assert found.most_surprising(3) == layers.mean(0).topk(3).indices.tolist()  # a text this short has no stretches


def test_a_long_series_becomes_means_of_equal_stretches() -> None:
    values = torch.rand(3, 2 * POINTS + 301, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    thinned = Thinned(values.shape[1])
    for part in values.split([1000, 1, 2, 2998, values.shape[1] - 4001], 1):
        thinned.add(part)
    means = thinned.means()
    assert thinned.each == 3 and len(means) == -(-values.shape[1] // 3) <= POINTS
    for n in (0, 1, 333, len(means) - 1):
        stretch = values[:, 3 * n : 3 * n + 3]
        wanted = [stretch.mean(), stretch.amin(0).mean(), stretch.amax(0).mean()]
        assert means[n].tolist() == pytest.approx([float(x) for x in wanted], abs=1e-12)


def spiked(length: int, spikes: dict[int, float]) -> Introspection:
    surprise = torch.ones(length, dtype=torch.float64)
    for place, value in spikes.items():
        surprise[place] = value
    layer = {name: torch.ones(5, 3) for name in TOKEN_SERIES} | {name: torch.ones(2, 3) for name in CHUNK_SERIES}
    tokens, zeros = torch.arange(length), torch.zeros(length, dtype=torch.float64)
    return Introspection(tokens, tokens, [layer], 20, 3, 4, surprise, zeros, zeros)


def test_surprising_tokens_stand_apart_from_each_other() -> None:
    places = spiked(597, {5: 9.0, 6: 8.0, 300: 7.0, 596: 6.0}).most_surprising(4)
    assert places[:3] == [5, 300, 596] and 6 not in places and len(places) == 4


def test_points_stand_in_the_middle_of_what_they_are_means_of() -> None:
    found = spiked(100, {})
    assert positions(found, "surprise").tolist() == [10, 30, 50, 70, 90]
    assert positions(found, "distance").tolist() == [8, 20]  # ends of chunks 4, 8, 12; then 16, 20, 24
    assert coarse(torch.arange(401.0))[[0, -1]].tolist() == [1.0, 400.0 - 0.5]


def test_what_is_not_finite_is_null_in_json() -> None:
    found = spiked(600, {7: float("inf")})
    found.layers[0]["surprise"][2] = float("nan")
    result = json.loads(json.dumps(figures(found, str), allow_nan=False))
    assert result["layers"][0]["surprise"]["mean"] == [1, 1, None, 1, 1]
    assert (result["most_surprising"][0]["position"], result["most_surprising"][0]["surprise"]) == (7, None)


def test_text_in_a_picture_cannot_do_anything() -> None:
    assert visible("a\n\x1b[31m\u202eé漢") == "a\\n\\x1b[31m\\u202eé漢"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    (tmp_path / "text.txt").write_text(TEXT, "utf-8")
    return write_checkpoint(config(tmp_path / "runs", "lmm"))


def evaluated(tmp_path: Path, source: Path, *args: str) -> dict[str, Any]:
    file = tmp_path / "figures.json"
    assert main(["evaluate", str(source), "--task", "memory", "--json", str(file), *args]) == 0
    result: dict[str, Any] = json.loads(file.read_text())
    return result


def refused(capsys: Capture, source: Path, *args: str) -> str:
    capsys.readouterr()
    assert main(["evaluate", str(source), "--task", "memory", *args]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    return captured.err


def test_a_text_gives_figures_a_picture_and_events(source: Path, tmp_path: Path, capsys: Capture) -> None:
    png, events = tmp_path / "memory.png", tmp_path / "events"
    options = ["--text", str(tmp_path / "text.txt"), "--picture", str(png), "--tensorboard", str(events)]
    result = evaluated(tmp_path, source, *options)
    ids = list(TEXT.encode())
    assert result["tokens"] == len(ids) and result["step"] == 10 and result["tokens_per_point"] == 1
    assert [sorted(layer) for layer in result["layers"]] == 2 * [sorted((*TOKEN_SERIES, *CHUNK_SERIES))]
    assert {name: len(s["mean"]) for name, s in result["layers"][1].items()} == {
        **dict.fromkeys(TOKEN_SERIES, len(ids)), **dict.fromkeys(CHUNK_SERIES, len(ids) // 4),
    }  # fmt: skip
    for rows in (result["most_surprising"], result["most_missed"]):
        assert rows and all(row["token"] == ids[row["position"]] for row in rows)
        for row in rows:
            before = bytes(ids[max(row["position"] - 12, 0) : row["position"]])
            assert row["before"] == before.decode("utf-8", "replace")
    out = capsys.readouterr().out
    assert "\x1b" not in out and "\x00" not in out
    assert f"{result['loss']['on']:.4f} on, {result['loss']['off']:.4f} off" in out

    image = matplotlib.image.imread(png)
    assert image.shape[:2] == (2400, 2100) and image[..., :3].std() > 0.05
    accumulator = EventAccumulator(str(events)).Reload()
    tags = accumulator.Tags()["images"]
    assert sorted(tags) == ["memory/gates", "memory/loss", "memory/norms", "memory/surprise"]
    for tag in tags:
        (event,) = accumulator.Images(tag)
        with Image.open(io.BytesIO(event.encoded_image_string)) as drawn:
            assert event.step == 10 and drawn.width >= 1000 and drawn.convert("L").getextrema()[0] < 100


def test_a_text_shorter_than_a_chunk_has_no_state_series(source: Path, tmp_path: Path) -> None:
    options = ["--text", str(tmp_path / "text.txt"), "--tokens", "3", "--picture", str(tmp_path / "memory.png")]
    result = evaluated(tmp_path, source, *options)
    layer = result["layers"][0]
    assert len(layer["surprise"]["mean"]) == 3 and layer["distance"] == {"mean": [], "least": [], "greatest": []}
    assert matplotlib.image.imread(tmp_path / "memory.png").shape[:2] == (2400, 2100)


def test_validation_data_are_read_where_no_text_is_given(tmp_path: Path) -> None:
    prepared = prepare_folder(tmp_path / "corpus")
    checkpoint = write_checkpoint(config(tmp_path / "runs", "mac", data={"path": str(prepared)}))
    result = evaluated(tmp_path, checkpoint, "--tokens", "150")
    assert result["tokens"] == 150 and len(result["layers"][0]["distance"]["mean"]) == 150 // 4
    assert result["text"] is None


def test_a_synthetic_task_is_read_with_its_labels(tmp_path: Path) -> None:
    recall = {"pairs": 2, "keys": 4, "values": 4, "gap": 4}
    run_config = config(tmp_path / "runs", "mag", data={"path": None, "source": "recall", "recall": recall})
    result = evaluated(tmp_path, write_checkpoint(run_config, tokenizer=None))
    assert result["tokens"] == 64 and sum(row["tokens"] for row in result["by_position"]) == 2
    assert len(result["most_missed"]) <= 2


def test_what_cannot_be_watched_is_refused_before_anything_is_written(tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "text.txt").write_text(TEXT, "utf-8")
    (tmp_path / "short.txt").write_text("a")
    text_of, events = ("--text", str(tmp_path / "text.txt")), tmp_path / "events"
    transformer = write_checkpoint(config(tmp_path / "t", "transformer"))
    assert "transformer) has none" in refused(capsys, transformer, *text_of, "--tensorboard", str(events))
    peer = config(
        tmp_path / "p", "lmm", memory={"rule": "deltanet", "expansion": 4}, attention={"persistent_tokens": 0}
    )
    assert "rule deltanet" in refused(capsys, write_checkpoint(peer), *text_of)
    source = write_checkpoint(config(tmp_path / "l", "lmm"))
    assert "at least 2" in refused(capsys, source, *text_of, "--tokens", "1")
    assert "cannot be read" in refused(capsys, source, "--text", str(tmp_path / "missing.txt"))
    assert "nothing to predict" in refused(capsys, source, "--text", str(tmp_path / "short.txt"))
    assert "no folder" in refused(capsys, source, *text_of, "--tensorboard", str(tmp_path / "a" / "b"))
    assert "no folder" in refused(capsys, source, *text_of, "--tensorboard", str(tmp_path / "text.txt"))
    assert not events.exists()


def test_several_processes_are_refused(source: Path) -> None:
    with opened(find(str(source), [])) as context:
        several = replace(context, mesh=Mesh(rank=1, world_size=2))
        with pytest.raises(UserError, match="2 were started") as error:
            check(several, argparse.Namespace(tokens=None, tensorboard=None))
        assert error.value.agreed
