"""YAML text to plain dicts, strictly: YAML 1.2 scalars, no tags, no aliases, no key twice; every key's line is kept.

PyYAML parses the text into events; the values are made here, because its YAML 1.1 reads `4e-4` as a string, `on`
as a boolean and `010` as eight, keeps the last of two equal keys in silence and runs constructors named by tags.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import yaml  # type: ignore[import-untyped]

from titans_train.config.errors import Problem, show

Path = tuple[str, ...]
MAX_DEPTH = 16  # a config has 3 levels; more is a mistake, or an attack on the reader's stack
MAX_BYTES = 1 << 18  # of a file; the longest config is below 10 kB
MAX_VALUES = 10_000  # in a file
MAX_PROBLEMS = 50  # that are named; where there are more, it is no config

_INTEGER = re.compile(r"[-+]?[0-9]+")
_BASED = re.compile(r"0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_INFINITE = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
_WORDS = {word: value for name, value in (("true", True), ("false", False), ("null", None))
          for word in (name, name.capitalize(), name.upper())} | {"": None, "~": None}  # fmt: skip


def plain_scalar(text: str) -> Any:
    """The value of unquoted text by the YAML 1.2 core schema: null, bool, int, float or str."""
    if text in _WORDS:
        return _WORDS[text]
    if _INTEGER.fullmatch(text):
        return int(text) if len(text) < 100 else text  # longer ones are no sizes, and Python limits them
    if _BASED.fullmatch(text):
        return int(text, 0)
    if _FLOAT.fullmatch(text):
        return float(text)
    if _INFINITE.fullmatch(text):
        return float(text.replace(".", "").lower())
    return text


@dataclass
class Document:
    tree: dict[str, Any] = field(default_factory=dict)
    places: dict[Path, str] = field(default_factory=dict)  # path of a key -> "file:line"
    problems: list[Problem] = field(default_factory=list)


def read_yaml(text: str, name: str) -> Document:
    """`name` is the file as it shall appear in messages. Never raises for bad text: see `problems`."""
    document = Document()
    if len(text) > MAX_BYTES:
        message = f"{len(text):,} characters, a config has at most {MAX_BYTES:,}"
        document.problems.append(Problem("", message, "give the path of a config", name))
        return document
    try:
        _Reader(yaml.parse(text, Loader=yaml.SafeLoader), name, document).document()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{name}:{mark.line + 1}" if mark else name
        details = " ".join(part for part in (error.context, error.problem) if part)
        document.problems.append(Problem("", f"not YAML: {details}", "check indentation, quotes and colons", where))
    except yaml.YAMLError as error:
        document.problems.append(Problem("", f"not YAML: {error}", "write plain text, two levels of keys", name))
    return document


def is_text(value: str) -> bool:
    """Whether it can be printed, stored and named to the operating system: no NUL, no half of a surrogate pair."""
    return not any(c == "\0" or "\ud800" <= c <= "\udfff" for c in value)


class _Reader:
    def __init__(self, events: Iterator[Any], name: str, into: Document) -> None:
        self.events, self.name, self.into = events, name, into
        self.depth = 0  # of the value being read; a key may be nested too
        self.values = 0  # read so far

    def where(self, event: Any) -> str:
        return f"{self.name}:{event.start_mark.line + 1}"

    def report(self, event: Any, path: Path, message: str, suggestion: str = "") -> None:
        self.into.problems.append(Problem(".".join(path), message, suggestion, self.where(event)))
        if len(self.into.problems) > MAX_PROBLEMS:
            raise yaml.YAMLError(f"more than {MAX_PROBLEMS} problems, the last at line {event.start_mark.line + 1}")

    def document(self) -> None:
        documents = 0
        for event in self.events:
            if isinstance(event, yaml.DocumentStartEvent):
                documents += 1
                first = next(self.events)
                if documents > 1:
                    self.report(first, (), "a second document ('---') in one file", "keep one document per file")
                    return
                tree = self.value(first, ())
                if isinstance(tree, dict):
                    self.into.tree = tree
                elif tree is not None:
                    message = f"a config is a mapping of sections, this is {show(tree)}"
                    self.report(first, (), message, "write 'run:', 'model:', …")

    def value(self, event: Any, path: Path) -> Any:
        if isinstance(event, yaml.AliasEvent):
            self.report(event, path, f"alias *{event.anchor[:60]}: aliases are not read", "write the value out")
            return None
        if event.tag is not None:
            self.report(event, path, f"YAML tag {show(event.tag)}: tags are refused", "remove the tag")
        if self.depth > MAX_DEPTH:
            raise yaml.YAMLError(f"nested more than {MAX_DEPTH} deep at line {event.start_mark.line + 1}")
        self.values += 1
        if self.values > MAX_VALUES:
            raise yaml.YAMLError(f"more than {MAX_VALUES:,} values, the last at line {event.start_mark.line + 1}")
        if isinstance(event, yaml.ScalarEvent):
            return self.scalar(event, path)
        self.depth += 1
        found = self.mapping(path) if isinstance(event, yaml.MappingStartEvent) else self.sequence(path)
        self.depth -= 1
        return found

    def scalar(self, event: Any, path: Path) -> Any:
        if not is_text(event.value):
            self.report(event, path, f"{show(event.value)} is not text", "remove the escaped character")
            return ascii(event.value)[1:-1].replace("\\", "")
        return event.value if event.style else plain_scalar(event.value)

    def sequence(self, path: Path) -> list[Any]:
        items: list[Any] = []
        while not isinstance(event := next(self.events), yaml.SequenceEndEvent):
            items.append(self.value(event, (*path, str(len(items)))))
        return items

    def mapping(self, path: Path) -> dict[str, Any]:
        found: dict[str, Any] = {}
        while not isinstance(event := next(self.events), yaml.MappingEndEvent):
            key = self.key(event, path)
            at = (*path, key)
            if key in found:
                first = self.into.places[at].rpartition(":")[2]
                self.report(event, at, f"key given twice, first on line {first}", "keep one of the two")
                self.value(next(self.events), at)
                continue
            self.into.places[at] = self.where(event)
            found[key] = self.value(next(self.events), at)
        return found

    def key(self, event: Any, path: Path) -> str:
        if isinstance(event, yaml.ScalarEvent):
            if event.tag is not None:
                message = f"YAML tag {show(event.tag)}: tags are refused"
                self.report(event, (*path, event.value), message, "remove the tag")
            return str(event.value) if event.value.isprintable() else ascii(event.value)
        text = str(self.value(event, path))
        self.report(event, path, f"a key must be a word, this is {show(text)}", "write 'key: value'")
        return text
