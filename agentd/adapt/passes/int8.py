"""How a classifier learns in a pass: inside the engine, in integers. All else is the same as in any other pass.

The dial is the cutoff of ElasticZO-INT8: the last k layers learn by integer backpropagation, those below by
zeroth-order steps (`elasticzo`), or not at all (`suffix-bp`, which with all layers is full backpropagation); k = 0 is
`mezo`.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agentd.adapt.gate.skills import Skill
from agentd.adapt.passes.base import CANDIDATE, Attempt, Means
from agentd.adapt.planning.dataset import Dataset
from agentd.engine.operations import Learn, SignStepReport
from agentd.revision.files import LEDGER, NETWORK

BATCH = 32
NOISE = (7, 32)  # r_max and density of the perturbations
# Schedules over a pass. Tuned on 434 rotated training images of Fashion-MNIST, judged on other training images: BP with
# (3, 2, 1) reached 74.2 %, with these 77.2 %; the last two layers by BP 72.5 % and 73.4 %.
ZO_BITS = (1, 0, -1)
BP_BITS = (2, 1, 0, -1)
_KEPT_STEPS = 200  # rows of a pass's steps at most


@dataclass(frozen=True)
class ClassifierSetting:
    """What a pass will do: k = `blocks` layers by backpropagation, and the bytes that is predicted to take."""

    method: str
    blocks: int
    steps: int
    predicted: dict[str, int]
    budget: int
    layers: int

    @property
    def needed(self) -> int:
        return sum(self.predicted.values())

    @property
    def frozen(self) -> bool:
        return self.method == "suffix-bp"

    @property
    def has_zo(self) -> bool:
        return not self.frozen and self.blocks < self.layers

    def as_json(self) -> dict[str, Any]:
        return {
            "method": self.method,
            "blocks": self.blocks,
            "zo_steps": self.steps if self.has_zo else 0,
            "steps": self.steps,
            "batch": BATCH,
            "needed_bytes": self.needed,
            "budget_bytes": self.budget,
            "why": f"{self.method} with k = {self.blocks} of {self.layers} layers needs {self.needed / 1e6:.1f} MB of "
            f"the {self.budget / 1e6:.1f} MB there are",
        }


class ClassifierPass(Attempt):
    """A classifier's pass, which learns inside the engine. It has no neutral inputs to drift on: its one task is all it
    knows."""

    nll_weight = 0.0  # the loss is the cross-entropy alone

    def __init__(self, means: Means, setting: ClassifierSetting) -> None:
        super().__init__(means)
        self._setting = setting
        self._zo_steps = 0
        self._network, self._ledger = means.folder / NETWORK, means.folder / LEDGER

    async def _learn(self, data: Dataset) -> None:
        setting = self._setting
        what = f"backpropagation in {setting.blocks} of {setting.layers} layers"
        self._progress.begin("zo" if setting.has_zo else "train", setting.steps, what)
        try:
            learn = Learn(
                train=[member.number for member in data.of("train")],
                dev=[member.number for member in data.of("dev")],
                parent=self._origin,
                bp_layers=setting.blocks,
                frozen=setting.frozen,
                steps=setting.steps,
                batch=BATCH,
                seed=self._seed + self._progress.id,
                noise=NOISE,
                zo_bits=ZO_BITS,
                bp_bits=BP_BITS,
                network=self._network,
                ledger=self._ledger,
            )
            done = await self._engine.call(learn, self._on_step)
        finally:
            await self._flush_steps()
        self._zo_steps = done.zo_steps
        self._progress.message = f"best of {done.steps} steps: step {done.best_step}"

    async def _stage_candidate(self) -> None:
        await self._engine.stage(CANDIDATE, self._network, None)

    async def _drift(self) -> None:
        return None

    async def _skills(self) -> dict[str, Skill]:
        return {}

    async def _chosen(self, *_: object) -> dict[int, bool]:
        return {}  # integers: no layout changes a bit

    async def _revision(self) -> tuple[dict[str, Path], dict[str, Any]]:
        files = {NETWORK: self._network}
        if self._zo_steps:
            files[LEDGER] = self._ledger
        facts = {"method": self._setting.method, "blocks": self._setting.blocks, "zo_steps": self._zo_steps}
        return files, facts

    def _on_step(self, report: SignStepReport) -> None:
        progress, setting = self._progress, self._setting
        progress.step, progress.loss = report.step, report.loss
        row: dict[str, Any] = {"phase": "zo" if setting.has_zo else "bp", "step": report.step}
        row |= {"loss": report.loss, "seconds": progress.seconds}
        if report.dev_loss is not None:
            progress.dev_loss, progress.accuracy = report.dev_loss, report.dev_accuracy
            row |= {"dev_loss": report.dev_loss, "dev_accuracy": report.dev_accuracy}
        elif report.step % max(1, setting.steps // _KEPT_STEPS):
            return
        if setting.has_zo:
            row |= {"seed": str(report.seed), "projected_gradient": float(report.sign)}
        self._rows.append(row)
