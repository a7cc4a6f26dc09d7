"""Demonstrations that are messages: what is stored of them, and what is refused."""

import json
from typing import Any

import pytest
from sqlite_utils import Database

from agentd.errors import InvalidRequest
from agentd.store import examples, feedback
from agentd.store.database import Store
from agentd.store.demonstrations import checked_message
from agentd.store.feedback import Feedback, NewFeedback
from tests.support.store_samples import recorded

PARAMETERS = {
    "type": "object",
    "properties": {"room": {"type": "string"}, "degrees": {"type": ["number", "null"]}},
    "required": ["room"],
    "additionalProperties": False,
}
TOOLS = [{"type": "function", "function": {"name": "heat", "parameters": PARAMETERS}}]
INPUT = {"messages": [{"role": "user", "content": "warmer"}], "tools": TOOLS}


def calling(name: str = "heat", **arguments: Any) -> dict[str, Any]:
    return {"content": None, "tool_calls": [{"function": {"name": name, "arguments": json.dumps(arguments)}}]}


@pytest.mark.parametrize(
    ("message", "what"),
    [
        (calling("cool", room="bath"), "cool"),
        (calling(degrees=2), "'room' is missing"),
        (calling(room="bath", floor=2), "no argument 'floor'"),
        (calling(room=7), "'room' is no string"),
        (calling(room="bath", degrees="two"), "'degrees' is no number or null"),
        (calling(room="bath", degrees=True), "'degrees' is no number or null"),
        ({"tool_calls": [{"function": {"name": "heat", "arguments": "{"}}]}, "no JSON"),
        ({"tool_calls": [{"function": {"name": "heat", "arguments": "[]"}}]}, "no JSON object"),
        ({"tool_calls": ["heat"]}, "tool_calls.0"),
        ({"role": "user", "content": "x"}, "role"),
        ({"content": ""}, "says nothing"),
        ({"content": "x", "said": "x"}, "said"),
        ({"content": [{"type": "image_url", "image_url": {}}]}, "content is a text"),
        ({"tool_calls": [{"function": {"name": "heat", "arguments": '{"room": "\\ud800"}'}}]}, "as JSON"),
        ({"tool_calls": [{"function": {"name": "heat", "arguments": '{"room": "x", "degrees": NaN}'}}]}, "as JSON"),
        ({"tool_calls": [{"function": {"name": "heat", "arguments": '{"room": "x", "degrees": 1e999}'}}]}, "as JSON"),
    ],
)
def test_what_could_not_have_been_answered_is_refused(message: dict[str, Any], what: str) -> None:
    with pytest.raises(InvalidRequest, match=what):
        checked_message(message, INPUT)


NAMED = {"type": "function", "function": {"name": "open"}}


@pytest.mark.parametrize(
    ("more", "calls", "what"),
    [
        ({"tool_choice": "none"}, 1, "may be called: none"),
        ({"tool_choice": NAMED}, 1, "may be called: open"),
        ({"tool_choice": {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [NAMED]}}}, 1, "open"),
        ({"parallel_tool_calls": False}, 2, "parallel_tool_calls"),
    ],
)
def test_what_the_request_does_not_let_be_called_is_refused(more: dict[str, Any], calls: int, what: str) -> None:
    tools = [*TOOLS, {"type": "function", "function": {"name": "open"}}]
    message = {"tool_calls": calling(room="bath")["tool_calls"] * calls}
    assert checked_message(message, {**INPUT, "tools": tools})
    with pytest.raises(InvalidRequest, match=what):
        checked_message(message, {**INPUT, "tools": tools, **more})


def test_a_message_as_the_client_of_openai_has_it_is_taken() -> None:
    nulls = dict.fromkeys(("refusal", "annotations", "audio", "function_call", "tool_calls"))
    assert checked_message({"role": "assistant", "content": "Hi", **nulls}, INPUT)["content"] == "Hi"
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert checked_message({"content": parts, "annotations": []}, INPUT)["content"] == "a\nb"
    tools = [{"type": "function", "function": {"name": "stop"}}]
    for nothing in ("", None):
        (call,) = checked_message(
            {"tool_calls": [{"function": {"name": "stop", "arguments": nothing}}]}, {**INPUT, "tools": tools}
        )["tool_calls"]
        assert call["function"]["arguments"] == "{}"


def test_a_function_without_parameters_takes_no_arguments() -> None:
    tools = [{"type": "function", "function": {"name": "heat"}}]
    assert checked_message(calling(), {**INPUT, "tools": tools})
    with pytest.raises(InvalidRequest, match="no argument 'room'"):
        checked_message(calling(room="bath"), {**INPUT, "tools": tools})


def test_no_schema_is_too_odd_and_no_argument_too_deep() -> None:
    odd = {"properties": {"room": {"type": [{"a": 1}, "string"]}}, "required": [["room"], 7]}
    tools = [{"type": "function", "function": {"name": "heat", "parameters": odd}}]
    assert checked_message(calling(room="bath"), {**INPUT, "tools": tools})["tool_calls"]
    deep: Any = "bath"
    for _ in range(2000):
        deep = {"x": deep}
    open_ended = [{"type": "function", "function": {"name": "heat", "parameters": {}}}]
    with pytest.raises(InvalidRequest, match="as JSON"):
        checked_message(
            {"tool_calls": [{"function": {"name": "heat", "arguments": {"room": deep}}}]},
            {**INPUT, "tools": open_ended},
        )


def test_calls_with_any_ids_become_an_example(store: Store) -> None:
    def give(db: Database, value: Any) -> Feedback:
        return feedback.add(db, NewFeedback(recorded(db, input=INPUT, episode="e"), "demonstration", value))[0]

    row = store.do(give, calling(room="bath", degrees=21))
    (call,) = row.value["tool_calls"]
    assert (call["type"], json.loads(call["function"]["arguments"])) == ("function", {"room": "bath", "degrees": 21})
    again = calling(room="bath", degrees=21)
    again["tool_calls"][0]["id"] = "another"
    assert store.do(give, again).state == "duplicate"
    (example,) = store.do(examples.list_, 10)
    assert (example.id, example.kind, example.input) == (row.example_id, "message", INPUT)
    target = json.loads(example.target)
    assert target == {"role": "assistant", "content": "", "tool_calls": [{**call, "id": "call_0"}]}
    store.do(give, {"content": "It is warm already."})
    (corrected,) = store.do(examples.list_, 10)
    assert (corrected.id, corrected.kind, corrected.target) == (example.id, "demonstration", "It is warm already.")
