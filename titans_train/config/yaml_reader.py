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

from titans_train.config.errors import Problem

Path = tuple[str, ...]
MAX_DEPTH = 16  # a config has 3 levels; more is a mistake, or an attack on the reader's stack

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


class _Reader:
    def __init__(self, events: Iterator[Any], name: str, into: Document) -> None:
        self.events, self.name, self.into = events, name, into

    def where(self, event: Any) -> str:
        return f"{self.name}:{event.start_mark.line + 1}"

    def report(self, event: Any, path: Path, message: str, suggestion: str = "") -> None:
        self.into.problems.append(Problem(".".join(path), message, suggestion, self.where(event)))

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
                    message = f"a config is a mapping of sections, this is {tree!r}"
                    self.report(first, (), message, "write 'run:', 'model:', …")

    def value(self, event: Any, path: Path) -> Any:
        if isinstance(event, yaml.AliasEvent):
            self.report(event, path, f"alias *{event.anchor}: aliases are not read", "write the value out")
            return None
        if event.tag is not None:
            self.report(event, path, f"YAML tag {event.tag}: tags are refused", "remove the tag")
        if len(path) > MAX_DEPTH:
            raise yaml.YAMLError(f"nested more than {MAX_DEPTH} deep at line {event.start_mark.line + 1}")
        if isinstance(event, yaml.ScalarEvent):
            return event.value if event.style else plain_scalar(event.value)
        return self.mapping(path) if isinstance(event, yaml.MappingStartEvent) else self.sequence(path)

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
                self.report(event, (*path, event.value), f"YAML tag {event.tag}: tags are refused", "remove the tag")
            return str(event.value)
        text = str(self.value(event, path))
        self.report(event, path, f"a key must be a word, this is {text}", "write 'key: value'")
        return text
