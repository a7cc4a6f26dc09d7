import itertools
import math
import random
import statistics
from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray

from agentd.learn.ledger import fold
from agentd.learn.optimise import Trajectory
from agentd.learn.philox import rademacher
from agentd.learn.spsa import Diverged, Oracle, minimise, spsa_gradient, visible
from agentd.learn.step_size import schedule


class Quadratic:
    """(theta - centre)' H (theta - centre) / 2 + floor, H = diag(h); `sampling` moves centres per batch."""

    def __init__(self, h: NDArray[np.float64], *, distance: float = 1.0, floor: float = 0.3) -> None:
        self.h, self.floor = h, floor
        self.theta = np.zeros(h.size)
        self.centre = distance * np.random.default_rng(0).standard_normal(h.size)
        self.noise: Callable[[], float] = lambda: 0.0
        self.sampling = 0.0
        self.forwards = 0

    def value(self, theta: NDArray[np.float64], batch: int | None = None) -> float:
        centre = self.centre
        if batch is not None and self.sampling:
            centre = centre + self.sampling * np.random.default_rng(1 + batch).standard_normal(self.h.size)
        # The constant keeps losses of different batches comparable, as those of real mini-batches are.
        return float(0.5 * (self.h * (theta - centre) ** 2).sum() + self.floor)

    def loss(self, seed: int, scale: float, batch: int) -> float:
        self.forwards += 1
        return self.value(self.theta + scale * rademacher(seed, 0, self.h.size), batch) + self.noise()

    def update(self, seed: int, coefficient: float) -> None:
        self.theta = self.theta + coefficient * rademacher(seed, 0, self.h.size)

    def dev(self) -> float:
        return self.value(self.theta)


def ill_conditioned(n: int = 200) -> NDArray[np.float64]:
    return np.logspace(0, -2, n) / n


def test_projected_gradient_of_a_quadratic_is_exact() -> None:
    """Central differences of a quadratic have no error at any epsilon: g = z' grad L."""
    oracle = Quadratic(ill_conditioned())
    gradient = oracle.h * (oracle.theta - oracle.centre)
    for seed, epsilon in itertools.product(range(5), (1e-2, 1.0, 30.0)):
        g, plus, minus = spsa_gradient(oracle, seed, epsilon, 0)
        assert g == pytest.approx(float(rademacher(seed, 0, 200) @ gradient), abs=1e-9)
        assert plus - minus == pytest.approx(2 * epsilon * g)


@pytest.mark.slow
def test_estimate_is_unbiased() -> None:
    """The mean of g z over seeds is the analytic gradient: E[z z'] is the identity."""
    n, draws = 20, 20_000
    oracle = Quadratic(np.linspace(0.1, 2.0, n))
    gradient = oracle.h * (oracle.theta - oracle.centre)
    total = np.zeros(n)
    for seed in range(draws):
        z = rademacher(seed, 0, n)
        total += spsa_gradient(oracle, seed, 0.1, 0)[0] * z
    # Var(g z_i) = |grad|^2 - grad_i^2 for signs; 5 standard errors over all entries
    assert np.abs(total / draws - gradient).max() < 5 * float(np.linalg.norm(gradient)) / draws**0.5


@pytest.mark.slow
@pytest.mark.parametrize("queries", [1, 4])
def test_converges_without_a_given_step_size(queries: int) -> None:
    oracle = Quadratic(ill_conditioned())
    excess = oracle.dev() - oracle.floor
    for _ in minimise(oracle, steps=600, epsilon=1.0, queries=queries):
        pass
    assert oracle.dev() - oracle.floor < 0.2 * excess


@pytest.mark.parametrize("scale", [1e-3, 1e3])
def test_calibration_follows_the_scale_of_the_loss(scale: float) -> None:
    """The run takes the same path in any unit of the loss: lr falls as curvature grows."""
    paths = []
    for factor in (1.0, scale):
        oracle = Quadratic(factor * ill_conditioned(), floor=0.0)
        for _ in minimise(oracle, steps=40, epsilon=1.0):
            pass
        paths.append(oracle.theta)
    assert np.allclose(paths[0], paths[1], rtol=1e-3, atol=1e-5)


def test_calibration_measures_the_trace_and_the_agreement() -> None:
    h = ill_conditioned(1000)
    oracle, trajectory = Quadratic(h), Trajectory()
    next(minimise(oracle, steps=100, epsilon=1.0, probes=16, trajectory=trajectory))
    assert trajectory.calibration is not None
    assert trajectory.calibration.curvature == pytest.approx(h.sum(), rel=1e-6)  # z'Hz is the trace for a diagonal H
    assert trajectory.calibration.agreement > 0.8
    assert trajectory.calibration.forwards == oracle.forwards == 96
    noisy, trajectory = Quadratic(h, distance=0.05), Trajectory()
    noisy.sampling = 1.0  # batches that share almost nothing
    next(minimise(noisy, steps=100, epsilon=1.0, probes=16, trajectory=trajectory))
    assert trajectory.calibration is not None
    assert trajectory.calibration.agreement < 0.35


