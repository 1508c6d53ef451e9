"""Text to token ids and back: bytes, a Hugging Face tokenizer.json, or a SentencePiece tokenizer.model.

A document always ends with one end-of-document token; text can never produce that token by itself.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from data_prep import token_bytes
from data_prep.errors import PrepareError
from data_prep.manifest import FILE_NAME, LARGEST, Manifest, TokenizerEntry
from data_prep.manifest_checks import TOKENIZER_FILES
from titans_train.untrusted import read_bounded

TOKENIZER_FILE, MODEL_FILE = TOKENIZER_FILES["huggingface"], TOKENIZER_FILES["sentencepiece"]
_LARGEST_FILE = 256 << 20  # bytes; those of the largest vocabularies are below 40 MB
END_TOKENS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "[EOS]", "<EOS>")

Tokens = NDArray[np.integer[Any]]


class Tokenizer(Protocol):
    """Can be pickled; a worker process reads its file again."""

    kind: str
    sha256: str
    vocabulary: int  # ids are below this
    end_of_document: int
    path: Path | None  # the file it was read from

    def encode(self, texts: Sequence[str]) -> list[Tokens]:
        """Token ids of each text, without the end-of-document token."""

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of token ids; end-of-document tokens and ids outside the vocabulary give nothing."""

    def bytes_of_tokens(self) -> token_bytes.Table | None:
        """Of text, by token id (token_bytes.py); None: not to be had."""

    def spec(self) -> dict[str, Any]:
        """What `from_spec` makes the same tokenizer of, as plain JSON: kind, path and end."""


class ByteTokenizer:
    """Token id = byte of the UTF-8 text; 256 ends a document."""

    kind = "bytes"
    sha256 = hashlib.sha256(b"bytes: 256 byte values, 256 = end of document").hexdigest()
    vocabulary = 257
    end_of_document = 256
    path: Path | None = None

    def encode(self, texts: Sequence[str]) -> list[Tokens]:
        return [np.frombuffer(text.encode("utf-8"), np.uint8) for text in texts]

    def decode(self, tokens: Sequence[int]) -> str:
        return bytes(token for token in tokens if 0 <= token < 256).decode("utf-8", errors="replace")

    def bytes_of_tokens(self) -> token_bytes.Table | None:
        return token_bytes.of_bytes()

    def spec(self) -> dict[str, Any]:
        return {"kind": self.kind, "path": None, "end": self.end_of_document}


class _FileTokenizer:
    """What the tokenizers that are read from a file share."""

    kind: str
    path: Path | None
    end_of_document: int

    def spec(self) -> dict[str, Any]:
        return {"kind": self.kind, "path": str(self.path), "end": self.end_of_document}

    def __reduce__(self) -> tuple[Any, ...]:
        return from_spec, (self.spec(),)


class HuggingFaceTokenizer(_FileTokenizer):
    """A tokenizer.json of the `tokenizers` library, without the special tokens its template would add."""

    kind = "huggingface"

    def __init__(self, path: Path, end_token: str | int | None = None) -> None:
        """`end_token` ends a document: its text or id; None looks for a usual name.

        PrepareError when the file is no tokenizer, has no end-of-document token, or gives that token for a text.
        """
        import tokenizers

        self.path: Path | None = path
        content = _content(path)
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(content.decode("utf-8"))
        except Exception as error:  # the library raises bare Exception for a file it cannot parse
            raise PrepareError(f"{path} is not a tokenizer.json ({error}); save one with Tokenizer.save") from error
        # Without this, "<|endoftext|>" written in a text would end the document.
        self._tokenizer.encode_special_tokens = True
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        names: dict[str, int] = self._tokenizer.get_vocab(with_added_tokens=True)
        self.vocabulary = max(names.values(), default=-1) + 1
        self.end_of_document = _end_id(names, path, end_token)
        self.sha256 = _sha256(content, self.end_of_document)
        end_text = self._tokenizer.id_to_token(self.end_of_document)
        for text in (end_text, f"a{end_text}b", f"a {end_text} b"):
            if self.end_of_document in self._tokenizer.encode(text, add_special_tokens=False).ids:
                raise PrepareError(
                    f"{path} reads the text {end_text!r} in a document as the end of a document; mark the token as "
                    "special in it, or name another one with --end-token"
                )

    def encode(self, texts: Sequence[str]) -> list[Tokens]:
        encoded = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(item.ids, np.uint32) for item in encoded]

    def decode(self, tokens: Sequence[int]) -> str:
        return str(self._tokenizer.decode(_known(tokens, self), skip_special_tokens=False))

    def bytes_of_tokens(self) -> token_bytes.Table | None:
        return token_bytes.of_huggingface(self._tokenizer, self.vocabulary, self.end_of_document)


