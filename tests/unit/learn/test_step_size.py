"""The calibrated step size, and what becomes of it in the course of a run."""

import itertools
import math

import pytest

from agentd.learn.step_size import Calibration, schedule


def test_more_queries_bear_a_larger_step_only_in_many_dimensions() -> None:
    diffuse = Calibration(curvature=10.0, spread=0.1, agreement=0.5, gradient=1.0, forwards=0)
    assert diffuse.stable_lr() == pytest.approx(0.1)
    assert diffuse.stable_lr(4) == pytest.approx(4 / 10.3)
    one_direction = Calibration(curvature=10.0, spread=10.0, agreement=0.5, gradient=1.0, forwards=0)
    assert one_direction.stable_lr(4) == pytest.approx(0.1)
    assert Calibration(-1.0, 0.0, 0.5, 1.0, 0).stable_lr() == math.inf


def test_the_schedule_warms_up_and_decays() -> None:
    factors = [schedule(step, 100) for step in range(1, 101)]
    assert factors[0] < 0.2
    assert max(factors) == 1.0 == factors[5]
    assert factors[-1] == pytest.approx(0.1)
    assert all(a >= b for a, b in itertools.pairwise(factors[5:]))
    assert 0 < schedule(1, 1) <= 1
