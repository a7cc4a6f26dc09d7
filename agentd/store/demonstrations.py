"""A demonstration that is an assistant's message: text, calls of the request's tools, or both.

An example whose kind is MESSAGE has such a message as its target, in JSON.
"""

import json
from typing import Any

from agentd.errors import InvalidRequest
from agentd.store.row import to_json

MESSAGE = "message"
_FIELDS = {"role", "content", "tool_calls", "reasoning_content", "refusal"}
_OPEN = ("additionalProperties", "patternProperties", "allOf", "anyOf", "oneOf", "$ref")
"""What lets an object have other properties than it names; without it answers are held to those."""
_TYPES: dict[str, tuple[type, ...]] = {
    "string": (str,),
    "boolean": (bool,),
    "array": (list,),
    "object": (dict,),
    "null": (type(None),),
    "integer": (int,),
    "number": (int, float),
}


def checked_message(message: dict[str, Any], input: dict[str, Any]) -> dict[str, Any]:
    """The message as it is stored: role, content and calls. `input` is that of the request.

    Raises InvalidRequest for one that says nothing, calls what the request did not declare, or lacks arguments that
    are required or has others than are allowed. What is inside of arguments is not looked at.
    """
    if unknown := sorted(message.keys() - _FIELDS):
        raise _wrong(f"it has an unknown field {unknown[0]!r}")
    content, calls = message.get("content"), message.get("tool_calls") or []
    if message.get("role", "assistant") != "assistant":
        raise _wrong("its role is assistant")
    if not (content is None or isinstance(content, str)) or not isinstance(calls, list):
        raise _wrong("content is a text, and tool_calls a list")
    if not (content or calls):
        raise _wrong("it says nothing")
    declared = {tool["function"]["name"]: tool["function"] for tool in input.get("tools", ())}
    stored: dict[str, Any] = {"role": "assistant", "content": content}
    if calls:
        stored["tool_calls"] = [_call(call, i, declared) for i, call in enumerate(calls)]
    return stored


def as_answer(message: dict[str, Any]) -> str | dict[str, Any]:
    """A checked message as an answer to learn: the text alone where it calls nothing."""
    content, calls = message.get("content") or "", message.get("tool_calls")
    return {"role": "assistant", "content": content, "tool_calls": calls} if calls else content


def message_target(message: dict[str, Any]) -> str:
    """A checked message that calls tools as the target of an example."""
    return to_json(as_answer(message))


def _call(call: Any, number: int, declared: dict[str, dict[str, Any]]) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise _wrong(f'tool_calls.{number} is {{"type": "function", "function": {{"name", "arguments"}}}}')
    name, arguments = function["name"], function.get("arguments", "{}")
    if name not in declared:
        known = ", ".join(declared) or "none"
        raise _wrong(f"tool_calls.{number} calls {name!r}, which the request did not declare; its tools: {known}")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError):
            raise _wrong(f"the arguments of tool_calls.{number} are no JSON") from None
    if not isinstance(arguments, dict):
        raise _wrong(f"the arguments of tool_calls.{number} are no JSON object")
    parameters = declared[name].get("parameters") or {}
    check_arguments(arguments, parameters, f"tool_calls.{number}, {name}")
    text = json.dumps(_in_order(arguments, parameters), ensure_ascii=False, separators=(",", ":"))
    return {
        "id": f"call_{number}",  # clients' ids do not count: equal calls are equal
        "type": "function",
        "function": {"name": name, "arguments": text},
    }


def check_arguments(arguments: dict[str, Any], schema: dict[str, Any], where: str) -> None:
    """Raises InvalidRequest, which names `where`, for arguments that the schema of a tool's parameters forbids."""
    properties = schema.get("properties")
    properties = properties if isinstance(properties, dict) else {}
    required = schema.get("required")
    for name in required if isinstance(required, list) else ():
        if name not in arguments:
            raise _wrong(f"{where}: argument {name!r} is missing")
    for name, value in arguments.items():
        if name not in properties:
            closed = "properties" in schema and not any(keyword in schema for keyword in _OPEN)
            if closed or schema.get("additionalProperties") is False:
                raise _wrong(f"{where}: the tool's parameters declare no argument {name!r}")
            continue
        kind = properties[name].get("type") if isinstance(properties[name], dict) else None
        kinds = [kind] if isinstance(kind, str) else kind if isinstance(kind, list) else []
        if kinds and not any(_is(value, each) for each in kinds):
            raise _wrong(f"{where}: argument {name!r} is no {' or '.join(map(str, kinds))}")


def _in_order(value: Any, schema: Any) -> Any:
    """The value with the properties of its objects in the order of the schema, in which answers have them."""
    if not isinstance(schema, dict):
        return value
    if isinstance(value, list):
        return [_in_order(each, schema.get("items")) for each in value]
    if not isinstance(value, dict):
        return value
    properties = schema.get("properties")
    properties = properties if isinstance(properties, dict) else {}
    names = [*(name for name in properties if name in value), *(name for name in value if name not in properties)]
    return {name: _in_order(value[name], properties.get(name)) for name in names}


def _is(value: Any, kind: Any) -> bool:
    if kind not in _TYPES:
        return True
    if isinstance(value, bool):
        return bool(kind == "boolean")
    return isinstance(value, _TYPES[kind]) or (kind == "integer" and isinstance(value, float) and value.is_integer())


def _wrong(what: str) -> InvalidRequest:
    return InvalidRequest(f"the demonstrated message: {what}", param="value")
