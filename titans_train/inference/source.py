"""From what a user names (a config, a run folder, a checkpoint) to a model and its tokenizer."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep.manifest import FILE_NAME, Manifest, ManifestError
from data_prep.tokenizer import ByteTokenizer, Tokenizer
from titans_train.config import ConfigError, RunConfig, dump_config, load_config
from titans_train.data import DataError
from titans_train.data.dataset import tokenizer_of_data
from titans_train.data.tokenizer import paths_of
from titans_train.errors import UserError
from titans_train.models import LanguageModel
from titans_train.plan import resolve_shape

NO_EFFECT = ("memory.store_every",)  # models that differ in these compute the same
NEXT = "set data.path to the folder that the training data was prepared in"


@dataclass(frozen=True)
class Source:
    checkpoint: Path
    config: RunConfig  # of the run that wrote it, or the CONFIG.yaml given; with the overrides
    record: dict[str, Any]  # the checkpoint's state.json


def find(name: str, overrides: list[str], checkpoint: str | None = None) -> Source:
    """`checkpoint`: a checkpoint's folder, or its name within the run; None: the newest.

    Errors: ConfigError; UserError where there is no complete checkpoint.
    """
    from titans_train.training.checkpoint import read_state

    path = Path(name).expanduser()
    config = None if path.is_dir() else load_config(path, overrides)
    run = path if config is None else Path(config.run.folder) / config.run.name
    folder = _checkpoint(run, checkpoint)
    record = read_state(folder)
    config = _stored_config(folder, record, overrides) if config is None else config
    return Source(folder, _with_cache(config, folder), record)


def load_checked(source: Source) -> tuple[LanguageModel, dict[str, Any]]:
    """The model and its state.json. UserError where the config describes another model."""
    from titans_train.training.checkpoint import load_model

    differing = _differences(resolve_shape(source.config).to_dict(), source.record["shape"])
    if differing:
        raise UserError(
            f"checkpoint {source.checkpoint} holds another model than the config describes: {'; '.join(differing)}; "
            "give the config that it was trained with, or name its folder instead of a config"
        )
    return load_model(source.checkpoint)


def tokenizer_of(source: Source) -> Tokenizer:
    """The tokenizer that the run's data were prepared with. A byte-level one needs no file where it is recorded."""
    entry = source.record.get("tokenizer")
    if source.record["config"]["data"]["source"] != "shards":
        raise UserError(f"{source.checkpoint} was trained on a synthetic task, which has no text to write")
    if entry is not None and entry["kind"] == ByteTokenizer.kind:
        return ByteTokenizer()
    try:
        tokenizer = tokenizer_of_data(source.config)
    except DataError as error:
        raise UserError(f"the tokenizer cannot be read: {error}. If the folder has moved, {NEXT}") from error
    if entry is not None and entry["sha256"] != tokenizer.sha256:
        raise UserError(
            f"{next(paths_of(source.config.data))} has another tokenizer ({tokenizer.sha256[:12]}) than "
            f"{source.checkpoint} was trained with ({entry['sha256'][:12]}); {NEXT}"
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
    trained = source.record.get("tokenizer") or _prepared(_first_path(source.record["config"]["data"]))
    found = _prepared(path)
    if trained is not None and found is not None and trained["sha256"] != found["sha256"]:
        raise UserError(
            f"{path} was prepared with the {found['kind']} tokenizer {found['sha256'][:12]}, the model was "
            f"trained with the {trained['kind']} tokenizer {trained['sha256'][:12]}: its figures would mean nothing; "
            "prepare the data with the tokenizer of the training data"
        )


def _first_path(data: dict[str, Any]) -> str | None:
    found: str | None = data["path"] or next((s["path"] for s in (data.get("sources") or {}).values()), None)
    return found


def _prepared(path: str | None) -> dict[str, Any] | None:
    """The tokenizer's entry in the manifest of a local prepared folder; None where there is none to be read."""
    try:
        entry = Manifest.from_text((Path(path or "").expanduser() / FILE_NAME).read_text("utf-8"), str(path)).tokenizer
    except (OSError, ManifestError):
        return None
    return {"kind": entry.kind, "sha256": entry.sha256}


def _checkpoint(run: Path, name: str | None) -> Path:
    from titans_train.training.checkpoint import find_latest

    siblings = run.parent if _is_checkpoint(run) else run / "checkpoints"
    candidates = [run] if name is None else [Path(name).expanduser(), siblings / name]
    for candidate in candidates:
        if _is_checkpoint(candidate):
            return candidate
        newest = find_latest(candidate) if candidate.is_dir() else None
        if newest is not None:
            return newest
    place = " or ".join(str(candidate) for candidate in candidates)
    raise UserError(f"{place} holds no complete checkpoint; train first: python -m titans_train train CONFIG.yaml")


def _is_checkpoint(folder: Path) -> bool:
    return (folder / "state.json").is_file()


def _stored_config(folder: Path, record: dict[str, Any], overrides: list[str]) -> RunConfig:
    """The run's own config, with overrides read exactly as `train` reads them."""
    try:
        config = RunConfig.model_validate(record["config"])
    except (KeyError, ValueError) as error:
        raise UserError(f"the config in {folder} is of another version; give a CONFIG.yaml and --checkpoint") from error
    if not overrides:
        return config
    with tempfile.TemporaryDirectory() as temporary:
        file = Path(temporary) / "config.yaml"
        file.write_text(dump_config(config), "utf-8")
        try:
            return load_config(file, overrides)
        except ConfigError as error:
            raise ConfigError(error.problems, f"the config in {folder} with these changes") from error


def _with_cache(config: RunConfig, checkpoint: Path) -> RunConfig:
    """Decompressed shards go beside the run, wherever it lies now."""
    if config.data.cache is not None:
        return config
    cache = str(checkpoint.absolute().parent.parent / "cache")
    return config.model_copy(update={"data": config.data.model_copy(update={"cache": cache})})


def _differences(wanted: dict[str, Any], found: dict[str, Any], prefix: str = "") -> list[str]:
    out = []
    for key in sorted(wanted.keys() | found.keys()):
        a, b, name = wanted.get(key), found.get(key), prefix + key
        if isinstance(a, dict) and isinstance(b, dict):
            out += _differences(a, b, f"{name}.")
        elif a != b and name not in NO_EFFECT:
            out.append(f"{name} is {b} in the checkpoint, {a} in the config")
    return out
