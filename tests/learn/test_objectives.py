import math
from collections.abc import Callable

import pytest

from agentd.learn.objectives import choice, completion, objective


def numerically(f: Callable[[list[float]], float], values: list[float], i: int, step: float = 1e-6) -> float:
    up, down = list(values), list(values)
    up[i] += step
    down[i] -= step
    return (f(up) - f(down)) / (2 * step)


def test_choice_is_the_cross_entropy_over_the_sums() -> None:
    loss, slopes = choice([-1.0, -2.0, -4.0], 1)
    likelihoods = [math.exp(-1), math.exp(-2), math.exp(-4)]
    assert loss == pytest.approx(-math.log(likelihoods[1] / sum(likelihoods)))
    for i, slope in enumerate(slopes):
        assert slope == pytest.approx(numerically(lambda v: choice(v, 1)[0], [-1.0, -2.0, -4.0], i), rel=1e-6)


def test_choice_survives_log_likelihoods_far_below_what_a_float_holds() -> None:
    loss, slopes = choice([-2000.0, -2001.0], 0)
    assert loss == pytest.approx(math.log(1 + math.exp(-1)))
    assert sum(slopes) == pytest.approx(0)


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
