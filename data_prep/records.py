"""One record (a line of JSON, a text, a value of a table) to a document, or to the reason why it is none."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any

from data_prep.errors import PrepareError

BROKEN_JSON = "broken JSON"
NOT_AN_OBJECT = "not an object"
MISSING_FIELD = "missing field"
NOT_TEXT = "not text"
INVALID_UTF8 = "invalid UTF-8"
EMPTY = "empty"
TOO_LONG = "too long"
HALF_SURROGATE = "half a surrogate pair"
UNREADABLE_FILE = "unreadable file"
REASONS = (
    BROKEN_JSON, NOT_AN_OBJECT, MISSING_FIELD, NOT_TEXT, INVALID_UTF8, EMPTY, TOO_LONG, HALF_SURROGATE, UNREADABLE_FILE,
)  # fmt: skip
EXCERPT_CHARACTERS = 200
_SHOWN_FIELDS = 20


@dataclass(frozen=True)
class ReadSettings:
    """How files become documents. Fields may be dotted paths ("meta.source") in JSON objects and Parquet structs."""

    text_field: str = "text"
    source_field: str | None = None  # of a document's data source: a text or number; anything else is none
    separator: str | None = None  # cuts text files into documents and is in none of them
    max_document_bytes: int = 16 << 20  # of UTF-8 text; tokenising takes up to 135 bytes of memory for each

    def __post_init__(self) -> None:
        if self.separator == "":
            raise PrepareError("the separator is empty; give a text that stands between documents, as <|endoftext|>")
        if self.max_document_bytes < 1:
            raise PrepareError(f"at most {self.max_document_bytes} bytes per document: must be 1 or more")
        for what, text in (("separator", self.separator), ("field", self.text_field), ("field", self.source_field)):
            if text is not None and not _is_unicode(text):
                raise PrepareError(f"the {what} {text!r} is not valid UTF-8; give a text that is, in a UTF-8 terminal")


@dataclass(frozen=True, slots=True)
class Document:
    """A text that is not blank, valid Unicode, and at most as long as allowed."""

    line: int  # from 1: the line, row or separated document within this unit's part of the file; 1 for a whole file
    file: int  # index in the unit's files
    text: str
    source: str | None


@dataclass(frozen=True, slots=True)
class Rejected:
    """A record that is no document; `reason` is one of REASONS, `detail` says more, `excerpt` how it begins."""

    line: int
    file: int
    reason: str
    detail: str
    excerpt: str


class Refusal(Exception):
    """Why a record is no document: a reason and a detail."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail = reason, detail


def parse_line(line: bytes | bytearray, settings: ReadSettings) -> tuple[str, str | None]:
    """Text and source of one JSON object. Refusal says what it lacks."""
    try:
        record = json.loads(decode(line))
    except RecursionError as error:
        raise Refusal(BROKEN_JSON, "nested too deep") from error
    except ValueError as error:  # also a number of too many digits
        raise Refusal(BROKEN_JSON, str(error)) from error
    if not isinstance(record, dict):
        raise Refusal(NOT_AN_OBJECT, f"holds {_kind(record)}, expected an object")
    found, value = _field(record, settings.text_field)
    if not found:
        fields = ", ".join(sorted(record)[:_SHOWN_FIELDS])
        raise Refusal(MISSING_FIELD, f"field {settings.text_field!r} is missing; fields: {fields}")
    source = _field(record, settings.source_field)[1] if settings.source_field is not None else None
    return check_text(value, settings), check_source(source)


def check_text(value: Any, settings: ReadSettings) -> str:
    """A value that may be a document's text (bytes: as UTF-8). Refusal says why it is none."""
    if isinstance(value, bytes):
        value = decode(value)
    if not isinstance(value, str):
        raise Refusal(NOT_TEXT, f"field {settings.text_field!r} is {_kind(value)}")
    if not value or value.isspace():
        raise Refusal(EMPTY, "nothing but white space" if value else "no characters")
    size = len(value) if value.isascii() else _utf8_bytes(value)
    if size > settings.max_document_bytes:
        raise too_long(size, settings)
    return value


def check_source(value: Any) -> str | None:
    """A non-empty text, with "?" for halves of surrogate pairs; the digits of a number; None for anything else."""
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        return str(value)
    return value.encode("utf-8", "replace").decode("utf-8") if isinstance(value, str) and value else None


def decode(data: bytes | bytearray) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise Refusal(INVALID_UTF8, f"byte {data[error.start]:#04x} at offset {error.start}") from error


def too_long(size: int, settings: ReadSettings) -> Refusal:
    return Refusal(
        TOO_LONG, f"{size:,} bytes, at most {settings.max_document_bytes:,} are allowed (--max-document-size)"
    )


def excerpt(value: Any) -> str:
    """The first characters of a record, as text that can be written anywhere."""
    if isinstance(value, Refusal):
        return ""
    if isinstance(value, bytes | bytearray):
        text = value[: 4 * EXCERPT_CHARACTERS].decode("utf-8", "replace")
    else:
        text = str(value)[:EXCERPT_CHARACTERS].encode("utf-8", "replace").decode("utf-8")
    return text[:EXCERPT_CHARACTERS]


def _is_unicode(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _kind(value: Any) -> str:
    """What a value is, in words for people who write JSON."""
    if value is None or isinstance(value, bool):
        return "null" if value is None else "true or false"
    names = {str: "a text", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return next((name for kind, name in names.items() if isinstance(value, kind)), f"a {type(value).__name__}")


def _utf8_bytes(text: str) -> int:
    try:
        return len(text.encode("utf-8"))
    except UnicodeEncodeError as error:
        raise Refusal(HALF_SURROGATE, f"character {ord(text[error.start]):#06x} at {error.start}") from error


def _field(record: dict[str, Any], name: str) -> tuple[bool, Any]:
    """(is there, value); a key that holds the whole name with its dots goes first."""
    if name in record:
        return True, record[name]
    value: Any = record
    for part in name.split("."):
        if not isinstance(value, dict) or part not in value:
            return False, None
        value = value[part]
    return True, value
