"""How much of an adapter is given up where it drifts too far."""

import math

import pytest

from agentd.adapt.passes.base import shortening

LIMIT = 0.4


@pytest.mark.parametrize("excess", [1.01, 1.3, 2.0, 6.0])
@pytest.mark.parametrize("power", [1.6, 2.0, 2.4])
def test_it_comes_to_the_limit_from_above_and_stays_near_it(excess: float, power: float) -> None:
    """Drift of a real adapter goes by the square of its scale, or a little off."""
    scale, looks = 1.0, 0
    while (drift := excess * LIMIT * scale**power) > LIMIT:
        scale *= shortening(drift, LIMIT)
        looks += 1
    assert looks <= 5
    assert drift > 0.75 * LIMIT, "no more is given up than has to be"


def test_what_drifts_beyond_all_numbers_is_taken_back_at_once() -> None:
    assert shortening(math.inf, LIMIT) == shortening(math.nan, LIMIT) == shortening(1e9, LIMIT) == 0.6
