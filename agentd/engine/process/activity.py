"""Who is being served right now, and who wants to know: background work gives way to requests."""

import asyncio
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from agentd.errors import AgentdError


class Activity:
    """Counts requests in flight. Listeners are told `True` when the first begins and `False` when the last ends.

    Background work may also be held for other reasons; that looks like a request that does not end.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._listeners: list[Callable[[bool], None]] = []
        self.active = 0
        self.begun = 0
        self.served = 0
        self.failed = 0
        self._last = clock()
        self._released = asyncio.Event()
        self._released.set()

    @property
    def held(self) -> bool:
        return not self._released.is_set()

    @property
    def busy(self) -> bool:
        """Whether background work has to stand still."""
        return self.active > 0 or self.held

    def hold(self, held: bool) -> None:
        """Lets background work stand still, or go on."""
        if held and not self.held:
            self._released.clear()
            if not self.active:
                self._tell(True)
        elif self.held and not held:
            self._released.set()
            if not self.active:
                self._tell(False)

    async def released(self) -> None:
        """Returns once nothing holds background work; requests do not count."""
        await self._released.wait()

    @property
    def idle_seconds(self) -> float:
        """Seconds since the last request ended; 0 while one runs."""
        return 0.0 if self.active else self._clock() - self._last

    @contextmanager
    def request(self) -> Iterator[None]:
        """Around everything done for one request. A client that leaves is not a failure, nor is a request that is the
        client's own mistake; any other exception is."""
        self.active += 1
        self.begun += 1
        if self.active == 1 and not self.held:
            self._tell(True)
        try:
            yield
            self.served += 1
        except Exception as error:
            self.failed += not (isinstance(error, AgentdError) and error.status < 500)
            raise
        finally:
            self.active -= 1
            self._last = self._clock()
            if not self.busy:
                self._tell(False)

    @contextmanager
    def listen(self, listener: Callable[[bool], None]) -> Iterator[None]:
        self._listeners.append(listener)
        if self.busy:
            listener(True)
        try:
            yield
        finally:
            self._listeners.remove(listener)

    def _tell(self, busy: bool) -> None:
        for listener in list(self._listeners):
            listener(busy)