class SentencePieceTokenizer(_FileTokenizer):
    """A .model file of the `sentencepiece` library; the begin and end symbols it could add are never added."""

    kind = "sentencepiece"

    def __init__(self, path: Path, end_token: str | int | None = None) -> None:
        """`end_token` ends a document: a control symbol or its id; None takes the model's own end of sentence.

        PrepareError when the file is no model, or has no such control symbol.
        """
        import sentencepiece

        self.path: Path | None = path
        content = _content(path)
        self._model = sentencepiece.SentencePieceProcessor()
        try:
            self._model.load_from_serialized_proto(content)
        except RuntimeError as error:
            raise PrepareError(f"{path} is not a SentencePiece model ({error}); give its .model file") from error
        self.vocabulary = int(self._model.get_piece_size())
        self.end_of_document = self._end_id(end_token)
        self.sha256 = _sha256(content, self.end_of_document)

    def encode(self, texts: Sequence[str]) -> list[Tokens]:
        encoded = self._model.encode(list(texts), out_type=int, num_threads=1, add_bos=False, add_eos=False)
        return [np.array(ids, np.uint32) for ids in encoded]

    def decode(self, tokens: Sequence[int]) -> str:
        return str(self._model.decode(_known(tokens, self)))

    def bytes_of_tokens(self) -> token_bytes.Table | None:
        return token_bytes.of_sentencepiece(self._model)

    def _end_id(self, end_token: str | int | None) -> int:
        if end_token is None:
            end = int(self._model.eos_id())
            if end < 0:
                raise PrepareError(f"{self.path} has no end-of-sentence symbol; name a control symbol with --end-token")
            return end
        if isinstance(end_token, int):
            end = end_token
        else:
            end = int(self._model.piece_to_id(end_token))
            if self._model.id_to_piece(end) != end_token:
                raise PrepareError(f"{self.path} has no symbol {end_token!r}; name one it has with --end-token")
        # Only a control symbol is never the reading of a text.
        if not 0 <= end < self.vocabulary or not self._model.is_control(end):
            raise PrepareError(f"{self.path}: {end_token!r} is no control symbol; name one with --end-token, as </s>")
        return end


def load_tokenizer(text: str, end_token: str | None = None) -> Tokenizer:
    """`text` is what --tokenizer takes: "bytes", a tokenizer.json, a .model file, or a folder that holds one."""
    if text == ByteTokenizer.kind:
        return ByteTokenizer()
    if "://" in text:
        raise PrepareError(f"tokenizer {text}: must be a local file; copy it here first")
    path = Path(text).expanduser().absolute()
    if path.is_dir():
        found = [path / name for name in TOKENIZER_FILES.values() if (path / name).is_file()]
        if not found:
            raise PrepareError(f"tokenizer {path}: holds no {TOKENIZER_FILE} or {MODEL_FILE}; name the file itself")
        path = found[0]
    return _load("sentencepiece" if path.suffix == ".model" else "huggingface", path, end_token)


def from_spec(spec: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer whose `spec()` this is; its file must lie where it was."""
    return _load(spec["kind"], Path(spec["path"] or ""), spec["end"])


def prepared_tokenizer(entry: TokenizerEntry, folder: Path) -> Tokenizer:
    """The tokenizer that a manifest describes, its file in a local folder; PrepareError when the file has changed."""
    if entry.kind not in (ByteTokenizer.kind, *TOKENIZER_FILES):
        raise PrepareError(f"{folder}: unknown kind of tokenizer {entry.kind!r}; it was prepared by a newer version")
    path = folder / entry.file.name if entry.file is not None else Path()
    stored = _load(entry.kind, path, entry.end_of_document)
    if stored.sha256 != entry.sha256:
        raise PrepareError(
            f"{path} has changed: sha256 {stored.sha256}, the manifest says {entry.sha256}; prepare the data again"
        )
    return stored


def load_prepared_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer a local prepared folder was made with; PrepareError when its file has changed since."""
    path = folder / FILE_NAME
    try:
        entry = Manifest.from_text(read_bounded(path, LARGEST).decode("utf-8"), str(path)).tokenizer
    except (OSError, UnicodeDecodeError) as error:
        raise PrepareError(f"cannot read {path}: {error}; name a prepared folder") from error
    return prepared_tokenizer(entry, folder)


def _load(kind: str, path: Path, end_token: str | int | None) -> Tokenizer:
    if kind == ByteTokenizer.kind:
        return ByteTokenizer()
    return (SentencePieceTokenizer if kind == "sentencepiece" else HuggingFaceTokenizer)(path, end_token)


def _content(path: Path) -> bytes:
    try:
        return read_bounded(path, _LARGEST_FILE)
    except OSError as error:
        raise PrepareError(
            f"tokenizer {path}: {error.strerror}; give bytes, a tokenizer.json or a SentencePiece .model file"
        ) from error


def _sha256(content: bytes, end: int) -> str:
    return hashlib.sha256(content + f"\nend={end}".encode()).hexdigest()


def _end_id(names: Mapping[str, int], path: Path, end_token: str | int | None) -> int:
    if isinstance(end_token, int):
        if end_token not in names.values():
            raise PrepareError(f"{path} has no token {end_token}; the file is not the one it was")
        return end_token
    candidates: Iterable[str] = END_TOKENS if end_token is None else (end_token,)
    for name in candidates:
        if name in names:
            return names[name]
    raise PrepareError(
        f"{path} has none of the end-of-document tokens {' '.join(candidates)}; name the one to use with --end-token"
    )


def _known(tokens: Sequence[int], tokenizer: Tokenizer) -> list[int]:
    return [int(token) for token in tokens if 0 <= token < tokenizer.vocabulary and token != tokenizer.end_of_document]
