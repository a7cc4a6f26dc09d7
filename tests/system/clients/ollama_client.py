"""ollama: its client from PyPI, which speaks to the same daemon in Ollama's API."""

import json
from collections.abc import Mapping
from typing import Any

import httpx
import ollama

from tests.system.clients.openai_client import TOOLS
from tests.system.clients.support import MODEL, QUESTION, RESULT, Colour, Place, warmth

SHORT = {"num_predict": 6, "temperature": 0}
ASKED: list[dict[str, Any]] = [{"role": "user", "content": QUESTION}]


class Adding(httpx.BaseTransport):
    """Puts fields into requests: Ollama's API has no tool_choice, and a random model calls nothing by itself."""

    def __init__(self, inner: httpx.BaseTransport, fields: Mapping[str, Any]) -> None:
        self._inner, self._fields = inner, fields

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        body = json.dumps({**json.loads(request.read()), **self._fields}).encode()
        headers = {**request.headers, "content-length": str(len(body))}
        return self._inner.handle_request(httpx.Request(request.method, request.url, headers=headers, content=body))

    def close(self) -> None:
        self._inner.close()


class Ollama:
    def plain(self, place: Place) -> None:
        with client(place) as server:
            answer = server.chat(MODEL, ASKED, options=SHORT)
        assert answer.done_reason == "length"
        assert (answer.eval_count, answer.message.role) == (6, "assistant")
        assert answer.total_duration
        assert answer.prompt_eval_duration
        assert answer.total_duration >= answer.prompt_eval_duration + (answer.eval_duration or 0) > 0

    def stream(self, place: Place) -> None:
        with client(place) as server:
            parts = list(server.chat(f"{MODEL}:latest", ASKED, stream=True, options=SHORT))
            whole = server.chat(f"{MODEL}:latest", ASKED, options={**SHORT, "seed": 1})
            again = list(server.chat(f"{MODEL}:latest", ASKED, stream=True, options={**SHORT, "seed": 1}))
        assert [part.done for part in parts] == [False] * (len(parts) - 1) + [True]
        assert "".join(part.message.content or "" for part in again) == whole.message.content

    def tools(self, place: Place) -> None:
        """With a function, as the client makes a tool of it, whole and streamed; then its result, and an answer. For
        the call its parameters are said more closely than that: a random model would not come to an end."""
        for streamed in (False, True):
            messages: list[Any] = list(ASKED)
            with client(place, tools=TOOLS, tool_choice="required", parallel_tool_calls=False) as server:
                if streamed:
                    parts = list(server.chat(MODEL, messages, tools=[warmth], stream=True, options={"temperature": 0}))
                    (message,) = [part.message for part in parts if part.message.tool_calls]
                    assert parts[-1].done_reason == "stop"
                else:
                    message = server.chat(MODEL, messages, tools=[warmth], options={"temperature": 0}).message
                (call,) = message.tool_calls or []
            assert call.function.name == "warmth"
            assert call.function.arguments["room"] in ("bath", "kitchen")
            result = warmth(**call.function.arguments)
            messages += [message, {"role": "tool", "content": result, "tool_name": call.function.name}]
            with client(place, tool_choice="none") as server:
                server.chat(MODEL, messages, tools=[warmth], options=SHORT)
            assert result == RESULT
            place.looped()
            (tool,) = place.seen()["input"]["tools"]
            assert tool["function"]["description"] == "How warm a room is."

    def structured(self, place: Place) -> None:
        with client(place) as server:
            options = {"temperature": 0, "num_predict": 200}
            answer = server.chat(MODEL, ASKED, format=Colour.model_json_schema(), options=options)
            Colour.model_validate_json(answer.message.content or "")
            generated = server.generate(MODEL, QUESTION, format=Colour.model_json_schema(), options=options)
            Colour.model_validate_json(generated.response or "")

    def turns(self, place: Place) -> None:
        messages: list[Any] = list(ASKED)
        with client(place) as server:
            for _ in range(3):
                answer = server.chat(MODEL, messages, options=SHORT)
                messages += [answer.message, {"role": "user", "content": "And then?"}]
        assert len(place.seen()["input"]["messages"]) == 5


def client(place: Place, **fields: Any) -> ollama.Client:
    """The stock client; over the socket its HTTP library is told so. `fields` are added to its requests."""
    inner = httpx.HTTPTransport(uds=str(place.daemon.api) if place.over == "socket" else None)
    headers = {"Authorization": f"Bearer {place.key}"}
    host = place.url.removesuffix("/v1")
    return ollama.Client(host, transport=Adding(inner, fields) if fields else inner, headers=headers)
