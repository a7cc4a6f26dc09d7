"""Losses from log-likelihoods, each with its derivative. Standard library only.

An example is scored by terms log p(token | what came before). A choice's log-likelihood is the sum of its terms, the
choices' cross-entropy is taken over these sums (so multi-token choices are compared as whole answers), and the
whole right answer, end of turn included, adds a little of its mean negative log-likelihood: that keeps the model
saying the answer, not only preferring it. Free text has the mean negative log-likelihood alone.

What people prefer and what they reject is judged by the odds p / (1 - p) of an answer, p being the geometric mean of
its tokens' likelihoods: so long answers are not the less likely ones, and no reference model is needed beside the one
that learns, neither its memory nor its forward passes. A model that would hardly say a rejected answer is left alone.

Whether an answer is right (`metric`) is a number without a derivative: backpropagation cannot see it, two forward
passes can.

Derivatives are taken by the terms, so whoever computed these can go on from there, in any framework.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from agentd.learn.encoded import METRIC, PREFERENCE, UNLIKELIHOOD, Encoded

ODDS_WEIGHT = 1.0
"""lambda of ORPO: how much the odds weigh beside the likelihood of the chosen answer."""
_LEAST = 1e-6  # of 1 - p, so that the odds are finite


@dataclass(frozen=True)
class Objective:
    """The loss of one example in nats, and its derivative by every term, in the shape the terms came in."""

    loss: float
    choices: list[list[float]]
    target: list[float]
    predicted: int | None
    """The most likely choice, of a preference by the mean over its tokens; None for free text."""


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


def odds_ratio(chosen: float, rejected: float) -> tuple[float, float, float]:
    """-log sigmoid(log(odds(chosen) / odds(rejected))), and its derivatives by both: L_OR of Hong, Lee and Thorne,
    "ORPO: Monolithic Preference Optimization without Reference Model" (2024), equations 4 and 7.

    chosen, rejected  mean log-likelihoods of the answers' tokens
    """
    (chosen_odds, by_chosen), (rejected_odds, by_rejected) = _log_odds(chosen), _log_odds(rejected)
    difference = chosen_odds - rejected_odds
    loss = max(0.0, -difference) + math.log1p(math.exp(-abs(difference)))
    wrong = math.exp(-difference - loss)  # sigmoid(-difference)
    return loss, -wrong * by_chosen, wrong * by_rejected


def unlikelihood(mean: float) -> tuple[float, float]:
    """-log(1 - p) of an answer whose tokens' log-likelihoods have this mean, and its derivative by the mean: the loss
    of Welleck et al., "Neural Text Generation with Unlikelihood Training" (2020), equation 4, over a whole answer.

    Both vanish as the answer becomes unlikely: nothing is gained by pushing it further down.
    """
    rest = _rest(mean)
    return -math.log(rest), math.exp(mean) / rest


def metric(predicted: int | None, correct: int, likeliest: Sequence[bool]) -> float:
    """How much of an answer is wrong: of a choice 0 or 1, of a text the share that a greedy answer would not say.

    A greedy answer is the target up to the first of its tokens that is not the likeliest one, so one forward pass over
    the target says how far it would be right, without anything being generated; 0 is an answer that is right to its
    end. Malladi et al. 2023 (MeZO, section 3.3) learn accuracy and F1 like this.

    predicted, correct  of a choice its number and the right one's; `predicted` is None for a text
    likeliest           by token of a text, whether no other is likelier
    """
    if predicted is not None:
        return float(predicted != correct)
    return 1.0 - next((i for i, most in enumerate(likeliest) if not most), len(likeliest)) / len(likeliest)


def _log_odds(mean: float) -> tuple[float, float]:
    """log(p / (1 - p)) where log p is `mean`, and its derivative by it."""
    rest = _rest(mean)
    return mean - math.log(rest), 1 / rest


def _rest(mean: float) -> float:
    """1 - p."""
    return max(_LEAST, -math.expm1(mean))


def example_objective(
    example: Encoded,
    choices: Sequence[float],
    target: Sequence[float],
    nll_weight: float,
    likeliest: Sequence[bool] = (),
) -> Objective:
    """The loss of an example by its own objective and weight, and its derivatives, in the shape of its terms.

    choices     per choice the sum of its tokens' log-likelihoods
    target      the log-likelihoods of the target's tokens
    nll_weight  see `objective`; a preference takes the mean negative log-likelihood of its chosen answer whole
    likeliest   of an example that learns its metric, whether each of the target's tokens is the most likely one
    """
    lengths = [len(terms) for terms in example.choices] or [1] * len(choices)  # a classifier's classes have no tokens
    predicted: int | None = None
    if example.objective == PREFERENCE:
        chosen, rejected = (total / n for total, n in zip(choices, lengths, strict=True))
        nll, by_target = completion(target)
        ratio, *by_mean = odds_ratio(chosen, rejected)
        by_choice = [[ODDS_WEIGHT * gradient / n] * n for gradient, n in zip(by_mean, lengths, strict=True)]
        loss, predicted = nll + ODDS_WEIGHT * ratio, int(not chosen > rejected)
    elif example.objective == UNLIKELIHOOD:
        loss, gradient = unlikelihood(math.fsum(target) / len(target))
        by_choice, by_target = [], [gradient / len(target)] * len(target)
    elif example.objective == METRIC:
        predicted = max(range(len(choices)), key=choices.__getitem__) if choices else None
        loss = metric(predicted, example.correct, likeliest)
        by_choice, by_target = [[0.0] * n for n in lengths[: len(choices)]], [0.0] * len(target)
    else:
        combined = objective([[total] for total in choices], example.correct, target, nll_weight)
        loss, predicted, by_target = combined.loss, combined.predicted, combined.target
        by_choice = [[gradient] * n for (gradient,), n in zip(combined.choices, lengths, strict=True)]
    weight = example.weight
    return Objective(
        weight * loss,
        [[weight * gradient for gradient in gradients] for gradients in by_choice],
        [weight * gradient for gradient in by_target],
        predicted,
    )


def log_likelihood(example: Encoded, choices: Sequence[float], target: Sequence[float]) -> float:
    """Log p of the whole right answer, among the choices where there are some; arguments as of `example_objective`."""
    return -choice(choices, example.correct)[0] if choices else math.fsum(target)


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
        [[by_term] * len(terms) for by_term, terms in zip(by_score, choices, strict=True)],
        [nll_weight * by_term for by_term in by_target],
        max(range(len(scores)), key=scores.__getitem__),
    )