@pytest.mark.parametrize("factor", [100.0, 1e6])
def test_a_step_size_far_too_large_does_not_diverge(factor: float) -> None:
    oracle = Quadratic(ill_conditioned())
    excess = oracle.dev() - oracle.floor
    stable = 1.0 / float(oracle.h.sum())
    rates = [result.lr for result in minimise(oracle, steps=300, epsilon=1.0, lr=factor * stable)]
    assert max(rates[1:]) <= 1.01 * stable
    assert oracle.dev() - oracle.floor < 0.4 * excess
    # The same without calibration shows that the guard is what saved it.
    plain = Quadratic(ill_conditioned())
    for _ in minimise(plain, steps=300, epsilon=1.0, lr=factor * stable, probes=0):
        pass
    assert plain.dev() - plain.floor > excess


def test_a_modest_step_size_is_kept_as_asked() -> None:
    oracle = Quadratic(ill_conditioned())
    lr = 0.1 / float(oracle.h.sum())
    results = list(minimise(oracle, steps=100, epsilon=1.0, lr=lr))
    peak = max(result.lr for result in results)
    assert peak == pytest.approx(lr)
    assert results[-1].lr == pytest.approx(0.1 * lr)


@pytest.mark.parametrize("seed", range(3))
def test_noise_of_the_oracle_is_survived(seed: int) -> None:
    """Every forward is off by some percent, every batch pulls elsewhere, and one loss in fifty is an outlier."""
    oracle = Quadratic(ill_conditioned(), distance=2.0)
    generator = random.Random(seed)
    oracle.noise = lambda: generator.gauss(0, 0.02) * (30 if generator.random() < 0.02 else 1)
    oracle.sampling = 0.5
    excess = oracle.dev() - oracle.floor
    trajectory = Trajectory()
    for _ in minimise(
        oracle, steps=400, epsilon=1.0, first_seed=1000 * seed, evaluate=oracle.dev, trajectory=trajectory
    ):
        pass
    assert trajectory.best_loss is not None
    # A lucky calibration reaches 0.3, one whose probes met the outliers 0.7; lr 0.1 would stay at 0.9.
    assert trajectory.best_loss - oracle.floor < 0.75 * excess
    assert oracle.dev() - oracle.floor < 0.8 * excess


def test_pure_noise_does_not_run_away() -> None:
    oracle = Quadratic(np.zeros(100))
    generator = random.Random(0)
    oracle.noise = lambda: generator.gauss(0, 0.01)
    for _ in minimise(oracle, steps=200, epsilon=0.1):
        pass
    # 200 steps no longer than epsilon each, in random directions
    assert np.abs(oracle.theta).max() < 0.1 * 200**0.5 * 3


def test_outliers_are_clipped() -> None:
    oracle = Quadratic(ill_conditioned())
    calls = itertools.count()
    oracle.noise = lambda: 1e6 if next(calls) == 70 else 0.0
    applied = [step for result in minimise(oracle, steps=40, epsilon=1.0) for step in result.applied]
    typical = statistics.median(abs(step.projected_gradient) for step in applied)
    assert max(abs(step.projected_gradient) for step in applied) < 12 * typical
    assert all(abs(step.coefficient) <= step.epsilon * 1.0001 for step in applied)


def test_epsilon_bounds_the_step_along_each_direction_not_their_sum() -> None:
    """Where epsilon allows less than the curvature does, four directions go four times as far as one."""
    rates = []
    for queries in (1, 4):
        oracle = Quadratic(ill_conditioned())
        results = list(minimise(oracle, steps=20, epsilon=1e-3, queries=queries, recheck=0))
        assert all(abs(step.coefficient) <= 1.0001e-3 for result in results for step in result.applied)
        rates.append(results[9].lr)
    assert rates[1] == pytest.approx(4 * rates[0], rel=0.5)


def test_the_ledger_replays_to_the_same_point() -> None:
    oracle, trajectory = Quadratic(ill_conditioned()), Trajectory()
    results = list(minimise(oracle, steps=30, epsilon=1.0, queries=2, first_seed=2**64 - 5, trajectory=trajectory))
    assert [step for result in results for step in result.applied] == trajectory.steps
    assert len({step.seed for step in trajectory.steps}) == len(trajectory.steps) == 4 + 29 * 2
    replayed = Quadratic(ill_conditioned())
    for seed, coefficient in fold(trajectory.steps):
        replayed.update(seed, coefficient)
    assert np.array_equal(replayed.theta, oracle.theta)


def test_a_run_is_reproducible() -> None:
    runs = []
    for _ in range(2):
        oracle = Quadratic(ill_conditioned())
        oracle.sampling = 0.5
        runs.append(list(minimise(oracle, steps=50, epsilon=1.0, first_seed=9, evaluate=oracle.dev)))
    assert runs[0] == runs[1]


