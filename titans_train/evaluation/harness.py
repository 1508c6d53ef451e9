"""A model of ours as a language model of EleutherAI's evaluation harness (package lm_eval, extra `harness`).

Each text is read from its start, from the state that a model starts with, in one pass with the state carried, however
long it is: there is no window that texts would be cut to. Loglikelihoods are sums of the model's own
log-probabilities.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs

from data_prep.tokenizer import Tokenizer
from titans_train.evaluation.cases import Case, padded
from titans_train.evaluation.scoring import Scorer, case_sums
from titans_train.inference.sampling import Sampler, generate, read


class HarnessModel(TemplateLM):
    """The base class encodes a context and its continuation as one text and takes them apart behind the context; a text
    without a context follows the end of a document."""

    def __init__(self, scorer: Scorer, tokenizer: Tokenizer) -> None:
        """scorer: of one process."""
        super().__init__()
        self.scorer, self.text = scorer, tokenizer

    @property
    def eot_token_id(self) -> int:
        return self.text.end_of_document

    @property
    def tokenizer_name(self) -> str:
        return f"{self.text.kind}-{self.text.sha256[:12]}"

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **others: Any) -> list[int]:
        return [int(token) for token in self.text.encode([string])[0]]

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[tuple[str, str], list[int], list[int]]], **others: Any
    ) -> list[tuple[float, bool]]:
        """Of each: log-probability of the continuation, and whether each of its tokens is the likeliest."""
        cases = [(np.array([*context, *asked], np.int64), len(asked)) for _, context, asked in requests]
        found = self._scores(cases)
        for (texts, _, _), answer in zip(requests, found, strict=True):
            self.cache_hook.add_partial("loglikelihood", texts, answer)
        return found

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Of each whole text, its first token after the end of a document."""
        encoded = [self.tok_encode(request.args[0]) for request in requests]
        cases = [(np.array([self.eot_token_id, *tokens], np.int64), len(tokens)) for tokens in encoded]
        found = [total for total, _ in self._scores(cases)]
        for request, total in zip(requests, found, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return found

    def _scores(self, cases: Sequence[Case]) -> list[tuple[float, bool]]:
        """Those of like length together: a batch is padded to its longest."""
        found = [(0.0, True)] * len(cases)
        order = sorted((n for n, (_, asked) in enumerate(cases) if asked), key=lambda n: len(cases[n][0]))
        if order:
            sums = case_sums(self.scorer, len(order), lambda rows: padded([cases[order[row]] for row in rows]))
            for n, (tokens, right, loss) in zip(order, sums.tolist(), strict=True):
                found[n] = (-loss, tokens == right)
        return found

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Greedily, or sampled where a task asks for it, up to a text of `until` or the end of a document."""
        found = []
        for request in requests:
            context, options = request.args
            found.append(self._continued(context, normalize_gen_kwargs(options)))
            self.cache_hook.add_partial("generate_until", request.args, found[-1])
        return found

    def _continued(self, context: str, options: Any) -> str:
        until = [text for text in options["until"] if text]
        temperature = float(options.get("temperature") or 0.0) if options["do_sample"] else 0.0
        sampler = Sampler(temperature, float(options.get("top_p") or 1.0), vocabulary=self.text.vocabulary)
        reading = read(self.scorer.module, self.tok_encode(context) or [self.eot_token_id])
        tokens: list[int] = []
        text = ""
        for token, _ in generate(self.scorer.module, reading, options["max_gen_toks"], sampler):
            if token == self.eot_token_id:
                break
            tokens.append(token)
            text = self.text.decode(tokens)
            ends = [place for stop in until if (place := text.find(stop)) >= 0]
            if ends:
                return text[: min(ends)]
        return text
