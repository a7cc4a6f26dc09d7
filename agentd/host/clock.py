"""The wall clock is set by others: boards without a battery start in the past and jump when the network comes up.

Durations are measured on the monotonic clock. What needs the date (retention, the scheduler's next look) is told when
the two move against each other.
"""

import asyncio
import time
from collections.abc import Callable

NOTICED = 2.0  # seconds by which the clocks may drift apart between two looks


class WallClock:
    """Watches for jumps. `trusted` is False for a day after one of more than an hour: nothing is deleted for its age
    meanwhile, as it may only look old. The same after a start at which the clock is behind `known`, the newest time
    that the state knows, or far ahead of it (seconds since the epoch; None: it knows none)."""

    SETTLE = 86400.0
    LARGE = 3600.0
    AWAY = 7 * 86400.0  # for so long a device may have been switched off

    def __init__(
        self,
        wall: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
        known: float | None = None,
    ) -> None:
        self._wall, self._monotonic = wall, monotonic
        self._offset = wall() - monotonic()
        is_odd = known is not None and not -self.LARGE <= wall() - known <= self.AWAY
        self._large_jump: float | None = monotonic() if is_odd else None

    @property
    def trusted(self) -> bool:
        return self._large_jump is None or self._monotonic() - self._large_jump >= self.SETTLE

    def look(self) -> float | None:
        """Seconds by which the wall clock has jumped since the last look, or None."""
        offset = self._wall() - self._monotonic()
        jump, self._offset = offset - self._offset, offset
        if abs(jump) < NOTICED:
            return None
        if abs(jump) >= self.LARGE:
            self._large_jump = self._monotonic()
        return jump

    async def watch(self, on_jump: Callable[[float], None], every: float = 5.0) -> None:
        while True:
            await asyncio.sleep(every)
            if (jump := self.look()) is not None:
                on_jump(jump)
