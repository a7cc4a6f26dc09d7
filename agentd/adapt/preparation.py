"""What a pass has before it begins: its examples, and the plan that fits the memory there is."""

import asyncio
from pathlib import Path
from typing import Any

from agentd.adapt import dataset as datasets
from agentd.adapt.classifier import ClassifierSetting
from agentd.adapt.classifier import plan as plan_classifier
from agentd.adapt.dataset import Dataset
from agentd.adapt.dial import Replan
from agentd.adapt.fixed_costs import engine_runtime, needed
from agentd.adapt.planning import Setting, plan
from agentd.adapt.training import Training
from agentd.budget import probe
from agentd.budget.architecture import Architecture
from agentd.config import Config
from agentd.engine.activity import Activity
from agentd.engine.supervisor import Supervisor
from agentd.errors import PassRefused
from agentd.gguf_header import Header
from agentd.models import ModelFile
from agentd.store import passes
from agentd.store.database import Store

_EARLIER = 50  # past passes that a plan looks at
_IN_PLACE = {"supported": False, "reason": "engine transformers learns in place, without a trainer"}


class Preparation:
    """`folders` is where passes have their working directories. Everything here raises PassRefused."""

    def __init__(self, store: Store, engine: Supervisor, activity: Activity, model: ModelFile, folders: Path) -> None:
        self._store, self._engine, self._activity = store, engine, activity
        self._model, self._folders = model, folders
        self.probed: dict[str, Any] | None = None  # what the trainer says of this model, once it was asked
        self._measured = False

    async def language(
        self, config: Config, options: dict[str, Any], seed: int, *, engine_is_free: bool
    ) -> tuple[Setting, Dataset, Replan]:
        """The best setting for a language model, and how to find another one when memory changes meanwhile.

        engine_is_free  no session is open in the engine and none will be meanwhile, so that it can be measured
        """
        data = await self._select(config, seed)
        probed = await self._probe(config)
        if engine_is_free and config.engine == "llamacpp" and not self._measured:
            await self._measure(config, probed)
        earlier = [row.as_json() for row in await self._store.call(passes.latest, _EARLIER)]
        known = (config, self._model, data)
        setting = await asyncio.to_thread(plan, *known, options, probed, earlier)

        async def replan(held: int, ceiling: int | None) -> Setting:
            try:
                return await asyncio.to_thread(plan, *known, options, probed, earlier, held, ceiling)
            except PassRefused:  # what was asked for does not fit any more; anything is better than nothing
                anything = {**options, "method": "auto", "blocks": "auto"}
                return await asyncio.to_thread(plan, *known, anything, probed, earlier, held, ceiling)

        return setting, data, replan

    async def _probe(self, config: Config) -> dict[str, Any]:
        if config.engine == "transformers":
            self.probed = _IN_PLACE
        if self.probed is None:
            self._folders.mkdir(mode=0o700, parents=True, exist_ok=True)
            self.probed = await Training(self._activity, self._folders / "probe.log").probe(self._model.path)
        return self.probed

    async def _measure(self, config: Config, probed: dict[str, Any]) -> None:
        """Adds to `probed` what a session costs the engine here, if it can be told and there is memory to try."""
        if isinstance(self._model.header, Header):
            shapes, context = Architecture.from_header(self._model.header), config.model.context
            reading = await asyncio.to_thread(probe.read)
            if reading.available - config.memory.reserve < needed(shapes, context):
                return
            probed |= {"engine_runtime_bytes": await engine_runtime(self._engine, shapes, context, self._folders)}
        self._measured = True

    async def classifier(self, config: Config, options: dict[str, Any], seed: int) -> tuple[ClassifierSetting, Dataset]:
        """The best setting for a classifier."""
        assert self._model.classifier is not None
        data = await self._select(config, seed)
        return await asyncio.to_thread(plan_classifier, config, self._model.classifier, data, options), data

    async def _select(self, config: Config, seed: int) -> Dataset:
        adapt = config.adapt
        return await self._store.call(
            lambda db: datasets.select(db, limit=adapt.max_examples, seed=seed, gate=adapt.gate)
        )
