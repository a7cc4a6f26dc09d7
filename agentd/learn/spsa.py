"""Zeroth-order optimisation: MeZO's two-sided SPSA over a loss oracle, with a step size calibrated from the run itself.

    g = (L(theta + eps z) - L(theta - eps z)) / 2 eps,    theta <- theta - lr g z

SPSA is Spall 1992; MeZO (Malladi et al. 2023) makes z again from its seed instead of storing it. The optimiser never
sees theta or z: the oracle applies them.

Before the first step the step size is calibrated (step_size.py): curvature and agreement are measured on `probes` seeds
and two batches, at the price of 6 probes forwards; the measurements are also the first update, so that they are not
lost.

L0 is taken a tenth of epsilon away along z, and the slope subtracted: engines that round activations to 8 bits have
losses with a grain, and at theta itself all sequences sit on one grain (measured: 0.04 off the mean of six points 0.003
away, whose own standard deviation is 0.008).
"""

import math
import statistics
from collections import deque
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from agentd.learn.ledger import Step
from agentd.learn.optimise import StepResult, Taken, Trajectory, iterate
from agentd.learn.step_size import CLIP, Calibration

_RECENT = 32
_CURVATURES = 8
_MAX_BAD = 5
_DITHER = 0.1
_MASK = (1 << 64) - 1


class Oracle(Protocol):
    """A model seen as a number. `batch` indexes mini-batches: the same index must give the same examples."""

    def loss(self, seed: int, scale: float, batch: int) -> float:
        """The loss on mini-batch `batch` at theta + scale * z(seed). `scale` 0 is theta itself."""

    def update(self, seed: int, coefficient: float) -> None:
        """theta <- theta + coefficient * z(seed), for good."""


@runtime_checkable
class PairOracle(Oracle, Protocol):
    """An oracle that has both signs of a perturbation at one go."""

    def pair(self, seed: int, epsilon: float, batch: int) -> tuple[float, float]:
        """(loss at theta + epsilon z, loss at theta - epsilon z), both on the same batch."""


class Diverged(ArithmeticError):
    """The loss stopped being a finite number, step after step."""


def spsa_gradient(oracle: Oracle, seed: int, epsilon: float, batch: int) -> tuple[float, float, float]:
    """(projected gradient, loss at +epsilon, loss at -epsilon): two forwards, both on the same batch."""
    if isinstance(oracle, PairOracle):
        plus, minus = oracle.pair(seed, epsilon, batch)
    else:
        plus, minus = oracle.loss(seed, epsilon, batch), oracle.loss(seed, -epsilon, batch)
    return (plus - minus) / (2 * epsilon), plus, minus


def minimise(
    oracle: Oracle,
    *,
    steps: int,
    epsilon: float,
    lr: float | None = None,
    queries: int | Callable[[int], int] = 1,
    first_seed: int = 0,
    probes: int = 4,
    recheck: int = 20,
    evaluate: Callable[[], float] | None = None,
    evaluate_every: int = 10,
    patience: int | None = None,
    trajectory: Trajectory | None = None,
) -> Generator[StepResult, None, None]:
    """Minimises the oracle's loss by `steps` steps of the loop in optimise.py.

    Step i uses mini-batch i (the probes use 0 and 1) and `queries` fresh seeds counted up from `first_seed`, whose
    projected gradients are averaged; a function gives their number by the step's (1-based). Each is clipped at 3 median
    absolute deviations of the recent ones and at queries epsilon / lr: two losses at +-epsilon say nothing about a step
    further than epsilon along that direction.

    `lr` None takes the calibrated one; a number is kept as asked unless the curvature says that it diverges. The
    curvature is measured again every `recheck` steps (one forward). `probes` 0 leaves calibration and rechecks out:
    plain MeZO with `lr`, which must then be given. `trajectory` is filled with the applied steps and the best point.

    Raises Diverged after five steps in a row without a finite loss, ValueError for arguments out of range.
    """
    count = queries if callable(queries) else lambda _: queries
    if steps < 0 or not epsilon > 0 or count(1) < 1 or probes < 0 or evaluate_every < 1:
        raise ValueError("steps and probes must be 0 or more, queries and evaluate_every 1 or more, epsilon positive")
    if lr is not None and not (math.isfinite(lr) and lr >= 0):
        raise ValueError(f"lr {lr} is not a step size")
    if lr is None and probes == 0:
        raise ValueError("without probes there is nothing to calibrate the step size from: give lr")
    trajectory = trajectory if trajectory is not None else Trajectory()
    run = SPSA(oracle, epsilon, first_seed, trajectory)

    def take(step: int, part: float) -> Taken:
        if step == 1 and probes:
            estimate = run.calibrate(probes)
            return run.apply(estimate, run.rate(lr, probes))
        rate = part * run.rate(lr, count(step))
        estimate = run.measure(step, count(step), curvature=bool(probes and recheck and step % recheck == 0))
        return run.apply(estimate, rate)

    return iterate(take, trajectory, steps=steps, evaluate=evaluate, evaluate_every=evaluate_every, patience=patience)


