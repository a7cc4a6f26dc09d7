"""Taking in what another device has learned: the same gate and the same trial as for what is learned here.

The steps are replayed on the base, and must lead to the very weights that they led to there. Where this device has
holdout of its own the gate judges the candidate by it; where it has none, the trial alone does.
"""

import asyncio
from pathlib import Path
from typing import Any

from agentd.adapt.attempt import Means
from agentd.adapt.dataset import Dataset
from agentd.adapt.gate import Verdict
from agentd.adapt.in_place import How, InPlacePass
from agentd.adapt.portable import Adaptation


class ImportPass(InPlacePass):
    def __init__(self, means: Means, adaptation: Adaptation) -> None:
        how = How(adaptation.method, adaptation.blocks, 0, adaptation.update, adaptation.dtype)
        super().__init__(means, how)
        self._ranks = adaptation.ranks
        self._imported = adaptation
        self._origin = 0
        self._steps, self._zo_steps = adaptation.steps, len(adaptation.steps)
        self._digest = adaptation.weights_sha256

    async def _learn(self, data: Dataset) -> None:
        """It was learned elsewhere."""
        for name, content in self._imported.files.items():
            await asyncio.to_thread((self._folder / name).write_bytes, content)

    def _beside(self) -> list[Path]:
        return [self._folder / name for name in self._imported.files]

    def _described(self) -> dict[str, Any]:
        legs = self._imported.legs
        return super()._described() | ({"legs": [leg.as_json() for leg in legs]} if len(legs) > 1 else {})

    async def _gate(self, data: Dataset) -> Verdict:
        if data.of("holdout"):
            return await super()._gate(data)
        self._progress.begin("gate", 0, "no holdout here: the trial alone judges")
        await self._stage_candidate()
        drift = await self._drift()
        limit = self._config.adapt.gate.max_drift
        if drift is not None and drift > limit:
            verdict = Verdict(
                False, f"drift of {drift:.3f} nats per token from the base; the limit is {limit}", {}, drift
            )
        else:
            why = f"imported (revision {self._imported.origin} of another device); there is no holdout to judge it by"
            verdict = Verdict(True, why, {}, drift)
        await self._advance("gated", gate=verdict.as_json())
        return verdict

    def _adapted(self, data: Dataset) -> set[str]:
        return {member.example.task for member in data.of("holdout")}

    async def _revision(self) -> tuple[dict[str, Path], dict[str, Any]]:
        files, made = await super()._revision()
        return files, {**made, "imported": {"origin": self._imported.origin}}
