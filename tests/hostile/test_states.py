"""State files for `generate --load-state`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.hostile.refusals import DEEP, little_memory, refused
from tests.hostile.tensors import FILES, cast, reshaped, rewritten
from tests.inference.checkpoints import config, write_checkpoint
from titans_train.__main__ import main

Capture = pytest.CaptureFixture[str]
BLOCKS = ("mag", "mac", "transformer")


@pytest.fixture(scope="module", params=BLOCKS)
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, Path]:
    """(block, checkpoint, a good state of it), amid a segment and a chunk."""
    folder = tmp_path_factory.mktemp(request.param)
    checkpoint, state = write_checkpoint(config(folder / "runs", request.param)), folder / "state"
    options = ["--prompt", "import ", "--tokens", "4", "--save-state", str(state)]
    assert main(["generate", str(checkpoint), *options]) == 0
    assert main(["generate", str(checkpoint), "--tokens", "2", "--load-state", str(state)]) == 0
    return request.param, checkpoint, state


def told(path: Path, change: Callable[[dict[str, str]], object]) -> None:
    """The file with other metadata."""
    with safe_open(str(path), "pt") as file:
        metadata = file.metadata()
    change(metadata)
    save_file(load_file(str(path)), str(path), metadata)


def tree(change: Callable[[Any], object]) -> Callable[[dict[str, str]], object]:
    """Changes the fields of the first block, or a part of them."""

    def of(metadata: dict[str, str]) -> None:
        data = json.loads(metadata["tree"])
        change(data["fields"]["blocks"][0]["fields"])
        metadata["tree"] = json.dumps(data)

    return of


def text(value: str, name: str = "tree") -> Callable[[dict[str, str]], object]:
    return lambda metadata: metadata.update({name: value})


METADATA = {
    "no tree": lambda metadata: metadata.pop("tree"),
    "a tree of words": text("x"),
    "a deep tree": text(DEEP),
    "a tree of lists": text("[" * 900 + "]" * 900),
    "a number": text("1"),
    "null": text("null"),
    "NaN": text("NaN"),
    "another type": text('{"type": "os.system", "fields": {"command": "x"}}'),
    "a type of the builtins": text('{"type": "eval", "fields": {}}'),
    "another state": text('{"type": "MemoryState", "fields": {"weights": [], "momentum": []}}'),
    "no fields": text('{"type": "ModelState"}'),
    "other fields": text('{"type": "ModelState", "fields": {"blocks": [], "x": 1}}'),
    "fields of numbers": text('{"type": "ModelState", "fields": 3}'),
    "a list as a type": text('{"type": ["ModelState"], "fields": {}}'),
    "no blocks": text('{"type": "ModelState", "fields": {"blocks": []}}'),
    "blocks of numbers": text('{"type": "ModelState", "fields": {"blocks": [1, 2]}}'),
    "blocks of null": text('{"type": "ModelState", "fields": {"blocks": [null, null]}}'),
    "a number of blocks": text('{"type": "ModelState", "fields": {"blocks": 2}}'),
    "a tensor that is not there": text('{"tensor": "../../x"}'),
    "a tensor of no name": text('{"tensor": 1}'),
    "a shape of words": text("x", "shape"),
    "a deep shape": text(DEEP, "shape"),
    "a list of shapes": text("[]", "shape"),
    "an infinite shape": text('{"width": Infinity}', "shape"),
    "a long shape": text(json.dumps({"x" * 100_000: "y" * 100_000}), "shape"),
}  # fmt: skip


@pytest.mark.parametrize("saved", ["mag"], indirect=True)
@pytest.mark.parametrize("name", METADATA)
def test_a_state_of_other_parts_is_refused(
    name: str, saved: tuple[str, Path, Path], tmp_path: Path, capsys: Capture
) -> None:
    _, checkpoint, state = saved
    path = tmp_path / "state"
    path.write_bytes(state.read_bytes())
    told(path, METADATA[name])
    assert "--load-state takes a file" in refused(capsys, "generate", str(checkpoint), "--load-state", str(path))


@pytest.mark.parametrize("saved", ["mag"], indirect=True)
@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_no_state_is_refused(
    name: str, saved: tuple[str, Path, Path], tmp_path: Path, capsys: Capture
) -> None:
    path, mark = tmp_path / "state", tmp_path / "mark"
    path.write_bytes(FILES[name](mark))
    with little_memory():
        error = refused(capsys, "generate", str(saved[1]), "--load-state", str(path))
    assert "--load-state takes a file" in error
    assert not mark.exists()


def numbers_in(block: str) -> list[str]:
    return {"mag": ["attention.position", "memory.memory.offset"], "mac": ["position"],
            "transformer": ["attention.position"]}[block]  # fmt: skip


def test_numbers_that_cannot_be_are_refused(saved: tuple[str, Path, Path], tmp_path: Path, capsys: Capture) -> None:
    block, checkpoint, state = saved
    for place in numbers_in(block):
        for value in (-1, 2**63, 10**30, 1.5, "3", True, None, [1], {"tensor": "next_logits"}):

            def change(fields: Any, place: str = place, value: object = value) -> None:
                *path, last = place.split(".")
                for key in path:
                    fields = fields[key]["fields"]
                assert last in fields
                fields[last] = value

            path = tmp_path / "state"
            path.write_bytes(state.read_bytes())
            told(path, tree(change))
            error = refused(capsys, "generate", str(checkpoint), "--load-state", str(path))
            assert "--load-state takes a file" in error, (place, value)


TENSORS: dict[str, Callable[[dict[str, Tensor]], object]] = {
    **{f"{name} as {dtype}": cast(name, dtype)
       for name in ("blocks.0", "blocks.1", "keys", "next_logits")
       for dtype in (torch.int8, torch.float64, torch.int64, torch.bool, torch.bfloat16, torch.complex64)},
    "the model's hash as a float": lambda tensors: tensors.update(weights=tensors["weights"].float()),
    "the model's hash as int64": lambda tensors: tensors.update(weights=tensors["weights"].long()),
    "the model's hash, cut": lambda tensors: tensors.update(weights=tensors["weights"][1:]),
    "random as int32": cast("random", torch.int32),
    "random, cut": reshaped("random", lambda t: t[:-1]), "random, empty": reshaped("random", lambda t: t[:0]),
    "random, zeros": lambda tensors: tensors.update(random=torch.zeros_like(tensors["random"])),
    "random, ones": lambda tensors: tensors.update(random=torch.full_like(tensors["random"], 255)),
    "logits, one more": reshaped("next_logits", lambda t: torch.cat([t, t[:1]])),
    "logits, one row": reshaped("next_logits", lambda t: t[None]),
    "logits, none": reshaped("next_logits", lambda t: t[:0]),
    "two rows": lambda tensors: tensors.update({n: t.repeat(2, *[1] * (t.dim() - 1)) for n, t in tensors.items()
                                                if n.startswith("blocks")}),
    "no rows": lambda tensors: tensors.update({n: t[:0] for n, t in tensors.items() if n.startswith("blocks")}),
    "one of two rows": reshaped("blocks.1", lambda t: t.repeat(2, *[1] * (t.dim() - 1))),
    "flat": reshaped("blocks.0", lambda t: t.flatten()),
    "a scalar": reshaped("blocks.0", lambda t: t.flatten()[0]),
    "keys, cut": reshaped("keys", lambda t: t[..., :-1]),
    "keys, many": reshaped("keys", lambda t: t.repeat(1, 1, 1000, 1)),
    "no logits": lambda tensors: tensors.pop("next_logits"),
    "no weights": lambda tensors: tensors.pop("weights"),
    "no random": lambda tensors: tensors.pop("random"),
}  # fmt: skip


def test_tensors_of_other_dtypes_and_shapes_are_refused(
    saved: tuple[str, Path, Path], tmp_path: Path, capsys: Capture
) -> None:
    _, checkpoint, state = saved
    for name, change in TENSORS.items():
        path = tmp_path / "state"
        path.write_bytes(state.read_bytes())
        rewritten(path, change)
        assert main(["generate", str(checkpoint), "--load-state", str(path)]) == 2, name
        assert "--load-state" in (error := capsys.readouterr().err) or "--seed" in error or "another" in error, name


@pytest.mark.parametrize("saved", ["mag"], indirect=True)
def test_logits_that_are_not_finite_are_refused(saved: tuple[str, Path, Path], tmp_path: Path, capsys: Capture) -> None:
    path = tmp_path / "state"
    path.write_bytes(saved[2].read_bytes())
    rewritten(path, lambda tensors: tensors["next_logits"].fill_(float("nan")))
    assert "not finite" in refused(capsys, "generate", str(saved[1]), "--load-state", str(path))


def test_a_changed_number_anywhere_is_found(saved: tuple[str, Path, Path], tmp_path: Path, capsys: Capture) -> None:
    """Within its range too, so that nothing else is wrong with it."""
    block, checkpoint, state = saved
    good = load_file(str(state))

    def error(change: Callable[[Path], object]) -> str:
        path = tmp_path / "state"
        path.write_bytes(state.read_bytes())
        change(path)
        return refused(capsys, "generate", str(checkpoint), "--load-state", str(path))

    def moved(fields: Any) -> None:
        fields["attention"]["fields"]["position"] += 1

    if block != "mac":  # there it would not fit the number of keys
        assert "is damaged: its content is not what was saved" in error(lambda path: told(path, tree(moved)))
    for name in (name for name, value in good.items() if name != "weights" and value.numel()):

        def changed(tensors: dict[str, Tensor], name: str = name) -> None:
            last = tensors[name].view(-1)[-1:]
            last.copy_(~last if last.dtype == torch.bool else last + 1)

        assert "is damaged: its content is not" in error(lambda path: rewritten(path, changed)), name  # noqa: B023


@pytest.mark.parametrize("saved", ["mag", "mac"], indirect=True)
def test_states_that_are_not_finite_are_refused_and_older_files_are_not(
    saved: tuple[str, Path, Path], tmp_path: Path, capsys: Capture
) -> None:
    """Files had no hash before."""
    path = tmp_path / "state"
    for value in (float("nan"), float("inf")):
        path.write_bytes(saved[2].read_bytes())
        rewritten(path, lambda tensors: tensors.pop("content"))
        assert main(["generate", str(saved[1]), "--tokens", "1", "--load-state", str(path)]) == 0
        name = next(n for n in load_file(str(path)) if n.endswith("memory.weights.0"))
        damaged = load_file(str(path))[name].fill_(value)
        rewritten(path, lambda tensors, name=name, damaged=damaged: tensors.update({name: damaged}))
        error = refused(capsys, "generate", str(saved[1]), "--load-state", str(path))
        assert "numbers that are not finite: the file is damaged" in error
