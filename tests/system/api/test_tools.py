"""Calls of tools through a real daemon with the tiny model, which says what constraints let it: valid calls, streamed
and not, and bad input refused by its field; test_round_trips.py has what is taken back."""

import json
from collections.abc import Iterator
from typing import Any

import pytest

from tools.daemon import DaemonProcess

CHAT = "/v1/chat/completions"
HI = {"role": "user", "content": "hi"}
WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 4}, "days": {"type": "integer", "maximum": 9}},
            "required": ["city"],
        },
    },
}
NOTHING: dict[str, Any] = {"type": "function", "function": {"name": "nothing"}}
TOOLS = [WEATHER, NOTHING]
NAMED = {"type": "function", "function": {"name": "get_weather"}}


@pytest.fixture(scope="module")
def daemon() -> Iterator[DaemonProcess]:
    with DaemonProcess(settings={"model": {"context": 4096}}) as process:
        process.start()
        yield process


def ask(daemon: DaemonProcess, *messages: dict[str, Any], **fields: Any) -> dict[str, Any]:
    body = {"messages": list(messages) or [HI], "tools": TOOLS, "temperature": 1, "max_tokens": 600, **fields}
    answer = daemon.post(CHAT, body)
    assert answer.status == 200, answer.body[:500]
    choice: dict[str, Any] = answer.json["choices"][0]
    return choice


def valid(call: dict[str, Any]) -> bool:
    arguments = json.loads(call["function"]["arguments"])
    if call["function"]["name"] == "nothing":
        return bool(arguments == {})
    return (
        call["function"]["name"] == "get_weather" and len(arguments.pop("city")) <= 4 and arguments.keys() <= {"days"}
    )


@pytest.mark.parametrize("seed", range(4))
def test_a_required_call_is_a_valid_one(daemon: DaemonProcess, seed: int) -> None:
    choice = ask(daemon, tool_choice="required", seed=seed)
    message = choice["message"]
    assert message["content"] is None
    assert message["tool_calls"]
    if choice["finish_reason"] == "tool_calls":
        assert all(map(valid, message["tool_calls"]))
        assert len({call["id"] for call in message["tool_calls"]}) == len(message["tool_calls"])
    one = ask(daemon, tool_choice="required", seed=seed, parallel_tool_calls=False)
    assert (one["finish_reason"], len(one["message"]["tool_calls"])) == ("tool_calls", 1)
    named = ask(daemon, tool_choice=NAMED, seed=seed, parallel_tool_calls=False)
    assert [call["function"]["name"] for call in named["message"]["tool_calls"]] == ["get_weather"]


def test_a_stream_says_the_same(daemon: DaemonProcess) -> None:
    whole = ask(daemon, tool_choice="required", seed=7)["message"]["tool_calls"]
    body = {"messages": [HI], "tools": TOOLS, "temperature": 1, "max_tokens": 600, "seed": 7, "stream": True}
    answer = daemon.post(CHAT, {**body, "tool_choice": "required"})
    lines = [line.removeprefix("data: ") for line in answer.body.decode().split("\n\n") if line]
    chunks = [json.loads(line)["choices"][0] for line in lines[:-1]]
    calls: list[dict[str, str]] = []
    for chunk in chunks:
        for delta in chunk["delta"].get("tool_calls", []):
            if delta["index"] == len(calls):
                assert delta["type"] == "function"
                assert delta["id"]
                calls.append({"name": delta["function"]["name"], "arguments": ""})
            else:
                assert "id" not in delta
                assert "name" not in delta["function"]
            calls[delta["index"]]["arguments"] += delta["function"]["arguments"]
    assert calls == [call["function"] for call in whole]
    assert chunks[-1]["delta"] == {}
    assert chunks[-1]["finish_reason"] in ("tool_calls", "length")
    assert all(chunk["delta"] for chunk in chunks[:-1])  # a call's opening says nothing


def test_functions_are_answered_as_they_were_before_tools(daemon: DaemonProcess) -> None:
    """Whole and streamed, and taken back; the record has it as tools."""
    fields = {"functions": [WEATHER["function"]], "function_call": {"name": "get_weather"}, "seed": 3}
    body = {"messages": [HI], "temperature": 1, "max_tokens": 600, **fields}
    answer = daemon.post(CHAT, body).json
    choice = answer["choices"][0]
    call = choice["message"]["function_call"]
    assert choice["finish_reason"] == "function_call"
    assert valid({"function": dict(call)})
    assert "tool_calls" not in choice["message"]
    assert daemon.inference(answer["id"])["tool_calls"][0]["function"] == call
    lines = [
        line.removeprefix("data: ") for line in daemon.post(CHAT, {**body, "stream": True}).body.decode().split("\n\n")
    ]
    chunks = [json.loads(line)["choices"][0] for line in lines if line.startswith("{")]
    deltas = [chunk["delta"]["function_call"] for chunk in chunks if "function_call" in chunk["delta"]]
    assert "".join(delta["arguments"] for delta in deltas) == call["arguments"]
    assert [delta["name"] for delta in deltas if "name" in delta] == ["get_weather"]
    assert chunks[-1]["finish_reason"] == "function_call"
    result = {"role": "function", "name": "get_weather", "content": "rain"}
    again = daemon.post(CHAT, {**body, "messages": [HI, choice["message"], result], "function_call": "none"})
    assert again.json["choices"][0]["finish_reason"] in ("stop", "length")


def test_where_no_call_may_follow_the_choices_of_the_task_hold(daemon: DaemonProcess) -> None:
    choice = ask(daemon, tool_choice="none", metadata={"task": "reviews"})
    assert choice["message"]["content"] in ("yes", "no")


def test_the_input_is_recorded_as_it_was_sent(daemon: DaemonProcess) -> None:
    body = {"messages": [HI], "tools": TOOLS, "tool_choice": NAMED, "max_tokens": 5}
    recorded = daemon.inference(daemon.post(CHAT, body).json["id"])
    assert recorded["input"] == {"messages": [HI], "tools": TOOLS, "tool_choice": NAMED}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [WEATHER, WEATHER]}, "tools"),
        ({"tool_choice": {"type": "function", "function": {"name": "other"}}}, "tool_choice"),
        ({"tools": [], "tool_choice": "required"}, "tool_choice"),
        ({"parameters": {"type": "strin"}}, "tools"),
        ({"parameters": {"type": "object", "properties": {"a": {"type": "strin"}}}}, "tools"),
        ({"parameters": {"type": "object", "properties": 7}}, "tools"),
        ({"parameters": {"type": "object", "properties": {"a": {"pattern": "("}}}}, "tools"),
        ({"messages": [HI, {"role": "tool", "tool_call_id": "c", "content": "x"}]}, "messages"),
    ],
)
def test_bad_input_is_refused_by_its_field(daemon: DaemonProcess, fields: dict[str, Any], param: str) -> None:
    if "parameters" in fields:
        bad = {"type": "function", "function": {"name": "the_bad_one", "parameters": fields["parameters"]}}
        fields = {"tools": [*TOOLS, bad]}
    answer = daemon.post(CHAT, {"messages": [HI], "tools": TOOLS, "max_tokens": 5, **fields})
    assert (answer.status, answer.error["param"]) == (400, param), answer.body[:300]
    assert ("the_bad_one" in answer.error["message"]) == ("the_bad_one" in str(fields))
    assert "start:" not in answer.error["message"]  # the grammar that was made of it is no one's business
