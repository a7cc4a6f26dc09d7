"""Backpropagation in the last blocks, alone, beside zeroth-order steps in the trunk below them (ElasticZO), or now and
then among them (LoHo).

A step of ElasticZO (Sugiura and Matsutani 2025) takes both losses of SPSA; BP goes through the minus pass:

    suffix   theta <- theta - lr_bp dL-/dtheta
    trunk    theta <- theta - lr_zo g z,  g = (L+ - L-) / 2 eps

The trunk's step size is calibrated and its projected gradients are clipped as in learn/spsa.py; that of the suffix is
given. Both warm up and fall along the same cosine.
"""

import dataclasses
import math
from collections.abc import Callable, Generator
from typing import Protocol

from agentd.learn.optimise import StepResult, Taken, Trajectory, iterate
from agentd.learn.spsa import SPSA, Oracle


class DescentOracle(Oracle, Protocol):
    """A model whose last blocks have gradients. z moves the trunk below them alone."""

    def descend(self, seed: int, epsilon: float, lr: float, batch: int) -> tuple[float, float]:
        """The losses at trunk + epsilon z and trunk - epsilon z; then, if both are finite, the last blocks have gone
        down the gradient of the latter by `lr`. At epsilon 0 both are the same loss, of one forward."""


def minimise(
    oracle: DescentOracle,
    *,
    steps: int,
    lr: float,
    epsilon: float | None,
    period: int = 1,
    first_seed: int = 0,
    probes: int = 4,
    evaluate: Callable[[], float] | None = None,
    evaluate_every: int = 10,
    patience: int | None = None,
    trajectory: Trajectory | None = None,
) -> Generator[StepResult, None, None]:
    """Takes `steps` steps of the loop in optimise.py; what is not said here is as in `learn.spsa.minimise`.

    lr       of the last blocks
    epsilon  of the trunk's steps; None leaves the trunk as it is
    period   with 2 or more, every `period`-th step is backpropagation alone and the others are zeroth-order alone

    With an epsilon the first step is the calibration, which is an update of the trunk alone. Raises Diverged.
    """
    if steps < 0 or evaluate_every < 1 or period < 1 or not (math.isfinite(lr) and lr > 0):
        raise ValueError("steps must be 0 or more, evaluate_every and period 1 or more, lr positive")
    if period > 1 and epsilon is None:
        raise ValueError("a period needs zeroth-order steps in between, hence an epsilon")
    if epsilon is not None and not (epsilon > 0 and probes > 0):
        raise ValueError("zeroth-order steps need a positive epsilon and probes to calibrate their size")
    trajectory = trajectory if trajectory is not None else Trajectory()
    run = SPSA(oracle, epsilon or 1.0, first_seed, trajectory)

    def backpropagate(step: int, rate: float) -> Taken:
        seed = run.seed()
        _, loss = oracle.descend(seed, 0.0, rate, step)
        estimate = run.estimate([(seed, 0.0)] if math.isfinite(loss) else [], [loss], 1)
        return Taken(estimate.loss, 0.0, rate, (), 1)

    def take(step: int, part: float) -> Taken:
        if epsilon is None or (period > 1 and step % period == 0):
            return backpropagate(step, part * lr)
        if step == 1:
            estimate, rate = run.calibrate(probes), run.rate(None, probes)
        elif period > 1:
            estimate, rate = run.measure(step, 1, curvature=False), part * run.rate(None, 1)
        else:
            seed = run.seed()
            plus, minus = oracle.descend(seed, epsilon, part * lr, step)
            g = (plus - minus) / (2 * epsilon)
            finite = math.isfinite(g)
            estimate = run.estimate([(seed, g)] if finite else [], [plus, minus] if finite else [], 2)
            rate = part * run.rate(None, 1)
        return dataclasses.replace(run.apply(estimate, rate), curvature=None)

    return iterate(take, trajectory, steps=steps, evaluate=evaluate, evaluate_every=evaluate_every, patience=patience)
