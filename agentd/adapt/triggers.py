"""When a pass starts by itself: enough new feedback, nobody waiting, no quiet hours. APScheduler holds the clock."""

import time
from collections.abc import Awaitable, Callable
from datetime import datetime

from apscheduler.schedulers.asyncio import AsyncIOScheduler

from agentd.config import Trigger

_COOLDOWN = 600.0  # seconds after a pass that did not commit, unless new examples arrived


class Triggers:
    """Looks every `check` seconds whether a pass is due. `facts` returns (new examples, idle seconds)."""

    def __init__(
        self,
        config: Trigger,
        facts: Callable[[], Awaitable[tuple[int, float]]],
        start: Callable[[str], Awaitable[None]],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._config, self._facts, self._start, self._clock = config, facts, start, clock
        self._scheduler = AsyncIOScheduler(timezone="UTC")
        self._last_pass = clock()
        self._held: tuple[int, float] | None = None

    def run(self) -> None:
        self._add_job()
        self._scheduler.start()

    def stop(self) -> None:
        if self._scheduler.running:
            self._scheduler.shutdown(wait=False)

    def reconfigure(self, config: Trigger, *, enabled: bool) -> None:
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
        """Called after every pass: one that did not commit is not tried again at once on the same examples."""
        self._last_pass = self._clock()
        self._held = None if committed else (new_examples, self._clock() + _COOLDOWN)

    async def consider(self) -> None:
        new_examples, idle = await self._facts()
        if reason := self.due(new_examples, idle, datetime.now()):
            await self._start(reason)

    def due(self, new_examples: int, idle: float, local_time: datetime) -> str | None:
        """The name of the trigger that fires now, or None."""
        if new_examples == 0 or idle < self._config.idle or self._quiet(local_time):
            return None
        if self._held and new_examples <= self._held[0] and self._clock() < self._held[1]:
            return None
        if new_examples >= self._config.min_examples:
            return "examples"
        if self._config.every and self._clock() - self._last_pass >= self._config.every:
            return "interval"
        return None

    def _quiet(self, local_time: datetime) -> bool:
        if not self._config.quiet_hours:
            return False
        start, end = self._config.quiet_hours.split("-")
        time_of_day = local_time.strftime("%H:%M")
        return start <= time_of_day < end if start <= end else time_of_day >= start or time_of_day < end
