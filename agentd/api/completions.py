"""POST /v1/chat/completions and /v1/completions: the OpenAI API, streaming and not, over one engine.

An answer's `id` is the inference id that feedback names; `agentd.revision` says which revision gave it.
"""

from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from agentd.api.access import author
from agentd.api.answer import Answer
from agentd.api.requests import episode, error_body, ignored_fields, only, parse, refuse_unknown
from agentd.api.schemas import ChatCompletion, TextCompletion
from agentd.api.services import services
from agentd.api.streaming import EventStream, First, all_of, event
from agentd.engine.protocol import Piece
from agentd.errors import AgentdError, InvalidRequest


async def chat_completions(request: Request) -> Response:
    s = services(request)
    only(request)
    body = await parse(request, ChatCompletion, s.config.serve.max_body)
    refuse_unknown(body, s.config.serve.strict)
    if body.top_logprobs and not body.logprobs:
        raise InvalidRequest("top_logprobs needs logprobs: true", param="top_logprobs")
    answer = Answer(
        s,
        body,
        input=body.input(),
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        max_tokens=body.max_completion_tokens or body.max_tokens,
        kind="chat",
        author=author(request),
        episode=episode(request, body.metadata),
        traceparent=request.headers.get("traceparent"),
    )
    return await _respond(request, answer)


async def completions(request: Request) -> Response:
    s = services(request)
    only(request)
    body = await parse(request, TextCompletion, s.config.serve.max_body)
    refuse_unknown(body, s.config.serve.strict)
    answer = Answer(
        s,
        body,
        input=body.input(),
        logprobs=body.logprobs,
        max_tokens=body.max_tokens,
        kind="completion",
        author=author(request),
        episode=episode(request, body.metadata),
        traceparent=request.headers.get("traceparent"),
    )
    return await _respond(request, answer)


async def _respond(request: Request, answer: Answer) -> Response:
    pieces, headers = answer.pieces(), ignored_fields(answer.body)
    if answer.body.stream:
        first = await First.of(request, pieces)
        return EventStream(_events(answer, first, pieces), headers)
    await all_of(request, pieces)
    return JSONResponse(answer.whole(), headers=headers)


async def _events(
    answer: Answer, first: First[Piece], pieces: AsyncGenerator[Piece, None]
) -> AsyncGenerator[bytes, None]:
    """Server-sent events: chunks, and at the end [DONE]; an error in the middle is an event too."""
    try:
        async with aclosing(first.comments()) as comments:
            async for comment in comments:
                yield comment
        piece = first.result()
        for number, part in enumerate(_parts(piece) or [piece]):
            yield event(answer.chunk(part, first=number == 0))
        async for piece in pieces:
            for part in _parts(piece):
                yield event(answer.chunk(part, first=False))
        if answer.body.stream_options and answer.body.stream_options.include_usage:
            yield event(answer.usage_chunk())
        yield b"data: [DONE]\n\n"
    except AgentdError as error:
        yield event(error_body(error))
    finally:
        await pieces.aclose()


def _parts(piece: Piece) -> list[Piece]:
    """What was said first, then an end without any of it: some clients do not look for text where an answer ends. A
    token that says nothing by itself (of a call's opening, a part of a character) is no part."""
    says = bool(piece.text or piece.reasoning or piece.calls or piece.logprobs)
    if piece.finish is None:
        return [piece] if says else []
    if not says:
        return [piece]
    return [replace(piece, finish=None), replace(piece, text="", reasoning="", calls=(), logprobs=[])]
