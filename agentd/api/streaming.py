"""Answers that take long: given up when the client goes away, or does not read."""

import asyncio
import json
import logging
import math
from collections.abc import AsyncGenerator, Awaitable, Mapping
from contextlib import aclosing
from typing import Any, Generic, TypeVar

import anyio
from starlette.requests import ClientDisconnect, Request
from starlette.responses import StreamingResponse
from starlette.types import Message, Send

logger = logging.getLogger(__name__)
T = TypeVar("T")

_ENCODER = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"))
_ENDS = {0x85: "\\u0085", 0x2028: "\\u2028", 0x2029: "\\u2029"}
_COMMENT = b": reading the prompt\n\n"
KEEP_ALIVE = 5.0  # seconds without an event after which a stream says that it is alive
PATIENCE = 60.0  # seconds a client of a stream may let it stand before it counts as gone


async def unless_left(request: Request, work: Awaitable[T]) -> T:
    """The result of `work`, which is given up when the client goes away: a slot is not for those who do not wait.

    Raises ClientDisconnect.
    """

    async def disconnected() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    working, leaving = asyncio.ensure_future(work), asyncio.create_task(disconnected())
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return working.result()
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.wait({working, leaving})


async def all_of(request: Request, pieces: AsyncGenerator[Any, None]) -> None:
    """Waits for the last piece. Raises ClientDisconnect."""

    async def collect() -> None:
        async with aclosing(pieces):
            async for _ in pieces:
                pass

    await unless_left(request, collect())


class First(Generic[T]):
    """The first piece of a stream, or that it is awaited still."""

    def __init__(self, pieces: AsyncGenerator[T, None]) -> None:
        self._pieces, self._future = pieces, asyncio.ensure_future(anext(pieces))

    @classmethod
    async def of(cls, request: Request, pieces: AsyncGenerator[T, None]) -> "First[T]":
        """Waits for it a while: what fails in that time still gets a status of its own. Raises ClientDisconnect."""
        first = cls(pieces)
        try:
            await unless_left(request, asyncio.wait({first._future}, timeout=KEEP_ALIVE))
            if first._future.done():
                first.result()
        except BaseException:
            await first._give_up()
            await pieces.aclose()
            raise
        return first

    async def comments(self) -> AsyncGenerator[bytes, None]:
        """Server-sent comments until it is there."""
        try:
            while not self._future.done():
                yield _COMMENT
                await asyncio.wait({self._future}, timeout=KEEP_ALIVE)
        finally:
            await self._give_up()

    def result(self) -> T:
        """Raises what failed."""
        return self._future.result()

    async def _give_up(self) -> None:
        if not self._future.done():
            self._future.cancel()
            await asyncio.wait({self._future})


class EventStream(StreamingResponse):
    """Server-sent events; `events` is closed, and with it the request, as soon as no one reads them."""

    kind = "text/event-stream"

    def __init__(self, events: AsyncGenerator[bytes, None], headers: Mapping[str, str] | None = None) -> None:
        super().__init__(events, media_type=self.kind, headers={"Cache-Control": "no-store", **(headers or {})})
        self._events = events

    async def stream_response(self, send: Send) -> None:
        # One scope for all of the stream: a new one for every token took a third of the daemon's time.
        patience = anyio.CancelScope()

        async def patiently(message: Message) -> None:
            patience.deadline = anyio.current_time() + PATIENCE
            await send(message)
            patience.deadline = math.inf

        async with aclosing(self._events):
            with patience:
                await super().stream_response(patiently)
        if patience.cancelled_caught:
            logger.warning("a client did not read its stream for %g s; it is given up", PATIENCE)


class LineStream(EventStream):
    """The same with a JSON object a line."""

    kind = "application/x-ndjson"


def one_line(data: Mapping[str, Any]) -> str:
    """JSON without what clients may take for the end of a line: httpx's `iter_lines` ends one at U+2028."""
    return _ENCODER.encode(data).translate(_ENDS)


def event(data: dict[str, Any], name: str | None = None) -> bytes:
    """A server-sent event of this data, with or without a name."""
    head = b"" if name is None else b"event: " + name.encode() + b"\n"
    return head + b"data: " + one_line(data).encode() + b"\n\n"
