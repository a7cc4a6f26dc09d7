import itertools
import math
import random
from collections.abc import Callable

import pytest

from agentd.learn.encoded import Encoded
from agentd.learn.objectives import choice, completion, example_objective, metric, objective, odds_ratio, unlikelihood


def numerically(f: Callable[[list[float]], float], values: list[float], i: int, step: float = 1e-6) -> float:
    up, down = list(values), list(values)
    up[i] += step
    down[i] -= step
    return (f(up) - f(down)) / (2 * step)


def test_choice_is_the_cross_entropy_over_the_sums() -> None:
    loss, gradients = choice([-1.0, -2.0, -4.0], 1)
    likelihoods = [math.exp(-1), math.exp(-2), math.exp(-4)]
    assert loss == pytest.approx(-math.log(likelihoods[1] / sum(likelihoods)))
    for i, gradient in enumerate(gradients):
        assert gradient == pytest.approx(numerically(lambda v: choice(v, 1)[0], [-1.0, -2.0, -4.0], i), rel=1e-6)


def test_choice_survives_log_likelihoods_far_below_what_a_float_holds() -> None:
    loss, gradients = choice([-2000.0, -2001.0], 0)
    assert loss == pytest.approx(math.log(1 + math.exp(-1)))
    assert sum(gradients) == pytest.approx(0)


def test_completion_is_the_mean_over_tokens() -> None:
    assert completion([-1.0, -3.0]) == (2.0, [-0.5, -0.5])


def test_an_example_with_choices_of_several_tokens() -> None:
    terms = [[-1.0, -0.5], [-0.7]]
    target = [-1.0, -0.5, -2.0]
    scored = objective(terms, 0, target, 0.1)
    assert scored.loss == pytest.approx(choice([-1.5, -0.7], 0)[0] + 0.1 * 3.5 / 3)
    assert scored.predicted == 1
    assert scored.choices[0] == [scored.choices[0][0]] * 2
    for i in range(2):
        expected = numerically(lambda v: objective([v, terms[1]], 0, target, 0.1).loss, terms[0], i)
        assert scored.choices[0][i] == pytest.approx(expected, rel=1e-6)
    for i in range(3):
        expected = numerically(lambda v: objective(terms, 0, v, 0.1).loss, target, i)
        assert scored.target[i] == pytest.approx(expected, rel=1e-6)


def test_free_text_has_no_choice_to_be_right_about() -> None:
    scored = objective([], 0, [-1.0, -3.0], 0.1)
    assert (scored.loss, scored.choices, scored.predicted) == (2.0, [], None)


def example(
    chosen: int = 2, rejected: int = 3, correct: int = 0, objective: str = "preference", weight: float = 1.0
) -> Encoded:
    """With answers of `chosen` and `rejected` tokens; 0: there is no such answer."""
    choices = [[(0, i, 1) for i in range(n)] for n in (chosen, rejected) if n]
    return Encoded([1] * 9, [[]], choices, correct, [(0, i, 1) for i in range(2)], objective, weight)


def test_the_odds_ratio_of_orpo() -> None:
    chosen, rejected = math.log(0.4), math.log(0.2)
    loss, by_chosen, by_rejected = odds_ratio(chosen, rejected)
    ratio = (0.4 / 0.6) / (0.2 / 0.8)
    assert loss == pytest.approx(-math.log(1 / (1 + 1 / ratio)))
    gradients = [numerically(lambda v: odds_ratio(*v)[0], [chosen, rejected], i) for i in range(2)]
    assert [by_chosen, by_rejected] == pytest.approx(gradients, rel=1e-6)


@pytest.mark.parametrize(("chosen", "rejected"), [(-3.0, -2.9), (-2.0, -0.1), (-40.0, -0.5)])
def test_the_odds_ratio_pulls_where_the_rejected_answer_is_the_likelier_one(chosen: float, rejected: float) -> None:
    slopes = [numerically(lambda v: odds_ratio(*v)[0], [chosen, rejected], i) for i in range(2)]
    assert [*odds_ratio(chosen, rejected)[1:]] == pytest.approx(slopes, rel=1e-6)


def test_unlikelihood_vanishes_with_the_answers_likelihood() -> None:
    assert unlikelihood(math.log(0.25))[0] == pytest.approx(-math.log(0.75))
    assert unlikelihood(-1.0)[1] == pytest.approx(numerically(lambda v: unlikelihood(v[0])[0], [-1.0], 0), rel=1e-6)
    assert unlikelihood(-40.0) == pytest.approx((0.0, 0.0), abs=1e-15)


@pytest.mark.parametrize("sure", [(-0.0, -0.0), (-1e-12, -700.0), (-700.0, -1e-12), (-1e4, -1e4), (-1e4, -0.0)])
def test_odds_are_finite_however_sure_the_model_is(sure: tuple[float, float]) -> None:
    assert all(map(math.isfinite, (*odds_ratio(*sure), *unlikelihood(sure[0]), *unlikelihood(sure[1]))))


@pytest.mark.parametrize(
    "encoded",
    [
        example(),
        example(weight=0.3),
        example(0, 0, objective="unlikelihood", weight=2.0),
        example(0, 0, objective="likelihood", weight=0.5),
        example(1, 2, correct=1, objective="likelihood"),
        example(1, 2, correct=1, objective="metric"),
    ],
)
def test_derivatives_of_an_examples_objective(encoded: Encoded) -> None:
    chance = random.Random(3)
    lengths = [*map(len, encoded.choices), len(encoded.target)]
    values = [-3 * chance.random() for _ in range(sum(lengths))]

    def parts(values: list[float]) -> tuple[list[float], list[float]]:
        ends = list(itertools.accumulate(lengths))
        split = [values[end - n : end] for end, n in zip(ends, lengths, strict=True)]
        return [sum(part) for part in split[:-1]], split[-1]

    result = example_objective(encoded, *parts(values), 0.1)
    gradients = [gradient for part in (*result.choices, result.target) for gradient in part]
    for i, gradient in enumerate(gradients):
        expected = numerically(lambda v: example_objective(encoded, *parts(v), 0.1).loss, values, i)
        assert gradient == pytest.approx(expected, rel=1e-5)


def test_a_preference_is_won_by_the_mean_over_an_answers_tokens() -> None:
    longer = example(chosen=4, rejected=1)
    assert example_objective(longer, [-2.0, -1.0], [-0.5, -0.5], 0.1).predicted == 0
    assert example_objective(longer, [-2.0, -0.4], [-0.5, -0.5], 0.1).predicted == 1
    assert example_objective(longer, [-2.0, -0.5], [-0.5, -0.5], 0.1).predicted == 1  # a tie is no win


def test_a_metric_is_what_a_greedy_answer_has_wrong() -> None:
    assert [metric(0, 0, ()), metric(1, 0, ())] == [0.0, 1.0]
    right, first, third = [True] * 4, [False, True, True, True], [True, True, False, True]
    assert [metric(None, 0, each) for each in (right, first, third)] == [0.0, 1.0, 0.5]


def test_a_metric_does_not_see_how_likely_an_answer_is() -> None:
    told_apart, text = example(1, 1, correct=1, objective="metric"), example(0, 0, objective="metric", weight=0.5)
    for least in (-0.1, -9.0):
        result = example_objective(told_apart, [least - 0.01, least], [-0.5, -0.5], 0.1)
        assert (result.loss, result.predicted) == (0.0, 1)
        result = example_objective(text, [], [-0.1, least], 0.1, [True, False])
        assert (result.loss, result.predicted) == (0.25, None)
