"""One format of calls for templates that have none: tools as JSON in the system message, calls and results as text."""

import json
from collections.abc import Sequence
from typing import Any

from agentd.engine.calls.format import CallFormat, JsonArguments

_OPENING, _MIDDLE, _CLOSING = '<tool_call>\n{"name": "', '", "arguments": ', "}\n</tool_call>"

GENERIC = CallFormat(
    opening=(_OPENING,),
    later=("\n" + _OPENING,),
    arguments=JsonArguments((_MIDDLE,)),
    gap=(f"{_CLOSING}\n{_OPENING}",),
    closing=(_CLOSING,),
    trigger="<tool_call>",
    origin="generic",
)

_EXPLANATION = """# Tools

These functions can be called, one JSON object a line:

<tools>
{tools}
</tools>

To call one, answer with its name and its arguments as a JSON object, between tags:

<tool_call>
{{"name": "NAME", "arguments": {{...}}}}
</tool_call>"""


def explained(messages: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Messages that say which tools there are, in the system message. Calls and results are text in them."""
    turns = _results_joined(messages)
    if not tools:
        return turns
    lines = "\n".join(json.dumps(tool["function"], ensure_ascii=False) for tool in tools)
    text = _EXPLANATION.format(tools=lines)
    if not turns or turns[0]["role"] != "system":
        return [{"role": "system", "content": text}, *turns]
    return [{**turns[0], "content": f"{turns[0]['content']}\n\n{text}"}, *turns[1:]]


def _results_joined(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Messages with calls and results as text; what the user says behind results is one message with them, because
    many templates want users and assistants to take turns."""
    joined: list[dict[str, Any]] = []
    for before, message in zip([{"role": ""}, *messages], messages, strict=False):
        plain = spelled_out(message)
        if before["role"] == "tool" and plain["role"] == "user":
            joined[-1] = {**joined[-1], "content": f"{joined[-1]['content']}\n{plain['content']}"}
        else:
            joined.append(plain)
    return joined


def spelled_out(message: dict[str, Any]) -> dict[str, Any]:
    """A message with its calls or its result as text."""
    if message["role"] == "tool":
        return {"role": "user", "content": f"<tool_response>\n{message['content']}\n</tool_response>"}
    if not message.get("tool_calls"):
        return message
    content = str(message["content"] or "")
    calls = []
    for call in message["tool_calls"]:
        function = call["function"]
        name = json.dumps(function["name"], ensure_ascii=False)[1:-1]
        arguments = function["arguments"]
        if not isinstance(arguments, str):
            arguments = json.dumps(arguments, ensure_ascii=False)
        calls.append(f"{_OPENING}{name}{_MIDDLE}{arguments}{_CLOSING}")
    rest = {key: value for key, value in message.items() if key != "tool_calls"}
    return {**rest, "content": "\n".join([*([content] if content else []), *calls])}
