"""What the next request says about the answer before it."""

import json
import time
from typing import Any

import pytest

from agentd.store import examples, feedback, implicit
from agentd.store.database import Store
from tests.support.store_samples import recorded

CALL = {"id": "call_7", "type": "function", "function": {"name": "light", "arguments": '{"room":"hall"}'}}
TOOL = {"type": "function", "function": {"name": "light", "parameters": {"properties": {"room": {"type": "string"}}}}}
ASKED = [{"role": "user", "content": "Put the light on in the hall."}]


@pytest.fixture
def called(store: Store) -> str:
    input = {"messages": ASKED, "tools": [TOOL]}
    return store.do(recorded, input=input, output="", tool_calls=[CALL], finish_reason="tool_calls", author="uid:1")


def observe(store: Store, messages: list[dict[str, Any]], author: str = "uid:1") -> int:
    return store.do(implicit.observe, {"messages": messages, "tools": [TOOL]}, author, {"implicit": 0.25})


def result(content: Any, id: str = "call_7") -> list[dict[str, Any]]:
    return [
        *ASKED,
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": id, "content": content},
    ]


@pytest.mark.parametrize(
    "content",
    [
        '{"error": "no such room"}',
        '{"status": "error"}',
        '{"is_error": true, "text": "?"}',
        "Error: no room hall",
        "An error occurred while running the tool",
        "ValueError: hall",
        [{"type": "text", "text": "Error: no room hall"}],
    ],
)
def test_a_call_that_its_tool_refused(store: Store, called: str, content: Any) -> None:
    assert observe(store, result(content)) == 1
    assert observe(store, result(content)) == 0  # the same conversation, sent again
    (row,) = store.do(feedback.list_, 10)
    assert (row.inference_id, row.value, row.source, row.tags) == (called, False, "implicit", {"sign": "tool error"})
    (example,) = store.do(examples.list_, 10)
    assert (example.kind, example.weight, json.loads(example.target)["good"]) == ("thumb", 0.25, False)


@pytest.mark.parametrize(
    "content",
    [
        '{"ok": true}',
        '{"error": null}',
        "The light is on.",
        "No errors.",
        "[1, 2]",
        '{"error": "timed out"}',
        "Error: connection refused",
        "HTTPError: 503",
        '{"error": "rate limit reached"}',
    ],
)
def test_what_worked_and_what_the_environment_did_teach_nothing(store: Store, called: str, content: str) -> None:
    assert observe(store, result(content)) == 0
    assert store.do(feedback.list_, 10) == []


def test_calls_of_others_and_results_that_were_answered_since(store: Store, called: str) -> None:
    assert observe(store, result("Error: no room", id="call_8")) == 0
    assert observe(store, result("Error: no room"), author="uid:2") == 0
    assert observe(store, [*result("Error: no room"), {"role": "assistant", "content": "Sorry."}]) == 0


@pytest.mark.parametrize(
    ("again", "n"),
    [
        ("Put on the light in the hall!", 1),
        ("Put the light on in the hall, please.", 1),
        ("Thanks. What time is it in Lima?", 0),
        ("Hm?", 0),
    ],
)
def test_a_question_that_is_asked_again(store: Store, again: str, n: int) -> None:
    store.do(recorded, input={"messages": ASKED}, output="It is dark.", author="uid:1")
    messages = [*ASKED, {"role": "assistant", "content": "It is dark."}, {"role": "user", "content": again}]
    assert observe(store, messages) == n


def test_labels_are_not_told_in_this_way(store: Store) -> None:
    labelled = store.do(recorded, text="x", task="t")
    store.do(feedback.add, feedback.NewFeedback(labelled, "label", "no", choices=["yes", "no"]))
    store.do(recorded, task="t", input={"messages": ASKED}, output="yes", author="uid:1")
    asked = [*ASKED, {"role": "assistant", "content": "yes"}, ASKED[0]]
    assert observe(store, asked) == 0


def test_a_question_of_several_sentences_is_recognised(store: Store) -> None:
    first = "Put the light on in the hall. " * 9
    store.do(recorded, input={"messages": [{"role": "user", "content": first}]}, output="It is dark.", author="uid:1")
    said = [{"role": "user", "content": first}, {"role": "assistant", "content": "It is dark."}]
    assert observe(store, [*said, {"role": "user", "content": f"Please: {first}"}]) == 1


def test_what_is_long_holds_no_request_up(store: Store, called: str) -> None:
    first, again = ({"role": "user", "content": f"{'ab' * 10_000} {n}"} for n in range(2))
    store.do(recorded, input={"messages": [first]}, output="Yes.", author="uid:1")
    begin = time.monotonic()
    assert observe(store, [first, {"role": "assistant", "content": "Yes."}, again]) == 0
    assert observe(store, result("Error: " + "no room " * 100_000)) == 0
    assert time.monotonic() - begin < 2
