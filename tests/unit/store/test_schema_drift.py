"""Examples whose tools changed since are set aside, named once, and come back with their tools."""

import json
from typing import Any

import pytest

from agentd.store import events, examples, feedback, schema_drift
from agentd.store.database import Store
from agentd.store.feedback import NewFeedback
from tests.support.store_samples import recorded


def request(store: Store, name: str, *parameters: str, text: str = "Do it.", task: str | None = "home") -> str:
    schema = {"type": "object", "properties": {each: {"type": "string"} for each in parameters}}
    tools = [{"type": "function", "function": {"name": name, "parameters": schema}}]
    return store.do(recorded, task=task, input={"messages": [{"role": "user", "content": text}], "tools": tools})


def correct(store: Store, inference: str, name: str, **arguments: str) -> None:
    call: dict[str, Any] = {"type": "function", "function": {"name": name, "arguments": json.dumps(arguments)}}
    store.do(feedback.add, NewFeedback(inference, "demonstration", {"tool_calls": [call]}))


def event_kinds(store: Store) -> list[str]:
    return [event.kind for event in store.do(events.latest, 100) if event.kind.startswith("schema drift")]


def states(store: Store) -> list[str]:
    return sorted(example.state for example in store.do(examples.list_, 10))


@pytest.mark.parametrize("task", ["home", None])
@pytest.mark.parametrize(("tool", "parameters"), [("light_v2", ("room",)), ("light", ("area",))])
def test_what_calls_a_tool_that_is_gone_waits_for_it(
    store: Store, task: str | None, tool: str, parameters: tuple[str, ...]
) -> None:
    correct(store, request(store, "light", "room", task=task), "light", room="hall")
    store.do(feedback.add, NewFeedback(request(store, "light", text="Hm?", task=task), "demonstration", "What?"))
    store.do(schema_drift.review)
    assert (states(store), event_kinds(store)) == (["new", "new"], [])
    for _ in range(60):
        request(store, tool, *parameters, task=task)
    store.do(schema_drift.review)
    store.do(schema_drift.review)
    assert (states(store), event_kinds(store)) == (["new", "stale"], ["schema drift"])
    (event,) = [event for event in store.do(events.latest, 100) if event.kind == "schema drift"]
    assert event.data == {"task": task or "default", "examples": 1, "tools": ["light"]}
    request(store, "light", "room", task=task)
    store.do(schema_drift.review)
    assert (states(store), event_kinds(store)) == (["new", "new"], ["schema drift", "schema drift over"])


def test_answers_that_were_compared_or_judged_wait_for_their_tools_too(store: Store) -> None:
    call = {"id": "c", "type": "function", "function": {"name": "light", "arguments": '{"room":"hall"}'}}
    schema = {"type": "object", "properties": {"room": {"type": "string"}}}
    tools = [{"type": "function", "function": {"name": "light", "parameters": schema}}]

    def said(text: str) -> str:
        input = {"messages": [{"role": "user", "content": text}], "tools": tools}
        return store.do(recorded, task="home", input=input, output="", tool_calls=[call], finish_reason="tool_calls")

    store.do(feedback.add, NewFeedback(said("a"), "boolean", True))
    store.do(feedback.add, NewFeedback(said("b"), "float", 0.2))
    chosen = {"tool_calls": [{"function": {"name": "light", "arguments": '{"room": "bath"}'}}]}
    store.do(feedback.add, NewFeedback(said("c"), "preference", {"chosen": chosen}))
    store.do(feedback.add, NewFeedback(said("d"), "preference", {"chosen": "Which one?"}))
    for _ in range(60):
        request(store, "lamp", "room")
    store.do(schema_drift.review)
    assert states(store) == ["new", "stale", "stale", "stale"]
    said("e")
    store.do(schema_drift.review)
    assert states(store) == ["new"] * 4


def test_requests_of_another_task_or_without_tools_say_nothing(store: Store) -> None:
    correct(store, request(store, "light", "room"), "light", room="hall")
    for _ in range(60):
        request(store, "other", "x", task="garden")
        store.do(recorded, task="home")
    store.do(schema_drift.review)
    assert states(store) == ["new"]
