"""POST /v1/chat/completions and /v1/completions: the OpenAI API, streaming and not, over one engine.

An answer's `id` is the inference id that feedback names; `agentd.revision` says which revision gave it.
"""

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, Awaitable
from contextlib import aclosing
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Message, Send

from agentd.api.answer import Answer
from agentd.api.peers import author
from agentd.api.requests import error_body, only, parse
from agentd.api.schemas import ChatCompletion, TextCompletion
from agentd.api.services import services
from agentd.engine.protocol import Piece
from agentd.errors import AgentdError, InvalidRequest

logger = logging.getLogger(__name__)
T = TypeVar("T")

PATIENCE = 60.0  # seconds a client of a stream may let it stand before it counts as gone


async def chat_completions(request: Request) -> Response:
    s = services(request)
    only(request)
    body = await parse(request, ChatCompletion, s.config.serve.max_body)
    if body.top_logprobs and not body.logprobs:
        raise InvalidRequest("top_logprobs needs logprobs: true", param="top_logprobs")
    answer = Answer(
        s,
        body,
        input={"messages": [message.plain() for message in body.messages]},
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        max_tokens=body.max_completion_tokens or body.max_tokens,
        kind="chat",
        author=author(request),
    )
    return await _respond(request, answer)


async def completions(request: Request) -> Response:
    s = services(request)
    only(request)
    body = await parse(request, TextCompletion, s.config.serve.max_body)
    answer = Answer(
        s,
        body,
        input={"prompt": body.prompt},
        logprobs=body.logprobs,
        max_tokens=body.max_tokens,
        kind="completion",
        author=author(request),
    )
    return await _respond(request, answer)


async def _respond(request: Request, answer: Answer) -> Response:
    if not answer.body.stream:
        return await _whole(request, answer)
    pieces = answer.pieces()
    try:
        first = await _unless_left(request, anext(pieces))  # errors up to here still get a status of their own
    except ClientDisconnect:
        await pieces.aclose()
        raise
    return EventStream(_events(answer, first, pieces))


async def _whole(request: Request, answer: Answer) -> Response:
    async def collect() -> None:
        async with aclosing(answer.pieces()) as pieces:
            async for _ in pieces:
                pass

    await _unless_left(request, collect())
    return JSONResponse(answer.whole())


async def _unless_left(request: Request, work: Awaitable[T]) -> T:
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


class EventStream(StreamingResponse):
    """Server-sent events; `events` is closed, and with it the request, as soon as nobody reads them."""

    def __init__(self, events: AsyncGenerator[bytes, None]) -> None:
        super().__init__(events, media_type="text/event-stream", headers={"Cache-Control": "no-store"})
        self._events = events

    async def stream_response(self, send: Send) -> None:
        async def patiently(message: Message) -> None:
            await asyncio.wait_for(send(message), PATIENCE)

        async with aclosing(self._events):
            try:
                await super().stream_response(patiently)
            except asyncio.TimeoutError:
                logger.warning("a client did not read its stream for %g s; it is given up", PATIENCE)


async def _events(answer: Answer, first: Piece, pieces: AsyncGenerator[Piece, None]) -> AsyncGenerator[bytes, None]:
    """Server-sent events: chunks, and at the end [DONE]; an error in the middle is an event too."""
    try:
        yield _event(answer.chunk(first, first=True))
        async for piece in pieces:
            yield _event(answer.chunk(piece, first=False))
        if answer.body.stream_options and answer.body.stream_options.include_usage:
            yield _event(answer.usage_chunk())
        yield b"data: [DONE]\n\n"
    except AgentdError as error:
        yield _event(error_body(error))
    finally:
        await pieces.aclose()


def _event(data: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(data, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"
