"""A revision's time on trial: swapped in, watched, then committed or taken back; picked up again after a restart."""

import asyncio
import contextlib
import logging
from collections.abc import Callable
from typing import Any, Protocol

from sqlite_utils import Database

from agentd.adapt import complaints, transitions
from agentd.adapt.progress import Progress
from agentd.adapt.trial import Trial
from agentd.config import Config
from agentd.engine.supervisor import Supervisor
from agentd.errors import AgentdError
from agentd.store import revisions, trials
from agentd.store.database import Store

logger = logging.getLogger(__name__)

STOPPED = "the daemon stopped"


class Tell(Protocol):
    """Records an event."""

    async def __call__(
        self, kind: str, message: str, number: int | None = None, revision: int | None = None, **data: Any
    ) -> None: ...


class RolledBack(Exception):
    """The trial ended and what served before serves again; recorded already."""


class Probation:
    """`stop_reason` says why the task that runs this was cancelled: STOPPED lets the trial go on after a restart."""

    def __init__(
        self,
        store: Store,
        engine: Supervisor,
        config: Callable[[], Config],
        tell: Tell,
        stop_reason: Callable[[], str | None],
        kind: type[Trial] = Trial,
    ) -> None:
        self._kind = kind
        self._store, self._engine, self._config, self._tell = store, engine, config, tell
        self._stop_reason = stop_reason
        self._trial: Trial | None = None

    async def as_json(self) -> dict[str, Any] | None:
        """The running trial, for status."""
        running = await self._store.call(trials.running)
        if running is None:
            return None
        left = self._trial.seconds_left if self._trial else None
        return {"revision": running.revision, "attempts_left": running.attempts_left, "seconds_left": left}

    async def begin(self, revision: int, progress: Progress) -> None:
        """Serves the revision on trial and commits it, or takes it back and raises RolledBack."""
        progress.begin("swap")
        attempts = self._config().adapt.trial.attempts
        await self._store.call(transitions.begin_trial, revision, progress.id, attempts)
        progress.state = "trial"
        await self._watch(revision, progress)

    async def resume(self, revision: int, number: int | None, progress: Progress) -> None:
        """After a restart: the trial goes on if it has attempts left. `progress` has the outcome."""
        previous = self._engine.revision
        outcome, reason = "committed", None
        try:
            if await self._store.call(trials.spend_attempt, revision) <= 0:
                await self._take_back(revision, previous, number or 0, "no attempts left after restarts")
                raise RolledBack("no attempts left after restarts")
            await self._watch(revision, progress)
        except RolledBack as error:
            outcome, reason = "rolled_back", str(error)
        except AgentdError as error:
            outcome, reason = "failed", str(error)
            logger.error("the trial of revision %d could not go on: %s", revision, error)
        except asyncio.CancelledError:
            if self._stop_reason() == STOPPED:
                return
            outcome, reason = "rolled_back", self._stop_reason() or "cancelled"
            with contextlib.suppress(AgentdError):
                await self._take_back(revision, previous, number or 0, reason)
        progress.finish(outcome, reason)
        with contextlib.suppress(AgentdError):
            await self._tell(f"pass {outcome}", reason or f"revision {revision} serves", number, revision)

    async def _watch(self, revision: int, progress: Progress) -> None:
        previous = await self._store.call(revisions.committed)
        trial = self._kind(self._engine, self._config().adapt.trial, lambda: self._complaints(revision, previous))
        reason = None
        try:
            await trial.measure()
            milliseconds = await self._engine.swap(revision)
            await self._tell(
                "swapped",
                f"revision {revision} on trial, {milliseconds:.2f} ms",
                progress.id,
                revision,
                swap_ms=round(milliseconds, 3),
            )
            progress.begin("trial", message=f"revision {revision} serves on trial")
            self._trial = trial
            reason = await trial.run()
            if reason is None:
                await self._store.call(transitions.commit, revision, progress.id)
        except asyncio.CancelledError:
            if self._stop_reason() == STOPPED:
                raise  # the trial goes on after the restart
            reason = self._stop_reason() or "cancelled"
        except AgentdError as error:
            reason = str(error)
        finally:
            self._trial = None
        # A cancellation may have come when the commit was on its way already: then it is committed.
        if reason is not None and (await self._store.call(revisions.committed)) != revision:
            await self._take_back(revision, previous, progress.id, reason)
            raise RolledBack(reason)

    async def _complaints(self, revision: int, committed: int) -> str | None:
        """What the feedback on the revision's answers says against it."""

        def rates(db: Database) -> tuple[complaints.Rate, complaints.Rate]:
            return complaints.rate(db, revision), complaints.rate(db, committed)

        on_trial, before = await self._store.call(rates)
        return complaints.more_negative(on_trial, before, self._config().adapt.trial.alpha)

    async def _take_back(self, revision: int, previous: int, number: int, reason: str) -> None:
        try:
            await self._store.call(transitions.take_back, revision, number, reason)
        finally:  # where the disk is full the trial counts as running, and what is known to be good serves all the same
            with contextlib.suppress(AgentdError):  # an engine that is down comes back on the committed revision
                await self._engine.swap(previous)
