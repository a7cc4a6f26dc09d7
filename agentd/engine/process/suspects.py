"""Which requests were being served when engines died. One that was there twice is refused for a while; one that was
there once is served again with no other such request beside it, so that the next death tells which of them it was."""

import asyncio
import contextlib
import hashlib
import json
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable
from typing import Any

from agentd.errors import EndsTheEngine

_DEATHS = 2  # that a request may be part of
_REMEMBERED = 600.0  # seconds
_MOST = 1024  # requests


class Suspects:
    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        # by fingerprint: how many there were, when the last was, and of which engine
        self._deaths: OrderedDict[str, tuple[int, float, int | None]] = OrderedDict()
        self._one_at_a_time = asyncio.Lock()

    @staticmethod
    def fingerprint(content: Any) -> str:
        """The same for a request that is sent again."""
        text = json.dumps(content, sort_keys=True, default=vars)
        return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()

    def deaths(self, fingerprint: str) -> int:
        number, when, _ = self._deaths.get(fingerprint, (0, 0.0, None))
        return number if self._clock() - when < _REMEMBERED else 0

    def check(self, fingerprint: str) -> None:
        """Raises EndsTheEngine."""
        if (number := self.deaths(fingerprint)) >= _DEATHS:
            raise EndsTheEngine(number)

    def died(self, fingerprint: str, pid: int | None) -> None:
        """The engine with this process id died while it served this request, perhaps several times over."""
        if fingerprint in self._deaths and self._deaths[fingerprint][2] == pid:
            return
        self._deaths[fingerprint] = self.deaths(fingerprint) + 1, self._clock(), pid
        self._deaths.move_to_end(fingerprint)
        while len(self._deaths) > _MOST:
            self._deaths.popitem(last=False)

    def served(self, fingerprint: str) -> None:
        """It ended, and the engine lives."""
        self._deaths.pop(fingerprint, None)

    @contextlib.asynccontextmanager
    async def turn(self, fingerprint: str) -> AsyncIterator[None]:
        """Within it, a request that was part of a death is the only such one. Raises EndsTheEngine."""
        self.check(fingerprint)
        if not self.deaths(fingerprint):
            yield
            return
        async with self._one_at_a_time:
            yield
