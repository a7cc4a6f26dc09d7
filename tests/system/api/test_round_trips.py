"""Whatever agentd answers it takes back unchanged, as the history of the next request: any kind of request, in both
APIs."""

import json
from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("hypothesis", reason="Python 3.10 has pins that it does not go with")
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from tests.system.api.test_tools import CHAT, HI, NAMED, TOOLS
from tools.daemon import DaemonProcess

RESPONSES = "/v1/responses"
SCHEMA: dict[str, Any] = {"enum": [1, "two", None, {"three": [3]}]}
# Within seconds on any machine, and the same ones each time: what is found by chance is found by tools/fuzz.
BOUNDED = settings(max_examples=20, deadline=None, derandomize=True, database=None, phases=[Phase.generate])


@pytest.fixture(scope="module")
def daemon() -> Iterator[DaemonProcess]:
    with DaemonProcess(settings={"model": {"context": 4096}}) as process:
        yield process.start()


ASKED = st.fixed_dictionaries(
    {
        "max_tokens": st.integers(1, 60),
        "temperature": st.floats(0, 2, width=16),
        "seed": st.integers(0, 2**31),
        "text": st.text(max_size=20),
        "result": st.text(max_size=20),
    },
    optional={
        "tool_choice": st.sampled_from(["none", "auto", "required", NAMED]),
        "parallel_tool_calls": st.booleans(),
        "schema": st.just(SCHEMA),
        "stop": st.sampled_from(["e", "</", '"']),
    },
)


def named(choice: Any) -> Any:
    """A tool_choice as the Responses API has it."""
    return {"type": "function", **choice["function"]} if isinstance(choice, dict) else choice


@BOUNDED
@given(case=ASKED)
def test_messages(daemon: DaemonProcess, case: dict[str, Any]) -> None:
    text, result, schema = case.pop("text"), case.pop("result"), case.pop("schema", None)
    body: dict[str, Any] = {"tools": TOOLS if "tool_choice" in case else None, **case}
    if schema:
        body["response_format"] = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}
    first = [{"role": "user", "content": text}]
    answer = daemon.post(CHAT, {"messages": first, **body})
    assert answer.status == 200, answer.body[:500]
    message = answer.json["choices"][0]["message"]
    calls = message.get("tool_calls") or ()
    results = [{"role": "tool", "tool_call_id": call["id"], "content": result} for call in calls]
    history = [*first, message, *results, HI]
    again = daemon.post(CHAT, {"messages": history, "tools": TOOLS, "max_tokens": 1})
    assert again.status == 200, (message, again.body[:500])
    stored = daemon.inference(again.json["id"])["input"]["messages"]
    assert stored[1]["content"] == (message["content"] or "")
    assert stored[1].get("tool_calls", []) == message.get("tool_calls", [])
    for call in calls:
        if answer.json["choices"][0]["finish_reason"] == "tool_calls":
            assert isinstance(json.loads(call["function"]["arguments"]), dict)


@BOUNDED
@given(case=ASKED)
def test_items(daemon: DaemonProcess, case: dict[str, Any]) -> None:
    text, result, schema = case.pop("text"), case.pop("result"), case.pop("schema", None)
    case["max_output_tokens"] = case.pop("max_tokens")
    if "tool_choice" in case:
        case["tools"] = [{"type": "function", **tool["function"]} for tool in TOOLS]
        case["tool_choice"] = named(case["tool_choice"])
    if schema:
        case["text"] = {"format": {"type": "json_schema", "name": "n", "schema": schema}}
    first = [{"role": "user", "content": text}]
    answer = daemon.post(RESPONSES, {"input": first, **case})
    assert answer.status == 200, answer.body[:500]
    output = answer.json["output"]
    calls = [item["call_id"] for item in output if item["type"] == "function_call"]
    results = [{"type": "function_call_output", "call_id": id, "output": result} for id in calls]
    sent: dict[str, Any] = {"input": [*first, *output, *results, HI], "max_output_tokens": 1}
    again = daemon.post(RESPONSES, sent)
    assert again.status == 200, (output, again.body[:500])
    chained = daemon.post(RESPONSES, {**sent, "input": [*results, HI], "previous_response_id": answer.json["id"]})
    assert chained.status == 200, (output, chained.body[:500])
    histories = [daemon.inference(each.json["id"])["input"]["messages"] for each in (again, chained)]
    assert histories[0] == histories[1]
