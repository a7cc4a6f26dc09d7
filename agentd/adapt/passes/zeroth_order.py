"""Zeroth-order steps with the engine as the loss oracle: on the control vectors of the trunk, on all weights, or on
low-rank changes beside them."""

import asyncio
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from agentd.adapt.passes.loss_journal import LossJournal
from agentd.engine.operations import Loss, Operation, Pair, R, Update, Use
from agentd.engine.process.supervisor import Supervisor
from agentd.learn.ledger import fold
from agentd.learn.optimise import StepResult, Trajectory
from agentd.learn.spsa import minimise, visible

EPSILON = 0.1  # in units of the hidden state; measured to be in the flat part (reference: zeroth-order)
BATCH = 16
_SHORT, _SHORT_BATCH = 32, 8  # a run of so few steps after backpropagation: half a batch, so that it stays short
MAX_DEV = 32  # examples
PATIENCE = 3  # evaluations in a row that do not improve
_CHANGE = 0.1  # of a share of right answers, from one side of a perturbation to the other, that says something
PROBES = (2, 4)  # at least and at most, to calibrate the step size; one for every eight steps in between


class EngineOracle:
    """The engine's loss as `learn.spsa` wants it: blocking, called from a worker thread."""

    def __init__(
        self,
        engine: Supervisor,
        train: Sequence[int],
        nll_weight: float,
        seed: int,
        batch: int = BATCH,
        journal: LossJournal | None = None,
    ) -> None:
        self._engine, self._train, self._weight, self._seed = engine, list(train), nll_weight, seed
        self._batch, self._journal = batch, journal
        self._loop = asyncio.get_running_loop()

    @property
    def per_epoch(self) -> int:
        """Mini-batches in an epoch."""
        return max(1, len(self._train) // min(self._batch, len(self._train)))

    def batch(self, number: int) -> list[int]:
        """The examples of mini-batch `number`: epochs in a shuffled order, the same for the same seed."""
        size = min(self._batch, len(self._train))
        epoch, place = divmod(number, self.per_epoch)
        order = random.Random(f"{self._seed}/{epoch}").sample(self._train, len(self._train))
        return order[place * size : (place + 1) * size]

    def loss(self, seed: int, scale: float, batch: int) -> float:
        return self.mean_loss(self.batch(batch), seed, scale)

    def mean_loss(self, examples: list[int], seed: int = 0, scale: float = 0.0) -> float:
        def measure() -> float:
            return self._call(Loss(examples, self._weight, seed, scale))

        return measure() if self._journal is None else self._journal.tell(measure)

    def update(self, seed: int, coefficient: float) -> None:
        self._call(Update(seed, coefficient))

    def _call(self, operation: Operation[R, Any]) -> R:
        return asyncio.run_coroutine_threadsafe(self._engine.call(operation), self._loop).result()


class PairingOracle(EngineOracle):
    """The same for an engine that measures both signs with one command."""

    def pair(self, seed: int, epsilon: float, batch: int) -> tuple[float, float]:
        return self._call(Pair(self.batch(batch), self._weight, seed, epsilon))


async def run(
    engine: Supervisor,
    *,
    train: Sequence[int],
    dev: Sequence[int],
    steps: int,
    nll_weight: float,
    seed: int,
    weights: str,
    on_step: Callable[[StepResult], None],
    epsilon: float = EPSILON,
    in_place: bool = False,
    remade: bool = True,
    queries: Callable[[int], int] = lambda epoch: 1,
    out_of_time: Callable[[], bool] = lambda: False,
    first: int | None = None,
    jumps: bool = False,
    journal: LossJournal | None = None,
) -> Trajectory:
    """Takes `steps` steps from the staged `weights`, which the session must be using, and leaves the session at the
    best point seen on `dev`: exactly the weights plus the replayed trajectory.

    in_place  the engine measures both signs with one command
    remade    False leaves the session where the run ended, where the best point is made again from the ledger anyway
    queries   of a step, by its epoch (1-based)
    out_of_time  asked after every step; the run ends once it is true
    first     the first of the directions' seeds, which count up from there; None: by `seed`, which orders batches
    jumps     the loss is a share of right answers: `epsilon` grows until it is seen to change
    journal   of this run; the losses that it has are not measured again. Not with `in_place`
    """
    kind = PairingOracle if in_place else EngineOracle
    oracle = kind(engine, train, nll_weight, seed, _SHORT_BATCH if steps <= _SHORT else BATCH, journal)
    trajectory = Trajectory()
    judged = list(dev)[:MAX_DEV]
    start = first_seed(seed) if first is None else first

    def begin() -> Iterator[StepResult]:
        return minimise(
            oracle,
            steps=steps,
            epsilon=visible(oracle, epsilon, first_seed=start, change=_CHANGE) if jumps else epsilon,
            first_seed=start,
            evaluate=(lambda: oracle.mean_loss(judged)) if judged else None,
            patience=PATIENCE,
            probes=probes_of(steps),
            queries=lambda step: queries(1 + step // oracle.per_epoch),
            trajectory=trajectory,
        )

    await drive(begin, on_step, out_of_time)
    if not remade:
        return trajectory
    # Floating-point addition does not undo itself: the best point is made again from its start.
    await engine.call(Use(weights))
    for number, coefficient in fold(trajectory.best_steps):
        await engine.call(Update(number, coefficient))
    return trajectory


def probes_of(steps: int) -> int:
    """Directions of the first of so many steps, which calibrates the step size."""
    return max(PROBES[0], min(PROBES[1], steps // 8))


def first_seed(seed: int) -> int:
    """Where the seeds of a pass begin: it takes far fewer than 2^20 of them; the ledger keeps 64 bits."""
    return (seed << 20) % (1 << 64)


async def drive(
    begin: Callable[[], Iterator[StepResult]],
    on_step: Callable[[StepResult], None],
    out_of_time: Callable[[], bool] = lambda: False,
) -> None:
    """Takes the steps of a run in a worker thread, telling of each; stops after the current one when cancelled or out
    of time."""
    loop = asyncio.get_running_loop()
    stop = False

    def work() -> None:
        for result in begin():
            loop.call_soon_threadsafe(on_step, result)
            if stop or out_of_time():
                return

    try:
        await asyncio.to_thread(work)
    except asyncio.CancelledError:
        stop = True
        raise


def row(result: StepResult, seconds: float) -> dict[str, Any]:
    """A step as the database keeps it."""
    entry: dict[str, Any] = {"phase": "zo", "step": result.step, "loss": result.loss, "dev_loss": result.dev_loss}
    entry |= {"seconds": seconds, "projected_gradient": result.projected_gradient, "lr": result.lr}
    if result.applied:
        entry |= {"seed": str(result.applied[0].seed), "epsilon": result.applied[0].epsilon}
    return entry
