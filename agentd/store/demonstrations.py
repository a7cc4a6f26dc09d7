"""A demonstration that is an assistant's message: text, calls of the request's tools, or both.

An example whose kind is MESSAGE has such a message as its target, in JSON.
"""

import json
from typing import Any

from agentd.errors import InvalidRequest
from agentd.formats.tool_use import tool_use
from agentd.store.normalise import content_text
from agentd.store.row import to_json

MESSAGE = "message"
_FIELDS = {"role", "content", "tool_calls", "reasoning_content", "reasoning", "refusal", "annotations"}
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

    Raises InvalidRequest for one that says nothing, calls what the request did not declare or allow, or lacks arguments
    that are required or has others than are allowed. What is inside of arguments is not looked at.
    """
    message = {name: value for name, value in message.items() if value is not None}
    if unknown := sorted(message.keys() - _FIELDS):
        raise _wrong(f"it has an unknown field {unknown[0]!r}")
    content, calls = _text(message.get("content")), message.get("tool_calls") or []
    if message.get("role", "assistant") != "assistant":
        raise _wrong("its role is assistant")
    if not (content is None or isinstance(content, str)) or not isinstance(calls, list):
        raise _wrong("content is a text, and tool_calls a list")
    if not (content or calls):
        raise _wrong("it says nothing")
    stored: dict[str, Any] = {"role": "assistant", "content": content}
    if calls:
        use = tool_use(input)
        if len(calls) > 1 and not use.parallel:
            raise _wrong(f"it has {len(calls)} calls, and the request said parallel_tool_calls: false")
        allowed = {tool["function"]["name"]: tool["function"] for tool in use.tools}
        stored["tool_calls"] = [_call(call, i, allowed) for i, call in enumerate(calls)]
    return stored


def as_answer(message: dict[str, Any]) -> str | dict[str, Any]:
    """A checked message as an answer to learn: the text alone where it calls nothing."""
    content, calls = message.get("content") or "", message.get("tool_calls")
    return {"role": "assistant", "content": content, "tool_calls": calls} if calls else content


def message_target(message: dict[str, Any]) -> str:
    """A checked message that calls tools as the target of an example."""
    return to_json(as_answer(message))


def _text(content: Any) -> Any:
    """Parts that are all texts as the one text that they are."""
    if isinstance(content, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in content):
        return content_text(content)
    return content


def _call(call: Any, number: int, declared: dict[str, dict[str, Any]]) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise _wrong(f'tool_calls.{number} is {{"type": "function", "function": {{"name", "arguments"}}}}')
    name, arguments = function["name"], function.get("arguments")
    if name not in declared:
        known = ", ".join(declared) or "none"
        raise _wrong(f"tool_calls.{number} calls {name!r}, which the request did not declare; may be called: {known}")
    if arguments in (None, ""):  # how some servers write that there are none
        arguments = "{}"
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError):
            raise _wrong(f"the arguments of tool_calls.{number} are no JSON") from None
    if not isinstance(arguments, dict):
        raise _wrong(f"the arguments of tool_calls.{number} are no JSON object")
    parameters = parameters_of(declared[name])
    check_arguments(arguments, parameters, f"tool_calls.{number}, {name}")
    try:
        ordered = _in_order(arguments, parameters)
        text = json.dumps(ordered, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
        text.encode()
    except (ValueError, RecursionError):  # NaN, half of a surrogate pair, or nested too deeply
        raise _wrong(f"the arguments of tool_calls.{number} cannot be written as JSON") from None
    return {
        "id": f"call_{number}",  # clients' ids do not count: equal calls are equal
        "type": "function",
        "function": {"name": name, "arguments": text},
    }


def parameters_of(function: dict[str, Any]) -> dict[str, Any]:
    """The schema of a declared function's arguments; without any it takes none."""
    parameters = function.get("parameters")
    return {"properties": {}} if parameters is None else parameters


def check_arguments(arguments: dict[str, Any], schema: dict[str, Any], where: str) -> None:
    """Raises InvalidRequest, which names `where`, for arguments that the schema of a tool's parameters forbids."""
    properties = schema.get("properties")
    properties = properties if isinstance(properties, dict) else {}
    required = schema.get("required")
    for name in required if isinstance(required, list) else ():
        if isinstance(name, str) and name not in arguments:
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
    if not isinstance(kind, str) or kind not in _TYPES:
        return True
    if isinstance(value, bool):
        return bool(kind == "boolean")
    return isinstance(value, _TYPES[kind]) or (kind == "integer" and isinstance(value, float) and value.is_integer())


def _wrong(what: str) -> InvalidRequest:
    return InvalidRequest(f"the demonstrated message: {what}", param="value")
