"""Backpropagation in the last blocks of the engine's own weights, alone or beside zeroth-order steps, and in low-rank
adapters beside all of them."""

import asyncio
import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from agentd.adapt.passes.zeroth_order import BATCH, MAX_DEV, PATIENCE, PROBES, PairingOracle, drive, first_seed
from agentd.engine.operations import Descend, WriteMoved
from agentd.engine.process.supervisor import Supervisor
from agentd.learn import descent
from agentd.learn.optimise import StepResult, Trajectory


class BackpropagatingOracle(PairingOracle):
    """The engine's loss as `learn.descent` wants it."""

    def descend(self, seed: int, epsilon: float, lr: float, batch: int) -> tuple[float, float]:
        return self._call(Descend(self.batch(batch), self._weight, seed, epsilon, lr))

    def write_moved(self, path: Path) -> None:
        self._call(WriteMoved(path))


@dataclass
class SnapshotTrajectory(Trajectory):
    """What backpropagation has moved cannot be made again from a ledger, so the best point's is written."""

    snapshot: Callable[[], None] = lambda: None

    def judge(self, step: int, loss: float) -> bool:
        best = super().judge(step, loss)
        if best and step:
            self.snapshot()
        return best


async def run(
    engine: Supervisor,
    *,
    train: Sequence[int],
    dev: Sequence[int],
    steps: int,
    nll_weight: float,
    seed: int,
    lr: float,
    epsilon: float | None,
    moved: Path,
    on_step: Callable[[StepResult], None],
    period: int = 1,
    out_of_time: Callable[[], bool] = lambda: False,
) -> Trajectory:
    """Takes `steps` steps from the weights that the session uses, whose rule says what learns, and leaves the
    session where the run ended. `moved` then has what backpropagation moves at the best point; there is no such file
    where that is the start. `lr`, `epsilon` and `period` as in learn/descent.py."""
    oracle = BackpropagatingOracle(engine, train, nll_weight, seed, BATCH)
    with contextlib.suppress(FileNotFoundError):
        moved.unlink()
    trajectory = SnapshotTrajectory(snapshot=lambda: oracle.write_moved(moved))
    judged = list(dev)[:MAX_DEV]
    await drive(
        lambda: descent.minimise(
            oracle,
            steps=steps,
            lr=lr,
            epsilon=epsilon,
            period=period,
            first_seed=first_seed(seed),
            probes=PROBES[0],
            evaluate=(lambda: oracle.mean_loss(judged)) if judged else None,
            patience=PATIENCE,
            trajectory=trajectory,
        ),
        on_step,
        out_of_time,
    )
    if not judged and steps:
        await asyncio.to_thread(oracle.write_moved, moved)
    return trajectory
