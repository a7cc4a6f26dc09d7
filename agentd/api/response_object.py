"""What the Responses API answers: the response with its items, and the events of which a stream of it is made."""

import time
from collections.abc import Iterator, Sequence
from typing import Any

from agentd.engine.protocol import CallDelta, Piece
from agentd.store import inferences
from agentd.store.inferences import Inference

_STATUS = {"length": "incomplete", "error": "failed", "cancelled": "cancelled", inferences.STREAMING: "in_progress"}

Event = dict[str, Any]


def item_id(kind: str, id: str, number: int = 0) -> str:
    """An item's id, made from its response's."""
    return f"{kind}_{id.removeprefix('resp_')}" + (f"_{number}" if kind == "fc" else "")


def reasoning_item(id: str, text: str, status: str = "completed") -> dict[str, Any]:
    content = [{"type": "reasoning_text", "text": text}] if text else []
    return {"id": item_id("rs", id), "type": "reasoning", "summary": [], "content": content, "status": status}


def response_of(item: str) -> str:
    """The id of the response that an item of this id is of."""
    return "resp_" + item.partition("_")[2].partition("_")[0]


def text_part(text: str, logprobs: Sequence[dict[str, Any]] = ()) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": [*logprobs]}


def message_item(
    id: str, text: str | None, status: str = "completed", logprobs: Sequence[dict[str, Any]] = ()
) -> dict[str, Any]:
    content = [] if text is None else [text_part(text, logprobs)]
    return {"id": item_id("msg", id), "type": "message", "role": "assistant", "status": status, "content": content}


def call_item(id: str, number: int, call: dict[str, Any], status: str = "completed") -> dict[str, Any]:
    return {
        "id": item_id("fc", id, number),
        "type": "function_call",
        "call_id": call["id"],
        "name": call["function"]["name"],
        "arguments": call["function"]["arguments"],
        "status": status,
    }


def output(
    id: str,
    reasoning: str,
    text: str,
    calls: Sequence[dict[str, Any]],
    status: str,
    logprobs: Sequence[dict[str, Any]] = (),
) -> list[dict[str, Any]]:
    """An answer as items; what is said last is as far as the response is."""
    items = [reasoning_item(id, reasoning)] if reasoning else []
    if text or not calls:
        items.append(message_item(id, text, logprobs=logprobs))
    items += [call_item(id, number, call) for number, call in enumerate(calls)]
    if status != "completed":
        items[-1]["status"] = "in_progress" if status == "in_progress" else "incomplete"
    return items


