"""The supervisor without an engine: what its tasks do while they are stopped."""

import asyncio
import socket
import time
from typing import Any, cast

import anyio
import pytest

from agentd.engine.process import supervisor as module
from agentd.engine.process.activity import Activity
from agentd.engine.process.client import EngineClient
from agentd.engine.process.supervisor import Supervisor


class Client:
    """Answers when it is told to."""

    def __init__(self) -> None:
        self.asked, self.answer, self.dead = asyncio.Event(), asyncio.Event(), asyncio.Event()
        self.killed = 0

    async def call(self, operation: Any) -> dict[str, float]:
        self.asked.set()
        await self.answer.wait()
        return {"longest_step": 0.0}

    def kill(self) -> None:
        self.killed += 1
        self.dead.set()


def _supervisor(client: Client) -> Supervisor:
    one = Supervisor({"slots": 1}, lambda _: (None, None), Activity(), revision=0, queue_limit=0, fallback=_no_fallback)
    one._client = cast(EngineClient, client)
    one._up.set()
    return one


async def _no_fallback(error: Exception, revision: int) -> int:
    raise error


def test_an_answer_that_comes_as_the_daemon_stops_does_not_keep_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """asyncio.wait_for swallows the cancellation where both come at once (Python before 3.12); stopping then never
    ended."""
    monkeypatch.setattr(module, "_PULSE", 0.0)

    async def run() -> bool:
        client = Client()
        one = _supervisor(client)
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


def test_time_in_which_the_daemon_stood_still_is_not_the_engine_s(monkeypatch: pytest.MonkeyPatch) -> None:
    """Frozen with all others, or held up itself, it would end an engine whose answer only waits to be read."""
    monkeypatch.setattr(module, "_PULSE", 0.0)
    monkeypatch.setattr(module, "_HUNG", 0.5)

    async def run() -> None:
        ours, theirs = socket.socketpair()
        channel, writer = await asyncio.open_connection(sock=ours)
        client = Client()

        async def read() -> None:
            await channel.readline()
            client.answer.set()

        tasks = asyncio.create_task(read()), asyncio.create_task(_supervisor(client)._feel_pulse())
        with anyio.fail_after(10), theirs:
            await client.asked.wait()
            client.asked.clear()
            theirs.send(b"well\n")
            time.sleep(1)  # the whole process stands still
            await client.asked.wait()  # it is well, and is asked again
        assert client.killed == 0
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        writer.close()

    asyncio.run(run())


def test_an_engine_that_does_not_answer_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_PULSE", 0.0)
    monkeypatch.setattr(module, "_HUNG", 0.1)

    async def run() -> int:
        client = Client()
        pulse = asyncio.create_task(_supervisor(client)._feel_pulse())
        with anyio.fail_after(10):
            await client.dead.wait()
        pulse.cancel()
        await asyncio.wait({pulse})
        return client.killed

    assert asyncio.run(run()) == 1
