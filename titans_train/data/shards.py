"""The verified store: documents by number, from shards that agree with the manifest in size and hash.

Every shard is checked when a process first opens it, in the calling thread, and whatever is wrong is raised.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import xxhash
from numpy.typing import NDArray

from data_prep.addresses import is_remote
from data_prep.manifest import FILE_NAME, Manifest, ManifestError, ShardEntry
from titans_train.data import opened
from titans_train.data.cache import Cache, clean_shared_memory
from titans_train.data.errors import DataError
from titans_train.data.lengths import read_lengths
from titans_train.data.mds import MdsFile, Tokens
from titans_train.data.remote import Remote
from titans_train.data.verified import REMEDY, VerifiedFiles, read_manifest

if TYPE_CHECKING:
    from data_prep.tokenizer import Tokenizer

_TRIES = 8  # of a file that others change or remove before it is open
_REMOTE = Remote()
Integers = NDArray[np.int64]
_Result = TypeVar("_Result")
_Failed = tuple[str, Exception]  # where, why


class ShardStore:
    """Documents of one split of a prepared folder, local or remote. Cheap to send to another process.

    `sources`: names of those read, sorted; their documents follow each other. `documents`, `tokens_total`,
    `text_bytes`: sums over them. `documents_per_shard` [shards] int64. `fingerprint`: 16 hex digits of the tokens and
    their order, wherever and however they are stored.
    """

    def __init__(
        self, path: str, split: str, cache: Cache, source: str | None = None, remote: Remote = _REMOTE
    ) -> None:
        """Read the manifest of `path`, a folder or URL. `source`: the one to read, None for all.

        DataError: no such folder, not a prepared one, of another version, without that source, or without a shard.
        """
        self.path = path.rstrip("/") if is_remote(path) else str(Path(path).expanduser().absolute())
        self.split = split
        _clean(cache)
        text = read_manifest(self.path, cache, remote)
        try:
            self.manifest = Manifest.from_text(text, f"{self.path}/{FILE_NAME}")
        except ManifestError as error:
            raise DataError(str(error)) from error
        self.sources = self._choose(source)
        entries = [self.manifest.splits[split][name] for name in self.sources]
        self.documents = sum(entry.documents for entry in entries)
        self.tokens_total = sum(entry.tokens for entry in entries)
        self.text_bytes = sum(entry.text_bytes for entry in entries)
        contents = [[entry.lengths.xxh64, *(shard.raw.xxh64 for shard in entry.shards)] for entry in entries]
        self.fingerprint = text_hash(json.dumps([self.manifest.tokenizer.sha256, self.manifest.dtype, contents]))
        # In the cache by content: one folder serves several data sets, and changed data starts anew.
        self._files = VerifiedFiles(self.path, text_hash(text), cache, remote)
        self._shards: list[tuple[str, ShardEntry]] = [
            (f"{split}/{name}", shard)
            for name, entry in zip(self.sources, entries, strict=True)
            for shard in entry.shards
        ]
        self.documents_per_shard = np.array([shard.documents for _, shard in self._shards], np.int64)
        self._ends = np.cumsum(self.documents_per_shard)
        self._begins = self._ends - self.documents_per_shard
        self.dtype = np.dtype(self.manifest.dtype).newbyteorder("<")
        # Of the open files of this process.
        self._identity = f"{cache.folder}/{self._files.name}/{split}/{','.join(self.sources)}/{self.path}"
        self._lengths: NDArray[np.int64] | None = None
        self._check_present()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_lengths": None}

    def tokenizer(self) -> Tokenizer:
        """The one that the documents were prepared with. DataError: it cannot be read, or has changed."""
        from titans_train.data.tokenizer import open_tokenizer

        return open_tokenizer(self.path, self._files.cache, self._files.remote)

    def _choose(self, source: str | None) -> tuple[str, ...]:
        known = sorted(self.manifest.splits.get(self.split, {}))
        if source is not None and any(source in sources for sources in self.manifest.splits.values()):
            return (source,) if source in known else ()  # a small source may have no document in a split
        if source is not None:
            raise DataError(
                f"{self.path}, split {self.split}, has no source {source!r}; it has {', '.join(known)}: name one of "
                "these, or prepare the data again"
            )
        return tuple(known) if source is None else (source,)

    def _check_present(self) -> None:
        """A missing shard of a local folder is refused at once; its content is checked when it is opened."""
        if is_remote(self.path):
            return
        missing = []
        for source in self.sources:
            folder = Path(self.path) / self.split / source
            try:
                present = set(os.listdir(folder)) if folder.is_dir() else set()
            except OSError as error:
                raise DataError(
                    f"cannot read {folder} ({error.strerror}); give this user read and execute permission for it and "
                    "the folders above, or set data.path to a folder that can be read"
                ) from error
            for shard in self.manifest.splits[self.split][source].shards:
                if shard.stored.name not in present:
                    missing.append(folder / shard.stored.name)
        if missing:
            more = f" and {len(missing) - 1} more shards" if len(missing) > 1 else ""
            raise DataError(f"shard {missing[0]}{more} is missing; {REMEDY}")

    def largest_shards(self, count: int) -> int:
        """Bytes that the cache needs to have the `count` largest shards at once; 0 where all are read in place."""
        return sum(sorted((self._files.room(shard) for _, shard in self._shards), reverse=True)[:count])

    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each document [documents], its end-of-document token included.

        Kept in memory, 8 bytes a document in each process: a mapped file could be changed or cut under a run.
        DataError: a lengths file that disagrees with the manifest.
        """
        if self._lengths is None:
            parts = [self._source_lengths(source) for source in self.sources]
            self._lengths = np.concatenate(parts) if len(parts) > 1 else parts[0] if parts else np.zeros(0, np.int64)
            self._lengths.setflags(write=False)
        return self._lengths

    def _source_lengths(self, source: str) -> NDArray[np.int64]:
        folder, entry = f"{self.split}/{source}", self.manifest.splits[self.split][source]
        label = f"{self.path}/{folder}/{entry.lengths.name}"

        def verified() -> bytes:
            content = self._files.copy(folder, entry.lengths).read_bytes()
            if xxhash.xxh64_hexdigest(content) != entry.lengths.xxh64:
                raise FileNotFoundError("its copy in the cache is changed again and again, by other processes")
            return content

        try:
            lengths = read_lengths(_retried(verified), entry.documents)
        except (OSError, ValueError) as error:
            raise DataError(f"{label}: {error}; {REMEDY}") from error
        if int(lengths.sum()) != entry.tokens:
            raise DataError(
                f"{label}: {len(lengths)} documents of {int(lengths.sum())} tokens, the manifest says {entry.tokens}; "
                "prepare the data again"
            )
        return lengths

    def tokens(self, document: int, begin: int, end: int) -> Tokens:
        """Tokens [begin, end) of a document, of `dtype`. DataError as `read`, or no such document."""
        self._place(document)
        out = np.empty(max(end - begin, 0), self.dtype)
        number, first, last = (np.array([value], np.int64) for value in (document, begin, end))
        self.read(number, first, last, out, np.zeros(1, np.int64))
        return out

    def read(self, documents: Integers, begins: Integers, ends: Integers, out: Tokens, positions: Integers) -> None:
        """Tokens [begin, end) of each document into `out`, of `dtype`, from `position` on in its flat order.

        Nothing else is read. DataError: a range outside of its document, a shard that cannot be trusted, or tokens
        that the tokenizer cannot have given.
        """
        lengths = self.lengths()[documents]
        shards = self._ends.searchsorted(documents, side="right")
        if (wrong := (begins < 0) | (begins > ends) | (ends > lengths)).any():
            n = int(wrong.argmax())
            raise DataError(
                f"{self._label(int(shards[n]))}, document {documents[n]}: tokens {begins[n]} to {ends[n]} of "
                f"{lengths[n]}; {REMEDY}"
            )
        index, size = documents - self._begins[shards], self.dtype.itemsize
        columns = (shards, index, (lengths - begins) * size, (ends - begins) * size, positions * size)
        pieces = list(zip(*(column.tolist() for column in columns), strict=True))
        self._settled(lambda files: self._fill(pieces, out.data.cast("B"), files))
        last = (ends == lengths) & (ends > begins)
        self._check_tokens(out.reshape(-1), documents, positions, positions + (ends - begins), last)

    def _settled(self, read: Callable[[dict[int, MdsFile]], _Failed | None]) -> None:
        """Reads, until none of the verified shards that `read` opened and put into its argument has changed since."""
        for _ in range(_TRIES):
            files: dict[int, MdsFile] = {}
            failed = read(files)
            changed = [shard for shard, file in files.items() if not file.unchanged()]
            if not changed and failed is None:
                return
            if not changed and failed is not None:
                raise DataError(f"{failed[0]}: {failed[1]}; {REMEDY}") from failed[1]
            for shard in changed:
                opened.close((self._identity, shard))  # to be checked again
        raise DataError(f"{self._label(changed[0])} changes while it is read; {REMEDY}")

    def _fill(
        self, pieces: list[tuple[int, int, int, int, int]], buffer: memoryview, files: dict[int, MdsFile]
    ) -> _Failed | None:
        """Reads pieces (shard, document in it, bytes before its end, bytes, place in the buffer).

        Puts the files it opens into `files`. Runs for every document read.
        """
        shard = 0
        preadv = os.preadv
        try:
            for shard, index, before_end, count, place in pieces:
                file = files.get(shard)
                if file is None:
                    file = files[shard] = self._file(shard)
                into = buffer[place : place + count]
                if preadv(file.descriptor, (into,), file.ends[index] - before_end) != count:
                    file.read_into(index, before_end, into)
        except DataError:
            raise
        except (OSError, ValueError) as error:
            return self._label(shard), error
        return None

    def _check_tokens(
        self, tokens: Tokens, documents: Integers, begins: Integers, ends: Integers, last: NDArray[np.bool_]
    ) -> None:
        """`begins`, `ends`: where each piece lies in `tokens`. `last`: whether it is the end of its document."""
        expected, vocabulary = self.manifest.tokenizer.end_of_document, self.manifest.tokenizer.vocabulary
        places = ends[last] - 1
        if (wrong := np.flatnonzero(tokens[places] != expected)).size:
            document, found = documents[last][wrong[0]], tokens[places[wrong[0]]]
            what = f"its last token is {found}, expected {expected}"
        elif tokens.size and int(tokens.max()) >= vocabulary:
            place = int(tokens.argmax())
            document = documents[(begins <= place) & (place < ends)][0]
            what = f"token {tokens[place]}, expected below {vocabulary}"
        else:
            return
        raise DataError(f"{self._label(self._place(int(document))[0])}, document {document}: {what}; {REMEDY}")

    def name(self, document: int) -> str:
        """What a document was called when it was prepared. DataError as `tokens`."""
        number, index = self._place(document)
        names: list[str] = []

        def read(files: dict[int, MdsFile]) -> _Failed | None:
            files[number] = self._file(number)
            try:
                names.append(files[number].name(index))
            except (OSError, ValueError) as error:
                return f"{self._label(number)}, document {document}", error
            return None

        self._settled(read)
        return names[-1]

    def _place(self, document: int) -> tuple[int, int]:
        """(number of the shard, document within it)."""
        if not 0 <= document < self.documents:
            raise DataError(f"document {document} of {self.path}, split {self.split}, which has {self.documents}")
        shard = int(self._ends.searchsorted(document, side="right"))
        return shard, document - int(self._begins[shard])

    def _label(self, number: int) -> str:
        folder, shard = self._shards[number]
        return f"shard {self.path}/{folder}/{shard.raw.name}"

    def _file(self, number: int) -> MdsFile:
        return opened.opened((self._identity, number), lambda: self._open(number))

    def _open(self, number: int) -> tuple[MdsFile, Path]:
        folder, shard = self._shards[number]

        def verified() -> MdsFile:
            path = self._files.raw_shard(folder, shard)
            try:
                file = MdsFile(path, shard.documents)
            except ValueError as error:  # checked a moment ago, so it may have been changed since
                raise FileNotFoundError(str(error)) from error
            if not file.is_at(self._files.raw_shard(folder, shard)):
                raise FileNotFoundError("it is replaced again and again, by other processes")
            return file

        try:
            file = _retried(verified)
            self._check_lengths(number, file)
            return file, self._files.marker(folder, shard.raw)
        except DataError:
            raise
        except (OSError, ValueError) as error:
            raise DataError(f"{self._label(number)}: {error}; {REMEDY}") from error

    def _check_lengths(self, number: int, file: MdsFile) -> None:
        """Pieces are found by the lengths file, so it must agree with the shard's own headers."""
        first, last = int(self._begins[number]), int(self._ends[number])
        found, expected = file.lengths(self.dtype.itemsize), self.lengths()[first:last]
        if (wrong := np.flatnonzero(found != expected)).size:
            n = int(wrong[0])
            raise DataError(
                f"{self._label(number)}, document {first + n}: expected {expected[n]} tokens, found {found[n]}; "
                f"{REMEDY}"
            )


def text_hash(text: str) -> str:
    """xxh64 of a text, 16 hex digits."""
    return xxhash.xxh64_hexdigest(text.encode("utf-8"))


@lru_cache(maxsize=16)
def _clean(cache: Cache) -> None:
    """Once per process."""
    cache.clean()
    clean_shared_memory()


def _retried(action: Callable[[], _Result]) -> _Result:
    """Again when a file was removed or replaced, as to make room in the cache, before it was open."""
    for _ in range(_TRIES - 1):
        try:
            return action()
        except FileNotFoundError:
            continue
    return action()
