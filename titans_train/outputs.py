"""Files that a command is to write, checked before it works for hours."""

from __future__ import annotations

import errno
import os
import tempfile
from pathlib import Path

from titans_train.errors import UserError


def check_place(option: str, path: Path) -> None:
    """UserError where `path`, which `option` names, has no folder or is one."""
    folder = path.absolute().parent
    if path.is_dir():
        raise UserError(f"{option} {path} is a folder; name a file in it")
    if not folder.is_dir():
        raise UserError(f"{option} {path}: there is no folder {folder}; create it")


def check_file(option: str, path: Path | None) -> None:
    """UserError where the file could not be written either; leaves nothing. None: there is none to write."""
    if path is None:
        return
    check_place(option, path)
    try:
        if not path.exists():
            with tempfile.TemporaryFile(dir=path.absolute().parent):
                pass
        elif not os.access(path, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise UserError(f"{option} {path} cannot be written: {error.strerror}; name another file") from error
