"""Adaptation as a whole: one pass at a time, its trial, commit and rollback, and picking up after a crash."""

import asyncio
import contextlib
import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from sqlite_utils import Database

from agentd import ids
from agentd.adapt import consolidation
from agentd.adapt.kinds.kind import EngineKind
from agentd.adapt.passes import parked as parked_passes
from agentd.adapt.passes.contribution import Order
from agentd.adapt.passes.progress import MemoryWatch, Progress
from agentd.adapt.planning import dataset as datasets
from agentd.adapt.planning.prepare import Preparation
from agentd.adapt.recall.judge import RecallJudge
from agentd.adapt.recall.switch import RecallSwitch
from agentd.adapt.rollback import Rollback
from agentd.adapt.running_pass import PassContext, PassRequest, RunningPass
from agentd.adapt.trial.trial import STOPPED, Trials
from agentd.adapt.triggers import Ages, Triggers
from agentd.config.schema import Config
from agentd.engine.process.activity import Activity
from agentd.engine.process.supervisor import Supervisor
from agentd.errors import AgentdError, Conflict, EngineUnavailable, RevisionCorrupt
from agentd.host import cgroup
from agentd.revision import archive
from agentd.revision.files import RevisionFiles
from agentd.store import events, examples, passes, trials
from agentd.store.database import Store
from agentd.store.passes import Pass

logger = logging.getLogger(__name__)

_FINISH = 12.0  # seconds that a trainer may take to write where it is when the daemon ends
_NOTED = 2.0  # seconds that its pass may take after that