def visible(oracle: Oracle, epsilon: float, *, first_seed: int, change: float, seeds: int = 4, most: int = 6) -> float:
    """The first of epsilon, 2 epsilon, 4 epsilon, … at which the losses on both sides are `change` apart, by the root
    mean square over some seeds, one a mini-batch; after `most` doublings the last.

    For a loss that is the same almost everywhere and jumps in between, as a share of right answers is. What is learned
    of such a loss is its mean over theta + epsilon z, which has a gradient, as soon as epsilon reaches a jump: the
    projected gradient is an unbiased estimate of that one's (Duchi, Jordan, Wainwright and Wibisono 2015).
    """
    for _ in range(most):
        differences = []
        for i in range(seeds):
            gradient, *_ = spsa_gradient(oracle, first_seed + i, epsilon, i)
            differences.append(2 * epsilon * gradient)
        if math.sqrt(statistics.fmean(each * each for each in differences)) >= change:
            break
        epsilon *= 2
    return epsilon


def growing_queries(epoch: int, *, alpha: float = 1.0, beta: float = 0.5, most: int = 8) -> int:
    """Q(e) = min(ceil(alpha e^beta), most) for the epoch counted from 1 (AdaZeta, Yang et al. 2024): directions say
    less and less as the loss falls, so a step takes more of them. Raises ValueError for an epoch below 1."""
    if epoch < 1:
        raise ValueError(f"epochs count from 1, not {epoch}")
    return min(math.ceil(alpha * math.pow(epoch, beta)), most)


@dataclass(frozen=True)
class Estimate:
    """Projected gradients at one point, finite ones only, and the mean of their losses."""

    gradients: list[tuple[int, float]]  # (seed, projected gradient)
    loss: float
    forwards: int


