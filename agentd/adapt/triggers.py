"""When a pass starts by itself: enough new feedback, no one waiting, no quiet hours. APScheduler holds the clock."""

import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import datetime

from apscheduler.schedulers.asyncio import AsyncIOScheduler

from agentd.config.schema import TriggerSettings

_COOLDOWN = 600.0  # seconds after a pass that did not commit; twice as long after the next one
_LONGEST_COOLDOWN = 86400.0


@dataclass(frozen=True)
class Ages:
    """Seconds by the wall clock, from the database: a board that is restarted every day counts on where it was.

    last_pass  since the last pass ended; while there was none, since the first new example
    enough     since there are as many new examples as start a pass; 0 while there are not
    """

    last_pass: float = 0.0
    enough: float = 0.0


async def _no_ages() -> Ages:
    return Ages()


class Triggers:
    """Looks every `check` seconds whether a pass is due. `facts` returns (new examples that a pass could learn from and
    judge, idle seconds)."""

    def __init__(
        self,
        config: TriggerSettings,
        facts: Callable[[], Awaitable[tuple[int, float]]],
        start: Callable[[str], Awaitable[None]],
        clock: Callable[[], float] = time.monotonic,
        ages: Callable[[], Awaitable[Ages]] = _no_ages,
    ) -> None:
        self._config, self._facts, self._start, self._clock = config, facts, start, clock
        self._ages = ages
        self.waits_for: str | None = None  # what a pass that is due is held up by
        self._scheduler = AsyncIOScheduler(timezone="UTC")
        self._held: tuple[int, float] | None = None
        self._fruitless = 0  # passes in a row that did not commit

    def run(self) -> None:
        self._add_job()
        self._scheduler.start()

    def stop(self) -> None:
        if self._scheduler.running:
            self._scheduler.shutdown(wait=False)

    def reconfigure(self, config: TriggerSettings, *, enabled: bool) -> None:
        """Takes other settings, and starts or stops looking."""
        self._config = config
        if not enabled:
            self._scheduler.remove_all_jobs()
        elif self._scheduler.running:
            self._add_job()
        else:
            self.run()

    def clock_jumped(self) -> None:
        """The scheduler plans by the wall clock: set back by a day, it would look again in a day."""
        if self._scheduler.get_jobs():
            self._add_job()

    def _add_job(self) -> None:
        self._scheduler.add_job(
            self.consider,
            "interval",
            id="consider",
            replace_existing=True,
            seconds=self._config.check,
            max_instances=1,
            coalesce=True,
            misfire_grace_time=None,
        )

    def note(self, new_examples: int, committed: bool) -> None:
        """Called after every pass: one that did not commit is tried again after a while, or on as many more examples
        as start a pass."""
        self._fruitless = 0 if committed else self._fruitless + 1
        cooldown = min(_LONGEST_COOLDOWN, _COOLDOWN * 2.0 ** (self._fruitless - 1))
        self._held = None if committed else (new_examples, self._clock() + cooldown)

    async def consider(self) -> None:
        new_examples, idle = await self._facts()
        ages = await self._ages() if new_examples else Ages()
        time.tzset()  # the time zone may have been changed since the daemon started
        if reason := self.due(new_examples, idle, datetime.now(), ages):
            await self._start(reason)

    def due(self, new_examples: int, idle: float, local_time: datetime, ages: Ages = Ages()) -> str | None:
        """The name of the trigger that fires now, or None; then `waits_for` says why a pass that is due has to wait."""
        self.waits_for = None
        if (reason := self._reason(new_examples, ages)) is None:
            return None
        waited = ages.enough if reason == "examples" else ages.last_pass - self._config.every
        if in_quiet_hours(self._config.quiet_hours, local_time):
            self.waits_for = f"the end of the quiet hours (adapt.trigger.quiet_hours: {self._config.quiet_hours})"
        elif idle < self._config.idle and waited < self._config.latest:
            self.waits_for = (
                f"{self._config.idle:g} s without a request (adapt.trigger.idle); in "
                f"{(self._config.latest - waited) / 3600:.1f} h it starts all the same (adapt.trigger.latest)"
            )
        return None if self.waits_for else reason

    def _reason(self, new_examples: int, ages: Ages) -> str | None:
        if new_examples == 0:
            return None
        if self._held and self._clock() < self._held[1] and new_examples < self._held[0] + self._config.min_examples:
            return None
        if new_examples >= self._config.min_examples:
            return "examples"
        if self._config.every and ages.last_pass >= self._config.every:
            return "interval"
        return None


def in_quiet_hours(span: str | None, local_time: datetime) -> bool:
    """Whether a time lies in a span such as 22:00-07:00."""
    if not span:
        return False
    start, end = span.split("-")
    time_of_day = local_time.strftime("%H:%M")
    return start <= time_of_day < end if start <= end else time_of_day >= start or time_of_day < end
