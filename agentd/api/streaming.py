"""Answers that take long: given up when the client goes away, or does not read."""

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, Awaitable, Mapping
from contextlib import aclosing
from typing import Any, TypeVar

import anyio
from starlette.requests import ClientDisconnect, Request
from starlette.responses import StreamingResponse
from starlette.types import Message, Send

logger = logging.getLogger(__name__)
T = TypeVar("T")

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


async def first_of(request: Request, pieces: AsyncGenerator[T, None]) -> T:
    """The first piece: what fails up to here still gets a status of its own. Raises ClientDisconnect."""
    try:
        return await unless_left(request, anext(pieces))
    except ClientDisconnect:
        await pieces.aclose()
        raise


async def all_of(request: Request, pieces: AsyncGenerator[Any, None]) -> None:
    """Waits for the last piece. Raises ClientDisconnect."""

    async def collect() -> None:
        async with aclosing(pieces):
            async for _ in pieces:
                pass

    await unless_left(request, collect())


class EventStream(StreamingResponse):
    """Server-sent events; `events` is closed, and with it the request, as soon as no one reads them."""

    def __init__(self, events: AsyncGenerator[bytes, None], headers: Mapping[str, str] | None = None) -> None:
        super().__init__(
            events, media_type="text/event-stream", headers={"Cache-Control": "no-store", **(headers or {})}
        )
        self._events = events

    async def stream_response(self, send: Send) -> None:
        async def patiently(message: Message) -> None:
            with anyio.fail_after(PATIENCE):
                await send(message)

        async with aclosing(self._events):
            try:
                await super().stream_response(patiently)
            except TimeoutError:
                logger.warning("a client did not read its stream for %g s; it is given up", PATIENCE)


def event(data: dict[str, Any], name: str | None = None) -> bytes:
    """A server-sent event of this data, with or without a name."""
    head = b"" if name is None else b"event: " + name.encode() + b"\n"
    return head + b"data: " + json.dumps(data, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"
