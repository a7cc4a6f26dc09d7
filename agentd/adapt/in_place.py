"""How the weights of engine transformers learn in a pass, in the engine's own process: by zeroth-order steps (MeZO),
by backpropagation in the last blocks, by both (ElasticZO, LoHo), or through low-rank changes that learn in either way
(LoRA, AdaZeta's tensor trains).

What is new is a ledger, (seed, projected gradient, learning rate, epsilon) a step, and what no ledger can make again:
the values of what backpropagation has moved, or the changes' factors, which are added to the weights. The candidate
that the gate judges is not what the run left behind but the parent's weights with the best steps replayed and these
values put in or factors added, so what is judged, what is stored and what a restart makes again are the same bytes;
where the run ended at its best point, its own weights are compared too.
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
from agentd.adapt.revision_files import LEDGER, LORA, MANIFEST, TENSORS
from agentd.budget.expectation import LOHO_PERIOD
from agentd.errors import PassFailed
from agentd.learn import ledger
from agentd.learn.ledger import Step
from agentd.learn.spsa import StepResult, Trajectory, growing_queries
from agentd.methods import CHANGES, FORWARD_ONLY
from agentd.store import revisions

EPSILON = 1e-3  # Malladi et al. 2023, all weights; docs/methods.md has the error by epsilon
EPSILON_CHANGES = 1e-2  # of low-rank changes, whose weights' own move by far less
DISTRIBUTION = "rademacher"
SPARSITY = 0.75  # of sparse-mezo: the part of each matrix, its largest entries, that is left alone
LR, LR_FEW, FEW = 3e-3, 1e-2, 2  # of SGD in the last blocks, and in so FEW of them; docs/methods.md
LR_LORA = 1e-3  # of AdamW
TRAIN_RANK = 5  # of tensor trains, as in AdaZeta (Yang et al. 2024)
_ALPHA = 2.0  # of LoRA, in units of the rank


@dataclass(frozen=True)
class How:
    """`blocks` last ones learn by backpropagation; `rule` is how zeroth-order steps move the rest, as a manifest says
    it. `dtype` is the type that the weights are served and learn in, `rank` that of low-rank changes."""

    method: str
    blocks: int
    steps: int
    rule: dict[str, Any]
    dtype: str
    rank: int = 0

    @classmethod
    def of(cls, method: str, blocks: int, steps: int, dtype: str, rank: int) -> "How":
        sparsity = SPARSITY if method == "sparse-mezo" else None
        kept = (TRAIN_RANK if method == "adazeta" else rank) if method in CHANGES else 0
        return cls(method, blocks, steps, {"distribution": DISTRIBUTION, "sparsity": sparsity}, dtype, kept)

    def session(self, seed: int) -> dict[str, Any]:
        """What the session is told: `protocol.InPlaceBackground.rule`."""
        told: dict[str, Any] = {**self.rule, "blocks": self.blocks, "everywhere": self.method == "loho"}
        if self.method in CHANGES:
            kind, alpha = ("tensor-train", 1.0) if self.method == "adazeta" else ("lora", _ALPHA * self.rank)
            change = {"kind": kind, "rank": self.rank, "alpha": alpha, "seed": seed}
            told |= {"blocks": 0, "change": {**change, "differentiated": self.method == "lora"}}
        return told


class InPlacePass(Attempt):
    nll_weight = NLL_WEIGHT

    def __init__(self, means: Means, how: How) -> None:
        super().__init__(means)
        self._how = how
        self._steps: list[Step] = []
        self._taken, self._zo_steps = 0, 0
        self._reached: str | None = None  # sha256 of what the run ended with, if that is its best point
        self._digest = ""
        # of low-rank changes, each added to the weights after the one before it
        self._ranks: tuple[int, ...] = (how.rank,)
        # what no ledger can make again, if there is anything: the values that backpropagation moved, or changes
        self._moved = means.folder / (LORA if how.method in CHANGES else TENSORS)

    async def _learn(self, data: Dataset) -> None:
        how = self._how
        self._progress.begin(*_phase(how))
        await self._engine.call("rule", **how.session(self._seed + self._progress.id))
        try:
            trajectory = await self._run(data)
        finally:
            await self._flush_steps()
        changes = how.method in CHANGES
        self._zo_steps = len(trajectory.best_steps)
        self._steps = [] if changes else trajectory.best_steps
        anything = bool(self._steps) or self._moved.exists()
        if anything and not changes and (trajectory.best_loss is None or trajectory.best_step == self._taken):
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
        if how.method in FORWARD_ONLY:
            changes = how.method in CHANGES
            trajectory = await zeroth_order.run(
                self._engine,
                **given,
                weights=str(self._parent),
                epsilon=EPSILON_CHANGES if changes else EPSILON,
                in_place=True,
                remade=changes,
                queries=growing_queries if how.method == "adazeta" else lambda epoch: 1,
            )
            if changes and trajectory.best_steps:
                await self._engine.call("write_moved", path=str(self._moved))
            return trajectory
        lr = LR_LORA if how.method == "lora" else LR_FEW if how.blocks <= FEW else LR
        epsilon = None if how.method in ("bp", "lora") else EPSILON
        period = LOHO_PERIOD if how.method == "loho" else 1
        return await descent.run(self._engine, **given, lr=lr, epsilon=epsilon, period=period, moved=self._moved)

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
        files = {LEDGER: self._folder / LEDGER} | {path.name: path for path in self._beside()}
        made = {"method": self._how.method, "blocks": self._how.blocks, "zo_steps": self._zo_steps}
        return files, {**made, **described, "line": line[::-1]}

    def _beside(self) -> list[Path]:
        """What there is that no ledger can make again."""
        return [self._moved] if self._moved.exists() else []

    def _described(self) -> dict[str, Any]:
        """What a manifest says of the weights: how steps moved them, how many tensors or changes it has, what it leads
        to."""
        update, dtype = self._how.rule, self._how.dtype
        told: dict[str, Any] = {"update": update, "dtype": dtype, "weights_sha256": self._digest or None, "tensors": 0}
        for path in self._beside():
            told |= {"ranks": self._ranks} if path.name == LORA else {"tensors": len(tensor_file.names(path))}
        return told

    def _write(self) -> None:
        """The candidate as the engine reads it: the ledger, and beside it what its steps mean."""
        ledger.write(self._folder / LEDGER, ledger.Ledger(self._origin, self._steps))
        (self._folder / MANIFEST).write_text(json.dumps(self._described()), encoding="utf-8")

    def _on_step(self, result: StepResult) -> None:
        self._taken = result.step
        self._progress.note(result)
        row = zeroth_order.row(result, self._progress.seconds)
        self._rows.append({**row, "phase": "bp"} if self._how.method in ("bp", "lora") else row)


def _phase(how: How) -> tuple[str, int, str]:
    blocks = f"{how.blocks} block{'s' if how.blocks != 1 else ''}"
    return {
        "bp": ("train", how.steps, f"backpropagation in the last {blocks}"),
        "lora": ("train", how.steps, f"LoRA of rank {how.rank} by backpropagation"),
        "elasticzo": ("zo", how.steps, f"backpropagation in the last {blocks}, SPSA in the trunk"),
        "loho": (
            "zo",
            how.steps,
            f"SPSA on all weights, every {LOHO_PERIOD}th step backpropagation in the last {blocks}",
        ),
        "mezo-lora": ("zo", how.steps, f"SPSA on LoRA of rank {how.rank}"),
        "adazeta": ("zo", how.steps, "SPSA on tensor trains, more queries in every epoch"),
    }.get(how.method, ("zo", how.steps, "SPSA on all weights"))
