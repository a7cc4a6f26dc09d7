"""Descent with and without zeroth-order steps beside it, on functions whose minimum is known."""

import math

import pytest

from agentd.learn.descent import minimise
from agentd.learn.optimise import Trajectory
from agentd.learn.philox import rademacher
from agentd.learn.spsa import Diverged

N = 24


class Bowl:
    """Half the squared distance from 1 of a trunk, which z moves, and of a suffix, which has a gradient."""

    def __init__(self) -> None:
        self.trunk, self.suffix = [0.0] * N, [0.0] * N
        self.calls: list[tuple[float, float]] = []  # epsilon and lr of every descent

    def value(self, seed: int = 0, scale: float = 0.0) -> float:
        z = rademacher(seed, 0, N)
        moved = [theta + scale * float(sign) for theta, sign in zip(self.trunk, z, strict=True)]
        return math.fsum((theta - 1) ** 2 / 2 for theta in (*moved, *self.suffix)) / N

    def loss(self, seed: int, scale: float, batch: int) -> float:
        return self.value(seed, scale)

    def update(self, seed: int, coefficient: float) -> None:
        z = rademacher(seed, 0, N)
        self.trunk = [theta + coefficient * float(sign) for theta, sign in zip(self.trunk, z, strict=True)]

    def descend(self, seed: int, epsilon: float, lr: float, batch: int) -> tuple[float, float]:
        self.calls.append((epsilon, lr))
        plus, minus = self.value(seed, epsilon), self.value(seed, -epsilon)
        self.suffix = [theta - lr * (theta - 1) for theta in self.suffix]
        return plus, minus


def test_backpropagation_alone_leaves_the_trunk() -> None:
    bowl, trajectory = Bowl(), Trajectory()
    results = list(minimise(bowl, steps=40, lr=0.3, epsilon=None, evaluate=bowl.value, trajectory=trajectory))
    assert bowl.trunk == [0.0] * N
    assert all(abs(theta - 1) < 0.01 for theta in bowl.suffix)
    assert trajectory.steps == []
    assert trajectory.best_step == 40
    assert {epsilon for epsilon, _ in bowl.calls} == {0.0}
    assert all(not result.applied and result.forwards == 1 for result in results)
    rates = [lr for _, lr in bowl.calls]
    assert max(rates) <= 0.3
    assert rates[-1] == pytest.approx(0.03)


def test_both_halves_learn_and_the_ledger_has_the_trunk_s() -> None:
    bowl, trajectory = Bowl(), Trajectory()
    list(minimise(bowl, steps=200, lr=0.2, epsilon=0.3, evaluate=bowl.value, trajectory=trajectory, first_seed=5))
    assert trajectory.best_loss is not None
    assert trajectory.best_loss < 0.05
    assert len(bowl.calls) == 199  # the first step calibrates
    again = Bowl()
    for step in trajectory.steps:
        again.update(step.seed, step.coefficient)
    assert again.trunk == bowl.trunk


def test_with_a_period_every_so_manieth_step_is_backpropagation_alone() -> None:
    """LoHo: the others are zeroth-order alone."""
    bowl, trajectory = Bowl(), Trajectory()
    results = list(minimise(bowl, steps=18, lr=0.2, epsilon=0.3, period=4, trajectory=trajectory))
    assert [result.step for result in results if not result.applied] == [4, 8, 12, 16]
    assert len(bowl.calls) == 4
    assert {epsilon for epsilon, _ in bowl.calls} == {0.0}
    assert [result.forwards for result in results[1:8]] == [2, 2, 1, 2, 2, 2, 1]
    assert bowl.value() < 0.7 * Bowl().value()


def test_a_run_without_improvement_stops() -> None:
    bowl = Bowl()
    trajectory = Trajectory()
    values = iter(range(100))
    list(
        minimise(
            bowl, steps=90, lr=0.1, epsilon=None, evaluate=lambda: next(values), evaluate_every=5, patience=2,
            trajectory=trajectory,
        )
    )  # fmt: skip
    assert len(bowl.calls) == 10
    assert "did not improve" in trajectory.stopped
    assert trajectory.best_step == 0


@pytest.mark.parametrize("epsilon", [None, 1e-2])
def test_losses_that_are_no_numbers_end_it(epsilon: float | None) -> None:
    class Broken(Bowl):
        def descend(self, seed: int, epsilon: float, lr: float, batch: int) -> tuple[float, float]:
            return math.nan, math.nan

    with pytest.raises(Diverged):
        list(minimise(Broken(), steps=30, lr=0.1, epsilon=epsilon))


def test_settings_out_of_range_are_refused() -> None:
    for settings in ({"lr": 0.0}, {"lr": math.nan}, {"steps": -1}, {"epsilon": 0.0}, {"epsilon": 1e-3, "probes": 0},
                     {"period": 0}, {"period": 4}):  # fmt: skip
        with pytest.raises(ValueError, match=r"must|need"):
            list(minimise(Bowl(), **{"steps": 1, "lr": 0.1, "epsilon": None, **settings}))  # type: ignore[arg-type]
