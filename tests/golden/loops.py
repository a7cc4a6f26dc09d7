"""The loops that take steps, over a loss that is a formula: long runs, in which everything happens that a loop decides.

Step sizes are calibrated, measured again, halved; projected gradients are clipped, losses are not numbers, runs stop.
"""

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from agentd.learn import descent, spsa
from agentd.learn.optimise import StepResult, Trajectory
from agentd.learn.philox import rademacher
from agentd.learn.spsa import growing_queries

_N, _SUFFIX = 24, 6  # entries of theta, and how many last ones have gradients
_EVERY = 10  # steps of which one is recorded


def measure(folder: Path) -> dict[str, Any]:
    long: dict[str, Any] = {"steps": 200, "first_seed": 7}
    elastic: dict[str, Any] = {**long, "lr": 0.05, "epsilon": 0.05, "probes": 2}
    return {
        "calibrated": _run(spsa.minimise, steps=200, epsilon=0.05),
        "calibrated, with patience": _run(
            spsa.minimise, steps=200, epsilon=0.05, patience=6, evaluate_every=5, early=True
        ),
        "more and more queries": _run(
            spsa.minimise, **long, epsilon=0.05, queries=lambda step: growing_queries(1 + step // 40)
        ),
        "a given step size": _run(spsa.minimise, **long, epsilon=0.05, lr=0.02),
        "no probes": _run(spsa.minimise, **long, epsilon=0.05, lr=0.002, probes=0, queries=2),
        "some losses are not numbers": _run(spsa.minimise, **long, epsilon=0.05, broken=5),
        "backpropagation alone": _run(descent.minimise, **{**elastic, "epsilon": None}),
        "elastic": _run(descent.minimise, **elastic),
        "elastic, with patience": _run(descent.minimise, **elastic, patience=6, evaluate_every=5, early=True),
        "now and then": _run(descent.minimise, **elastic, period=4),
    }


class _Bowl:
    """A sum of squares whose middle is elsewhere for each mini-batch. Sums are exact, so they are the same everywhere.

    broken  every so manieth seed gives a loss that is no number
    early   what judges has its middle on the way: the best point comes long before the end
    """

    _n_zo = _N  # entries that zeroth-order steps move

    def __init__(self, broken: int = 0, early: bool = False) -> None:
        self._theta = [2.0 * math.cos(i) for i in range(_N)]
        self._broken, self._early = broken, early

    def at(self, seed: int, scale: float, batch: int | None) -> float:
        if self._broken and scale and seed % self._broken == 0:
            return math.nan
        return math.fsum(
            0.5 * self._curvature(i) * self._apart(i, x, batch) ** 2 for i, x in enumerate(self._moved(seed, scale))
        )

    def loss(self, seed: int, scale: float, batch: int) -> float:
        return self.at(seed, scale, batch)

    def update(self, seed: int, coefficient: float) -> None:
        self._theta = self._moved(seed, coefficient)

    def judge(self) -> float:
        return self.at(0, 0.0, None)

    def norm(self) -> float:
        return math.sqrt(math.fsum(x * x for x in self._theta))

    def _moved(self, seed: int, scale: float) -> list[float]:
        if not scale:
            return list(self._theta)
        z = [*rademacher(seed, 0, self._n_zo).tolist(), *[0.0] * (_N - self._n_zo)]
        return [x + scale * each for x, each in zip(self._theta, z, strict=True)]

    def _curvature(self, i: int) -> float:
        return 0.1 + 0.2 * (i % 5)

    def _apart(self, i: int, x: float, batch: int | None) -> float:
        if batch is None:
            return x - (1.2 * math.cos(i) if self._early else 0.0)
        return x - 0.5 * math.sin(3.0 * batch + i)


class _DescendingBowl(_Bowl):
    """Its last entries have gradients, and zeroth-order steps leave them alone."""

    _n_zo = _N - _SUFFIX

    def descend(self, seed: int, epsilon: float, lr: float, batch: int) -> tuple[float, float]:
        plus, minus = self.at(seed, epsilon, batch), self.at(seed, -epsilon, batch)
        for i in range(self._n_zo, _N):
            self._theta[i] -= lr * self._curvature(i) * self._apart(i, self._theta[i], batch)
        return plus, minus


def _run(
    minimise: Callable[..., Iterator[StepResult]], broken: int = 0, early: bool = False, **options: Any
) -> dict[str, Any]:
    bowl = (_DescendingBowl if minimise is descent.minimise else _Bowl)(broken, early)
    trajectory = Trajectory()
    results = list(minimise(bowl, **options, evaluate=bowl.judge, trajectory=trajectory))
    sampled = results[:2] + results[_EVERY - 1 :: _EVERY]
    return {
        "loss": [result.loss for result in sampled],
        "dev_loss": [result.dev_loss for result in sampled],
        "lr": [result.lr for result in sampled],
        "projected_gradient": [result.projected_gradient for result in sampled],
        "curvature": [result.curvature for result in sampled],
        "seeds": [[step.seed for step in result.applied] for result in sampled],
        "forwards": sum(result.forwards for result in results),
        "steps": len(results),
        "best_step": trajectory.best_step,
        "best_loss": trajectory.best_loss,
        "stopped": trajectory.stopped,
        "theta": bowl.norm(),
    }
