"""The supervisor without an engine: what its tasks do while they are stopped."""

import asyncio
from typing import Any, cast

import pytest

from agentd.engine.process import supervisor as module
from agentd.engine.process.activity import Activity
from agentd.engine.process.client import EngineClient
from agentd.engine.process.supervisor import Supervisor


class Client:
    """Answers when it is told to."""

    def __init__(self) -> None:
        self.asked, self.answer = asyncio.Event(), asyncio.Event()

    async def call(self, operation: Any) -> dict[str, float]:
        self.asked.set()
        await self.answer.wait()
        return {"longest_step": 0.0}


async def _no_fallback(error: Exception, revision: int) -> int:
    raise error


def test_an_answer_that_comes_as_the_daemon_stops_does_not_keep_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """asyncio.wait_for swallows the cancellation where both come at once (Python before 3.12); stopping then never
    ended."""
    monkeypatch.setattr(module, "_PULSE", 0.0)

    async def run() -> bool:
        client = Client()
        one = Supervisor(
            {"slots": 1}, lambda _: (None, None), Activity(), revision=0, queue_limit=0, fallback=_no_fallback
        )
        one._client = cast(EngineClient, client)
        one._up.set()
        pulse = asyncio.create_task(one._feel_pulse())
        await client.asked.wait()
        client.answer.set()
        pulse.cancel()
        one._up.clear()
        await asyncio.wait({pulse}, timeout=1)
        ended = pulse.done()
        pulse.cancel()
        return ended

    assert asyncio.run(run())
