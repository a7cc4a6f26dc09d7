"""Which of several answers is the likeliest as a whole, from the logits of no more tokens than that takes. Pure.

The likelihood of an answer is the product of its tokens', given the prompt and what comes before them; what is known
of it is a bound of the rest, so the best-first search of Hart, Nilsson and Raphael 1968 (A*) finds the best exactly.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from agentd.engine.probabilities import Floats

_NEGLIGIBLE = 30.0  # nats below the best one at temperature 1, where an answer would never be drawn
_AT_ONCE = 5  # tokens of an answer to look at before others have their turn


@dataclass(eq=False)
class _Answer:
    """`score` is the log-likelihood in nats of the first `n` tokens."""

    tokens: list[int]
    n: int = 0
    score: float = 0.0

    @property
    def complete(self) -> bool:
        return self.n == len(self.tokens)


class ChoiceSearch:
    """`answers` are those of `encode.scored_answers`; at a `temperature` above 0 one is drawn with probabilities
    proportional to likelihood ** (1 / temperature)."""

    def __init__(self, answers: Sequence[Sequence[int]], temperature: float = 0.0) -> None:
        self._answers = [_Answer(list(tokens)) for tokens in answers]
        self._temperature = temperature
        self._known: dict[tuple[int, ...], dict[int, float]] = {}
        self._current: _Answer | None = None  # the one that is being looked at

    def following(self, prefix: Sequence[int]) -> set[int]:
        """The tokens with which answers go on after `prefix`."""
        n = len(prefix)
        return {a.tokens[n] for a in self._answers if len(a.tokens) > n and a.tokens[:n] == list(prefix)}

    def observe(self, prefix: Sequence[int], log_probabilities: Floats) -> None:
        """Takes in log p(token | prompt, prefix) of the whole vocabulary (n_vocab,)."""
        self._known[tuple(prefix)] = {token: float(log_probabilities[token]) for token in self.following(prefix)}
        for answer in self._answers:
            while not answer.complete and (known := self._known.get(tuple(answer.tokens[: answer.n]))) is not None:
                answer.score += known[answer.tokens[answer.n]]
                answer.n += 1

    def open(self) -> list[int] | None:
        """The beginning of the answer to look at next, whose last token is predicted: of a long one no more at once
        than others can wait for. None when the answer is certain."""
        best = max((a.score for a in self._answers if a.complete), default=-math.inf)
        bound = best - _NEGLIGIBLE * self._temperature
        unknown = [a for a in self._answers if not a.complete and a.score > bound]
        if not unknown:
            return None
        if self._current not in unknown:  # one to its end: the cache holds the tokens of one
            self._current = max(unknown, key=lambda a: a.score)
        return self._current.tokens[: self._current.n + _AT_ONCE]

    def choose(self, random: np.random.Generator) -> int:
        """The number of the chosen answer. Raises ValueError where likelihoods are not finite."""
        complete = [(a.score, i) for i, a in enumerate(self._answers) if a.complete and math.isfinite(a.score)]
        if not complete:
            raise ValueError("the model's numbers are not finite")
        best = max(score for score, _ in complete)
        if not self._temperature:
            return next(i for score, i in complete if score == best)
        weights = np.exp([(score - best) / self._temperature for score, _ in complete])
        return complete[int(random.choice(len(complete), p=weights / weights.sum()))][1]