def response(
    id: str,
    about: dict[str, Any],
    *,
    created: int,
    finish: str | None,
    items: list[dict[str, Any]],
    usage: dict[str, Any] | None,
    agentd: dict[str, Any],
    error: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """The response as a client gets it. `about` is what its request said, `finish` None while it is in progress."""
    status = status_of(finish)
    return {
        "id": id,
        "object": "response",
        "created_at": created,
        "completed_at": int(time.time()) if status == "completed" else None,
        "status": status,
        "error": error,
        "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
        **about,
        "output": items,
        "usage": usage,
        "background": False,
        "agentd": agentd,
    }


def status_of(finish: str | None) -> str:
    return "in_progress" if finish is None else _STATUS.get(finish, "completed")


def usage(prompt: int, cached: int, completion: int, reasoning: int) -> dict[str, Any]:
    return {
        "input_tokens": prompt,
        "input_tokens_details": {"cached_tokens": cached, "cache_write_tokens": 0},
        "output_tokens": completion,
        "output_tokens_details": {"reasoning_tokens": reasoning},
        "total_tokens": prompt + completion,
    }


def stored(row: Inference, created: int) -> dict[str, Any]:
    """A response as the store has it."""
    cached, reasoning = (row.params.get(name, 0) for name in ("cached_tokens", "reasoning_tokens"))
    status = status_of(row.finish_reason)
    return response(
        row.id,
        row.params["response"],
        created=created,
        finish=row.finish_reason,
        items=output(row.id, row.reasoning, row.output, row.tool_calls, status),
        usage=usage(row.prompt_tokens, cached, row.completion_tokens, reasoning),
        agentd={"revision": row.revision},
    )


def input_items(row: Inference) -> list[dict[str, Any]]:
    """What a stored response answered, first to last, as items without the instructions."""
    messages = row.input["messages"]
    if row.params["response"]["instructions"] is not None:
        messages = messages[1:]
    items: list[dict[str, Any]] = []
    for number, message in enumerate(messages):
        id = f"{row.id}_in{number}"
        if message["role"] == "assistant":
            text, calls = message.get("content") or "", message.get("tool_calls") or []
            items += output(id, message.get("reasoning_content") or "", text, calls, "completed")
        elif message["role"] == "tool":
            result = {"call_id": message["tool_call_id"], "output": message["content"], "status": "completed"}
            items.append({"id": item_id("fco", id), "type": "function_call_output", **result})
        else:
            content = [{"type": "input_text", "text": message["content"]}]
            about = {"role": message["role"], "status": "completed", "content": content}
            items.append({"id": item_id("msg", id), "type": "message", **about})
    return items


class Events:
    """Makes the events of one response from an answer's pieces, numbered. One item after the other is open."""

    def __init__(self, id: str) -> None:
        self._id = id
        self._number = 0
        self._items: list[dict[str, Any]] = []  # those that are done
        self._kind: str | None = None  # of the open one: reasoning, message or call
        self._text = ""
        self._logprobs: list[dict[str, Any]] = []  # of all text: an answer has one message
        self._call: dict[str, Any] = {}
        self._calls = 0

    def event(self, kind: str, **fields: Any) -> Event:
        self._number += 1
        return {"type": f"response.{kind}", "sequence_number": self._number - 1, **fields}

    def piece(self, piece: Piece) -> Iterator[Event]:
        if piece.reasoning:
            if self._kind != "reasoning":
                yield from self._open("reasoning", reasoning_item(self._id, "", "in_progress"))
                yield self._at("content_part.added", content_index=0, part={"type": "reasoning_text", "text": ""})
            self._text += piece.reasoning
            yield self._at("reasoning_text.delta", content_index=0, delta=piece.reasoning)
        if piece.text or (piece.logprobs and self._kind == "message"):
            yield from self._say(piece.text, piece.logprobs)
        for delta in piece.calls:
            yield from self._add(delta)

    def end(self, status: str) -> Iterator[Event]:
        """What is open ends; an answer without text or calls says an empty one."""
        if not self._calls and self._kind != "message":
            yield from self._say("")
        yield from self._close("completed" if status == "completed" else "incomplete")

    @property
    def _here(self) -> dict[str, Any]:
        kind = {"reasoning": "rs", "message": "msg", "call": "fc"}[self._kind or "message"]
        return {"item_id": item_id(kind, self._id, self._calls - 1), "output_index": len(self._items)}

    def _at(self, kind: str, **fields: Any) -> Event:
        return self.event(kind, **self._here, **fields)

    def _open(self, kind: str, item: dict[str, Any]) -> Iterator[Event]:
        yield from self._close()
        self._kind, self._text = kind, ""
        yield self.event("output_item.added", output_index=len(self._items), item=item)

    def _say(self, text: str, logprobs: Sequence[dict[str, Any]] = ()) -> Iterator[Event]:
        if self._kind != "message":
            yield from self._open("message", message_item(self._id, None, "in_progress"))
            yield self._at("content_part.added", content_index=0, part=text_part(""))
        self._text += text
        self._logprobs += logprobs
        if text or logprobs:
            yield self._at("output_text.delta", content_index=0, delta=text, logprobs=[*logprobs])

    def _add(self, delta: CallDelta) -> Iterator[Event]:
        if self._kind != "call" or delta.index != self._calls - 1:
            self._calls = delta.index + 1
            call = {"id": delta.id or "", "function": {"name": delta.name or "", "arguments": ""}}
            yield from self._close_before(call, delta.index)
        if delta.arguments:
            self._call["function"]["arguments"] += delta.arguments
            yield self._at("function_call_arguments.delta", delta=delta.arguments)

    def _close_before(self, call: dict[str, Any], number: int) -> Iterator[Event]:
        self._calls = number  # of those before, whose last is still open
        yield from self._close()
        self._calls, self._call = number + 1, call
        yield from self._open("call", call_item(self._id, number, call, "in_progress"))

    def _close(self, status: str = "completed") -> Iterator[Event]:
        if self._kind is None:
            return
        if self._kind == "reasoning":
            item = reasoning_item(self._id, self._text, status)
            yield self._at("reasoning_text.done", content_index=0, text=self._text)
            part = {"type": "reasoning_text", "text": self._text}
            yield self._at("content_part.done", content_index=0, part=part)
        elif self._kind == "message":
            item = message_item(self._id, self._text, status, self._logprobs)
            yield self._at("output_text.done", content_index=0, text=self._text, logprobs=self._logprobs)
            yield self._at("content_part.done", content_index=0, part=text_part(self._text, self._logprobs))
        else:
            item = call_item(self._id, self._calls - 1, self._call, status)
            function = self._call["function"]
            yield self._at("function_call_arguments.done", name=function["name"], arguments=function["arguments"])
        yield self.event("output_item.done", output_index=len(self._items), item=item)
        self._items.append(item)
        self._kind = None
