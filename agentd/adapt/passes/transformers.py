"""How the weights of engine transformers learn in a pass, in the engine's own process: by zeroth-order steps (MeZO),
by backpropagation in the last blocks, by both (ElasticZO, LoHo), or through low-rank adapters that learn in either way
(LoRA, AdaZeta's tensor trains).

What is new is a ledger, (seed, projected gradient, learning rate, epsilon) a step, and what no ledger can make again:
the values of what backpropagation has moved, or the adapters' factors, which are added to the weights. The candidate
that the gate judges is not what the run left behind but the parent's weights with the best steps replayed and these
values put in or factors added, so what is judged, what is stored and what a restart makes again are the same bytes;
where the run ended at its best point, its own weights are compared too.
"""

import asyncio
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from agentd.adapt.passes import first_order, zeroth_order
from agentd.adapt.passes.base import CANDIDATE, Attempt, Means
from agentd.adapt.passes.trainer_job import NLL_WEIGHT
from agentd.adapt.planning.dataset import Dataset
from agentd.adapt.planning.setting import ALPHA
from agentd.budget.expectation import LOHO_PERIOD
from agentd.engine.operations import Digest, SetRule, Use, WriteMoved
from agentd.engine.protocol import AdapterSpec, LearningRule, Weights
from agentd.errors import PassFailed
from agentd.formats import safetensors_file
from agentd.learn import ledger
from agentd.learn.encoded import METRIC
from agentd.learn.ledger import Step
from agentd.learn.optimise import StepResult, Trajectory
from agentd.learn.spsa import growing_queries
from agentd.learn.update_rule import UpdateRule
from agentd.methods import CHANGES, FORWARD_ONLY
from agentd.revision.files import LEDGER, LORA, MANIFEST, TENSORS
from agentd.store import revisions

EPSILON = 1e-3  # Malladi et al. 2023, all weights; docs/methods.md has the error by epsilon
EPSILON_CHANGES = 1e-2  # of low-rank adapters, whose weights' own move by far less
SPARSITY = 0.75  # of sparse-mezo
LR, LR_FEW, FEW = 3e-3, 1e-2, 2  # of SGD in the last blocks, and in so FEW of them; docs/benchmarks.md
LR_LORA = 1e-3  # of AdamW
_FACTOR = ".lora_B.weight"  # of the two whose product is added to a layer, the one whose scale is that of the product
TRAIN_RANK = 5  # of tensor trains, as in AdaZeta (Yang et al. 2024)


@dataclass(frozen=True)
class InPlaceSetting:
    """What a pass will do: the last `blocks` learn by backpropagation, the rest by zeroth-order steps of `rule`; the
    weights are served and learn in the type `dtype`, low-rank adapters have this `rank`."""

    method: str
    blocks: int
    steps: int
    rule: UpdateRule
    dtype: str
    rank: int = 0

    @classmethod
    def of(cls, method: str, blocks: int, steps: int, dtype: str, rank: int) -> "InPlaceSetting":
        rule = UpdateRule(sparsity=SPARSITY if method == "sparse-mezo" else None)
        if method not in CHANGES:
            rank = 0
        elif method == "adazeta":
            rank = TRAIN_RANK
        return cls(method, blocks, steps, rule, dtype, rank)

    def session(self, seed: int) -> LearningRule:
        """The rule of a session that learns so."""
        if self.method not in CHANGES:
            return LearningRule(**self.rule.as_json(), blocks=self.blocks, everywhere=self.method == "loho")
        kind, alpha = ("tensor-train", 1.0) if self.method == "adazeta" else ("lora", ALPHA * self.rank)
        return LearningRule(
            **self.rule.as_json(),
            adapters=AdapterSpec(kind, self.rank, alpha, seed, differentiated=self.method == "lora"),
        )


