"""Who is being served right now, and who wants to know: background work gives way to requests."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Activity:
    """Counts requests in flight. Listeners are told `True` when the first begins and `False` when the last ends."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._listeners: list[Callable[[bool], None]] = []
        self.active = 0
        self.served = 0
        self.failed = 0
        self._last = clock()

    @property
    def idle_seconds(self) -> float:
        """Seconds since the last request ended; 0 while one runs."""
        return 0.0 if self.active else self._clock() - self._last

    @contextmanager
    def request(self) -> Iterator[None]:
        """Around everything done for one request. A client that leaves is not a failure; an exception is."""
        self.active += 1
        if self.active == 1:
            self._tell(True)
        try:
            yield
            self.served += 1
        except Exception:
            self.failed += 1
            raise
        finally:
            self.active -= 1
            self._last = self._clock()
            if self.active == 0:
                self._tell(False)

    @contextmanager
    def listen(self, listener: Callable[[bool], None]) -> Iterator[None]:
        self._listeners.append(listener)
        if self.active:
            listener(True)
        try:
            yield
        finally:
            self._listeners.remove(listener)

    def _tell(self, busy: bool) -> None:
        for listener in list(self._listeners):
            listener(busy)
