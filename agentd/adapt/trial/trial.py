"""A new revision serves on trial first: swapped in, watched, then committed or taken back; picked up again after a
restart."""

import asyncio
import contextlib
import logging
import math
import time
from collections.abc import Awaitable, Callable
from typing import Any, Protocol

import anyio
from sqlite_utils import Database

from agentd.adapt.passes.progress import Progress
from agentd.adapt.trial import feedback_monitor
from agentd.config.schema import Config, TrialSettings
from agentd.engine import canaries
from agentd.engine.process.supervisor import Supervisor
from agentd.errors import AgentdError
from agentd.store import revisions, transitions, trials
from agentd.store.database import Store
from agentd.store.transitions import Learned

logger = logging.getLogger(__name__)

STOPPED = "the daemon stopped"
_EVERY = 10.0  # seconds between checks
_PATIENCE = 30.0  # seconds a canary may take
_JITTER = 0.25  # seconds by which a canary's time may differ without meaning anything
_WARMING = 30.0  # seconds that a revision may take to compute what prompts often begin with, before it serves
_AGAIN = 4  # rounds more for a revision that seems slow at the end

FeedbackTest = Callable[[], Awaitable[str | None]]
"""What is wrong with the feedback that the revision gets, if anything."""


async def _no_feedback() -> str | None:
    return None


class Tell(Protocol):
    """Records an event."""

    async def __call__(
        self, kind: str, message: str, number: int | None = None, revision: int | None = None, **data: Any
    ) -> None: ...


class RolledBack(Exception):
    """The trial ended and what served before serves again; recorded already."""


class TrialWatch:
    """Watches a revision. `run` returns None when it passed, or what went wrong.

    `measure`, called while the committed revision still serves, notes what a canary answer takes with that one.
    """

    def __init__(
        self,
        engine: Supervisor,
        config: TrialSettings,
        feedback: FeedbackTest = _no_feedback,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._engine, self._config, self._feedback, self._clock = engine, config, feedback, clock
        self._ends = clock() + config.duration
        self._committed: float | None = None
        self._best = math.inf

    @property
    def seconds_left(self) -> float:
        return max(0.0, self._ends - self._clock())

    async def measure(self) -> None:
        """Times the canaries with what serves now, once warm. A failure here is not the candidate's."""
        with contextlib.suppress(AgentdError, ArithmeticError, TimeoutError):
            for _ in range(2):
                await self._canaries()
        self._committed, self._best = (None if math.isinf(self._best) else self._best), math.inf

    async def run(self) -> str | None:
        self._ends = self._clock() + self._config.duration
        restarts = self._engine.restarts
        while True:
            if problem := await self._check():
                return problem
            # A death may be a request's fault; the canaries, which were answered, speak for the revision.
            if self._engine.restarts - restarts > self._config.attempts:
                return f"the engine died {self._engine.restarts - restarts} times while the revision was on trial"
            if problem := await self._feedback():
                return problem
            if not self.seconds_left:
                for _ in range(_AGAIN):  # a busy moment is not held against it
                    if self._slower() and (problem := await self._check()):
                        return problem
                return self._slower()
            await asyncio.sleep(min(_EVERY, self.seconds_left))

    async def _check(self) -> str | None:
        """Canary prompts must be answered, with finite probabilities."""
        try:
            await self._canaries()
        except TimeoutError:
            return f"a canary prompt was not answered within {_PATIENCE:.0f} s"
        except AgentdError as error:
            return f"a canary prompt failed: {error}"
        except ArithmeticError as error:
            return f"a canary prompt {error}"
        return None

    def _slower(self) -> str | None:
        """Judged by the best of all checks: other work on the device makes some of them slow, not all."""
        if self._committed is None or self._best <= self._config.max_latency * self._committed + _JITTER:
            return None
        return (
            f"canary answers take {self._best:.2f} s, {self._best / self._committed:.1f} times as long as with the "
            f"committed revision; adapt.trial.max_latency is {self._config.max_latency:g}"
        )

    async def _canaries(self) -> None:
        """Asks all of them and notes the time of the fastest round."""
        started = self._clock()
        for prompt in canaries.PROMPTS:
            with anyio.fail_after(_PATIENCE):
                await canaries.ask(self._engine, self._engine.info, prompt)
        self._best = min(self._best, self._clock() - started)


class Trials:
    """A trial whose task was cancelled goes on after a restart if its progress has STOPPED as its `stop_reason`."""

    def __init__(self, store: Store, engine: Supervisor, config: Callable[[], Config], tell: Tell) -> None:
        self._store, self._engine, self._config, self._tell = store, engine, config, tell
        self._trial: TrialWatch | None = None

    async def as_json(self) -> dict[str, Any] | None:
        """The running trial, for status."""
        running = await self._store.call(trials.running)
        if running is None:
            return None
        left = self._trial.seconds_left if self._trial else None
        return {"revision": running.revision, "attempts_left": running.attempts_left, "seconds_left": left}

    async def begin(self, revision: int, progress: Progress, learned: Learned) -> None:
        """Serves the revision on trial and commits it, or takes it back and raises RolledBack."""
        progress.begin("swap")
        attempts = self._config().adapt.trial.attempts
        await self._store.call(transitions.begin_trial, revision, progress.id, attempts, learned)
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
            if progress.stop_reason == STOPPED:
                return
            outcome, reason = "rolled_back", progress.stop_reason or "cancelled"
            with contextlib.suppress(AgentdError):
                await self._take_back(revision, previous, number or 0, reason)
        progress.finish(outcome, reason)
        with contextlib.suppress(AgentdError):
            await self._tell(f"pass {outcome}", reason or f"revision {revision} serves", number, revision)

    async def _watch(self, revision: int, progress: Progress) -> None:
        previous = await self._store.call(revisions.committed)
        trial = TrialWatch(self._engine, self._config().adapt.trial, lambda: self._feedback(revision, previous))
        reason = None
        try:
            await trial.measure()
            milliseconds = await self._engine.swap(revision, _WARMING)
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
            if progress.stop_reason == STOPPED:
                raise  # the trial goes on after the restart
            reason = progress.stop_reason or "cancelled"
        except AgentdError as error:
            reason = str(error)
        finally:
            self._trial = None
        # A cancellation may have come when the commit was on its way already: then it is committed.
        if reason is not None and (await self._store.call(revisions.committed)) != revision:
            await self._take_back(revision, previous, progress.id, reason)
            raise RolledBack(reason)

    async def _feedback(self, revision: int, committed: int) -> str | None:
        """What the feedback on the revision's answers says against it."""

        def rates(db: Database) -> tuple[feedback_monitor.Rate, feedback_monitor.Rate]:
            return feedback_monitor.rate(db, revision), feedback_monitor.rate(db, committed)

        on_trial, before = await self._store.call(rates)
        return feedback_monitor.more_negative(on_trial, before, self._config().adapt.trial.alpha)

    async def _take_back(self, revision: int, previous: int, number: int, reason: str) -> None:
        try:
            await self._store.call(transitions.take_back, revision, number, reason)
        finally:  # where the disk is full the trial counts as running, and what is known to be good serves all the same
            with contextlib.suppress(AgentdError):  # an engine that is down comes back on the committed revision
                await self._engine.swap(previous)
