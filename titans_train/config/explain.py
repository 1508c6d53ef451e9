"""Pydantic's findings in the words of a user: path, value, limit and what to write instead.

Also `partial`: what is left of a config when some of its values are wrong, so that the checks across sections still
run on the rest and everything is reported at once.
"""

from __future__ import annotations

import math
import types
from collections.abc import Callable, Sequence
from typing import Any, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from titans_train.config.errors import Problem, closest, show
from titans_train.config.schema import RunConfig
from titans_train.config.yaml_reader import MAX_PROBLEMS, Document, plain_scalar

Error = Any  # pydantic's ErrorDetails


class UnknownValueError(Exception):
    """A check asked for a value that is missing or wrong, and therefore already reported."""


class Partial:
    """The valid values of a section as attributes; asking for another one raises UnknownValueError."""

    def __init__(self, values: dict[str, Any]) -> None:
        self.__dict__.update(values)

    def __getattr__(self, name: str) -> Any:
        raise UnknownValueError(name)


def partial(model: type[BaseModel], raw: Any, bad: Sequence[tuple[int | str, ...]]) -> Partial:
    """`raw` as `model`, without the fields at the locations `bad` (as pydantic reports them)."""
    values: dict[str, Any] = {}
    if not isinstance(raw, dict):
        return Partial(values)
    for name, field in model.model_fields.items():
        below = [loc[1:] for loc in bad if loc and loc[0] == name]
        section, many = section_of(field), sections_of(field)
        if () in below:
            continue
        if section is not None and isinstance(raw.get(name), dict):
            values[name] = partial(section, raw[name], below)
        elif many is not None and isinstance(raw.get(name), dict):
            each = raw[name].items()
            values[name] = {key: partial(many, value, [b[1:] for b in below if b[:1] == (key,)]) for key, value in each}
        elif name in raw:
            values[name] = raw[name]
        elif not field.is_required():
            values[name] = field.get_default(call_default_factory=True)
    return Partial(values)


def section_of(field: FieldInfo) -> type[BaseModel] | None:
    """The section class of a field such as `Memory` or `Recall | None`."""
    hint = field.annotation
    choices = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    return next((c for c in choices if isinstance(c, type) and issubclass(c, BaseModel)), None)


def sections_of(field: FieldInfo) -> type[BaseModel] | None:
    """The section class of a field such as `dict[str, Source] | None`, whose keys a user names."""
    hint = field.annotation
    choices = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    values = [get_args(c)[1] for c in choices if get_origin(c) is dict]
    return next((v for v in values if isinstance(v, type) and issubclass(v, BaseModel)), None)


def explain(error: ValidationError, document: Document) -> list[Problem]:
    """One for each finding; of very many, the first."""
    found = error.errors(include_url=False)
    more = [Problem("", f"and {len(found) - MAX_PROBLEMS} more")] if len(found) > MAX_PROBLEMS else []
    return [*(_problem(e, document) for e in found[:MAX_PROBLEMS]), *more]


def _problem(error: Error, document: Document) -> Problem:
    loc = tuple(str(part) for part in error["loc"])
    value, context = error["input"], error.get("ctx", {})
    where = document.places.get(loc, "")
    if error["type"] == "missing":
        message, suggestion = _missing(loc)
        where = document.places.get(loc[:-1], "")
    elif error["type"] == "extra_forbidden":
        message, suggestion = "unknown key", _similar_key(loc)
    else:
        writer = _WRITERS.get(error["type"])
        message, suggestion = writer(value, context) if writer else (f"{show(value)}: {error['msg']}", "")
        if suggestion == "" and (description := _description(loc)):
            suggestion = f"meaning: {description}"
    return Problem(".".join(loc), message, suggestion, where)


# What to say for each kind of pydantic error: (value, context) -> (message, suggestion).
Writer = Callable[[Any, dict[str, Any]], tuple[str, str]]


def _number(kind: str) -> Writer:
    def write(value: Any, context: dict[str, Any]) -> tuple[str, str]:
        message = f"{show(value)} is not {kind}"
        if isinstance(value, str):
            number = plain_scalar(value.strip().replace("_", "").replace(",", ""))
            if isinstance(number, int | float) and not isinstance(number, bool):
                return message, f"write {number:g}" if isinstance(number, float) else f"write {number}, without quotes"
        if isinstance(value, float) and math.isfinite(value):
            return message, f"write {round(value)}"
        return message, ""

    return write


def _limit(key: str, words: str, step: int) -> Writer:
    def write(value: Any, context: dict[str, Any]) -> tuple[str, str]:
        limit = context[key]
        nearest = limit + step if isinstance(value, int) and isinstance(limit, int) else limit
        known = step == 0 or (isinstance(nearest, int) and isinstance(value, int))
        remedy = f"use {nearest}" if known else ""
        return f"{show(value)} is refused, the limit is {words} {limit}", remedy

    return write


