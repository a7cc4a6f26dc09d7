"""What makes an answer right: the metrics of tasks. Pure.

accuracy  of choices: the likeliest one is the right one; by log-likelihoods, nothing is generated
exact     the text is the right one, and so are the calls
call      the calls are the right ones, names and arguments; where none is right, none was made, with any text
json      the share of fields that are right; an answer is right where all are
loss      of the right text, which has no right or wrong
"""

import json
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

GENERATED = ("exact", "call", "json")
"""Metrics for which holdout is answered as it would be served."""

_ABSENT = object()


def resolved(metric: str, *, choices: bool, calls: bool) -> str:
    """The metric of a task whose declaration says `auto`: by whether it has choices, and examples with calls."""
    if metric != "auto":
        return metric
    return "accuracy" if choices else "call" if calls else "loss"


def share_right(metric: str, text: str, calls: Sequence[Mapping[str, Any]], target: str | Mapping[str, Any]) -> float:
    """How much of an answer is right, from 0 to 1, by one of GENERATED; all of it only at 1.

    calls   as the OpenAI API has them
    target  the right text, or the right message of the assistant
    """
    right_text = target if isinstance(target, str) else str(target.get("content") or "")
    right_calls = [] if isinstance(target, str) else list(target.get("tool_calls") or ())
    try:
        if metric == "call":
            return float(same_calls(calls, right_calls))
        if metric == "exact":
            return float(_plain(text) == _plain(right_text) and same_calls(calls, right_calls))
        if metric == "json":
            if right_calls or calls:
                return fields_right([_call(call) for call in calls], [_call(call) for call in right_calls])
            return fields_right(_parsed(text), _parsed(right_text))
    except RecursionError:  # models say anything
        return 0.0
    raise ValueError(f"{metric} is not judged by answers")


def same_calls(calls: Sequence[Mapping[str, Any]], right: Sequence[Mapping[str, Any]]) -> bool:
    """Whether these are the same calls. Several in one message may run at the same time: their order says nothing."""
    return sorted(map(_key, calls)) == sorted(map(_key, right))


def fields_right(value: Any, right: Any) -> float:
    """The share of leaves that are right, of all that either value has; 0 for what is no JSON."""
    if value is _ABSENT or right is _ABSENT:
        return 0.0
    leaves, right_leaves = dict(_leaves(value)), dict(_leaves(right))
    paths = leaves.keys() | right_leaves.keys()
    return sum(leaves.get(path, _ABSENT) == right_leaves.get(path, _ABSENT) for path in paths) / len(paths)


def _call(call: Mapping[str, Any]) -> dict[str, Any]:
    function = call["function"]
    arguments = _parsed(function.get("arguments") or "{}")
    return {"name": function["name"], "arguments": function["arguments"] if arguments is _ABSENT else arguments}


def _key(call: Mapping[str, Any]) -> str:
    return json.dumps(list(_leaves(_call(call))))


def _leaves(value: Any, path: str = "") -> list[tuple[str, str]]:
    """The paths and leaves of a JSON value in an order that does not depend on that of keys. 1 and 1.0 are one number,
    and texts are compared in NFC."""
    if isinstance(value, dict) and value:
        named = {unicodedata.normalize("NFC", str(name)): each for name, each in value.items()}
        return [leaf for name in sorted(named) for leaf in _leaves(named[name], f"{path}/{json.dumps(name)}")]
    if isinstance(value, list) and value:
        return [leaf for i, each in enumerate(value) for leaf in _leaves(each, f"{path}/{i}")]
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, str):
        value = unicodedata.normalize("NFC", value)
    return [(path, json.dumps(value))]


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return _ABSENT


def _plain(text: str) -> str:
    return unicodedata.normalize("NFC", text).strip()
