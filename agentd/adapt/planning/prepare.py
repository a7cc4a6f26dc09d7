"""What a pass has before it begins: its examples, and the plan that fits the memory there is."""

import asyncio
import contextlib
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from agentd.adapt.kinds.kind import EngineKind, PassPlan, Probing
from agentd.adapt.passes.trainer_process import Training
from agentd.adapt.planning import dataset as datasets
from agentd.adapt.planning.dataset import Dataset
from agentd.adapt.planning.setting import Conditions, Machine
from agentd.adapt.recall.practice import with_recall
from agentd.config.schema import Config
from agentd.engine.operations import Abandon, Encode, Open
from agentd.engine.process.activity import Activity
from agentd.engine.process.supervisor import Supervisor
from agentd.errors import AgentdError, PassRefused
from agentd.learn.encoded import LIKELIHOOD
from agentd.store import examples, meanings, measurements, passes, schema_drift
from agentd.store.database import Store

SIFTED = "sifted"  # the folder of what the engine reads before a pass starts by itself
_EARLIER = 50  # past passes that a plan looks at


class Preparation:
    """`folders` is where passes have their working directories."""

    def __init__(
        self, kind: EngineKind[Any], store: Store, engine: Supervisor, activity: Activity, folders: Path
    ) -> None:
        self._kind, self._store, self._engine, self._activity, self._folders = kind, store, engine, activity, folders
        self._probed: dict[str, Any] | None = None
        self._key: str | None = None  # under which that is kept
        self._asked = False

    async def plan(
        self,
        config: Config,
        options: dict[str, Any],
        seed: int,
        *,
        engine_is_free: bool,
        recalled: Mapping[str, int] = MappingProxyType({}),
        data: Dataset | None = None,
    ) -> PassPlan[Any]:
        """The best setting, and how to find another one. Raises PassRefused.

        options         as the pass has them; `consolidate`: it begins at the base
        engine_is_free  no session is open in the engine and none will be meanwhile, so that it can be measured
        recalled        by task, with how many past corrections its prompts are served
        data            of a pass that has its examples already
        """
        self._folders.mkdir(mode=0o700, parents=True, exist_ok=True)
        trainer = Training(self._activity, self._folders / "probe.log")
        probed = await self._probe(config, trainer, engine_is_free)
        machine = Machine(probed, await earlier_passes(self._store))
        if data is not None:
            setting = await asyncio.to_thread(self._kind.setting, config, data, options, machine)
        else:
            data, setting = await self._fitting(config, options, seed, machine)
            data, setting = await self._prompted(config, options, seed, machine, data, setting, recalled)

        async def replan(conditions: Conditions) -> Any:
            if conditions.prefers is not None:
                same = {**options, **dict(zip(("method", "blocks"), conditions.prefers, strict=True))}
                with contextlib.suppress(PassRefused):
                    return await asyncio.to_thread(self._kind.setting, config, data, same, machine, conditions)
            try:
                return await asyncio.to_thread(self._kind.setting, config, data, options, machine, conditions)
            except PassRefused:  # what was asked for does not fit any more; anything is better than nothing
                anything = {**options, "method": "auto", "blocks": "auto"}
                return await asyncio.to_thread(self._kind.setting, config, data, anything, machine, conditions)

        return PassPlan(setting, data, replan)

    async def contribution(self, config: Config, kinds: Sequence[str], seed: int) -> tuple[str, PassPlan[Any]]:
        """The first of these kinds of contribution to a fleet that fits, with its plan: of all examples, learned or
        not. Raises PassRefused."""
        refused: PassRefused | None = None
        for kind in kinds:
            options = {**self._kind.contributions[kind], "consolidate": True, "objective": LIKELIHOOD}
            try:
                return kind, await self.plan(config, options, seed, engine_is_free=True)
            except PassRefused as error:
                refused = refused or error
        assert refused is not None
        raise refused

    async def known(self) -> dict[str, Any] | None:
        """What the machine can do, as this process found or an earlier one; None where none has looked yet."""
        if not self._asked:
            self._asked = True
            self._key = await asyncio.to_thread(self._kind.probed_under)
            if self._key:
                self._probed = await self._store.call(measurements.recall, self._key)
        return self._probed

    async def _probe(self, config: Config, trainer: Training, engine_is_free: bool) -> dict[str, Any]:
        """What the machine can do: measured once, and kept over restarts."""
        known = await self.known()
        using = Probing(self._engine, trainer, self._folders, engine_is_free)
        self._probed = await self._kind.probe(config, using, known)
        if self._key and self._probed != known:
            with contextlib.suppress(AgentdError):  # costs time at the next start, no more
                await self._store.call(measurements.remember, self._key, self._probed)
        return self._probed

    async def _fitting(
        self, config: Config, options: dict[str, Any], seed: int, machine: Machine
    ) -> tuple[Dataset, Any]:
        """The examples and the best setting for them. Where a pass is to learn everything again, as much of it as fits
        into memory, but no less than other passes take."""
        least, relearn = config.adapt.max_examples, bool(options.get("consolidate"))
        limit = max(least, config.adapt.consolidate.max_examples) if relearn else least
        while True:
            data = await self._select(config, seed, limit, relearn=relearn)
            data = replace(data, objective=options.get("objective", config.adapt.objective))
            try:
                return data, await asyncio.to_thread(self._kind.setting, config, data, options, machine)
            except PassRefused:
                if limit <= least:
                    raise
                limit = max(least, min(limit, len(data.of("train", "dev"))) // 2)

    async def _prompted(
        self,
        config: Config,
        options: dict[str, Any],
        seed: int,
        machine: Machine,
        data: Dataset,
        setting: Any,
        recalled: Mapping[str, int],
    ) -> tuple[Dataset, Any]:
        """With recall in some prompts, unless their length would cost blocks or methods."""
        prompted = await with_recall(self._store, data, recalled, config.adapt.recall_tokens, seed)
        if prompted is not data:
            with contextlib.suppress(PassRefused):
                other = await asyncio.to_thread(self._kind.setting, config, prompted, options, machine)
                if (other.method, other.blocks) == (setting.method, setting.blocks):
                    return prompted, other
        return data, setting

    async def sift(self, config: Config, seed: int) -> bool:
        """Before a pass starts by itself with this seed: sets aside what the engine cannot use of its examples, and
        what calls tools that are gone, so that it starts on nothing that would turn out useless. Returns whether less
        is new now.

        No one else may have a session in the engine meanwhile. Raises AgentdError.
        """
        before = await self._store.call(datasets.readiness, config.adapt.gate)
        with contextlib.suppress(PassRefused):  # a pass that is refused all the same says why
            await self._set_aside(config, await self._select(config, seed, config.adapt.max_examples))
        after = await self._store.call(datasets.readiness, config.adapt.gate)
        return after.new < before.new

    def tidy(self) -> None:
        """Removes what a crash has left of sifting: it holds users' texts."""
        shutil.rmtree(self._folders / SIFTED, ignore_errors=True)

    async def _set_aside(self, config: Config, data: Dataset) -> None:
        read = max((member.example.updated_at for member in data.members), default=None)
        folder = self._folders / SIFTED
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        source, target = folder / "examples.jsonl", folder / "encoded.jsonl"
        try:
            await asyncio.to_thread(data.write, source)
            await self._engine.call(Open())
            try:
                await self._engine.call(Encode(source, target))
            finally:
                await self._engine.call(Abandon())
            data, _ = await asyncio.to_thread(datasets.usable, data, target)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        if data.unusable:
            await self._store.call(examples.set_aside, data.unusable, read, config.context)

    async def _select(self, config: Config, seed: int, limit: int, *, relearn: bool = False) -> Dataset:
        gate = config.adapt.gate
        await self._store.call(schema_drift.review)
        await self._store.call(meanings.review)
        return await self._store.call(
            lambda db: datasets.select(db, limit=limit, seed=seed, gate=gate, relearn=relearn)
        )


async def earlier_passes(store: Store) -> list[dict[str, Any]]:
    """The rows of past passes that a plan looks at, the newest first."""
    return [row.as_json() for row in await store.call(passes.latest, _EARLIER)]
