"""From what a user names (a config, a run folder, a checkpoint, an export) to a model and its tokenizer."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_prep.errors import PrepareError
from data_prep.manifest import FILE_NAME, LARGEST, Manifest, ManifestError
from data_prep.tokenizer import ByteTokenizer, Tokenizer, prepared_tokenizer
from titans_train.config import ConfigError, RunConfig, dump_config, load_config
from titans_train.data import DataError
from titans_train.data.dataset import tokenizer_of_data
from titans_train.data.tokenizer import paths_of
from titans_train.errors import UserError
from titans_train.inference.exported import Exported, is_export
from titans_train.models import LanguageModel
from titans_train.models.stored import build
from titans_train.plan import resolve_shape
from titans_train.shape import ModelShape, completed, missing
from titans_train.untrusted import read_bounded

if TYPE_CHECKING:
    from titans_train.training.checkpoint import Checkpoint

NO_EFFECT = ("memory.store_every",)  # models that differ in these compute the same
SHOWN = 8  # checkpoints that an error lists, the newest
NEXT = "set data.path to the folder that the training data was prepared in"


@dataclass(frozen=True)
class Source:
    stored: Checkpoint | Exported
    config: RunConfig  # of the run that wrote it, or the CONFIG.yaml given; with the overrides
    trained: RunConfig  # of the run that wrote it

    @property
    def checkpoint(self) -> Path:
        return self.stored.path

    @property
    def record(self) -> dict[str, Any]:
        """The checkpoint's manifest."""
        return self.stored.manifest


def find(name: str, overrides: list[str], checkpoint: str | None = None) -> Source:
    """`checkpoint`: a checkpoint's folder, or its name within the run; None: the newest.

    Errors: ConfigError; UserError where there is no complete checkpoint.
    """
    path = Path(name).expanduser()
    config = None if path.is_dir() else load_config(path, overrides)
    run = path if config is None else Path(config.run.folder) / config.run.name
    stored = open_stored(run, checkpoint)
    trained = _trained(stored)
    config = _changed(stored.path, trained, overrides) if config is None else config
    return Source(stored, _with_cache(config, stored), trained)


def shape_of(source: Source) -> ModelShape:
    """The architecture. UserError: the config describes another one than is stored."""
    shape = resolve_shape(source.config)
    stored = source.record["shape"]
    differing = _differences(shape.to_dict(), completed(stored) if isinstance(stored, dict) else stored)
    if differing:
        raise UserError(
            f"checkpoint {source.checkpoint} holds another model than the config describes: {'; '.join(differing)}; "
            "give the config that it was trained with, or name its folder instead of a config"
        )
    return shape


def load_checked(source: Source) -> tuple[LanguageModel, dict[str, Any]]:
    """The model, on the CPU in fp32 and in eval mode, and its manifest. UserError as `shape_of`."""
    return build(shape_of(source), source.stored), source.record


def tokenizer_of(source: Source) -> Tokenizer:
    """The tokenizer that the run's data were prepared with. A byte-level one needs no file where it is recorded."""
    if source.trained.data.source != "shards":
        raise UserError(f"{source.checkpoint} was trained on a synthetic task, which has no text to write")
    entry = source.record.get("tokenizer")
    if isinstance(source.stored, Exported) and source.stored.tokenizer is not None:
        try:
            return prepared_tokenizer(source.stored.tokenizer, source.checkpoint)
        except PrepareError as error:
            raise UserError(f"the tokenizer of {source.checkpoint} cannot be read: {error}") from error
    if entry is not None and entry["kind"] == ByteTokenizer.kind:
        return ByteTokenizer()
    try:
        tokenizer = tokenizer_of_data(source.config)
    except DataError as error:
        raise UserError(f"the tokenizer cannot be read: {error}. If the folder has moved, {NEXT}") from error
    if entry is not None and entry["sha256"] != tokenizer.sha256:
        raise UserError(
            f"{next(paths_of(source.config.data))} has another tokenizer ({tokenizer.sha256[:12]}) than "
            f"{source.checkpoint} was trained with ({str(entry['sha256'])[:12]}); {NEXT}"
        )
    return tokenizer


def encode(tokenizer: Tokenizer, text: str) -> list[int]:
    """Token ids of a prompt. UserError for a command line that is not UTF-8."""
    try:
        return [int(i) for i in tokenizer.encode([text])[0]]
    except UnicodeEncodeError as error:
        raise UserError(f"the prompt is not UTF-8 text at character {error.start}; correct it") from error


