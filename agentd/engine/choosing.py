"""A request whose answer must be one of several: which one, from the logits that serving computes for it."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from agentd.engine.choices import ChoiceSearch
from agentd.engine.encode import scored_answers
from agentd.engine.logprobs import logprob
from agentd.engine.probabilities import Floats, log_probabilities
from agentd.engine.prompts import Prompts
from agentd.engine.protocol import Generate
from agentd.errors import AgentdError, ContextLengthExceeded


@dataclass(frozen=True)
class Chosen:
    """`logprobs` come with their places in the text; `finish` is `length` where `max_tokens` cut it."""

    tokens: list[int]
    text: str
    finish: str
    logprobs: list[tuple[int, dict[str, Any]]]


@dataclass
class Choosing:
    """A choice on its way: `answers` are its tokens and texts, `entries` log-probabilities by prefix and token."""

    vocabulary: Prompts
    request: Generate
    search: ChoiceSearch
    answers: list[tuple[list[int], str]]
    entries: dict[tuple[int, ...], dict[str, Any]] = field(default_factory=dict)

    @classmethod
    def of(cls, request: Generate, prompt: list[int], vocabulary: Prompts, limit: int) -> "Choosing":
        """Raises ContextLengthExceeded where the longest answer does not fit `limit` tokens."""
        tokens = [vocabulary.answer(request.input, prompt, choice) for choice in request.choices]
        if (longest := len(prompt) + max(map(len, tokens))) >= limit:
            raise ContextLengthExceeded(longest, limit)
        temperature = 0.0 if request.sampling.greedy else request.sampling.temperature
        search = ChoiceSearch(scored_answers(tokens, vocabulary.end), temperature)
        return cls(vocabulary, request, search, list(zip(tokens, request.choices, strict=True)))

    def observe(self, prefix: tuple[int, ...], logits: Floats) -> None:
        """The logits (n_vocab,) of what follows these tokens of an answer."""
        if self.request.sampling.logit_bias:
            logits = np.array(logits)
            for token, bias in self.request.sampling.logit_bias:
                logits[token] += np.float32(bias)
        values = log_probabilities(logits)
        self.search.observe(prefix, values)
        if self.request.logprobs is not None:
            for token in self.search.following(prefix):
                self.entries[(*prefix, token)] = logprob(self.vocabulary, values, token, self.request.logprobs)

    def chosen(self) -> Chosen:
        """The answer, once nothing is open. Raises AgentdError where no likelihood is finite."""
        try:
            number = self.search.choose(np.random.default_rng(self.request.sampling.seed))
        except ValueError as error:
            raise AgentdError(f"no choice can be made: {error}") from None
        tokens, text = self.answers[number]
        finish = "stop"
        if len(tokens) > self.request.max_tokens:
            tokens, finish = tokens[: self.request.max_tokens], "length"
            text = b"".join(map(self.vocabulary.piece, tokens)).decode("utf-8", "replace")
        if self.request.logprobs is None:
            return Chosen(tokens, text, finish, [])
        pieces = [self.vocabulary.piece(token) for token in tokens]
        places = [len(b"".join(pieces[:i]).decode("utf-8", "ignore")) for i in range(len(tokens))]
        entries = [self.entries[tuple(tokens[: i + 1])] for i in range(len(tokens))]
        return Chosen(tokens, text, finish, list(zip(places, entries, strict=True)))