def test_best_point_is_a_prefix_of_the_run() -> None:
    """The development loss gets worse after step 30: the best point is the run up to there, and replays to it."""
    oracle, trajectory = Quadratic(ill_conditioned()), Trajectory()
    snapshots = {}
    evaluations = iter([5.0, 4.0, 3.0, 1.0, 2.0, 2.0, 2.0, 2.0])
    for result in minimise(
        oracle, steps=100, epsilon=1.0, evaluate=lambda: next(evaluations), patience=3, trajectory=trajectory
    ):
        snapshots[result.step] = oracle.theta
        assert result.best == (result.step in (10, 20, 30))
    assert result.step == 60
    assert trajectory.stopped == "3 evaluations in a row did not improve"
    assert (trajectory.first_loss, trajectory.best_loss, trajectory.best_step) == (5.0, 1.0, 30)
    best = Quadratic(ill_conditioned())
    for seed, coefficient in fold(trajectory.best_steps):
        best.update(seed, coefficient)
    assert np.array_equal(best.theta, snapshots[30])


def test_a_run_that_only_gets_worse_has_its_start_as_best_point() -> None:
    oracle, trajectory = Quadratic(ill_conditioned()), Trajectory()
    evaluations = itertools.count(1)
    results = list(
        minimise(oracle, steps=40, epsilon=1.0, evaluate=lambda: float(next(evaluations)), trajectory=trajectory)
    )
    assert trajectory.best_steps == []
    assert len(trajectory.steps) == 4 + 39
    # The step size is halved on the second failed evaluation in a row, beyond what the schedule does.
    assert results[25].lr / results[15].lr == pytest.approx(0.5 * schedule(26, 40) / schedule(16, 40), rel=0.1)


def test_a_step_costs_its_two_forwards() -> None:
    oracle = Quadratic(ill_conditioned())
    results = list(minimise(oracle, steps=101, epsilon=1.0))
    assert sum(result.forwards for result in results) == oracle.forwards
    # one forward in twenty steps for the curvature
    assert sum(result.forwards for result in results[1:]) == 2 * 100 + 5


def test_closing_the_generator_stops_between_steps() -> None:
    oracle, trajectory = Quadratic(ill_conditioned()), Trajectory()
    run = minimise(oracle, steps=100, epsilon=1.0, trajectory=trajectory)
    for result in run:
        if result.step == 7:
            run.close()
    assert len(trajectory.steps) == 4 + 6
    assert trajectory.best_steps == trajectory.steps


def test_a_loss_that_is_not_finite_changes_nothing_and_is_named() -> None:
    oracle, trajectory = Quadratic(ill_conditioned()), Trajectory()
    oracle.noise = lambda: math.nan
    with pytest.raises(Diverged, match="not finite around the starting point"):
        next(minimise(oracle, steps=10, epsilon=1.0))
    broken = itertools.count()
    oracle.noise = lambda: math.nan if next(broken) > 50 else 0.0
    with pytest.raises(Diverged, match="5 steps in a row"):
        for _ in minimise(oracle, steps=100, epsilon=1.0, trajectory=trajectory):
            pass
    assert np.isfinite(oracle.theta).all()
    assert all(math.isfinite(step.coefficient) for step in trajectory.steps)


@pytest.mark.parametrize(
    "arguments",
    [{"epsilon": 0.0}, {"epsilon": math.nan}, {"queries": 0}, {"steps": -1}, {"lr": -1.0}, {"lr": math.inf},
     {"probes": 0}, {"evaluate_every": 0}],
)  # fmt: skip
def test_arguments_out_of_range_are_refused(arguments: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"must be|not a step size|give lr"):
        next(minimise(Quadratic(np.ones(3)), **{"steps": 1, "epsilon": 0.1, **arguments}))  # type: ignore[arg-type]  # values of several types


def test_quadratic_is_an_oracle() -> None:
    oracle: Oracle = Quadratic(np.ones(2))
    assert oracle.loss(0, 0.0, 0) > 0


class Share(Quadratic):
    """What share of the coordinates is farther than 1 from its centre: flat nearly everywhere."""

    def value(self, theta: NDArray[np.float64], batch: int | None = None) -> float:
        return float(np.mean(np.abs(theta - self.centre) > 1))


def test_a_loss_that_jumps_is_learned_from_as_far_away_as_it_shows() -> None:
    oracle = Share(np.ones(60), distance=3.0)
    before, flat = oracle.dev(), 1e-4
    assert {spsa_gradient(oracle, seed, flat, 0)[0] for seed in range(20)} == {0.0}
    epsilon = visible(oracle, flat, first_seed=0, change=0.05, most=20)
    assert epsilon / flat == 2 ** round(math.log2(epsilon / flat))
    assert any(spsa_gradient(oracle, seed, epsilon, 0)[0] for seed in range(4))
    *_, last = minimise(oracle, steps=300, epsilon=epsilon, first_seed=0)
    assert last.step == 300
    assert oracle.dev() < 0.7 * before


def test_a_loss_that_never_changes_ends_the_search() -> None:
    oracle = Share(np.ones(4), distance=0.0)
    oracle.centre += 1e9
    assert visible(oracle, 0.5, first_seed=0, change=0.1, seeds=2, most=3) == 4.0
    assert oracle.forwards == 12
