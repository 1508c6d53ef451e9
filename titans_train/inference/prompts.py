"""Files with many texts to continue: JSON Lines of prompts, or questions, one a line."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from titans_train.errors import UserError
from titans_train.untrusted import parse_json, read_bounded

LARGEST = 256 << 20  # bytes


@dataclass(frozen=True)
class Prompt:
    line: int  # of the file, from 1; 0: of no file
    text: str


def read_prompts(path: Path) -> list[Prompt]:
    """Of each line a JSON string, or an object with "prompt"; empty lines are passed over. UserError names the line."""
    prompts = []
    for number, line in _lines(path):
        where = f"{path} line {number}"
        try:
            value = parse_json(line)
        except ValueError as error:
            raise UserError(
                f'{where} is not JSON ({str(error)[:200]}); each line is a JSON string or {{"prompt": "..."}}'
            ) from error
        text = value.get("prompt") if isinstance(value, dict) else value
        if not isinstance(text, str):
            raise UserError(f'{where} holds no prompt; each line is a JSON string or {{"prompt": "..."}}')
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise UserError(f"{where}: its prompt is not UTF-8 text at character {error.start}; correct it") from error
        prompts.append(Prompt(number, text))
    return _some(prompts, path)


def read_questions(path: Path) -> list[Prompt]:
    """Each line as it stands, without its end; empty lines are passed over. UserError: no lines."""
    return _some([Prompt(number, line) for number, line in _lines(path)], path)


def _lines(path: Path) -> list[tuple[int, str]]:
    try:
        text = read_bounded(path, LARGEST).decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read as UTF-8 text: {error}") from error
    lines = [(number, line.removesuffix("\r")) for number, line in enumerate(text.split("\n"), 1)]
    return [(number, line) for number, line in lines if line.strip()]


def _some(prompts: list[Prompt], path: Path) -> list[Prompt]:
    if not prompts:
        raise UserError(f"{path} holds no line to continue; write one a line")
    return prompts
