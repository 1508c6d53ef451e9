"""Text to token ids and back: bytes, or any Hugging Face tokenizer.json.

A document always ends with one end-of-document token; text can never produce that token by itself.
"""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from data_prep.errors import PrepareError
from data_prep.manifest import FILE_NAME, Manifest

TOKENIZER_FILE = "tokenizer.json"
END_TOKENS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "[EOS]", "<EOS>")


class Tokenizer(Protocol):
    kind: str
    sha256: str
    vocabulary: int  # ids are below this
    end_of_document: int
    path: Path | None  # the file it was read from

    def encode(self, texts: Sequence[str]) -> list[NDArray[np.integer[Any]]]:
        """Token ids of each text, without the end-of-document token."""

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of token ids; end-of-document tokens and ids outside the vocabulary give nothing."""


class ByteTokenizer:
    """Token id = byte of the UTF-8 text; 256 ends a document."""

    kind = "bytes"
    sha256 = hashlib.sha256(b"bytes: 256 byte values, 256 = end of document").hexdigest()
    vocabulary = 257
    end_of_document = 256
    path: Path | None = None

    def encode(self, texts: Sequence[str]) -> list[NDArray[np.integer[Any]]]:
        return [np.frombuffer(text.encode("utf-8"), np.uint8) for text in texts]

    def decode(self, tokens: Sequence[int]) -> str:
        return bytes(token for token in tokens if 0 <= token < 256).decode("utf-8", errors="replace")


class HuggingFaceTokenizer:
    """A tokenizer.json of the `tokenizers` library, without the special tokens its template would add."""

    kind = "huggingface"

    def __init__(self, path: Path, end_token: str | int | None = None) -> None:
        """`end_token` ends a document: its text or id; None looks for a usual name.

        PrepareError when the file is no tokenizer or has no end-of-document token.
        """
        self.path: Path | None = path
        try:
            content = path.read_bytes()
            library = importlib.import_module("tokenizers")
            self._tokenizer = library.Tokenizer.from_str(content.decode("utf-8"))
        except OSError as error:
            raise PrepareError(f"tokenizer {path}: {error.strerror}; give bytes or a tokenizer.json") from error
        except ImportError as error:
            raise PrepareError("a tokenizer file needs the tokenizers package: pip install tokenizers") from error
        except Exception as error:  # the library raises bare Exception for a file it cannot parse
            raise PrepareError(f"{path} is not a tokenizer.json ({error}); save one with Tokenizer.save") from error
        # Without this, "<|endoftext|>" written in a text would end the document.
        self._tokenizer.encode_special_tokens = True
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        names: dict[str, int] = self._tokenizer.get_vocab(with_added_tokens=True)
        self.vocabulary = max(names.values(), default=-1) + 1
        self.end_of_document = _end_id(names, path, end_token)
        self.sha256 = hashlib.sha256(content + f"\nend={self.end_of_document}".encode()).hexdigest()

    def encode(self, texts: Sequence[str]) -> list[NDArray[np.integer[Any]]]:
        encoded = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(item.ids, np.uint32) for item in encoded]

    def decode(self, tokens: Sequence[int]) -> str:
        known = [token for token in tokens if 0 <= token < self.vocabulary and token != self.end_of_document]
        text: str = self._tokenizer.decode(known, skip_special_tokens=False)
        return text


def _end_id(names: dict[str, int], path: Path, end_token: str | int | None) -> int:
    if isinstance(end_token, int):
        return end_token
    candidates = END_TOKENS if end_token is None else (end_token,)
    for name in candidates:
        if name in names:
            return names[name]
    raise PrepareError(
        f"{path} has none of the end-of-document tokens {' '.join(candidates)}; name the one to use with --end-token"
    )


def load_tokenizer(text: str, end_token: str | None = None) -> Tokenizer:
    """`text` is what --tokenizer takes: "bytes" or the path of a tokenizer.json."""
    return ByteTokenizer() if text == "bytes" else HuggingFaceTokenizer(Path(text).expanduser(), end_token)


def load_prepared_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer a local prepared folder was made with; PrepareError when its file has changed since."""
    path = folder / FILE_NAME
    try:
        entry = Manifest.from_text(path.read_text("utf-8"), str(path)).tokenizer
    except OSError as error:
        raise PrepareError(f"cannot read {path}: {error.strerror}; name a prepared folder") from error
    if entry.kind == ByteTokenizer.kind:
        return ByteTokenizer()
    assert entry.file is not None
    stored = HuggingFaceTokenizer(folder / entry.file.name, entry.end_of_document)
    if stored.sha256 != entry.sha256:
        raise PrepareError(
            f"{folder / entry.file.name} has changed: sha256 {stored.sha256}, the manifest says {entry.sha256}; "
            "prepare the data again"
        )
    return stored