class InPlacePass(Attempt):
    nll_weight = NLL_WEIGHT

    def __init__(self, means: Means, setting: InPlaceSetting) -> None:
        super().__init__(means)
        self._setting = setting
        self._steps: list[Step] = []
        self._taken, self._zo_steps = 0, 0
        self._reached: str | None = None  # sha256 of what the run ended with, if that is its best point
        self._digest = ""
        # of low-rank adapters, each added to the weights after the one before it
        self._ranks: tuple[int, ...] = (setting.rank,)
        # what no ledger can make again, if there is anything: the values that backpropagation moved, or adapters
        self._moved = means.folder / (LORA if setting.method in CHANGES else TENSORS)

    @property
    def _start(self) -> Weights:
        """What is learned on top of."""
        return str(self._origin)

    async def _learn(self, data: Dataset) -> None:
        setting = self._setting
        self._progress.begin(*_phase(setting))
        await self._engine.call(SetRule(setting.session(self._seed + self._progress.id)))
        try:
            trajectory = await self._run(data)
        finally:
            await self._flush_steps()
        changes = setting.method in CHANGES
        self._zo_steps = len(trajectory.best_steps)
        self._steps = [] if changes else trajectory.best_steps
        anything = bool(self._steps) or self._moved.exists()
        if anything and not changes and (trajectory.best_loss is None or trajectory.best_step == self._taken):
            self._reached = await self._engine.call(Digest())
        await self._engine.call(Use(self._start))  # the copy that learned is given up
        best = trajectory.best_step if trajectory.best_loss is not None else self._taken
        self._progress.message = f"best of {self._taken} steps: step {best}"

    async def _run(self, data: Dataset) -> Trajectory:
        setting = self._setting
        arguments: dict[str, Any] = {
            "train": [member.number for member in data.of("train", "replay")],
            "dev": [member.number for member in data.of("dev")],
            "steps": setting.steps,
            "nll_weight": NLL_WEIGHT,
            "seed": self._seed + self._progress.id,
            "on_step": self._on_step,
            "out_of_time": lambda: self._progress.seconds > self._config.adapt.max_time,
        }
        if setting.method in FORWARD_ONLY:
            changes = setting.method in CHANGES
            trajectory = await zeroth_order.run(
                self._engine,
                **arguments,
                weights=self._start,
                epsilon=EPSILON_CHANGES if changes else EPSILON,
                in_place=True,
                remade=changes,
                jumps=data.objective == METRIC,
                queries=growing_queries if setting.method == "adazeta" else lambda epoch: 1,
            )
            if changes and trajectory.best_steps:
                await self._engine.call(WriteMoved(self._moved))
            return trajectory
        lr = LR_LORA if setting.method == "lora" else LR_FEW if setting.blocks <= FEW else LR
        epsilon = None if setting.method in ("bp", "lora") else EPSILON
        period = LOHO_PERIOD if setting.method == "loho" else 1
        return await first_order.run(
            self._engine, **arguments, lr=lr, epsilon=epsilon, period=period, moved=self._moved
        )

    async def _stage_candidate(self) -> None:
        await asyncio.to_thread(self._write)
        await self._engine.stage(CANDIDATE, self._folder / LEDGER, None)
        await self._engine.call(Use(CANDIDATE))
        self._digest = await self._engine.call(Digest())  # where one was known, staging has compared it
        if self._reached not in (None, self._digest):
            raise PassFailed("replaying the ledger gave other weights than the run had")

    async def _scale(self, factor: float) -> bool:
        moved = self._moved.exists()
        if self._moved.name == TENSORS if moved else not self._steps:
            return False  # of weights' values only the engine knows how far they went
        self._steps = [replace(step, lr=step.lr * factor) for step in self._steps]
        if moved:
            await asyncio.to_thread(safetensors_file.scale, self._moved, _FACTOR, factor)
        self._reached, self._digest = None, ""
        return True

    async def _revision(self) -> tuple[dict[str, Path], dict[str, Any]]:
        chain = await self._store.call(revisions.lineage, self._origin)
        described = await asyncio.to_thread(self._described)
        files = {LEDGER: self._folder / LEDGER} | {path.name: path for path in self._beside()}
        facts = {"method": self._setting.method, "blocks": self._setting.blocks, "zo_steps": self._zo_steps}
        return files, {**facts, **described, "chain": chain[::-1]}

    def _beside(self) -> list[Path]:
        """What there is that no ledger can make again."""
        return [self._moved] if self._moved.exists() else []

    def _described(self) -> dict[str, Any]:
        """What a manifest says of the weights: how steps moved them, how many tensors or changes it has, what it leads
        to."""
        update, dtype = self._setting.rule.as_json(), self._setting.dtype
        description: dict[str, Any] = {
            "update": update,
            "dtype": dtype,
            "weights_sha256": self._digest or None,
            "tensors": 0,
        }
        for path in self._beside():
            description |= (
                {"ranks": self._ranks} if path.name == LORA else {"tensors": len(safetensors_file.names(path))}
            )
        return description

    def _write(self) -> None:
        """The candidate as the engine reads it: the ledger, and beside it what its steps mean."""
        ledger.write(self._folder / LEDGER, ledger.Ledger(self._origin, self._steps))
        (self._folder / MANIFEST).write_text(json.dumps(self._described()), encoding="utf-8")

    def _on_step(self, result: StepResult) -> None:
        self._taken = result.step
        self._progress.note(result)
        row = zeroth_order.row(result, self._progress.seconds)
        self._rows.append({**row, "phase": "bp"} if self._setting.method in ("bp", "lora") else row)


def _phase(setting: InPlaceSetting) -> tuple[str, int, str]:
    blocks = f"{setting.blocks} block{'s' if setting.blocks != 1 else ''}"
    return {
        "bp": ("train", setting.steps, f"backpropagation in the last {blocks}"),
        "lora": ("train", setting.steps, f"LoRA of rank {setting.rank} by backpropagation"),
        "elasticzo": ("zo", setting.steps, f"backpropagation in the last {blocks}, SPSA in the trunk"),
        "loho": (
            "zo",
            setting.steps,
            f"SPSA on all weights, every {LOHO_PERIOD}th step backpropagation in the last {blocks}",
        ),
        "mezo-lora": ("zo", setting.steps, f"SPSA on LoRA of rank {setting.rank}"),
        "adazeta": ("zo", setting.steps, "SPSA on tensor trains, more queries in every epoch"),
    }.get(setting.method, ("zo", setting.steps, "SPSA on all weights"))
