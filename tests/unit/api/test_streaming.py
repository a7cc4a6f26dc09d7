"""A stream whose first piece takes long says so, and ends whatever it waits for when its client goes."""

import asyncio
import json
from collections.abc import AsyncGenerator

import pytest
from openai._streaming import SSEDecoder
from starlette.requests import ClientDisconnect, Request
from starlette.types import Message

from agentd.api import streaming
from agentd.api.streaming import First, event, one_line
from agentd.errors import InvalidRequest


class Pieces:
    """A stream whose first piece comes when it is let go."""

    def __init__(self, error: Exception | None = None) -> None:
        self.go, self.closed, self._error = asyncio.Event(), False, error

    async def stream(self) -> AsyncGenerator[str, None]:
        try:
            await self.go.wait()
            if self._error:
                raise self._error
            yield "first"
        finally:
            self.closed = True


def request(gone: asyncio.Event) -> Request:
    async def receive() -> Message:
        await gone.wait()
        return {"type": "http.disconnect"}

    return Request({"type": "http", "method": "POST", "headers": []}, receive)


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "KEEP_ALIVE", 0.01)


async def lines(first: First[str], pieces: Pieces, n: int) -> list[bytes]:
    """The comments up to the first piece, which comes after `n` of them."""
    seen = []
    async for comment in first.comments():
        seen.append(comment)
        if len(seen) == n:
            pieces.go.set()
    return seen


def test_comments_come_until_the_first_piece_does_and_clients_pass_over_them() -> None:
    async def check() -> list[bytes]:
        pieces = Pieces()
        first = await First.of(request(asyncio.Event()), pieces.stream())
        seen = await lines(first, pieces, 3)
        assert first.result() == "first"
        return seen

    seen = asyncio.run(check())
    assert len(seen) == 3
    events = list(SSEDecoder().iter_bytes(iter([*seen, event({"text": "first"})])))
    assert [each.data for each in events] == ['{"text":"first"}']


def test_what_is_there_at_once_has_no_comment_and_what_fails_at_once_a_status() -> None:
    async def check() -> None:
        pieces = Pieces()
        pieces.go.set()
        first = await First.of(request(asyncio.Event()), pieces.stream())
        assert [comment async for comment in first.comments()] == []
        failing = Pieces(InvalidRequest("no"))
        failing.go.set()
        with pytest.raises(InvalidRequest):
            await First.of(request(asyncio.Event()), failing.stream())
        assert failing.closed

    asyncio.run(check())


def test_what_fails_later_is_told_in_the_stream() -> None:
    async def check() -> None:
        pieces = Pieces(InvalidRequest("no"))
        first = await First.of(request(asyncio.Event()), pieces.stream())
        await lines(first, pieces, 2)
        with pytest.raises(InvalidRequest):
            first.result()

    asyncio.run(check())


def test_a_client_that_goes_ends_what_it_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    async def check() -> None:
        pieces, gone = Pieces(), asyncio.Event()
        first = await First.of(request(gone), pieces.stream())
        comments = first.comments()
        await anext(comments)
        await comments.aclose()  # as when the stream is not read any more
        assert pieces.closed
        monkeypatch.setattr(streaming, "KEEP_ALIVE", 60.0)
        early, gone = Pieces(), asyncio.Event()
        gone.set()
        with pytest.raises(ClientDisconnect):
            await First.of(request(gone), early.stream())

    asyncio.run(check())


def test_an_event_is_one_line_for_whoever_looks_for_ends_of_lines() -> None:
    """httpx's `iter_lines`, by which many clients read streams, ends a line at each of these."""
    text = "a\u2028b\u2029c\u0085d\u000be\u001cf"
    sent = event({"text": text}).decode()
    assert len(sent.splitlines()) == 2
    assert json.loads(sent.removeprefix("data: ")) == {"text": text}
    assert json.loads(one_line({"text": text})) == {"text": text}