class Adaptation:
    def __init__(
        self,
        config: Config,
        store: Store,
        engine: Supervisor,
        activity: Activity,
        files: RevisionFiles,
        kind: EngineKind[Any],
    ) -> None:
        self._config, self._store, self._engine, self._activity = config, store, engine, activity
        self.files, self.kind = files, kind
        self._folders = config.state.dir / "passes"
        tell = lambda kind, message, revision: self._event(kind, message, revision=revision)  # noqa: E731
        self._rollback = Rollback(store, engine, files, tell)
        self._task: asyncio.Task[None] | None = None
        self._sifting: asyncio.Task[bool] | None = None
        self._progress: Progress | None = None
        self._running: RunningPass | None = None
        self._trials = Trials(store, engine, lambda: self._config, self._event)
        self._prepare = Preparation(kind, store, engine, activity, self._folders)
        self.triggers = Triggers(config.adapt.trigger, self._facts, self._start_by_itself, ages=self._ages)
        self.recall = RecallSwitch(lambda: self._config, store)
        self._judge = RecallJudge(
            lambda: self._config, store, engine, activity, self.recall, kind, self._folders / "recall", self._is_free
        )
        self._changing = asyncio.Lock()  # who starts a pass, or has another revision served, does it alone
        self.paused = False
        self.daemon_pid = os.getpid()
        self._context = PassContext(
            config=lambda: self._config,
            store=store,
            engine=engine,
            activity=activity,
            files=files,
            kind=kind,
            folders=self._folders,
            prepare=self._prepare,
            trials=self._trials,
            tell=self._event,
            pids=self.pids,
            recalled=self._recalled,
            paused=lambda: self.paused,
            learned=self.triggers.note,
        )

    # --- life

    async def start_up(self) -> None:
        """Picks up a trial that a restart interrupted, and starts looking for things to learn."""
        self._context.group = await asyncio.to_thread(cgroup.make, "agentd-trainer")
        await asyncio.to_thread(self._prepare.tidy)
        if trial := await self._store.call(trials.running):
            self._progress = Progress(trial.pass_id or 0, state="trial", phase="trial")
            resumed = self._trials.resume(trial.revision, trial.pass_id, self._progress)
            self._task = asyncio.create_task(resumed)
        waiting = await self._store.call(passes.parked)
        await asyncio.to_thread(parked_passes.tidy, self._folders, waiting.id if waiting else None)
        if waiting and not trial:
            phases = {phase: float(seconds) for phase, seconds in waiting.phases.items()}
            self._progress = Progress(waiting.id, state="parked", phase="parked", phases=phases)
            asked = PassRequest(waiting.options, waiting.seed)
            self._running = RunningPass(self._context, self._progress, asked)
            self._task = asyncio.create_task(self._running.resume(waiting))
        if self._config.adapt.enabled:
            self.triggers.run()
        self._judge.run()

    async def shut_down(self) -> None:
        self.triggers.stop()
        await self._end_sifting()
        await self._judge.shut_down()
        if self._task and not self._task.done():
            assert self._progress is not None  # there is one as soon as there is a task
            if not self._progress.ending:
                self._progress.stop_reason = STOPPED
                if self._running and await self._running.finish_training(_FINISH):
                    await asyncio.wait({self._task}, timeout=_NOTED)  # its pass notes that it is parked
                self._progress.end(self._task, STOPPED)
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
        if self._context.group:
            self._context.group.remove()

    async def stop(self, reason: str) -> None:
        """Ends the running pass or trial and what is judged besides, if there is any, and waits until it has ended."""
        await self._judge.stop()
        if self._task and not self._task.done():
            assert self._progress is not None
            self._progress.end(self._task, reason)
            await asyncio.wait({self._task})

    def reconfigure(self, config: Config) -> None:
        """Settings that count from now on; a pass that runs keeps those it began with."""
        self._config = config
        self.triggers.reconfigure(config.adapt.trigger, enabled=config.adapt.enabled)

    async def known(self) -> dict[str, Any] | None:
        """What this machine can do for a pass of this model, once it was looked at."""
        return await self._prepare.known()

    @property
    def serving(self) -> int:
        """The revision that serves now."""
        return self._engine.revision

    def folder(self, number: int) -> Path:
        """The working directory of a pass."""
        return self._folders / str(number)

    # --- what the admin API asks for

    async def start(
        self,
        trigger: str,
        options: dict[str, Any],
        imported: archive.Archive | None = None,
        order: Order | None = None,
        noted: Callable[[Database, int], None] = lambda db, number: None,
    ) -> int:
        """Starts a pass and returns its number: it learns for this board, takes in what was `imported`, or fulfils the
        `order` of a fleet. What `noted` writes of its number is there as soon as the pass is, or neither.

        Raises Conflict while one runs, EngineUnavailable without an engine.
        """
        if (busy := self.busy) is not None:
            raise Conflict(f"{busy}; wait for it or cancel it")
        async with self._changing:
            if self._task and not self._task.done():
                await asyncio.wait({self._task})  # it only tidies up
            self.require_engine()
            self._require_something_to_consolidate(options)
            await self._end_sifting()
            seed = self._config.adapt.seed
            await self._judge.stop()  # there is one session of background work
            row = await self._store.call(_create, trigger, self._engine.revision, seed, options, noted)
            await self._event("pass started", f"pass {row.id}, trigger {trigger}", row.id)
            self._progress = Progress(row.id)
            self._running = RunningPass(self._context, self._progress, PassRequest(options, seed, imported, order))
            self._task = asyncio.create_task(self._running.run())
            await asyncio.sleep(0)  # it has begun: a task that is cancelled before that never does, nor ends its pass
        return row.id

    async def import_revision(self, imported: archive.Archive) -> int:
        """Starts the pass that imports what another device learned. Raises Conflict where it does not fit this one."""
        self.require_engine()
        self.kind.check_import(imported, self._engine)
        return await self.start("manual", {"import": imported.identity}, imported)

    @property
    def busy(self) -> str | None:
        """What keeps a pass from starting now, if anything does."""
        if self._changing.locked():
            return "a pass is starting, or another revision is put in place"
        if self._task is None or self._task.done() or (self._progress is not None and self._progress.done):
            return None
        return f"pass {self._progress.id if self._progress else ''} is running"

    def require_engine(self) -> None:
        """Raises EngineUnavailable while nothing could be learned."""
        if not self._engine.ready:
            raise EngineUnavailable(f"{self._engine.problem or 'the engine is starting'}; try again when it serves")

    def _require_something_to_consolidate(self, options: Mapping[str, Any]) -> None:
        """Raises Conflict."""
        if options.get("consolidate") and self._engine.revision == 0:
            raise Conflict("the base model serves; there is nothing to learn again from it")

    async def _recalled(self) -> dict[str, int]:
        """By task with recall, how many past corrections its prompts have."""
        counts = {name: self.recall.k(name) for name in await self._store.call(examples.count)}
        return {name: k for name, k in counts.items() if k}

    async def dry_run(self, options: dict[str, Any]) -> dict[str, Any]:
        """The plan a pass would follow now. Raises PassRefused."""
        self._require_something_to_consolidate(options)
        plan = await self._prepare.plan(
            self._config, options, self._config.adapt.seed, engine_is_free=False, recalled=await self._recalled()
        )
        counts = {role: len(plan.data.of(role)) for role in ("train", "dev", "holdout")}
        return {**plan.setting.as_json(), "examples": counts, "left_out": plan.data.left_out}

    async def cancel(self) -> int:
        """Stops the running pass and returns its number. Raises Conflict when none runs."""
        if self._task is None or self._task.done() or self._progress is None:
            raise Conflict("no pass is running")
        await self.stop("cancelled by the owner")
        return self._progress.id

    async def rollback(self, revision: int | None, reason: str | None) -> dict[str, Any]:
        """Serves another revision: the given one, or the parent of what serves. Running passes are stopped."""
        async with self._changing:
            serving, target = self._engine.revision, await self._rollback.target(revision)
            why = reason or "rolled back by the owner"
            await self.stop(why)
            milliseconds = await self._rollback.activate(target, why)
        return {"revision": target, "previous": serving, "swap_ms": round(milliseconds, 3)}

    async def trial_json(self) -> dict[str, Any] | None:
        return await self._trials.as_json()

    def progress_json(self, *, running_only: bool = False) -> dict[str, Any] | None:
        if self._progress is None or (running_only and self._progress.done):
            return None
        return self._progress.as_json()

    def pids(self) -> dict[str, int | None]:
        trainer = self._running.trainer_pid if self._running else None
        return {"daemon": self.daemon_pid, "engine": self._engine.pid, "trainer": trainer}

    def processes(self) -> dict[str, int | None]:
        """Proportional set size of every process in bytes."""
        sizes = MemoryWatch(self.pids).read()
        return {name: sizes.get(name) for name in ("daemon", "engine", "trainer")}

    @staticmethod
    def outcomes(db: Database) -> dict[str, int]:
        rows = db.execute("SELECT state, count(*) FROM passes WHERE finished_at IS NOT NULL GROUP BY state")
        return dict(rows.fetchall())

    async def fall_back(self, error: RevisionCorrupt, revision: int) -> int:
        """Says what to serve when `revision` turns out unusable, see `Rollback`."""
        return await self._rollback.fall_back(error, revision)

    # --- what comes next

    def _is_free(self) -> bool:
        """Whether nothing of a pass or a trial runs, or is about to."""
        busy = any(task and not task.done() for task in (self._task, self._sifting))
        return not (self._changing.locked() or self.paused or busy or self._store.problem)

    async def _facts(self) -> tuple[int, float]:
        if self.paused or self._activity.held or (self._task and not self._task.done()) or not self._engine.ready:
            return 0, 0.0
        if self._store.problem:  # a pass's files would take what is left
            return 0, 0.0
        readiness = await self._store.call(datasets.readiness, self._config.adapt.gate)
        return readiness.new, self._activity.idle_seconds

    async def _ages(self) -> Ages:
        """How long what a pass would learn has waited, see `Triggers`."""
        ended = await self._store.call(passes.last_end)
        readiness = await self._store.call(datasets.readiness, self._config.adapt.gate)
        least = self._config.adapt.trigger.min_examples
        first, enough = await self._store.call(examples.new_since, least, readiness.ready)
        return Ages(ids.seconds_since(ended or first), ids.seconds_since(enough))

    async def _start_by_itself(self, trigger: str) -> None:
        last = await self._store.call(passes.latest, 1)
        seed = self._config.adapt.seed + (last[0].id if last else 0) + 1  # as the pass would have it
        self._sifting = asyncio.create_task(self._sift(seed))
        await asyncio.wait({self._sifting})
        if self._sifting.cancelled():  # somebody has started a pass
            return
        try:
            if not self._sifting.result():  # else what is left is counted at the next look
                await self.start(trigger, await self._options())
        except (Conflict, EngineUnavailable):
            pass
        except AgentdError as error:
            logger.warning("no pass starts by itself: %s", error)

    async def _options(self) -> dict[str, Any]:
        """Of a pass that starts by itself: whether it learns everything again from the base."""
        adapt = self._config.adapt
        reason = await self._store.call(consolidation.due, adapt.consolidate, adapt.gate.max_drift)
        if reason is None or self._engine.revision == 0:
            return {}
        await self._event("consolidation", f"the next pass learns everything again from the base: {reason}")
        return {"consolidate": True}

    async def _sift(self, seed: int) -> bool:
        await self._judge.stop()  # there is one session of background work
        return await self._prepare.sift(self._config, seed)

    async def _end_sifting(self) -> None:
        """The engine has one session, and whoever asks for a pass does not wait for what would precede another."""
        if self._sifting and not self._sifting.done():
            self._sifting.cancel()
            await asyncio.wait({self._sifting})

    async def _event(
        self, kind: str, message: str, number: int | None = None, revision: int | None = None, **data: Any
    ) -> None:
        logger.info("%s: %s", kind, message)
        await self._store.call(events.add, kind, message, pass_id=number or None, revision=revision, data=data)


def _create(
    db: Database,
    trigger: str,
    revision: int,
    seed: int,
    options: Mapping[str, Any],
    noted: Callable[[Database, int], None],
) -> Pass:
    row = passes.create(db, trigger, revision, seed, options)
    noted(db, row.id)
    return row