def check_tokenizer(source: Source, config: RunConfig) -> None:
    """UserError where the data in `config` have other tokens than the model was trained on."""
    if config.data.source != "shards":
        return
    path = next(paths_of(config.data))
    trained = source.record.get("tokenizer") or _prepared(next(paths_of(source.trained.data), None))
    found = _prepared(path)
    if trained is not None and found is not None and trained["sha256"] != found["sha256"]:
        raise UserError(
            f"{path} was prepared with the {found['kind']} tokenizer {found['sha256'][:12]}, the model was "
            f"trained with the {trained['kind']} tokenizer {str(trained['sha256'])[:12]}: its figures would mean "
            "nothing; prepare the data with the tokenizer of the training data"
        )


def _prepared(path: str | None) -> dict[str, Any] | None:
    """The tokenizer's entry in the manifest of a local prepared folder; None where there is none to be read."""
    try:
        text = read_bounded(Path(path or "").expanduser() / FILE_NAME, LARGEST).decode("utf-8")
        entry = Manifest.from_text(text, str(path)).tokenizer
    except (OSError, UnicodeDecodeError, ManifestError):
        return None
    return {"kind": entry.kind, "sha256": entry.sha256}


def open_stored(run: Path, name: str | None = None) -> Checkpoint | Exported:
    """The export or checkpoint that `run` is, else the checkpoint `name` of that run, or its newest. UserError."""
    from titans_train.training.checkpoint import Checkpoint
    from titans_train.training.checkpoint_folder import candidates as checkpoints
    from titans_train.training.checkpoint_folder import find_latest

    siblings = run.parent if _is_checkpoint(run) else run / "checkpoints"
    candidates = [run] if name is None else [Path(name).expanduser(), siblings / name]
    for candidate in candidates:
        if is_export(candidate):
            return Exported.open(candidate)
        if _is_checkpoint(candidate):
            return Checkpoint.open(candidate)
        newest = find_latest(candidate) if candidate.is_dir() else None
        if newest is not None:
            return Checkpoint.open(newest, verify=False)  # it has just been
    place = " or ".join(str(candidate) for candidate in candidates)
    others = [] if name is None else checkpoints(siblings.parent)
    if others:
        known = ", ".join(path.name for path in others[:SHOWN]) + (", ..." if len(others) > SHOWN else "")
        raise UserError(f"{place} holds no complete checkpoint; in {siblings} there are {known}: name one of these")
    raise UserError(f"{place} holds no complete checkpoint; train first: python -m titans_train train CONFIG.yaml")


def _is_checkpoint(folder: Path) -> bool:
    from titans_train.training.manifest import MANIFEST

    return (folder / MANIFEST).is_file()


def _trained(stored: Checkpoint | Exported) -> RunConfig:
    entry = stored.manifest.get("tokenizer")
    if entry is not None and not (isinstance(entry, dict) and {"kind", "sha256"} <= entry.keys()):
        raise UserError(f"the tokenizer recorded in {stored.path} is none; use another checkpoint")
    config, shape = stored.manifest["config"], stored.manifest["shape"]
    try:
        for section, values in missing(shape).items():  # an earlier version's, which today's defaults are not
            config = {**config, section: {**config[section], **values}} if values else config
        return RunConfig.model_validate(config)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(
            f"the config in {stored.path} is of another version; use the version that it was trained with"
        ) from error


def _changed(folder: Path, config: RunConfig, overrides: list[str]) -> RunConfig:
    """With overrides, read exactly as `train` reads them."""
    if not overrides:
        return config
    with tempfile.TemporaryDirectory() as temporary:
        file = Path(temporary) / "config.yaml"
        file.write_text(dump_config(config), "utf-8")
        try:
            return load_config(file, overrides)
        except ConfigError as error:
            raise ConfigError(error.problems, f"the config in {folder} with these changes") from error


def _with_cache(config: RunConfig, stored: Checkpoint | Exported) -> RunConfig:
    """Decompressed shards go beside the run, wherever it lies now; beside an export, where its config says."""
    if config.data.cache is not None or isinstance(stored, Exported):
        return config
    cache = str(stored.path.absolute().parent.parent / "cache")
    return config.model_copy(update={"data": config.data.model_copy(update={"cache": cache})})


def _differences(wanted: dict[str, Any], found: Any, prefix: str = "") -> list[str]:
    if not isinstance(found, dict):
        return [f"{prefix or 'its shape'} is {str(found)[:40]!r} in the checkpoint"]
    out = []
    for key in sorted(wanted.keys() | found.keys()):
        a, b, name = wanted.get(key), found.get(key), prefix + key
        if isinstance(a, dict) and isinstance(b, dict):
            out += _differences(a, b, f"{name}.")
        elif a != b and name not in NO_EFFECT:
            out.append(f"{name[:60]} is {str(b)[:40]} in the checkpoint, {a} in the config")
    return out
