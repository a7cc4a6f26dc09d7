"""A new revision serves on trial first: it is committed after a while without a failed check, else taken back."""

import asyncio
import contextlib
import math
import time
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

from agentd.config import Trial as TrialConfig
from agentd.engine.protocol import Generate, Sampling
from agentd.engine.supervisor import Supervisor
from agentd.errors import AgentdError
from agentd.ids import uuid7

_CANARIES = ("Name a colour.", "What is two plus two?")
_EVERY = 10.0  # seconds between checks
_PATIENCE = 30.0  # seconds a canary may take
_JITTER = 0.25  # seconds by which a canary's time may differ without meaning anything

_AGAIN = 4  # rounds more for a revision that seems slow at the end

Complaints = Callable[[], Awaitable[str | None]]


async def _no_complaints() -> str | None:
    return None


class Trial:
    """Watches a revision. `run` returns None when it passed, or what went wrong.

    `measure`, called while the committed revision still serves, notes what a canary answer takes with that one.
    `complaints` says what is wrong with the feedback the revision gets, if anything.
    """

    canary = "a canary prompt"

    def __init__(
        self,
        engine: Supervisor,
        config: TrialConfig,
        complaints: Complaints = _no_complaints,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._engine, self._config, self._complaints, self._clock = engine, config, complaints, clock
        self._ends = clock() + config.duration
        self._committed: float | None = None
        self._best = math.inf

    @property
    def seconds_left(self) -> float:
        return max(0.0, self._ends - self._clock())

    async def measure(self) -> None:
        """Times the canaries with what serves now, once warm. A failure here is not the candidate's."""
        with contextlib.suppress(AgentdError, ArithmeticError, asyncio.TimeoutError):
            for _ in range(2):
                await self._canaries()
        self._committed, self._best = (None if math.isinf(self._best) else self._best), math.inf

    async def run(self) -> str | None:
        self._ends = self._clock() + self._config.duration
        restarts = self._engine.restarts
        while True:
            if problem := await self._check():
                return problem
            if self._engine.restarts != restarts:
                return "the engine died while the revision was on trial"
            if problem := await self._complaints():
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
        except asyncio.TimeoutError:
            return f"{self.canary} was not answered within {_PATIENCE:.0f} s"
        except AgentdError as error:
            return f"{self.canary} failed: {error}"
        except ArithmeticError as error:
            return f"{self.canary} {error}"
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
        for prompt in _CANARIES:
            await _within(_PATIENCE, self._ask(prompt))
        self._best = min(self._best, self._clock() - started)

    async def _ask(self, prompt: str) -> None:
        chat = self._engine.info is not None and self._engine.info.has_chat_template
        content = {"messages": [{"role": "user", "content": prompt}]} if chat else {"prompt": prompt}
        request = Generate("canary-" + uuid7(), content, Sampling(temperature=0), max_tokens=4, logprobs=0)
        async for piece in self._engine.generate(request):
            for entry in piece.logprobs:
                if not entry["logprob"] > float("-inf"):
                    raise ArithmeticError("gave probabilities that are not finite")


async def _within(seconds: float, work: Coroutine[Any, Any, None]) -> None:
    """asyncio.wait_for, which before Python 3.12 swallows a cancellation that comes when the work has just ended: a
    trial would go on that its owner had stopped. Raises asyncio.TimeoutError."""
    task = asyncio.ensure_future(work)
    try:
        await asyncio.wait({task}, timeout=seconds)
        if not task.done():
            raise asyncio.TimeoutError
        task.result()
    finally:
        if not task.done():
            task.cancel()
            await asyncio.wait({task})
