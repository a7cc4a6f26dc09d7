"""How the weights of engine transformers learn in a pass, in the engine's own process: by zeroth-order steps (MeZO), by
backpropagation in the last blocks, or by both (ElasticZO).

What is new is a ledger, (seed, projected gradient, learning rate, epsilon) a step, and the values of what
backpropagation has moved, which no ledger can make again. The candidate that the gate judges is not what the run left
behind but the parent's weights with the best steps replayed and these values put in, so what is judged, what is stored
and what a restart makes again are the same bytes; where the run ended at its best point, its own weights are compared
too.
"""

import asyncio
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agentd.adapt import descent, tensor_file, zeroth_order
from agentd.adapt.attempt import CANDIDATE, Attempt, Means
from agentd.adapt.backpropagation import NLL_WEIGHT
from agentd.adapt.dataset import Dataset
from agentd.adapt.revision_files import LEDGER, MANIFEST, TENSORS
from agentd.errors import PassFailed
from agentd.learn import ledger
from agentd.learn.ledger import Step
from agentd.learn.spsa import StepResult, Trajectory
from agentd.store import revisions

EPSILON = 1e-3  # Malladi et al. 2023, all weights; docs/methods.md has the error by epsilon
DISTRIBUTION = "rademacher"
SPARSITY = 0.75  # of sparse-mezo: the part of each matrix, its largest entries, that is left alone
LR, LR_FEW, FEW = 3e-3, 1e-2, 2  # of SGD in the last blocks, and in so FEW of them; docs/methods.md


@dataclass(frozen=True)
class How:
    """`blocks` last ones learn by backpropagation; `rule` is how zeroth-order steps move the rest, as a manifest says
    it. `dtype` is the type that the weights are served and learn in."""

    method: str
    blocks: int
    steps: int
    rule: dict[str, Any]
    dtype: str

    @classmethod
    def of(cls, method: str, blocks: int, steps: int, dtype: str) -> "How":
        sparsity = SPARSITY if method == "sparse-mezo" else None
        return cls(method, blocks, steps, {"distribution": DISTRIBUTION, "sparsity": sparsity}, dtype)


class InPlacePass(Attempt):
    nll_weight = NLL_WEIGHT

    def __init__(self, means: Means, how: How) -> None:
        super().__init__(means)
        self._how = how
        self._steps: list[Step] = []
        self._taken = 0
        self._reached: str | None = None  # sha256 of what the run ended with, if that is its best point
        self._digest = ""
        self._moved = means.folder / TENSORS  # what backpropagation has moved, if anything

    async def _learn(self, data: Dataset) -> None:
        how = self._how
        self._progress.begin(*_phase(how))
        await self._engine.call("rule", **how.rule, blocks=how.blocks)
        try:
            trajectory = await self._run(data)
        finally:
            await self._flush_steps()
        self._steps = trajectory.best_steps
        anything = bool(self._steps) or self._moved.exists()
        if anything and (trajectory.best_loss is None or trajectory.best_step == self._taken):
            self._reached = await self._engine.call("digest")
        await self._engine.call("use", weights=str(self._parent))  # the copy that learned is given up
        best = trajectory.best_step if trajectory.best_loss is not None else self._taken
        self._progress.message = f"best of {self._taken} steps: step {best}"

    async def _run(self, data: Dataset) -> Trajectory:
        how = self._how
        given: dict[str, Any] = {
            "train": [member.number for member in data.of("train")],
            "dev": [member.number for member in data.of("dev")],
            "steps": how.steps,
            "nll_weight": NLL_WEIGHT,
            "seed": self._seed + self._progress.id,
            "on_step": self._on_step,
        }
        if not how.blocks:
            return await zeroth_order.run(
                self._engine, **given, weights=str(self._parent), epsilon=EPSILON, in_place=True
            )
        lr = LR_FEW if how.blocks <= FEW else LR
        epsilon = None if how.method == "bp" else EPSILON
        return await descent.run(self._engine, **given, lr=lr, epsilon=epsilon, moved=self._moved)

    async def _stage_candidate(self) -> None:
        await asyncio.to_thread(self._write)
        await self._engine.stage(CANDIDATE, self._folder / LEDGER, None)
        await self._engine.call("use", weights=CANDIDATE)
        self._digest = await self._engine.call("digest")  # where one was known, staging has compared it
        if self._reached not in (None, self._digest):
            raise PassFailed("replaying the ledger gave other weights than the run had")

    async def _revision(self) -> tuple[dict[str, Path], dict[str, Any]]:
        line = await self._store.call(revisions.lineage, self._origin)
        described = await asyncio.to_thread(self._described)
        files = {LEDGER: self._folder / LEDGER}
        if self._moved.exists():
            files[TENSORS] = self._moved
        made = {"method": self._how.method, "blocks": self._how.blocks, "zo_steps": len(self._steps)}
        return files, {**made, **described, "line": line[::-1]}

    def _described(self) -> dict[str, Any]:
        """What a manifest says of the weights: how steps moved them, how many tensors it has, what it leads to."""
        moved = len(tensor_file.names(self._moved)) if self._moved.exists() else 0
        told = {"update": self._how.rule, "dtype": self._how.dtype, "weights_sha256": self._digest or None}
        return {**told, "tensors": moved}

    def _write(self) -> None:
        """The candidate as the engine reads it: the ledger, and beside it what its steps mean."""
        ledger.write(self._folder / LEDGER, ledger.Ledger(self._origin, self._steps))
        (self._folder / MANIFEST).write_text(json.dumps(self._described()), encoding="utf-8")

    def _on_step(self, result: StepResult) -> None:
        self._taken = result.step
        self._progress.note(result)
        row = zeroth_order.row(result, self._progress.seconds)
        self._rows.append({**row, "phase": "bp"} if self._how.method == "bp" else row)


def _phase(how: How) -> tuple[str, int, str]:
    blocks = f"{how.blocks} block{'s' if how.blocks != 1 else ''}"
    if how.method == "bp":
        return "train", how.steps, f"backpropagation in the last {blocks}"
    if how.blocks:
        return "zo", how.steps, f"backpropagation in the last {blocks}, SPSA in the trunk"
    return "zo", how.steps, "SPSA on all weights"
