"""From files and overrides to a RunConfig: read, merge on the base, validate, cross-check; all problems at once."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]
from pydantic import BaseModel, ValidationError

from titans_train.config.checks import check_partial
from titans_train.config.errors import ConfigError, Problem, closest, show
from titans_train.config.explain import explain, partial
from titans_train.config.schema import RunConfig
from titans_train.config.yaml_reader import MAX_BYTES, Document, is_text, plain_scalar, read_yaml
from titans_train.untrusted import read_bounded

MAX_BASES = 16


def load_config(path: str | Path, overrides: Sequence[str] = (), world_size: int | None = None) -> RunConfig:
    """Reads `path`, then its `base:` files underneath, then `overrides` ("key.path=value") on top.

    With `world_size` (number of processes) it is also checked that the run fits on so many.
    Errors: ConfigError with every problem of reading, of values and of combinations.
    """
    merged = Document()
    fatal = _read_with_base(Path(path), [], merged)
    for override in overrides:
        _apply(override, merged)
    if fatal:  # without the text of a file, everything else would be a false alarm
        raise ConfigError(merged.problems, str(path))
    problems = list(merged.problems)
    config: RunConfig | None = None
    try:
        config = RunConfig.model_validate(merged.tree)
        checked: Any = config
    except ValidationError as error:
        problems += explain(error, merged)
        checked = partial(RunConfig, merged.tree, [e["loc"] for e in error.errors()])
    for problem in check_partial(checked, world_size):
        where = problem.where or merged.places.get(tuple(problem.path.split(".")), "")
        problems.append(Problem(problem.path, problem.message, problem.suggestion, where))
    if problems or config is None:
        raise ConfigError(problems, str(path))
    return config


def dump_config(config: RunConfig) -> str:
    """The whole config as YAML that `load_config` reads back to an equal one; every default written out."""

    def lines(section: BaseModel, indent: str) -> list[str]:
        out = []
        for name in type(section).model_fields:
            value = getattr(section, name)
            if isinstance(value, BaseModel):
                out += [f"{indent}{name}:", *lines(value, indent + "  ")]
            elif isinstance(value, dict) and any(isinstance(v, BaseModel) for v in value.values()):
                out.append(f"{indent}{name}:")
                for key, each in value.items():
                    out += [f"{indent}  {json.dumps(key)}:", *lines(each, indent + "    ")]
            else:  # JSON scalars are YAML scalars, and leave no doubt about their type
                out.append(f"{indent}{name}: {json.dumps(value)}")
        return out

    return "\n".join(lines(config, "")) + "\n"


def _read_with_base(path: Path, chain: list[Path], merged: Document) -> bool:
    """Merges `path` over its base into `merged`. True if a file could not be read as YAML at all."""
    text = _read_text(path, chain, merged)
    if text is None:
        return True
    document = read_yaml(text, str(path))
    base = document.tree.pop("base", None)
    fatal = any(p.path == "" for p in document.problems)
    where = document.places.get(("base",), "")
    if base is not None and not isinstance(base, str):
        message = f"{show(base)} is not the path of a file"
        document.problems.append(Problem("base", message, "write base: other.yaml", where))
    elif base is not None:
        target = path.parent / base
        if len(chain) >= MAX_BASES:
            message = f"more than {MAX_BASES} base files below each other"
            merged.problems.append(Problem("base", message, "put them together into fewer", where))
            fatal = True
        elif target.resolve() in [p.resolve() for p in (*chain, path)]:
            names = " -> ".join(str(p) for p in (*chain, path, target))
            message = f"the base files form a circle: {names}"
            merged.problems.append(Problem("base", message, "remove one of the links", where))
            fatal = True
        else:
            fatal = _read_with_base(target, [*chain, path], merged) or fatal
    _merge(merged.tree, document.tree)
    merged.places |= document.places
    merged.problems += document.problems
    return fatal


def _read_text(path: Path, chain: list[Path], merged: Document) -> str | None:
    source = f"base of {chain[-1]}" if chain else ""
    label = "base" if chain else ""
    try:
        return read_bounded(path, MAX_BYTES).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        message = f"{path} is not UTF-8: byte 0x{error.object[error.start]:02x} at offset {error.start}"
        problem = Problem(label, message, "save the file as UTF-8 text", source)
    except FileNotFoundError:
        siblings = [p.name for p in path.parent.glob("*.y*ml")] if path.parent.is_dir() else []
        similar = closest(path.name, siblings)
        remedy = f"did you mean {path.parent / similar}?" if similar else "give the path of a YAML file"
        problem = Problem(label, f"there is no file {path}", remedy, source)
    except OSError as error:
        problem = Problem(label, f"{path} cannot be read: {error.strerror}", "give the path of a YAML file", source)
    merged.problems.append(problem)
    return None


def _merge(under: dict[str, Any], over: dict[str, Any]) -> None:
    """Mappings merge key by key; anything else replaces what was there. Works in place on `under`."""
    for key, value in over.items():
        below = under.get(key)
        if isinstance(value, dict) and isinstance(below, dict):
            _merge(below, value)
        else:
            under[key] = value


def _apply(override: str, merged: Document) -> None:
    name, equals, text = override.partition("=")
    path = tuple(part.strip() for part in name.split("."))
    where = "command line"
    if not equals or not all(path):
        suggestion = "write key.path=value, for example training.steps=100"
        merged.problems.append(Problem("", f"override {show(override)} is not key.path=value", suggestion, where))
        return
    if path == ("base",):
        merged.problems.append(Problem("base", "a base cannot be an override", "name it in the file", where))
        return
    if merged.places.get(path) == where:
        merged.problems.append(Problem(".".join(path), "given twice on the command line", "keep one of the two", where))
        return
    try:
        node, value = merged.tree, _scalar(text.strip())
    except ValueError as error:
        merged.problems.append(Problem(".".join(path), str(error), "close the quotes", where))
        return
    for part in path[:-1]:
        if not isinstance(node.get(part), dict):
            node[part] = {}
        node = node[part]
    node[path[-1]] = value
    merged.places[path] = where


def _scalar(text: str) -> Any:
    """One YAML scalar. Unquoted text is taken whole: `monitoring.sample_prompt=def f(x):  # f` needs no quotes.

    Errors: ValueError for text that begins with a quote and is not one quoted string.
    """
    if text[:1] not in ("'", '"'):
        return plain_scalar(text)
    try:
        events = [e for e in yaml.parse(text, Loader=yaml.SafeLoader) if isinstance(e, yaml.NodeEvent)]
        if len(events) == 1 and isinstance(events[0], yaml.ScalarEvent) and is_text(events[0].value):
            return events[0].value
    except yaml.YAMLError:
        pass
    raise ValueError(f"{show(text)} is not one quoted string")
