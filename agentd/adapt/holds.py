"""When a pass has to wait: the device is hot, runs on a low battery, or is short of memory right now; or the model's
file was replaced.

A held pass is not ended: its trainer is stopped, the engine is asked for nothing more, and it goes on where it was.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable

from agentd.config.schema import HoldSettings
from agentd.engine.process.activity import Activity
from agentd.errors import ModelUnusable
from agentd.host import allocator
from agentd.host.sensors import Sensors

_EVERY = 5.0  # seconds between looks at the sensors
_COOLER = 5.0  # °C under the limit before a pass goes on
_CHARGED = 5.0  # percent above the limit
_PRESSURE = 15.0  # seconds a notification of memory pressure holds for

Tell = Callable[[str, str], Awaitable[None]]
"""Records an event: its kind and its message."""


class Holds:
    """Keeps `activity` held while there is a reason to. `sensors` and `model` may block; they are called in a thread.
    `model` raises ModelUnusable once the model's file is another one: a pass would learn for what does not serve."""

    def __init__(
        self,
        config: Callable[[], HoldSettings],
        activity: Activity,
        sensors: Callable[[], Sensors],
        tell: Tell,
        model: Callable[[], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._config, self._activity, self._sensors, self._tell, self._clock = config, activity, sensors, tell, clock
        self._model = model
        self._pressed: float | None = None
        self.reasons: dict[str, str] = {}

    async def watch(self) -> None:
        while True:
            await self.look()
            await asyncio.sleep(_EVERY)

    async def look(self) -> None:
        """Reads the sensors and holds or releases."""
        now = await asyncio.to_thread(self._sensors)
        reasons: dict[str, str] = {}
        if reason := self._hot(now):
            reasons["temperature"] = reason
        if reason := self._empty(now):
            reasons["battery"] = reason
        try:
            await asyncio.to_thread(self._model)
        except ModelUnusable as error:
            reasons["model"] = str(error)
        if self._pressed is not None and self._clock() - self._pressed < _PRESSURE:
            reasons["memory"] = "the service manager reports memory pressure"
        await self._set(reasons)

    async def pressure(self) -> None:
        """Memory pressure was reported: holds for a while, and gives back what is only kept for later."""
        self._pressed = self._clock()
        await self.look()
        await asyncio.to_thread(allocator.give_back)

    def _hot(self, now: Sensors) -> str | None:
        limit = self._config().temperature
        if limit is None or now.temperature is None:
            return None
        if now.temperature <= (limit - _COOLER if "temperature" in self.reasons else limit):
            return None
        return (
            f"{now.hottest or 'a sensor'} reads {now.temperature:.0f} °C, adapt.hold.temperature is {limit:g} "
            f"(adapt.hold.sensor names another sensor)"
        )

    def _empty(self, now: Sensors) -> str | None:
        limit = self._config().battery
        if limit is None or now.battery is None or now.plugged is not False:
            return None
        if now.battery >= (limit + _CHARGED if "battery" in self.reasons else limit):
            return None
        return f"{now.battery:.0f} % on battery; adapt.hold.battery is {limit:g}"

    async def _set(self, reasons: dict[str, str]) -> None:
        begun = [reason for name, reason in reasons.items() if name not in self.reasons]
        was_held, self.reasons = bool(self.reasons), reasons
        self._activity.hold(bool(reasons))
        if begun:
            await self._tell("adaptation held", "; ".join(begun))
        elif was_held and not reasons:
            await self._tell("adaptation released", "nothing holds passes any more")
