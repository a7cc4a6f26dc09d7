"""Clipping, noise, and the ε that they amount to."""

import math
import random
import statistics

import pytest

from agentd.learn import privacy


def test_a_vector_is_scaled_as_a_whole() -> None:
    assert privacy.clipped([3.0, 4.0], 10.0) == [3.0, 4.0]
    assert privacy.clipped([3.0, 4.0], 1.0) == pytest.approx([0.6, 0.8])
    assert privacy.clipped([0.0, 0.0], 1.0) == [0.0, 0.0]


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_what_is_not_finite_is_as_if_nothing_was_learned(value: float) -> None:
    assert privacy.clipped([1.0, value], 1.0) == [0.0, 0.0]


def test_noise_is_on_every_entry_and_as_large_as_it_says() -> None:
    noised = privacy.noised([0.0] * 4000, 2.5, random.Random(1).gauss)
    assert statistics.fmean(noised) == pytest.approx(0.0, abs=0.15)
    assert statistics.pstdev(noised) == pytest.approx(2.5, rel=0.05)


def test_epsilon_is_that_of_zcdp() -> None:
    # Bun and Steinke 2016: rho = 1/2 is (1/2 + 2 sqrt(1/2 ln(1/delta)), delta)
    assert privacy.rho(2.0) == 0.5
    assert privacy.epsilon(0.5, math.exp(-2)) == pytest.approx(2.5)
    # ten rounds with a noise of 10 clips
    assert privacy.epsilon(10 * privacy.rho(10.0), 1e-5) == pytest.approx(0.2 + 2 * math.sqrt(0.2 * math.log(1e5)))
    assert privacy.epsilon(privacy.rho(0.0), 1e-5) == math.inf


def test_the_bound_holds_for_two_neighbours() -> None:
    """The privacy loss of one coordinate, at worst 2 C apart, exceeds ε with a chance of at most delta."""
    clip, multiplier, delta = 1.5, 4.0, 1e-3
    epsilon = privacy.epsilon(privacy.rho(multiplier), delta)
    dice, deviation = random.Random(2), multiplier * clip
    exceeded = 0
    for _ in range(20_000):
        x = dice.gauss(clip, deviation)
        loss = ((x + clip) ** 2 - (x - clip) ** 2) / (2 * deviation**2)
        exceeded += loss > epsilon
    assert exceeded <= 20_000 * delta
