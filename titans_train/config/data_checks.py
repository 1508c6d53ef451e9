"""Combinations within the section `data` that no run may have, and what it asks of the model; as checks.py."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator

from titans_train.config.errors import Problem, show
from titans_train.config.schema import RunConfig
from titans_train.mixing import LONGEST_PERIOD, units


def source(config: RunConfig) -> Iterator[Problem]:
    data = config.data
    if data.source != "shards":
        if getattr(data, data.source) is None:
            example = {"recall": "{pairs: 16}", "needles": "{digits: 4}"}[data.source]
            remedy = f"write '{data.source}: {example}' below 'data:'"
            yield Problem(f"data.{data.source}", f"null, but data.source is {data.source}", remedy)
    elif data.sources is None and not data.path:
        message = f"{show(data.path)}, but data.source is shards"
        yield Problem("data.path", message, "give the folder that python -m data_prep wrote")
    elif data.sources is not None and data.path:
        yield Problem("data.path", f"{show(data.path)}, but data.sources is given too", "keep one of the two")


def sources(config: RunConfig) -> Iterator[Problem]:
    """Names and weights of several sources, now and later."""
    found, later = config.data.sources, config.data.weights_from
    if found is None:
        if later is not None:
            yield Problem("data.weights_from", "given without data.sources", "remove it, or name the sources")
        return
    if not found:
        yield Problem("data.sources", "empty", "write 'web: {path: data/web, weight: 1}' below it, or remove it")
        return
    for name in found:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}", name):
            message = f"{show(name)}: up to 64 letters, digits, '_' and '-', a letter or digit first"
            yield Problem(f"data.sources.{name}", message, "use a name such as web")
    yield from _shares("data.sources", {name: source.weight for name, source in found.items()})
    for step, weights in (later or {}).items():
        path = f"data.weights_from.{step}"
        if not isinstance(weights, dict) or not all(_is_number(weight) for weight in weights.values()):
            continue  # reported already, as what it is
        if not re.fullmatch(r"[1-9][0-9]{0,15}", step) or step == "1":
            yield Problem(path, f"{show(step)} is not a step above 1", "write '20000: {name: weight, …}'")
        elif set(weights) != set(found):
            missing, unknown = sorted(set(found) - set(weights)), sorted(set(weights) - set(found))
            words = [f"no weight for {', '.join(missing)}"] if missing else []
            words += [f"unknown source {', '.join(unknown)}"] if unknown else []
            yield Problem(path, "; ".join(words), f"give one for each of {', '.join(found)}; 0 leaves a source out")
        else:
            yield from _shares(path, weights)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _shares(path: str, weights: dict[str, float]) -> Iterator[Problem]:
    wrong = next((name for name, weight in weights.items() if not (math.isfinite(weight) and weight >= 0)), None)
    if wrong is not None:
        message = f"{show(weights[wrong])} is no finite number of 0 or more"
        yield Problem(f"{path}.{wrong}", message, "use 0 to leave a source out")
        return
    if not any(weights.values()):
        yield Problem(path, "no source has a weight above 0", "give at least one source a weight above 0")
        return
    period = sum(units(weights).values())
    if period > LONGEST_PERIOD:
        message = f"the order of the sources repeats after {period:,} sequences only, the limit is {LONGEST_PERIOD:,}"
        total = sum(weights.values())
        rounded = {name: max(round(weight / total, 3), 0.001 if weight else 0) for name, weight in weights.items()}
        words = ", ".join(f"{name}: {weight:g}" for name, weight in rounded.items())
        yield Problem(path, message, f"write the weights with fewer digits, such as {words}")


def recall(config: RunConfig) -> Iterator[Problem]:
    task = config.data.recall
    if config.data.source != "recall" or task is None:
        return
    if task.pairs > task.keys:
        message = f"{task.pairs} pairs need as many different keys, data.recall.keys is {task.keys}"
        yield Problem("data.recall.pairs", message, f"use at most {task.keys}, or data.recall.keys {task.pairs}")
    if task.spread is not None and task.pairs > task.values:
        message = f"{task.pairs} pairs with spread need as many values, data.recall.values is {task.values}"
        yield Problem("data.recall.pairs", message, f"use at most {task.values}, or data.recall.values {task.pairs}")
    needed, given = 4 * task.pairs + task.gap, config.training.sequence_length
    if needed > given:
        message = f"{given} is too short for {task.pairs} pairs, a gap of {task.gap} and {task.pairs} queries"
        yield Problem("training.sequence_length", message, f"use at least {needed}")
    symbols, vocabulary = task.keys + task.values + 2, config.model.vocabulary
    if vocabulary < symbols:
        message = f"{vocabulary} is too small for {task.keys} keys, {task.values} values and 2 other tokens"
        yield Problem("model.vocabulary", message, f"use at least {symbols}")


def needles(config: RunConfig) -> Iterator[Problem]:
    task = config.data.needles
    if config.data.source != "needles" or task is None:
        return
    if task.needles > task.keys:
        message = f"{task.needles} needles need as many different keys, data.needles.keys is {task.keys}"
        yield Problem("data.needles.needles", message, f"use at most {task.keys}, or data.needles.keys {task.needles}")
    needed, given = (task.needles + 1) * (2 + task.digits), config.training.sequence_length
    if needed > given:
        message = f"{given} is too short for {task.needles} needles and a question of {2 + task.digits} tokens each"
        yield Problem("training.sequence_length", message, f"use at least {needed}")
    symbols, vocabulary = 2 + task.keys + task.symbols + task.words, config.model.vocabulary
    if vocabulary < symbols:
        message = f"{vocabulary} is too small for {task.keys} keys, {task.symbols} symbols, {task.words} words, 2 marks"
        yield Problem("model.vocabulary", message, f"use at least {symbols}")


DATA_CHECKS = [source, sources, recall, needles]
