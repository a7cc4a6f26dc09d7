"""What a pass has before it begins: its examples, and the plan that fits the memory there is."""

import asyncio
from pathlib import Path
from typing import Any

from agentd.adapt.kinds.kind import EngineKind, PassPlan
from agentd.adapt.passes.trainer_process import Training
from agentd.adapt.planning import dataset as datasets
from agentd.adapt.planning.dataset import Dataset
from agentd.adapt.planning.setting import Conditions, Machine
from agentd.config.schema import Config
from agentd.engine.process.activity import Activity
from agentd.engine.process.supervisor import Supervisor
from agentd.errors import PassRefused
from agentd.store import passes, schema_drift
from agentd.store.database import Store

_EARLIER = 50  # past passes that a plan looks at


class Preparation:
    """`folders` is where passes have their working directories."""

    def __init__(
        self, kind: EngineKind[Any], store: Store, engine: Supervisor, activity: Activity, folders: Path
    ) -> None:
        self._kind, self._store, self._engine, self._activity, self._folders = kind, store, engine, activity, folders
        self.probed: dict[str, Any] | None = None  # what the machine can do, once it was looked at

    async def plan(self, config: Config, options: dict[str, Any], seed: int, *, engine_is_free: bool) -> PassPlan[Any]:
        """The best setting, and how to find another one. Raises PassRefused.

        engine_is_free  no session is open in the engine and none will be meanwhile, so that it can be measured
        """
        data = await self._select(config, seed)
        self._folders.mkdir(mode=0o700, parents=True, exist_ok=True)
        trainer = Training(self._activity, self._folders / "probe.log")
        self.probed = await self._kind.probe(
            config, self._engine, trainer, self._folders, engine_is_free=engine_is_free
        )
        machine = Machine(self.probed, await earlier_passes(self._store))
        setting = await asyncio.to_thread(self._kind.setting, config, data, options, machine)

        async def replan(conditions: Conditions) -> Any:
            try:
                return await asyncio.to_thread(self._kind.setting, config, data, options, machine, conditions)
            except PassRefused:  # what was asked for does not fit any more; anything is better than nothing
                anything = {**options, "method": "auto", "blocks": "auto"}
                return await asyncio.to_thread(self._kind.setting, config, data, anything, machine, conditions)

        return PassPlan(setting, data, replan)

    async def _select(self, config: Config, seed: int) -> Dataset:
        adapt = config.adapt
        await self._store.call(schema_drift.review)
        return await self._store.call(
            lambda db: datasets.select(db, limit=adapt.max_examples, seed=seed, gate=adapt.gate)
        )


async def earlier_passes(store: Store) -> list[dict[str, Any]]:
    """The rows of past passes that a plan looks at, the newest first."""
    return [row.as_json() for row in await store.call(passes.latest, _EARLIER)]
