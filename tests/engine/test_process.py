"""The engine as a process of its own: it may die at any time, and serving always goes first."""

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from agentd.engine.operations import (
    Abandon,
    Descend,
    Digest,
    Encode,
    Loss,
    Open,
    Operation,
    ScoreExamples,
    SetRule,
    Stats,
    Tap,
    Use,
)
from agentd.engine.process.activity import Activity
from agentd.engine.process.client import EngineClient
from agentd.engine.process.supervisor import Supervisor
from agentd.engine.protocol import AdapterSpec, Generate, LearningRule
from agentd.errors import (
    AgentdError,
    EngineDied,
    EngineUnavailable,
    InvalidRequest,
    ModelUnusable,
    Overloaded,
    RevisionCorrupt,
)
from tests.support.engine_samples import CHOICES, CONTEXT, REVIEWS, SLOTS, chat, review, write_lora
from tools import tiny_model

QUESTION = "Write a short line about the sea."


@pytest.fixture
def settings(model_path: Path) -> dict[str, Any]:
    return {
        "engine": "llamacpp",
        "path": str(model_path),
        "context": CONTEXT,
        "slots": SLOTS,
        "threads": 1,
        "gpu_layers": "auto",
    }


async def _no_fallback(error: RevisionCorrupt, revision: int) -> int:
    raise error


@contextlib.asynccontextmanager
async def supervised(
    settings: dict[str, Any],
    files: dict[int, Path] | None = None,
    *,
    revision: int = 0,
    queue_limit: int = 8,
    fallback: Callable[[RevisionCorrupt, int], Awaitable[int]] = _no_fallback,
) -> AsyncIterator[Supervisor]:
    def find(number: int) -> tuple[Path | None, Path | None]:
        if files is None or number not in files:
            raise RevisionCorrupt(number, "its files are gone")
        return files[number], None

    supervisor = Supervisor(settings, find, Activity(), revision=revision, queue_limit=queue_limit, fallback=fallback)
    await supervisor.start()
    try:
        yield supervisor
    finally:
        await supervisor.stop()


async def whole(supervisor: Supervisor, request: Generate) -> tuple[str, int]:
    """The text and the revision of an answer."""
    pieces = [piece async for piece in supervisor.generate(request)]
    assert pieces[-1].finish
    return "".join(piece.text for piece in pieces), pieces[-1].revision


