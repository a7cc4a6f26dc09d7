"""Losses from log-likelihoods, each with its derivative. Standard library only.

An example is scored by terms log p(token | what came before). A choice's log-likelihood is the sum of its terms, the
choices' cross-entropy is taken over these sums (so multi-token choices are compared as whole answers), and the
whole right answer, end of turn included, adds a little of its mean negative log-likelihood: that keeps the model
saying the answer, not only preferring it. Free text has the mean negative log-likelihood alone.

Derivatives are taken by the terms, so whoever computed these can go on from there, whatever computed them.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Objective:
    """The loss of one example in nats, and its derivative by every term, in the shape the terms came in."""

    loss: float
    choices: list[list[float]]
    target: list[float]
    predicted: int | None
    """The most likely choice; None for free text."""


def choice(scores: Sequence[float], correct: int) -> tuple[float, list[float]]:
    """Cross-entropy of softmax(scores) against `correct`, and its derivative by the scores."""
    top = max(scores)
    exponentials = [math.exp(score - top) for score in scores]
    total = math.fsum(exponentials)
    loss = top + math.log(total) - scores[correct]
    return loss, [value / total - (i == correct) for i, value in enumerate(exponentials)]


def completion(terms: Sequence[float]) -> tuple[float, list[float]]:
    """Mean negative log-likelihood of a text's tokens, and its derivative by each of them."""
    return -math.fsum(terms) / len(terms), [-1 / len(terms)] * len(terms)


def objective(
    choices: Sequence[Sequence[float]], correct: int, target: Sequence[float], nll_weight: float
) -> Objective:
    """The loss of one example.

    choices     per choice the log-likelihoods of its tokens; empty for free text
    correct     index of the right choice; ignored for free text
    target      the log-likelihoods of the whole right answer's tokens
    nll_weight  weight of the mean negative log-likelihood of `target` beside the choices' cross-entropy
    """
    nll, by_target = completion(target)
    if not choices:
        return Objective(nll, [], by_target, None)
    scores = [math.fsum(terms) for terms in choices]
    loss, by_score = choice(scores, correct)
    return Objective(
        loss + nll_weight * nll,
        [[slope] * len(terms) for slope, terms in zip(by_score, choices, strict=True)],
        [nll_weight * slope for slope in by_target],
        max(range(len(scores)), key=scores.__getitem__),
    )
