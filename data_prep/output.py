"""The prepared folder or prefix itself: what lies there already, and putting a finished one in its place."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from data_prep.claim import Claim
from data_prep.durable import flush_directory, flush_folder
from data_prep.errors import PrepareError
from data_prep.manifest import FILE_NAME, Manifest, ManifestError
from data_prep.storage import exists, join, list_files, read_bytes, upload
from data_prep.work import Place

_NO_REPLACING = "{} is a mount point, which cannot be replaced{}; name a folder below it, as --output {}/prepared"
_REMEDY = "name another --output, or remove {} if it is no longer needed"


def existing(place: Place, wanted: dict[str, Any]) -> Manifest | None:
    """The manifest of an output that holds exactly what is wanted; None where none lies; else PrepareError."""
    remedy = _REMEDY.format("the prefix" if place.remote else "the folder")
    if place.remote is None:
        if not place.local.exists():
            return None
        if not place.local.is_dir():
            raise PrepareError(f"{place.output} exists and is not a folder; {remedy}")
        if not any(place.local.iterdir()):
            if os.path.ismount(place.local):
                raise PrepareError(_NO_REPLACING.format(place.output, "", place.output))
            return None
        if not (place.local / FILE_NAME).is_file():
            raise PrepareError(f"{place.output} exists and holds something else (no {FILE_NAME}); {remedy}")
    path = join(place.output, FILE_NAME)
    if not exists(path):
        return None
    try:
        manifest = Manifest.from_text(read_bytes(path).decode("utf-8"), path)
    except (ManifestError, UnicodeDecodeError) as error:
        raise PrepareError(f"{error}; {remedy}") from error
    _compare(place, manifest, wanted, remedy)
    return manifest


def _compare(place: Place, manifest: Manifest, wanted: dict[str, Any], remedy: str) -> None:
    differing = [
        f"{key} {manifest.settings.get(key)!r}, now {wanted.get(key)!r}"
        for key in sorted(wanted.keys() | manifest.settings.keys())
        if manifest.settings.get(key) != wanted.get(key)
    ]
    if differing:
        raise PrepareError(f"{place.output} was prepared with other settings ({'; '.join(differing)}); {remedy}")
    sizes = stored_sizes(place.output)
    for name, entry in manifest.files():
        if sizes.get(name) != entry.bytes:
            state = f"has {sizes[name]} bytes, expected {entry.bytes}" if name in sizes else "is missing"
            raise PrepareError(
                f"{join(place.output, name)} {state}; remove {place.output} and prepare it again, or name another "
                "--output"
            )


def stored_sizes(output: str) -> dict[str, int]:
    """Path below `output` -> bytes, of all that lies there."""
    if not exists(output):
        return {}
    return {info.path.removeprefix(output).lstrip("/"): info.bytes for info in list_files(output)}


def check_remote_empty(place: Place) -> None:
    """PrepareError where a new upload would mix with what is there."""
    if place.remote and (names := sorted(stored_sizes(place.output))):
        raise PrepareError(
            f"{place.output} holds something else ({len(names):,} objects such as {names[0]}, no {FILE_NAME}), and "
            f"{place.work} no unfinished work to go on with; {_REMEDY.format('them')}, or name the working folder "
            "with --work"
        )


def check_replaceable(place: Place) -> None:
    """PrepareError where a local output exists, empty, and a folder cannot take its place as in the end."""
    if place.remote or not place.local.exists():
        return
    trial = place.beside / "trial"
    trial.mkdir(exist_ok=True)
    try:
        os.replace(trial, place.local)
    except OSError as error:
        trial.rmdir()
        raise PrepareError(_NO_REPLACING.format(place.output, f" ({error.strerror})", place.output)) from error


def publish(place: Place, manifest: Manifest, claim: Claim | None) -> None:
    """Put the staged files in their place, the manifest last: the output is whole or not there."""
    text = manifest.to_text()
    if place.remote is None:
        (place.staging / FILE_NAME).write_text(text, "utf-8")
        flush_folder(place.staging)
        place.local.parent.mkdir(parents=True, exist_ok=True)
        os.replace(place.staging, place.local)
        flush_directory(place.local.parent)
        return
    assert claim is not None
    claim.check()
    for path in sorted(path for path in place.staging.rglob("*") if path.is_file()):
        upload(path, join(place.remote, path.relative_to(place.staging).as_posix()))
    manifest_path = Path(place.work / FILE_NAME)
    manifest_path.write_text(text, "utf-8")
    claim.check()
    upload(manifest_path, join(place.remote, FILE_NAME))
