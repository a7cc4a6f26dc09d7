import json
from typing import Any

import pytest

from agentd.learn.metrics import resolved, share_right


def call(name: str, arguments: Any, id: str = "x") -> dict[str, Any]:
    text = arguments if isinstance(arguments, str) else json.dumps(arguments)
    return {"id": id, "type": "function", "function": {"name": name, "arguments": text}}


def message(*calls: dict[str, Any], content: str | None = None) -> dict[str, Any]:
    return {"role": "assistant", "content": content, "tool_calls": list(calls)}


def by_calls(calls: list[dict[str, Any]], target: Any) -> float:
    return share_right("call", "", calls, target)


ON = call("on", {"room": "hall", "level": 1})


@pytest.mark.parametrize(
    ("calls", "right"),
    [
        ([call("on", '{"level": 1.0,\n "room":"hall"}', "other")], True),
        ([call("on", {"room": "hall"})], False),
        ([call("on", {"room": "Hall", "level": 1})], False),
        ([call("on", {"room": "hall", "level": True})], False),
        ([call("on", {"room": "hall", "level": "1"})], False),
        ([call("off", {"room": "hall", "level": 1})], False),
        ([ON, ON], False),
        ([], False),
        ([call("on", '{"room": "hall", "lev')], False),
    ],
)
def test_calls_are_equal_as_json(calls: list[dict[str, Any]], right: bool) -> None:
    assert by_calls(calls, message(ON)) == right


def test_several_calls_have_no_order() -> None:
    off = call("off", {})
    assert by_calls([off, ON], message(ON, off)) == 1
    assert by_calls([ON, ON], message(ON, off)) == 0
    assert by_calls([call("off", "")], message(off)) == 1


def test_nested_arguments_keep_the_order_of_lists() -> None:
    nested = message(call("f", {"a": [1, {"b": None}], "é": []}))
    assert by_calls([call("f", {"e\u0301": [], "a": [1, {"b": None}]})], nested) == 1
    assert by_calls([call("f", {"é": [], "a": [{"b": None}, 1]})], nested) == 0
    assert by_calls([call("f", {"é": {}, "a": [1, {"b": None}]})], nested) == 0


def test_where_no_call_is_right_none_is_to_be_made() -> None:
    assert share_right("call", "Whatever it says.", [], "Hello!") == 1
    assert by_calls([ON], "Hello!") == 0


def test_exact_text() -> None:
    assert share_right("exact", " caf\u0065\u0301\n", [], "café") == 1
    assert share_right("exact", "Café", [], "café") == 0
    assert share_right("exact", "café", [ON], "café") == 0
    assert share_right("exact", "", [ON], message(ON)) == 1
    assert share_right("exact", "So:", [ON], message(ON)) == 0


def test_fields_of_json() -> None:
    right = '{"name": "Ann", "age": 30, "tags": ["a", "b"]}'
    assert share_right("json", ' {"tags":["a","b"],"age":30.0,"name":"Ann"}', [], right) == 1
    assert share_right("json", '{"name": "Ann", "age": 31, "tags": ["a", "b"]}', [], right) == 0.75
    assert share_right("json", '{"name": "Ann", "more": 1}', [], right) == 1 / 5
    assert share_right("json", '{"name": "Ann"', [], right) == 0
    assert share_right("json", "{}", [], "{}") == 1
    assert share_right("json", "", [call("on", {"room": "hall", "level": 2})], message(ON)) == pytest.approx(2 / 3)


def test_an_undeclared_metric_follows_from_the_examples() -> None:
    assert resolved("auto", choices=True, calls=False) == "accuracy"
    assert resolved("auto", choices=False, calls=True) == "call"
    assert resolved("auto", choices=False, calls=False) == "loss"
    assert resolved("loss", choices=False, calls=True) == "loss"


@pytest.mark.parametrize("metric", ["json", "call"])
def test_what_is_nested_too_deeply_is_wrong(metric: str) -> None:
    deep = '{"x": ' * 900 + "1" + "}" * 900
    call = {"function": {"name": "f", "arguments": deep}}
    assert share_right(metric, deep, [call], "{}") == 0.0
