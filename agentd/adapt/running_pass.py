"""One pass from its plan to the end of its trial, whatever that end is; and going on with one that a restart cut
short."""

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from agentd.adapt.gate.skills import Baseline
from agentd.adapt.kinds.kind import EngineKind
from agentd.adapt.passes import memory_control
from agentd.adapt.passes import parked as parked_passes
from agentd.adapt.passes.base import Attempt, Means, Rejected, describe_failure, prune_folders
from agentd.adapt.passes.contribution import Order
from agentd.adapt.passes.parked import Parked
from agentd.adapt.passes.progress import MemoryWatch, Progress
from agentd.adapt.passes.trainer_process import Training
from agentd.adapt.planning import dataset as datasets
from agentd.adapt.planning.dataset import Dataset
from agentd.adapt.planning.prepare import Preparation
from agentd.adapt.planning.setting import PassSetting
from agentd.adapt.trial.trial import STOPPED, RolledBack, Tell, Trials
from agentd.adapt.triggers import in_quiet_hours
from agentd.config.schema import Config
from agentd.engine.process.activity import Activity
from agentd.engine.process.supervisor import Supervisor
from agentd.errors import AgentdError, PassRefused
from agentd.host import allocator, cgroup
from agentd.revision import archive
from agentd.revision.files import RevisionFiles
from agentd.store import passes, revisions, transitions
from agentd.store.database import Store
from agentd.store.passes import Pass

logger = logging.getLogger(__name__)

_PATIENCE = 1800.0  # seconds that a pass which goes on may wait for memory
_LOOK = 2.0  # seconds between looks at whether a parked pass may go on


@dataclass
class PassContext:
    """What all passes share.

    config    the settings as they are now
    pids      of daemon, engine and trainer
    recalled  by task with recall, how many past corrections its prompts have
    paused    whether the owner has paused learning
    learned   is told how many examples are left, and whether a revision was committed
    group     of the trainer's process
    """

    config: Callable[[], Config]
    store: Store
    engine: Supervisor
    activity: Activity
    files: RevisionFiles
    kind: EngineKind[Any]
    folders: Path
    prepare: Preparation
    trials: Trials
    tell: Tell
    pids: Callable[[], dict[str, int | None]]
    recalled: Callable[[], Awaitable[dict[str, int]]]
    paused: Callable[[], bool]
    learned: Callable[[int, bool], None]
    group: cgroup.Group | None = None
    baseline: Baseline = field(default_factory=Baseline)

    def folder(self, number: int) -> Path:
        """The working directory of a pass."""
        return self.folders / str(number)

    def held_back(self, trigger: str) -> str | None:
        """What a parked pass waits for: whatever would keep a pass from starting by itself, but for what is new."""
        config = self.config()
        if not self.engine.ready:
            return "the engine is up"
        if self.paused():
            return "`agentctl resume`: learning is paused"
        if self.activity.held:
            return "what holds passes now (`agentctl status`)"
        if self.store.problem:
            return "there is room on the disk"
        if trigger != "manual" and not config.adapt.enabled:
            return "adapt.enabled is true again"
        hours = config.adapt.trigger.quiet_hours
        return f"the quiet hours ({hours})" if in_quiet_hours(hours, datetime.now()) else None


@dataclass(frozen=True)
class PassRequest:
    """What a pass is to do: it learns for this board, takes in what was `imported`, fulfils the `order` of a fleet, or
    goes on with what was `parked`."""

    options: dict[str, Any]
    seed: int
    imported: archive.Archive | None = None
    order: Order | None = None
    parked: Parked | None = None


