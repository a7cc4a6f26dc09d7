"""How the weights of engine transformers learn in a pass: MeZO on all of them, in the engine's own process.

What is new is a ledger: (seed, projected gradient, learning rate, epsilon) a step. The candidate that the gate judges
is not what the run left behind but the parent's weights with the best steps replayed, so what is judged, what is stored
and what a restart makes again are the same bytes; where the run ended at its best point, its own weights are compared
too.
"""

import asyncio
import json
from pathlib import Path
from typing import Any

from agentd.adapt import zeroth_order
from agentd.adapt.attempt import CANDIDATE, Attempt, Means
from agentd.adapt.backpropagation import NLL_WEIGHT
from agentd.adapt.dataset import Dataset
from agentd.adapt.revision_files import LEDGER, MANIFEST
from agentd.errors import PassFailed
from agentd.learn import ledger
from agentd.learn.ledger import Step
from agentd.learn.spsa import StepResult

EPSILON = 1e-3  # Malladi et al. 2023, all weights; docs/methods.md has the error by epsilon
DISTRIBUTION = "rademacher"
SPARSITY = 0.75  # of sparse-mezo: the part of each matrix, its largest entries, that is left alone


def rule(method: str) -> dict[str, Any]:
    """How the steps of a method move the weights, as a manifest says it."""
    return {"distribution": DISTRIBUTION, "sparsity": SPARSITY if method == "sparse-mezo" else None}


class InPlacePass(Attempt):
    nll_weight = NLL_WEIGHT

    def __init__(self, means: Means, *, method: str, steps: int, rule: dict[str, Any], dtype: str) -> None:
        """`rule` is how steps move the weights, `dtype` the type that the weights are served and learn in."""
        super().__init__(means)
        self._method, self._n_steps, self._rule, self._dtype = method, steps, rule, dtype
        self._steps: list[Step] = []
        self._reached: str | None = None  # sha256 of what the run ended with, if that is its best point
        self._digest = ""

    async def _learn(self, data: Dataset) -> None:
        steps = self._n_steps
        self._progress.begin("zo", steps, "SPSA on all weights")
        await self._engine.call("rule", **self._rule)
        try:
            trajectory = await zeroth_order.run(
                self._engine,
                train=[member.number for member in data.of("train")],
                dev=[member.number for member in data.of("dev")],
                steps=steps,
                nll_weight=NLL_WEIGHT,
                seed=self._seed + self._progress.id,
                weights=str(self._parent),
                on_step=self._on_step,
                epsilon=EPSILON,
                in_place=True,
            )
        finally:
            await self._flush_steps()
        self._steps = trajectory.best_steps
        if self._steps and len(self._steps) == len(trajectory.steps):
            self._reached = await self._engine.call("digest")
        await self._engine.call("use", weights=str(self._parent))  # the copy that learned is given up
        self._progress.message = f"best of {steps} steps: {len(self._steps)} are kept"

    async def _stage_candidate(self) -> None:
        await asyncio.to_thread(self._write)
        await self._engine.stage(CANDIDATE, self._folder / LEDGER, None)
        await self._engine.call("use", weights=CANDIDATE)
        self._digest = await self._engine.call("digest")  # where one was known, staging has compared it
        if self._reached not in (None, self._digest):
            raise PassFailed("replaying the ledger gave other weights than the run had")

    async def _revision(self) -> tuple[dict[str, Path], dict[str, Any]]:
        made = {"method": self._method, "blocks": 0, "zo_steps": len(self._steps)}
        return {LEDGER: self._folder / LEDGER}, {**made, **self._described()}

    def _described(self) -> dict[str, Any]:
        return {"update": self._rule, "dtype": self._dtype, "weights_sha256": self._digest or None}

    def _write(self) -> None:
        """The candidate as the engine reads it: the ledger, and beside it what its steps mean."""
        ledger.write(self._folder / LEDGER, ledger.Ledger(self._origin, self._steps))
        (self._folder / MANIFEST).write_text(json.dumps(self._described()), encoding="utf-8")

    def _on_step(self, result: StepResult) -> None:
        self._progress.note(result)
        self._rows.append(zeroth_order.row(result, self._progress.seconds))