def _choice(value: Any, context: dict[str, Any]) -> tuple[str, str]:
    choices = [c.strip("'") for c in context["expected"].replace(" or ", ", ").split(", ")]
    similar = closest(str(value).lower(), choices)
    return f"{show(value)} is none of {', '.join(choices)}", f"did you mean {similar}?" if similar else ""


def _boolean(value: Any, context: dict[str, Any]) -> tuple[str, str]:
    words = {"on": "true", "yes": "true", "1": "true", "off": "false", "no": "false", "0": "false"}
    return f"{show(value)} is not a boolean", f"write {words.get(str(value).lower(), 'true or false')}"


def _text(value: Any, context: dict[str, Any]) -> tuple[str, str]:
    remedy = f'write it in quotes: "{show(value)}"' if isinstance(value, int | float) else ""
    return f"{show(value)} is not text", remedy


def _pattern(value: Any, context: dict[str, Any]) -> tuple[str, str]:
    kept = "".join(c if c.isascii() and (c.isalnum() or c in "._-") else "-" for c in str(value)).lstrip("._-")
    message = f"{show(value)}: up to 128 letters, digits, '.', '_' and '-', a letter or digit first"
    return message, f"use {kept[:128]}" if kept else "use a name such as run-1"


def _section(value: Any, context: dict[str, Any]) -> tuple[str, str]:
    return f"{show(value)} is not a section", "write its keys below it, indented, or remove the line"


_WRITERS: dict[str, Writer] = {
    "int_type": _number("an integer"),
    "int_from_float": _number("an integer"),
    "float_type": _number("a number"),
    "finite_number": lambda value, context: (f"{show(value)} is not a finite number", ""),
    "bool_type": _boolean,
    "string_type": _text,
    "string_too_short": lambda value, context: ("empty text is refused", ""),
    "string_pattern_mismatch": _pattern,
    "literal_error": _choice,
    "greater_than_equal": _limit("ge", "at least", 0),
    "less_than_equal": _limit("le", "at most", 0),
    "greater_than": _limit("gt", "above", 1),
    "less_than": _limit("lt", "below", -1),
    "model_type": _section,
    "dict_type": _section,
}


def _missing(loc: tuple[str, ...]) -> tuple[str, str]:
    field = _field(loc)
    section = section_of(field) if field is not None else None
    if section is not None:
        required = [name for name, f in section.model_fields.items() if f.is_required()]
        needed = f"with at least {', '.join(required)}" if required else f"with {', '.join(section.model_fields)}"
        return "the section is missing", f"write '{loc[-1]}:' {needed}"
    example = "value" if field is None else _example(field)
    return "required, but not given", f"write '{loc[-1]}: {example}' below '{'.'.join(loc[:-1])}:'"


def _example(field: FieldInfo) -> str:
    choices = get_args(field.annotation)
    if choices and isinstance(choices[0], str):
        return " | ".join(choices)
    return {int: "<an integer>", float: "<a number>"}.get(field.annotation, "<text>")  # type: ignore[arg-type]


def _field(loc: tuple[str, ...]) -> FieldInfo | None:
    model: type[BaseModel] | None = RunConfig
    field: FieldInfo | None = None
    many: type[BaseModel] | None = None
    for part in loc:
        if many is not None:  # `part` is a name that the user gave
            field, model, many = None, many, None
            continue
        field = model.model_fields.get(part) if model is not None else None
        model, many = (section_of(field), sections_of(field)) if field is not None else (None, None)
    return field


def _description(loc: tuple[str, ...]) -> str:
    field = _field(loc)
    return field.description or "" if field is not None else ""


def _all_keys(model: type[BaseModel], prefix: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    keys: list[tuple[str, ...]] = []
    for name, field in model.model_fields.items():
        keys.append((*prefix, name))
        section, many = section_of(field), sections_of(field)
        if section is not None:
            keys += _all_keys(section, (*prefix, name))
        elif many is not None:
            keys += _all_keys(many, (*prefix, name, "NAME"))
    return keys


def _similar_key(loc: tuple[str, ...]) -> str:
    """The key of the same section most like this one, else the same or a similar key of another section."""
    keys = _all_keys(RunConfig)
    beside = [k for k in keys if len(k) == len(loc)]
    siblings = [k[-1] for k in beside if all(a in (b, "NAME") for a, b in zip(k[:-1], loc[:-1], strict=True))]
    similar = closest(loc[-1], siblings)
    if similar is not None:
        return f"did you mean {'.'.join((*loc[:-1], similar))}?"
    same_name = [k for k in keys if k[-1] == loc[-1] and len(k) > 1]
    if not same_name:
        other = closest(loc[-1], [k[-1] for k in keys])
        same_name = [k for k in keys if k[-1] == other]
    if same_name:
        return f"did you mean {'.'.join(same_name[0])}?"
    return f"known keys here: {', '.join(siblings)}"