class RunningPass:
    def __init__(self, context: PassContext, progress: Progress, request: PassRequest) -> None:
        self._context, self._progress, self._request = context, progress, request
        self._store, self._engine = context.store, context.engine
        self._training: Training | None = None

    @property
    def trainer_pid(self) -> int | None:
        return self._training.pid if self._training else None

    async def finish_training(self, seconds: float) -> bool:
        """Has the trainer write where it is and end. Returns whether there was one that could."""
        return self._training is not None and await self._training.finish(seconds)

    async def run(self) -> None:
        progress, number = self._progress, self._progress.id
        memory = MemoryWatch(self._context.pids, mapping=self._context.kind.mapped)
        reason: str | None = None
        try:  # all of it: cancelled before it has come to anything it ends like any other
            try:
                outcome = await self._attempt(memory)
            finally:
                progress.ending = True  # how it ended is noted whoever wants it to end now
        except Rejected as error:
            outcome, reason = "rejected", str(error)
        except RolledBack as error:
            outcome, reason = "rolled_back", str(error)
        except PassRefused as error:
            outcome, reason = "refused", str(error)
            with contextlib.suppress(AgentdError):
                await self._store.call(
                    passes.advance, number, "refused", reason=reason, shortfall_bytes=error.shortfall
                )
        except asyncio.CancelledError:
            reason = progress.stop_reason or "cancelled"
            outcome = await self._abandon(reason)
        except Exception as error:
            if not isinstance(error, AgentdError):
                logger.exception("pass %d failed", number)
            # of a trainer that was told to end, this is no failure
            reason = STOPPED if progress.stop_reason == STOPPED else describe_failure(error)
            outcome = await self._abandon(reason)
        if outcome in ("trial", "parked"):  # it goes on after the restart
            with contextlib.suppress(AgentdError):
                await self._store.call(passes.note_progress, number, progress.phases_so_far, ())
                if outcome == "parked":
                    await self._context.tell("pass parked", STOPPED, number)
            return
        progress.finish(outcome, reason)
        await self._record(memory, outcome, reason)
        await asyncio.to_thread(allocator.give_back)  # a pass reads all examples; the daemon lives for months

    async def _record(self, memory: MemoryWatch, outcome: str, reason: str | None) -> None:
        """What it took, and that it is over; what it needed is cleared away."""
        number, context = self._progress.id, self._context
        before = {f"{name}_before": size for name, size in memory.before.items()}
        peaks = {**memory.peaks, **before, "total": memory.total}
        took = {"phases": self._progress.phases, "peaks": peaks, "peak_bytes": memory.added}
        with contextlib.suppress(AgentdError):
            await self._store.call(lambda db: passes.update(db, number, **took))
            await context.tell(f"pass {outcome}", reason or f"revision {self._engine.revision} serves", number)
            if self._request.order is None:
                readiness = await self._store.call(datasets.readiness, context.config().adapt.gate)
                context.learned(readiness.new, outcome == "committed")
        keep = context.config().retention.passes
        await asyncio.to_thread(parked_passes.clear, context.folder(number))
        await asyncio.to_thread(prune_folders, context.folders, keep)
        with contextlib.suppress(AgentdError):
            await self._store.call(passes.retain_answers, keep)

    async def _attempt(self, memory: MemoryWatch) -> str:
        """How it ended, if nothing was raised."""
        task = asyncio.current_task()
        assert task is not None
        async with memory:
            guard = asyncio.create_task(self._guard(memory, task))
            guard.add_done_callback(lambda _: None)
            try:
                if self._request.order is not None:
                    await self._contribute(self._request.order, memory)
                    return "contributed"
                if self._request.imported is not None:
                    attempt, data = await self._import(self._request.imported)
                else:
                    attempt, data = await self._plan(memory)
                revision = await attempt.run(data)
                await self._context.trials.begin(revision, self._progress, attempt.learned)
                return "committed"
            finally:
                guard.cancel()

    async def _guard(self, memory: MemoryWatch, task: asyncio.Task[Any]) -> None:
        """Ends the pass when the rest of the device needs the memory and the pass cannot take less."""
        floor = lambda: self._context.config().memory.floor  # noqa: E731
        self._progress.end(task, await memory_control.outlast(memory, floor, self._progress))

    async def _plan(self, memory: MemoryWatch) -> tuple[Attempt, Dataset]:
        context, parked = self._context, self._request.parked
        waits_until = time.monotonic() + (_PATIENCE if parked else 0)
        while True:
            try:
                plan = await context.prepare.plan(
                    context.config(),
                    self._request.options,
                    self._request.seed + self._progress.id,
                    engine_is_free=True,
                    recalled=await context.recalled(),
                    data=parked.data if parked else None,
                )
                break
            except PassRefused as error:
                if not error.shortfall or time.monotonic() >= waits_until:
                    raise
                self._progress.message = f"it goes on once there is memory: {error}"
                await asyncio.sleep(_LOOK)
        await self._planned(plan.setting)
        means = await self._means()
        self._training = Training(context.activity, means.folder / "trainer.log", context.group)
        return context.kind.make_pass(means, plan, self._training, memory), plan.data

    async def _contribute(self, order: Order, memory: MemoryWatch) -> None:
        """Learns for a fleet, in the way that it wants most of those for which there is memory. Raises AgentdError."""
        context = self._context
        seed = self._request.seed + self._progress.id
        kind, plan = await context.prepare.contribution(context.config(), order.kinds, seed)
        await self._planned(plan.setting)
        means = await self._means()
        self._training = Training(context.activity, means.folder / "trainer.log", context.group)
        await context.kind.contribution(means, plan, self._training, memory, kind, order).contribute(plan.data)

    async def _import(self, imported: archive.Archive) -> tuple[Attempt, Dataset]:
        gate = self._context.config().adapt.gate
        data = await self._store.call(lambda db: datasets.judging(db, gate))
        self._progress.state = "planned"
        await self._store.call(passes.advance, self._progress.id, "planned")
        return self._context.kind.import_pass(await self._means(), imported), data

    async def _means(self) -> Means:
        context, request = self._context, self._request
        folder = context.folder(self._progress.id)
        await asyncio.to_thread(folder.mkdir, mode=0o700, parents=True, exist_ok=True)
        tools = (context.config(), self._store, self._engine, context.files)
        relearn = bool(request.options.get("consolidate"))
        return Means(*tools, self._progress, folder, request.seed, context.baseline, relearn, request.parked)

    async def _planned(self, setting: PassSetting) -> None:
        progress = self._progress
        progress.method, progress.blocks = setting.method, setting.blocks
        progress.predicted_bytes, progress.state = setting.needed, "planned"
        columns = {"method": setting.method, "blocks": setting.blocks, "plan": setting.as_json()}
        columns |= {"predicted": setting.predicted, "predicted_bytes": setting.needed}
        await self._store.call(lambda db: passes.advance(db, progress.id, "planned", **columns))

    async def _abandon(self, reason: str) -> str:
        """Ends the pass where it was cut short; returns its state then."""
        number = self._progress.id
        keep = self._progress.stop_reason == STOPPED
        park = keep and await asyncio.to_thread(parked_passes.read, self._context.folder(number)) is not None
        try:
            outcome = await self._store.call(transitions.abandon, number, reason, keep_trial=keep, park=park)
            committed = await self._store.call(revisions.committed)
            if committed != self._engine.revision and not keep:
                await self._engine.swap(committed)
        except AgentdError as error:
            logger.error("pass %d could not be ended: %s", number, error)
            return "parked" if park else "failed"  # the next start sees to it
        return outcome

    # --- going on after a restart

    async def resume(self, row: Pass) -> None:
        """Goes on with a pass that a restart has cut short, once nothing speaks against learning now."""
        progress, folder = self._progress, self._context.folder(row.id)
        parked: Parked | None = None
        reason: str | None = None
        try:
            while why := self._context.held_back(row.trigger):
                progress.message = f"it goes on after {why}"
                await asyncio.sleep(_LOOK)
            parked = await asyncio.to_thread(parked_passes.read, folder)
            reason = await self._store.call(parked_passes.resume, row, parked, self._engine.revision)
        except asyncio.CancelledError:
            parked, reason = None, progress.stop_reason or "cancelled"
            if await self._abandon(reason) == "parked":
                return
        except AgentdError as error:
            logger.error("pass %d cannot go on: %s", row.id, error)  # after the next start, maybe
            return
        if parked is None or reason is not None:
            progress.finish("failed", reason)
            await asyncio.to_thread(parked_passes.clear, folder)
            with contextlib.suppress(AgentdError):
                await self._context.tell("pass failed", reason or "", row.id)
            return
        await self._context.tell("pass resumed", parked.description, row.id)
        progress.state, progress.message = "resumed", ""
        progress.phase = "plan"
        progress.go_on()
        self._request = replace(self._request, parked=parked)
        await self.run()
