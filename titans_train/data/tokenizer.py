"""The tokenizer that prepared data were made with, wherever they lie."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from data_prep.addresses import is_remote
from data_prep.errors import PrepareError
from data_prep.manifest import FILE_NAME, Manifest, ManifestError
from data_prep.tokenizer import ByteTokenizer, Tokenizer, load_prepared_tokenizer, prepared_tokenizer
from titans_train.data.cache import Cache
from titans_train.data.errors import DataError
from titans_train.data.remote import Remote
from titans_train.data.shards import text_hash
from titans_train.data.verified import VerifiedFiles, read_manifest

if TYPE_CHECKING:
    from titans_train.config.schema import Data


def paths_of(data: Data) -> Iterator[str]:
    """Folders and URLs that a config names, in order."""
    if data.path is not None:
        yield data.path
    yield from (source.path for source in (data.sources or {}).values())


def open_tokenizer(path: str, cache: Cache, remote: Remote) -> Tokenizer:
    """Of a prepared folder or URL; a remote file goes into the cache. DataError: none there, or it has changed."""
    try:
        if not is_remote(path):
            return load_prepared_tokenizer(Path(path).expanduser())
        text = read_manifest(path, cache, remote)
        entry = Manifest.from_text(text, f"{path}/{FILE_NAME}").tokenizer
        if entry.file is None:
            return ByteTokenizer()
        files = VerifiedFiles(path, text_hash(text), cache, remote)
        return prepared_tokenizer(entry, files.copy("", entry.file).parent)
    except (PrepareError, ManifestError) as error:
        raise DataError(str(error)) from error
