"""What an engine's death says about the requests that were there, and about the revision. The engine is a real process;
it is killed where a request or weights would crash it."""

import asyncio
import contextlib
import json
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from agentd.engine import canaries
from agentd.engine.operations import Stats
from agentd.engine.process import supervisor as supervisors
from agentd.engine.process.activity import Activity
from agentd.engine.process.client import EngineClient
from agentd.engine.process.supervisor import Supervisor
from agentd.engine.protocol import Generate, ModelInfo, Piece, Sampling
from agentd.errors import EndsTheEngine, EngineDied, RevisionCorrupt
from tools import tiny_model

REVISION = 3


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model.write(tmp_path_factory.mktemp("model") / "tiny.gguf")


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisors, "_BACKOFF", (0.02,))


@contextlib.asynccontextmanager
async def running(model: Path, revision: int = 0) -> AsyncIterator[Supervisor]:
    settings = {"engine": "llamacpp", "path": str(model), "context": 256, "slots": 4, "threads": 1, "gpu_layers": 0}

    async def base(error: RevisionCorrupt, revision: int) -> int:
        return 0

    engine = Supervisor(
        settings, lambda number: (None, None), Activity(), revision=revision, queue_limit=8, fallback=base
    )
    await engine.start()
    try:
        yield engine
    finally:
        await engine.stop()


def request(text: str, key: str = "") -> Generate:
    return Generate(key or text, {"prompt": text}, Sampling(temperature=0), max_tokens=4)


async def answer(engine: Supervisor, request: Generate) -> str:
    return "".join([piece.text async for piece in engine.generate(request)])


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Requests with this word kill the engine that they are given to; the keys of those that did."""
    generate, killers = EngineClient.generate, []

    async def deadly(self: EngineClient, request: Generate) -> AsyncIterator[Piece]:
        pieces = generate(self, request)
        if "poison" in json.dumps(request.input):
            killers.append(request.key)
            os.kill(self.pid or 0, signal.SIGKILL)
        else:
            await asyncio.sleep(0.05)  # so that it is there when another kills
        try:
            async for piece in pieces:
                yield piece
        finally:
            await pieces.aclose()

    monkeypatch.setattr(EngineClient, "generate", deadly)
    return killers


def test_a_request_that_ends_engines_is_retried_once_and_then_refused(model: Path, poison: list[str]) -> None:
    async def run() -> None:
        async with running(model, REVISION) as engine:
            expected = [await answer(engine, request(f"innocent {n}")) for n in range(3)]
            # The same thing asked by several at once is there at one death, not at several.
            texts = [f"innocent {n}" for n in (0, 1, 2, 2, 2)]
            expected += expected[-1:] * 2
            innocent = [asyncio.create_task(answer(engine, request(text, f"i{n}"))) for n, text in enumerate(texts)]
            with pytest.raises((EngineDied, EndsTheEngine)):
                await answer(engine, request("poison", "first"))
            assert len(poison) == 2
            assert await asyncio.gather(*innocent) == expected  # whoever was there with it
            for number in range(3):  # what a client sends again
                with pytest.raises(EndsTheEngine) as refused:
                    await answer(engine, request("poison", f"again {number}"))
                assert refused.value.status == 422
            assert len(poison) == 2
            assert engine.restarts == 2
            assert (engine.revision, engine.degraded) == (REVISION, None)
            assert await answer(engine, request("innocent 1", "last")) == expected[1]

    asyncio.run(run())


def test_many_requests_that_end_engines_do_not_cost_the_revision(model: Path, poison: list[str]) -> None:
    async def run() -> None:
        async with running(model, REVISION) as engine:
            for number in range(4):
                with pytest.raises((EngineDied, EndsTheEngine)):
                    await answer(engine, request(f"poison {number}"))
            assert engine.restarts == 8
            assert await answer(engine, request("innocent"))
            assert (engine.revision, engine.degraded) == (REVISION, None)

    asyncio.run(run())


def test_an_engine_that_is_killed_again_and_again_does_not_cost_a_revision_that_answers(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ask, prompts = canaries.ask, []

    async def counted(client: Any, info: ModelInfo | None, prompt: str) -> None:
        prompts.append(prompt)
        await ask(client, info, prompt)

    monkeypatch.setattr(canaries, "ask", counted)

    async def run() -> None:
        async with running(model, REVISION) as engine:
            for number in range(5):
                os.kill(engine.pid or 0, signal.SIGKILL)
                while engine.restarts <= number or not engine.ready:
                    await asyncio.sleep(0.01)
            assert prompts, "it serves without having been asked"
            assert (engine.revision, engine.degraded) == (REVISION, None)
            assert await answer(engine, request("question"))

    asyncio.run(run())


def test_a_revision_that_dies_of_canaries_too_is_left(
    model: Path, monkeypatch: pytest.MonkeyPatch, poison: list[str]
) -> None:
    ask, prompts = canaries.ask, []

    async def fatal(client: Any, info: ModelInfo | None, prompt: str) -> None:
        prompts.append(prompt)
        os.kill(client.pid, signal.SIGKILL)
        await ask(client, info, prompt)

    monkeypatch.setattr(canaries, "ask", fatal)

    async def run() -> None:
        async with running(model, REVISION) as engine:
            for number in range(2):
                with pytest.raises((EngineDied, EndsTheEngine)):
                    await answer(engine, request(f"poison {number}"))
            assert await answer(engine, request("innocent"))  # waits until something serves
            assert engine.revision == 0
            assert "canary" in (engine.degraded or "")
            assert len(prompts) == 2
            await engine.swap(REVISION)
            assert engine.degraded is None, "the owner may try again"

    asyncio.run(run())


def test_an_engine_that_hangs_is_ended_and_its_request_answered_by_the_next(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, seconds in (("_PULSE", 0.05), ("_STALLED", 0.1), ("_HUNG", 1.0)):
        monkeypatch.setattr(supervisors, name, seconds)

    async def run() -> None:
        async with running(model) as engine:
            expected = await answer(engine, request("question"))
            assert engine.stalled is None
            os.kill(engine.pid or 0, signal.SIGSTOP)
            work = asyncio.create_task(answer(engine, request("question", "again")))
            await asyncio.sleep(0.5)
            assert "has not answered" in (engine.stalled or "")
            assert await work == expected
            assert engine.restarts == 1
            assert engine.stalled is None

    asyncio.run(run())


def test_a_request_that_is_cancelled_before_it_was_looked_at_is_never_begun(model: Path) -> None:
    async def run() -> None:
        async with running(model) as engine:
            os.kill(engine.pid or 0, signal.SIGSTOP)
            leavers = [asyncio.create_task(answer(engine, request(f"leaver {n}"))) for n in range(3)]
            await asyncio.sleep(0.1)
            for leaver in leavers:
                leaver.cancel()
            await asyncio.gather(*leavers, return_exceptions=True)
            os.kill(engine.pid or 0, signal.SIGCONT)
            stats = await engine.call(Stats())
            assert (stats["active"], stats["waiting"]) == (0, 0)
            assert await answer(engine, request("question"))

    asyncio.run(run())