async def until(condition: Callable[[], bool], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        await asyncio.sleep(0.02)


def kill(supervisor: Supervisor, number: int = signal.SIGKILL) -> int:
    pid = supervisor.pid
    assert pid
    os.kill(pid, number)
    return pid


def gone(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def write_examples(path: Path, n: int) -> Path:
    lines = [
        {"input": review(f"{text} ({i})"), "choices": CHOICES, "target": label}
        for i in range(-(-n // len(REVIEWS)))
        for text, label in REVIEWS
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines[:n]))
    return path


async def open_session(supervisor: Supervisor, tmp_path: Path, n: int) -> list[int]:
    await supervisor.call(Open())
    source = write_examples(tmp_path / "examples.jsonl", n)
    assert await supervisor.call(Encode(source, tmp_path / "encoded.jsonl")) == n
    return list(range(n))


def test_streams_run_side_by_side_and_errors_reach_the_one_who_made_them(settings: dict[str, Any]) -> None:
    async def run() -> None:
        async with supervised(settings) as supervisor:
            assert supervisor.ready
            alone = await whole(supervisor, chat("alone", QUESTION))
            answers = await asyncio.gather(*(whole(supervisor, chat(f"r{i}", QUESTION)) for i in range(6)))
            assert answers == [alone] * 6
            with pytest.raises(InvalidRequest, match="empty") as caught:
                await whole(supervisor, Generate("bad", {"prompt": ""}))
            assert (caught.value.status, caught.value.param) == (400, "prompt")
            with pytest.raises(InvalidRequest, match="surrogate"):
                await whole(supervisor, Generate("half", {"prompt": "\ud83d"}))
            assert await supervisor.alive(5)
            with pytest.raises(AgentdError, match="no background session"):
                await supervisor.call(Digest())
            with pytest.raises(AgentdError, match="no background session"):
                await supervisor.call(ScoreExamples([0]))
            assert supervisor.restarts == 0

    asyncio.run(run())


def test_a_death_before_the_first_piece_goes_unnoticed(
    settings: dict[str, Any], tmp_path: Path, model_path: Path
) -> None:
    files = {4: write_lora(tmp_path / "a.gguf", model_path, size=2.0)}

    async def run() -> None:
        async with supervised(settings, files, revision=4) as supervisor:
            expected = await whole(supervisor, chat("alone", QUESTION))
            assert expected[1] == 4
            kill(supervisor, signal.SIGSTOP)
            work = [asyncio.create_task(whole(supervisor, chat(f"r{i}", QUESTION))) for i in range(3)]
            await asyncio.sleep(0.1)
            first = kill(supervisor)
            assert await asyncio.gather(*work) == [expected] * 3  # by the committed revision
            assert supervisor.restarts == 1
            assert supervisor.pid != first
            assert supervisor.ready

    asyncio.run(run())


def test_a_death_in_the_middle_is_told_and_the_next_request_is_served(
    settings: dict[str, Any], tmp_path: Path, model_path: Path
) -> None:
    files = {1: write_lora(tmp_path / "a.gguf", model_path, size=2.0)}

    async def run() -> None:
        async with supervised(settings, files) as supervisor:
            assert await supervisor.swap(1) < 20  # milliseconds
            expected = await whole(supervisor, chat("alone", QUESTION))
            stream = supervisor.generate(chat("long", QUESTION, max_tokens=200))
            await stream.__anext__()
            slow = supervisor.generate(chat("slow", QUESTION, max_tokens=200))
            await slow.__anext__()
            kill(supervisor)
            with pytest.raises(EngineDied, match=r"killed by SIGKILL.*send it again") as caught:
                [piece async for piece in stream]
            assert caught.value.status == 503
            assert await whole(supervisor, chat("next", QUESTION)) == expected
            with pytest.raises(EngineDied):  # who reads slowly hears of it when the next engine is up
                [piece async for piece in slow]
            assert supervisor.ready
            assert supervisor.restarts == 1
            assert await whole(supervisor, chat("another", QUESTION)) == expected

    asyncio.run(run())


def test_background_calls_end_with_the_engine(settings: dict[str, Any], tmp_path: Path) -> None:
    async def run() -> None:
        async with supervised(settings) as supervisor:
            numbers = await open_session(supervisor, tmp_path, 300)
            progress: list[int] = []
            work = asyncio.create_task(supervisor.call(ScoreExamples(numbers), progress.append))
            queued = asyncio.create_task(supervisor.call(Loss([0], 0.1, 0, 0.0)))
            await until(lambda: bool(progress))
            kill(supervisor)
            for call in (work, queued):
                with pytest.raises(EngineDied):
                    await call
            await until(lambda: supervisor.ready)
            with pytest.raises(AgentdError, match="no background session"):
                await supervisor.call(ScoreExamples(numbers))

    asyncio.run(run())


def test_a_request_cuts_into_background_work_and_does_not_change_it(settings: dict[str, Any], tmp_path: Path) -> None:
    async def run() -> None:
        async with supervised(settings) as supervisor:
            numbers = await open_session(supervisor, tmp_path, 60)
            plain = await supervisor.call(ScoreExamples(numbers))
            n_embd = supervisor.info.n_embd if supervisor.info else 0
            tapped = await supervisor.call(Tap(numbers, 4, 5, tmp_path / "plain"))
            alone = await whole(supervisor, chat("alone", QUESTION, max_tokens=4))
            await supervisor.call(Use("0"))

            async def disturbed(operation: Operation[Any, Any]) -> Any:
                """The result of a background call that requests come into."""
                work = asyncio.create_task(supervisor.call(operation))
                waits = []
                for i in range(4):
                    await asyncio.sleep(0.02)
                    assert not work.done()
                    start = time.monotonic()
                    stream = supervisor.generate(chat(f"{type(operation).__name__} {i}", QUESTION, max_tokens=4))
                    text = (await stream.__anext__()).text
                    waits.append(time.monotonic() - start)
                    text += "".join([piece.text async for piece in stream])
                    assert text == alone[0]
                assert max(waits) < 2  # seconds
                return await work

            assert await disturbed(ScoreExamples(numbers)) == plain
            assert await disturbed(Tap(numbers, 4, 5, tmp_path / "cut")) == tapped
            assert (tmp_path / "cut").read_bytes() == (tmp_path / "plain").read_bytes()
            assert (tmp_path / "cut").stat().st_size == 4 * n_embd * tapped.rows
            assert min(tapped.starts) == tapped.prefix_rows
            assert len(set(tapped.starts)) == len(numbers)

    asyncio.run(run())


def test_looking_does_not_hold_up_background_work(settings: dict[str, Any], tmp_path: Path) -> None:
    async def run() -> None:
        async with supervised(settings) as supervisor:
            numbers = await open_session(supervisor, tmp_path, 18)
            work = asyncio.create_task(supervisor.call(ScoreExamples(numbers)))
            looks = 0
            while not work.done():  # faster than a forward pass takes
                assert await supervisor.alive(10)
                looks += 1
                await asyncio.sleep(0.01)
            assert len(await work) == 18
            assert looks > 1

    asyncio.run(run())


def test_an_abandoned_session_ends_its_calls_and_serving_goes_on(settings: dict[str, Any], tmp_path: Path) -> None:
    async def run() -> None:
        async with supervised(settings) as supervisor:
            numbers = await open_session(supervisor, tmp_path, 300)
            calls = [asyncio.create_task(supervisor.call(ScoreExamples(numbers))) for _ in range(2)]
            await asyncio.sleep(0.3)
            await supervisor.call(Abandon())
            for call in calls:
                with pytest.raises(AgentdError, match="abandoned"):
                    await call
            assert (await whole(supervisor, chat("after", QUESTION, max_tokens=4)))[0]
            await open_session(supervisor, tmp_path, 2)
            scores = await supervisor.call(ScoreExamples([0, 1]))
            assert len(scores) == 2

    asyncio.run(run())


def test_learning_goes_on_from_where_requests_cut_in(tmp_path: Path) -> None:
    """An engine that learns in place answers in the middle of a step; what ends the step is told apart from that."""
    learning = {
        "engine": "transformers",
        "path": str(tiny_model.write(tmp_path / "tiny.gguf")),
        "folder": str(tmp_path / "weights"),
        "key": "0" * 20,
        "revisions": str(tmp_path / "revisions"),
        "context": CONTEXT,
        "slots": SLOTS,
        "threads": 1,
        "dtype": "float32",
    }
    rule = LearningRule(adapters=AdapterSpec("lora", 4, 8.0, 1, differentiated=True))

    async def run() -> None:
        async with supervised(learning) as supervisor:
            numbers = await open_session(supervisor, tmp_path, 36)

            async def descend() -> Any:
                await supervisor.call(SetRule(rule))
                return await supervisor.call(Descend(numbers, 0.1, seed=1, epsilon=0.0, lr=1e-3))

            await descend()
            start = time.monotonic()
            plain = await descend()
            seconds = time.monotonic() - start
            alone = await whole(supervisor, chat("alone", QUESTION, max_tokens=4))
            work = asyncio.create_task(descend())
            answered = 0
            while not work.done():  # somebody waits all the time, so no forward is ever through undisturbed
                assert await whole(supervisor, chat(f"{answered}", QUESTION, max_tokens=4)) == alone
                answered += 1
                await asyncio.sleep(seconds / 100)
            assert await work == plain
            assert answered > 5

            work = asyncio.create_task(descend())
            await asyncio.sleep(seconds / 2)
            request = asyncio.create_task(whole(supervisor, chat("long", QUESTION, max_tokens=64)))
            await asyncio.sleep(0.05)
            await supervisor.call(Abandon())  # in the middle of an answer in the middle of a step
            with pytest.raises(AgentdError, match="abandoned"):
                await work
            assert (await request)[0].startswith(alone[0])

    asyncio.run(run())


def test_a_client_that_leaves_frees_its_slot(settings: dict[str, Any]) -> None:
    async def run() -> None:
        async with supervised(settings) as supervisor:
            stream = supervisor.generate(chat("leaver", QUESTION, max_tokens=400))
            await stream.__anext__()
            waiting = asyncio.create_task(whole(supervisor, chat("cancelled", QUESTION, max_tokens=400)))
            await asyncio.sleep(0.05)
            await stream.aclose()
            waiting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waiting
            deadline = time.monotonic() + 3
            while (await supervisor.call(Stats()))["active"]:
                assert time.monotonic() < deadline
            assert (await supervisor.call(Stats()))["waiting"] == 0

    asyncio.run(run())


def test_alive_notices_an_engine_that_hangs(settings: dict[str, Any]) -> None:
    async def run() -> None:
        async with supervised(settings) as supervisor:
            assert await supervisor.alive(5)
            kill(supervisor, signal.SIGSTOP)
            assert not await supervisor.alive(0.2)
            kill(supervisor, signal.SIGCONT)
            assert await supervisor.alive(5)

    asyncio.run(run())


def test_more_than_the_queue_holds_is_refused(settings: dict[str, Any]) -> None:
    async def run() -> None:
        async with supervised({**settings, "slots": 1}, queue_limit=1) as supervisor:
            work = [asyncio.create_task(whole(supervisor, chat(f"r{i}", QUESTION, max_tokens=8))) for i in range(2)]
            await asyncio.sleep(0)
            with pytest.raises(Overloaded, match="2 requests"):
                await whole(supervisor, chat("one too many", QUESTION))
            assert len({text for text, _ in await asyncio.gather(*work)}) == 1
            assert (await whole(supervisor, chat("later", QUESTION, max_tokens=8)))[0]

    asyncio.run(run())


@pytest.mark.parametrize("missing", [True, False])
def test_a_corrupt_revision_falls_back(
    settings: dict[str, Any], tmp_path: Path, model_path: Path, missing: bool
) -> None:
    files = {1: write_lora(tmp_path / "a.gguf", model_path, size=2.0)}
    if not missing:
        files[2] = tmp_path / "b.gguf"
        files[2].write_bytes(files[1].read_bytes()[:-999])
    fallbacks: list[tuple[int, str]] = []

    async def fall_back(error: RevisionCorrupt, revision: int) -> int:
        fallbacks.append((revision, str(error)))
        return revision - 1

    async def run() -> None:
        async with supervised(settings, files, revision=2, fallback=fall_back) as supervisor:
            assert supervisor.revision == 1
            assert (await whole(supervisor, chat("a", QUESTION, max_tokens=4)))[1] == 1
            with pytest.raises(RevisionCorrupt, match="revision 2"):
                await supervisor.swap(2)
            assert supervisor.revision == 1
            assert (await whole(supervisor, chat("b", QUESTION, max_tokens=4)))[1] == 1

    asyncio.run(run())
    assert len(fallbacks) == 1
    assert fallbacks[0][0] == 2
    assert "revision 2 cannot be used" in fallbacks[0][1]


def test_a_swap_during_a_stream_changes_the_next_answer_and_frees_the_old(
    settings: dict[str, Any], tmp_path: Path, model_path: Path
) -> None:
    files = {n: write_lora(tmp_path / f"{n}.gguf", model_path, seed=n, size=2.0) for n in (1, 2)}

    async def run() -> None:
        async with supervised(settings, files, revision=1) as supervisor:
            expected = await whole(supervisor, chat("expected", QUESTION, max_tokens=24))
            stream = supervisor.generate(chat("running", QUESTION, max_tokens=24))
            text = (await stream.__anext__()).text
            assert await supervisor.swap(2) < 20
            other = await whole(supervisor, chat("other", QUESTION, max_tokens=24))
            rest = [piece async for piece in stream]
            assert (text + "".join(piece.text for piece in rest), rest[-1].revision) == expected
            assert other[1] == 2
            assert other[0] != expected[0]
            stats = await supervisor.call(Stats())
            assert (stats["staged"], stats["leaving"]) == (["0", "2"], 0)
            await supervisor.swap(1)
            assert await whole(supervisor, chat("back", QUESTION, max_tokens=24)) == expected

    asyncio.run(run())


@pytest.mark.parametrize("damage", ["truncated", "no gguf", "missing"])
def test_a_model_that_cannot_be_loaded_is_named(
    settings: dict[str, Any], tmp_path: Path, model_path: Path, damage: str
) -> None:
    path = tmp_path / "broken.gguf"
    if damage == "truncated":
        with model_path.open("rb") as file:
            path.write_bytes(file.read(4 << 20))
    elif damage == "no gguf":
        path.write_bytes(b"this is no model" * 100)

    async def run() -> None:
        with pytest.raises(ModelUnusable, match=f"cannot use the model {path}: ."):
            async with supervised({**settings, "path": str(path)}):
                pass
        client = EngineClient({**settings, "path": str(path)})
        with pytest.raises(EngineUnavailable, match="not running"):
            await client.call(Stats())

    asyncio.run(run())


def test_a_process_that_dies_while_loading_is_no_request_to_send_again(settings: dict[str, Any]) -> None:
    async def run() -> None:
        client = EngineClient(settings)
        starting = asyncio.create_task(client.start())
        await until(lambda: client.pid is not None)
        os.kill(client.pid or 0, signal.SIGKILL)
        with pytest.raises(EngineUnavailable, match="while it loaded"):
            await starting
        await client.stop()

    asyncio.run(run())


_DAEMON = """
import asyncio, json, sys
from agentd.engine.process.client import EngineClient

async def main():
    client = EngineClient(json.loads(sys.argv[1]))
    if sys.argv[2] == "ready":
        await client.start()
    else:
        starting = asyncio.create_task(client.start())
        while client.pid is None:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.1)
    print(client.pid, flush=True)
    await asyncio.sleep(60)

asyncio.run(main())
"""


@pytest.mark.parametrize("when", ["ready", "loading"])
def test_the_engine_does_not_outlive_the_daemon(settings: dict[str, Any], when: str) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", _DAEMON, json.dumps(settings), when], stdout=subprocess.PIPE, text=True
    ) as daemon:
        assert daemon.stdout is not None
        pid = int(daemon.stdout.readline())
        assert not gone(pid)
        daemon.kill()
    deadline = time.monotonic() + 5
    while not gone(pid):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_nothing_is_answered_before_the_start(settings: dict[str, Any]) -> None:
    async def run() -> None:
        supervisor = Supervisor(
            settings, lambda _: (None, None), Activity(), revision=0, queue_limit=1, fallback=_no_fallback
        )
        assert not supervisor.ready
        assert not await supervisor.alive(1)
        with pytest.raises(EngineUnavailable, match="starting"):
            await supervisor.call(Stats())

    asyncio.run(run())
