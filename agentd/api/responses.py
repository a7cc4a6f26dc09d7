"""/v1/responses: the Responses API as a form of chat completions, over the same internal request and the same store."""

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from agentd.api import response_object
from agentd.api.access import author
from agentd.api.answer import Answer
from agentd.api.lenient import Lenient
from agentd.api.requests import episode, error_body, ignored_fields, only, parse, refuse_unknown
from agentd.api.response_body import ResponsesBody, renamed
from agentd.api.response_object import Events
from agentd.api.services import Services, services
from agentd.api.streaming import EventStream, First, all_of, event
from agentd.engine.protocol import Piece
from agentd.errors import AgentdError, InvalidRequest, NotFound
from agentd.ids import epoch
from agentd.store import inferences
from agentd.store.inferences import Inference


async def responses(request: Request) -> Response:
    s = services(request)
    only(request)
    body = await parse(request, ResponsesBody, s.config.serve.max_body)
    refuse_unknown(body, s.config.serve.strict)
    before = []
    if body.previous_response_id is not None:
        row = await s.store.call(inferences.find, body.previous_response_id)
        before = _conversation(row, body.previous_response_id)
    chat = body.chat(before, await _referenced(s, body.references))
    about = body.about(s.resolve(body.model))
    try:
        answer = Answer(
            s,
            chat,
            input=chat.input(),
            logprobs=body.logprobs,
            max_tokens=body.max_output_tokens,
            kind="response",
            author=author(request),
            episode=episode(request, body.metadata),
            traceparent=request.headers.get("traceparent"),
            about={"response": about},
        )
        headers = ignored_fields(body)
        pieces = answer.pieces()
        if body.stream:
            first = await First.of(request, pieces)
            return EventStream(_events(answer, about, first, pieces), headers)
        await all_of(request, pieces)
    except InvalidRequest as error:
        raise renamed(error) from None
    return JSONResponse(_response(answer, about), headers=headers)


async def show(request: Request) -> Response:
    row = await _stored(request)
    return JSONResponse(response_object.stored(row, int(epoch(row.created_at))))


async def input_items(request: Request) -> Response:
    """The newest first, unless `order` says otherwise."""
    items = response_object.input_items(await _stored(request))
    query = request.query_params
    if query.get("order", "desc") == "desc":
        items.reverse()
    if (after := query.get("after")) is not None:
        places = [i for i, item in enumerate(items) if item["id"] == after]
        if not places:
            raise InvalidRequest(f"after: there is no item {after!r} here", param="after")
        items = items[places[0] + 1 :]
    page = items[: int(query.get("limit", 20))]
    first, last = (page[0]["id"], page[-1]["id"]) if page else (None, None)
    more = len(page) < len(items)
    return JSONResponse({"object": "list", "data": page, "first_id": first, "last_id": last, "has_more": more})


async def cancel(request: Request) -> Response:
    """Only a response in the background could be: one that is streamed ends with its connection."""
    await parse(request, Lenient, 1024)
    row = await _stored(request)
    raise InvalidRequest(f"{row.id} is not a background response; close its connection to end it", param="id")


async def _stored(request: Request) -> Inference:
    row = await services(request).store.call(inferences.find, request.path_params["id"])
    if row is None or row.kind != "response":
        raise NotFound("response", request.path_params["id"])
    return row


async def _referenced(s: Services, ids: list[str]) -> dict[str, dict[str, Any]]:
    """Items of stored responses by their ids. Raises InvalidRequest for one that is not there."""
    items: dict[str, dict[str, Any]] = {}
    for id in ids:
        row = await s.store.call(inferences.find, response_object.response_of(id))
        if row is not None and row.kind == "response":
            status = response_object.status_of(row.finish_reason)
            outputs = response_object.output(row.id, row.reasoning, row.output, row.tool_calls, status)
            items |= {item["id"]: item for item in [*outputs, *response_object.input_items(row)]}
        if id not in items:
            error = InvalidRequest(f"there is no item {id!r}; those of store: false are not kept", param="input")
            error.code = "item_not_found"
            raise error
    return items


async def delete(request: Request) -> Response:
    id = request.path_params["id"]
    await services(request).store.call(inferences.forget_response, id)
    await services(request).supervisor.forget_prefixes()
    return JSONResponse({"id": id, "object": "response", "deleted": True})


async def _events(
    answer: Answer, about: dict[str, Any], first: First[Piece], pieces: AsyncGenerator[Piece, None]
) -> AsyncGenerator[bytes, None]:
    """An error in the middle ends the response, which is an event too."""
    events = Events(answer.id)

    def sent(data: dict[str, Any]) -> bytes:
        return event(data, data["type"])

    try:
        async with aclosing(first.comments()) as comments:
            async for comment in comments:
                yield comment
        begun = _response(answer, about, begun=True)
        yield sent(events.event("created", response=begun))
        yield sent(events.event("in_progress", response=begun))
        for each in events.piece(first.result()):
            yield sent(each)
        async for piece in pieces:
            for each in events.piece(piece):
                yield sent(each)
        whole = _response(answer, about)
        for each in events.end(whole["status"]):
            yield sent(each)
        yield sent(events.event(whole["status"], response=whole))
    except AgentdError as error:
        failed = _response(answer, about, error=error)
        yield sent(events.event("failed", response=failed))
    finally:
        await pieces.aclose()


def _response(
    answer: Answer, about: dict[str, Any], *, begun: bool = False, error: AgentdError | None = None
) -> dict[str, Any]:
    finish = None if begun else "error" if error else answer.finish
    last, reply = answer.last, answer.reply
    status = response_object.status_of(finish)
    said = (reply.reasoning, reply.text, reply.calls)
    items = [] if begun else response_object.output(answer.id, *said, status, answer.logprobs)
    counts = (last.prompt_tokens, last.cached_tokens, last.completion_tokens, answer.reasoning_tokens)
    return response_object.response(
        answer.id,
        about,
        created=answer.created,
        finish=finish,
        items=items,
        usage=None if begun or error else response_object.usage(*counts),
        agentd=answer.agentd(),
        error={"code": "server_error", **error_body(error)["error"]} if error else None,
    )


def _conversation(row: Inference | None, id: str) -> list[dict[str, Any]]:
    """What was said up to the end of a stored response, without its instructions: those hold for one request."""
    if row is None or row.kind != "response" or row.finish_reason in (inferences.STREAMING, "error", "cancelled"):
        error = InvalidRequest(
            f"there is no finished response {id!r}; one of store: false is not kept", param="previous_response_id"
        )
        error.code = "previous_response_not_found"
        raise error
    messages: list[dict[str, Any]] = row.input["messages"]
    if row.params["response"]["instructions"] is not None:
        messages = messages[1:]
    said: dict[str, Any] = {"role": "assistant", "content": row.output or (None if row.tool_calls else "")}
    if row.reasoning:
        said["reasoning_content"] = row.reasoning
    if row.tool_calls:
        said["tool_calls"] = row.tool_calls
    return [*messages, said]
