"""Taking in what another device has learned: the same gate and the same trial as for what is learned here.

Engine transformers replays the steps on the base, and they must lead to the very weights that they led to there; engine
llama.cpp takes adapter and control vector as they are. Where this device has holdout of its own the gate judges the
candidate by it; where it has none, the trial alone does.
"""

import asyncio
from pathlib import Path
from typing import Any

from agentd.adapt.gate import gate
from agentd.adapt.gate.gate import Verdict
from agentd.adapt.passes.base import CANDIDATE, Attempt, Means
from agentd.adapt.passes.trainer_job import NLL_WEIGHT
from agentd.adapt.passes.transformers import InPlacePass, InPlaceSetting
from agentd.adapt.planning.dataset import Dataset
from agentd.learn.update_rule import UpdateRule
from agentd.revision.archive import Archive, WeightsArchive
from agentd.revision.files import ADAPTER, CONTROL


class _Import(Attempt):
    """What imports share whatever was learned: nothing to learn, and a gate that may have nothing to judge by."""

    _imported: Archive

    def _facts(self) -> dict[str, Any]:
        """What its manifest says of where it comes from."""
        source = self._imported.source
        return {"fleet": source} if source is not None else {"imported": {"origin": self._imported.origin}}

    async def _learn(self, data: Dataset) -> None:
        """It was learned elsewhere."""
        for name, content in self._imported.files.items():
            await asyncio.to_thread((self._folder / name).write_bytes, content)

    async def _gate(self, data: Dataset) -> Verdict:
        if data.of("holdout"):
            return await super()._gate(data)
        self._progress.begin("gate", 0, "no holdout here: the trial alone judges")
        await self._stage_candidate()
        drift = await self._drift()
        shown = await self._skills()
        figures = {group: skill.figures for group, skill in shown.items()}
        limit = self._config.adapt.gate.max_drift
        worse = gate.skill_problem(shown, self._config.adapt.gate)
        if drift is not None and drift > limit:
            verdict = Verdict(
                False, f"drift of {drift:.3f} nats per token from the base; the limit is {limit}", {}, drift, figures
            )
        elif worse:
            verdict = Verdict(False, worse, {}, drift, figures)
        else:
            origin = self._imported.source or f"revision {self._imported.origin} of another device"
            why = f"imported ({origin}); there is no holdout to judge it by"
            verdict = Verdict(True, why, {}, drift, figures)
        await self._advance("gated", gate=verdict.as_json())
        return verdict

    async def _scale(self, factor: float) -> bool:
        return False  # it is judged as others made it

    def _adapted(self, data: Dataset) -> set[str]:
        return {member.example.task for member in data.of("holdout")}


class WeightsImport(_Import, InPlacePass):
    def __init__(self, means: Means, archive: WeightsArchive) -> None:
        rule = UpdateRule.from_json(archive.update)
        super().__init__(means, InPlaceSetting(archive.method, archive.blocks, 0, rule, archive.dtype))
        self._imported, self._segments = archive, archive.segments
        self._ranks = archive.ranks
        self._origin = 0
        self._steps, self._zo_steps = archive.steps, len(archive.steps)
        self._digest = archive.weights_sha256
        # A board has seen but a part of what the fleet has: what is no worse on that part may be better elsewhere.
        self.improves = archive.source is None

    async def _revision(self) -> tuple[dict[str, Path], dict[str, Any]]:
        files, facts = await super()._revision()
        return files, {**facts, **self._facts()}

    def _beside(self) -> list[Path]:
        return [self._folder / name for name in self._imported.files]

    def _described(self) -> dict[str, Any]:
        described = super()._described()
        return described | ({"segments": [s.as_json() for s in self._segments]} if len(self._segments) > 1 else {})


class AdapterImport(_Import):
    nll_weight = NLL_WEIGHT

    def __init__(self, means: Means, archive: Archive) -> None:
        super().__init__(means)
        self._imported = archive
        self._origin = 0
        self.improves = archive.source is None

    async def _stage_candidate(self) -> None:
        adapter, control = (self._paths().get(name) for name in (ADAPTER, CONTROL))
        await self._engine.stage(CANDIDATE, adapter, control)

    async def _revision(self) -> tuple[dict[str, Path], dict[str, Any]]:
        archive = self._imported
        facts = {"method": archive.method, "blocks": archive.blocks, "zo_steps": 0}
        return self._paths(), {**facts, **self._facts()}

    def _paths(self) -> dict[str, Path]:
        return {name: self._folder / name for name in self._imported.files}
