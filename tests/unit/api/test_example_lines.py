"""Lines of POST /v1/examples, as other tools write them."""

import json
from typing import Any

import pytest

from agentd.api import examples
from agentd.api.requests import validate
from agentd.api.schemas import ExampleLine
from agentd.ctl.feedback import _line
from agentd.errors import InvalidLine
from agentd.store.imports import prepare


def parsed(*lines: dict[str, Any]) -> list[Any]:
    return examples._parse_lines("\n".join(map(json.dumps, lines)).encode(), {}, None, None)


def test_what_a_row_of_a_table_has_not_is_null() -> None:
    row = dict.fromkeys(ExampleLine.model_fields)
    given = {**row, "prompt": [{"role": "user", "content": "hi"}], "completion": "Hello!"}
    line = validate(json.dumps(given).encode(), ExampleLine)
    assert line == validate(b'{"messages": [{"role": "user", "content": "hi"}], "completion": "Hello!"}', ExampleLine)


def test_a_conversation_is_an_example_for_each_answer_as_long_as_these_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    turn = [{"role": "user", "content": "And then?"}, {"role": "assistant", "content": "More."}]
    assert len(parsed({"messages": turn * 20})) == 20
    monkeypatch.setattr(examples, "_UNFOLDED", 100_000)
    assert len(parsed({"messages": turn * 20})) == 20
    with pytest.raises(InvalidLine, match="line 2: every answer") as error:
        parsed({"messages": turn * 20}, {"messages": turn * 200})
    assert error.value.number == 2


def test_a_line_is_no_longer_than_a_request() -> None:
    """One of megabytes keeps all of the daemon waiting while it is searched, and no request could ask it anyway."""
    line = json.dumps({"text": "word " * 50, "label": "a"}).encode()
    assert len(examples._parse_lines(line, {}, None, None, longest=len(line))) == 1
    with pytest.raises(InvalidLine, match="line 2: it is longer than"):
        examples._parse_lines(line + b"\n" + line.replace(b"word", b"words"), {}, None, None, longest=len(line))


@pytest.mark.parametrize(
    "blank",
    [{"completion": " "}, {"chosen": " ", "rejected": "x"}, {"completion": [{"role": "assistant", "content": " "}]}],
)
def test_an_answer_has_something_to_read_in_whichever_line_it_stands(blank: dict[str, Any]) -> None:
    with pytest.raises(InvalidLine, match=r"line 2: .*something to read"):
        prepare(parsed({"text": "one", "completion": "fine"}, {"text": "two", **blank}))


def test_a_number_is_no_label() -> None:
    with pytest.raises(InvalidLine, match="label: Input should be a valid string"):
        parsed({"text": "one", "label": 5})


@pytest.mark.parametrize("nothing", [{}, {"arguments": None}, {"arguments": ""}, {"arguments": {}}])
def test_a_call_without_arguments_is_one_however_it_is_written(nothing: dict[str, Any]) -> None:
    called = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "stop", **nothing}}]}
    (example,) = parsed({"messages": [{"role": "user", "content": "Stop."}, called], "tools": [{"name": "stop"}]})
    assert json.loads(example.target)["tool_calls"][0]["function"] == {"name": "stop", "arguments": "{}"}


@pytest.mark.parametrize("input", [{"messages": [{"role": "user", "content": "hi"}]}, {"prompt": "hi"}])
@pytest.mark.parametrize("form", [{"grammar": 'root ::= "a"'}, {"response_format": {"type": "json_object"}}])
@pytest.mark.parametrize(("kind", "target"), [("demonstration", "a"), ("thumb", '{"answer":"a","good":true}')])
def test_what_is_exported_comes_in_again(input: dict[str, Any], form: dict[str, Any], kind: str, target: str) -> None:
    asked = {**input, **form}
    (example,) = parsed(_line({"task": "t", "kind": kind, "input": asked, "target": target}))
    assert (example.input, example.kind, example.target) == (asked, kind, target)


def test_a_file_from_before_there_were_tools() -> None:
    """OpenAI's fine-tuning format of then: functions, and calls and results by their names."""
    asked = {"role": "user", "content": "Stop."}
    called = {"role": "assistant", "content": None, "function_call": {"name": "stop", "arguments": "{}"}}
    done = {"role": "function", "name": "stop", "content": "stopped"}
    line = {
        "messages": [asked, called, done, {"role": "assistant", "content": "Done."}],
        "functions": [{"name": "stop"}],
    }
    call, answer = parsed(line)
    function = {"name": "stop", "arguments": "{}"}
    assert json.loads(call.target)["tool_calls"][0]["function"] == function
    assert call.input["tools"] == [{"type": "function", "function": {"name": "stop"}}]
    assert (answer.kind, answer.target) == ("demonstration", "Done.")
    assert [message["role"] for message in answer.input["messages"]] == ["user", "assistant", "tool"]
    (alone,) = parsed({"messages": [asked], "completion": called, "functions": [{"name": "stop"}]})
    assert json.loads(alone.target)["tool_calls"][0]["function"] == function