class SPSA:
    """The state of a run between its steps: its step size, what clips it, and what it has applied."""

    def __init__(self, oracle: Oracle, epsilon: float, first_seed: int, trajectory: Trajectory) -> None:
        self.oracle, self.epsilon, self.trajectory = oracle, epsilon, trajectory
        self._next_seed = first_seed
        self._recent: deque[float] = deque(maxlen=_RECENT)
        self._curvatures: deque[float] = deque(maxlen=_CURVATURES)
        self._bad = 0

    def seed(self) -> int:
        seed = self._next_seed & _MASK
        self._next_seed = seed + 1
        return seed

    def typical(self) -> float:
        """The median of the recent |g|: their median absolute deviation, as g is symmetric about 0."""
        return statistics.median(self._recent) if self._recent else 0.0

    def curvature(self) -> float | None:
        return statistics.median(self._curvatures) if self._curvatures else None

    def calibrate(self, probes: int) -> Estimate:
        """Fills the trajectory's calibration; returns the measurements as those of one step of `probes` queries."""
        pairs: list[tuple[float, float]] = []
        losses: list[float] = []
        curvatures: list[float] = []
        seeds: list[int] = []
        for _ in range(probes):
            seed = self.seed()
            sides = [spsa_gradient(self.oracle, seed, self.epsilon, batch) for batch in (0, 1)]
            bends = [self._bend(seed, batch, side) for batch, side in enumerate(sides)]
            if all(math.isfinite(value) for side in (*sides, bends) for value in side):
                seeds.append(seed)
                pairs.append((sides[0][0], sides[1][0]))
                losses += [loss for side in sides for loss in side[1:]]
                curvatures += bends
        if not seeds:
            raise Diverged(f"the loss is not finite around the starting point, at epsilon {self.epsilon:g}")
        self._recent.extend(abs(g) for pair in pairs for g in pair)
        self._curvatures.extend(curvatures)
        limit = CLIP * self.typical()
        pairs = [(max(-limit, min(limit, a)), max(-limit, min(limit, b))) for a, b in pairs]
        self.trajectory.calibration = Calibration.of(pairs, curvatures, 6 * probes)
        gradients = [(seed, (a + b) / 2) for seed, (a, b) in zip(seeds, pairs, strict=True)]
        return Estimate(gradients, statistics.fmean(losses), 6 * probes)

    def _bend(self, seed: int, batch: int, side: tuple[float, float, float]) -> float:
        """z'Hz on `batch`, from the two losses at hand and one more forward near the middle."""
        gradient, plus, minus = side
        offset = _DITHER * self.epsilon
        middle = self.oracle.loss(seed, offset, batch) - offset * gradient
        return (plus + minus - 2 * middle) / (self.epsilon**2 - offset**2)

    def rate(self, requested: float | None, queries: int) -> float:
        """The step size before the schedule: the calibrated one, or the one asked for, within what is stable."""
        calibration = self.trajectory.calibration
        if calibration is None:
            return requested or 0.0
        # The largest median step that epsilon can vouch for along each of the directions, among which `lr` is divided;
        # all there is where no curvature shows above the noise.
        trusted = queries * self.epsilon / (self.typical() or self.epsilon)
        target = (
            calibration.agreement * min(calibration.stable_lr(queries), trusted) if requested is None else requested
        )
        # The curvature met on the way, where it has grown since the probes.
        grown = max(1.0, (self.curvature() or 0.0) / calibration.curvature) if calibration.curvature > 0 else 1.0
        rate = min(target, calibration.stable_lr(queries) / grown, trusted)
        return rate if math.isfinite(rate) else 0.0

    def measure(self, batch: int, queries: int, *, curvature: bool) -> Estimate:
        gradients: list[tuple[int, float]] = []
        losses: list[float] = []
        for query in range(queries):
            seed = self.seed()
            gradient, plus, minus = side = spsa_gradient(self.oracle, seed, self.epsilon, batch)
            if curvature and query == 0 and math.isfinite(bend := self._bend(seed, batch, side)):
                self._curvatures.append(bend)
            if math.isfinite(gradient):
                gradients.append((seed, gradient))
                losses += [plus, minus]
        return self.estimate(gradients, losses, 2 * queries + curvature)

    def estimate(self, gradients: list[tuple[int, float]], losses: list[float], forwards: int) -> Estimate:
        """Counts steps without any finite loss. Raises Diverged."""
        self._bad = 0 if gradients else self._bad + 1
        if self._bad >= _MAX_BAD:
            raise Diverged(f"{_MAX_BAD} steps in a row gave no finite loss; epsilon {self.epsilon:g} may be too large")
        return Estimate(gradients, statistics.fmean(losses) if losses else math.nan, forwards)

    def apply(self, estimate: Estimate, rate: float) -> Taken:
        """Clips, updates theta, records. The projected gradient told is the mean of the clipped ones."""
        applied: tuple[Step, ...] = ()
        if estimate.gradients:
            limit = CLIP * self.typical() or math.inf
            share = rate / len(estimate.gradients)
            if share > 0:
                limit = min(limit, self.epsilon / share)
            self._recent.extend(abs(gradient) for _, gradient in estimate.gradients)
            applied = tuple(
                Step(seed, max(-limit, min(limit, gradient)), share, self.epsilon)
                for seed, gradient in estimate.gradients
            )
        for step in applied:
            self.oracle.update(step.seed, step.coefficient)
            self.trajectory.steps.append(step)
        mean = statistics.fmean(step.projected_gradient for step in applied) if applied else 0.0
        return Taken(estimate.loss, mean, rate, applied, estimate.forwards, self.curvature())
