"""The verb `export`: a checkpoint's model in one folder, for `generate`, `evaluate` and everybody's safetensors."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError
from safetensors.torch import save_file

from data_prep.durable import flush_directory, flush_folder
from data_prep.manifest import TokenizerEntry, describe_file
from data_prep.manifest_checks import TOKENIZER_FILES
from data_prep.tokenizer import Tokenizer
from titans_train.config import dump_config
from titans_train.errors import UserError
from titans_train.inference.exported import (
    CONFIG,
    DTYPES,
    FORMAT,
    MANIFEST,
    README,
    SHAPE,
    WEIGHTS,
    digest,
    sha256_of,
)
from titans_train.inference.readme import readme
from titans_train.inference.source import Source, find, load_checked, tokenizer_of
from titans_train.models import LanguageModel

if TYPE_CHECKING:
    from titans_train.config import RunConfig


def main(args: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m titans_train export", description=__doc__)
    parser.add_argument("source", metavar="CONFIG.yaml|RUN|CHECKPOINT")
    parser.add_argument("out", type=Path, metavar="OUT", help="a folder, which must not exist yet")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="as data.path, where the data moved")
    parser.add_argument("--checkpoint", help="a checkpoint of the run, as step-00000100 (default: the newest)")
    parser.add_argument("--dtype", choices=list(DTYPES), default="float32", help="of the parameters")
    options = parser.parse_intermixed_args(list(args))
    _check_free(options.out)
    source = find(options.source, options.overrides, options.checkpoint)
    tokenizer = tokenizer_of(source) if source.trained.data.source == "shards" else None
    model, _ = load_checked(source)
    export(source, model, tokenizer, options.out, options.dtype)
    count = sum(parameter.numel() for parameter in model.parameters())
    size = sum(file.stat().st_size for file in options.out.iterdir())
    print(f"{options.out}: {count:,} parameters of {source.checkpoint} as {options.dtype}, {size:,} bytes")
    return 0


def export(source: Source, model: LanguageModel, tokenizer: Tokenizer | None, out: Path, dtype: str) -> None:
    """Writes `out`: whole, or not at all. UserError: it is there already, or cannot be written."""
    _check_free(out)
    with _beside(out) as folder:
        weights = {name: value.detach().to(DTYPES[dtype][0]) for name, value in model.named_parameters()}
        save_file({name: value.contiguous() for name, value in weights.items()}, str(folder / WEIGHTS))
        (folder / SHAPE).write_text(json.dumps(model.shape.to_dict(), indent=1) + "\n", "utf-8")
        (folder / CONFIG).write_text(dump_config(_without_places(source.config)), "utf-8")
        entry = None if tokenizer is None else _tokenizer(tokenizer, folder)
        record = source.record
        about = {
            "format": FORMAT, "run": source.trained.run.name, "step": int(record["step"]),
            "tokens": int(record["tokens"]), "dtype": dtype, "tokenizer": None if entry is None else asdict(entry),
        }  # fmt: skip
        (folder / README).write_text(readme(about, model), "utf-8")
        _seal(folder, about)


def _without_places(config: RunConfig) -> RunConfig:
    """The cache of this machine is not the next one's."""
    return config.model_copy(update={"data": config.data.model_copy(update={"cache": None})})


def _check_free(out: Path) -> None:
    if out.exists() or out.is_symlink():
        raise UserError(f"{out} exists already and is not overwritten; name another folder, or remove it")
    if not out.absolute().parent.is_dir():
        raise UserError(f"{out}: there is no folder {out.absolute().parent}; create it")


@contextlib.contextmanager
def _beside(out: Path) -> Iterator[Path]:
    """A folder that becomes `out` when the block ends without an error. UserError: the disk is full, and the like."""
    temporary = out.with_name(f"{out.name}.tmp")
    try:
        temporary.mkdir()
    except OSError as error:
        raise UserError(f"{temporary} cannot be made ({error.strerror}); remove what another export left") from error
    try:
        yield temporary
        flush_folder(temporary)
        _check_free(out)
        temporary.rename(out)
        flush_directory(out.absolute().parent)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{out} cannot be written ({error}); free space or name another folder") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _tokenizer(tokenizer: Tokenizer, folder: Path) -> TokenizerEntry:
    file = None
    if tokenizer.path is not None:
        target = folder / TOKENIZER_FILES[tokenizer.kind]
        shutil.copyfile(tokenizer.path, target)
        file = describe_file(target)
    return TokenizerEntry(tokenizer.kind, tokenizer.sha256, tokenizer.vocabulary, tokenizer.end_of_document, file)


def _seal(folder: Path, about: dict[str, Any]) -> None:
    """Flushes every file and writes the manifest of them, last."""
    files = {}
    for path in sorted(folder.iterdir()):
        with path.open("rb") as file:
            os.fsync(file.fileno())
        files[path.name] = {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
    manifest = {**about, "files": files}
    with (folder / MANIFEST).open("w", encoding="utf-8") as file:
        json.dump({**manifest, "sha256": digest(manifest)}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
