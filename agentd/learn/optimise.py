"""The loop that every method shares: a step, now and then a look at the development loss, the best point kept, an end.

How a step is taken is the method's (spsa.py, descent.py). What is decided here is the same for all of them.
"""

import math
from collections.abc import Callable, Generator
from dataclasses import dataclass, field

from agentd.learn.ledger import Step
from agentd.learn.step_size import Calibration, schedule


@dataclass
class EarlyStopping:
    """Which point of a run did best on the development examples, and how many looks ago that was.

    Losses in any unit; one that is not finite is never the best. `best_loss` is None until one was.
    """

    first_loss: float | None = None
    best_loss: float | None = None
    best_step: int = 0
    failures: int = 0
    """Looks in a row that did not improve on the best one."""

    def judge(self, step: int, loss: float) -> bool:
        """Records the development loss after `step`; True when it is the best so far."""
        if self.first_loss is None:
            self.first_loss = loss
        if math.isfinite(loss) and (self.best_loss is None or loss < self.best_loss):
            self.best_step, self.best_loss, self.failures = step, loss, 0
            return True
        self.failures += 1
        return False


@dataclass
class Trajectory(EarlyStopping):
    """What a run has applied so far, and how much of it led to the best point seen on the development loss.

    A point of a run is a prefix of its steps: replay `best_steps` on the parent to stand at the best point.
    """

    steps: list[Step] = field(default_factory=list)
    best: int = 0
    calibration: Calibration | None = None
    stopped: str = ""

    @property
    def best_steps(self) -> list[Step]:
        """The steps up to the best development loss; all of them when there was no development loss."""
        return list(self.steps) if self.best_loss is None else self.steps[: self.best]

    def judge(self, step: int, loss: float) -> bool:
        improved = super().judge(step, loss)
        if improved:
            self.best = len(self.steps)
        return improved


@dataclass(frozen=True)
class Taken:
    """What a method says of the step that it took. `loss` is the mean of its losses; `applied` goes into the ledger."""

    loss: float
    projected_gradient: float
    lr: float
    applied: tuple[Step, ...]
    forwards: int
    curvature: float | None = None


@dataclass(frozen=True, kw_only=True)
class StepResult(Taken):
    """What one step did, and what was seen after it."""

    step: int
    steps: int
    dev_loss: float | None = None
    best: bool = False


def iterate(
    take: Callable[[int, float], Taken],
    trajectory: Trajectory,
    *,
    steps: int,
    evaluate: Callable[[], float] | None,
    evaluate_every: int,
    patience: int | None,
) -> Generator[StepResult, None, None]:
    """Takes `steps` steps, yielding after each; closing the generator stops the run cleanly.

    `take` gets a step's number (1-based) and the part of the step size to use: it warms up, falls along a cosine
    (step_size.py), and is halved on every second failure in a row to improve. `evaluate` returns a development loss
    (called before the first step, every `evaluate_every` steps and after the last); after `patience` failures in a row
    the run stops.
    """
    if evaluate is not None:
        trajectory.judge(0, evaluate())
        trajectory.failures = 0
    scale = 1.0
    for step in range(1, steps + 1):
        report = take(step, scale * schedule(step, steps))
        dev_loss, best = None, False
        if evaluate is not None and (step % evaluate_every == 0 or step == steps):
            dev_loss = evaluate()
            best = trajectory.judge(step, dev_loss)
            scale *= 0.5 if trajectory.failures and trajectory.failures % 2 == 0 else 1.0
        yield StepResult(step=step, steps=steps, **vars(report), dev_loss=dev_loss, best=best)
        if patience is not None and trajectory.failures >= patience:
            trajectory.stopped = f"{trajectory.failures} evaluations in a row did not improve"
            return
