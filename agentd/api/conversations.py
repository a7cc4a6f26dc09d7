"""Conversations to learn from, in the form of OpenAI's fine-tuning files and of TRL's data sets."""

import itertools
import json
from typing import Any, TypeGuard

from agentd.api.lenient import MAX_NAME
from agentd.errors import InvalidRequest
from agentd.store.demonstrations import MESSAGE, as_answer, checked_message, message_target
from agentd.store.row import to_json
from agentd.store.tasks import PREFERENCE, SCORE, THUMB

Tree = dict[str, Any]


def normal_form(line: Tree) -> Tree:
    """A line as `ExampleLine` has it. TRL leaves out ids of calls and has arguments as objects, tools as functions or
    as a JSON text, and prompt and completion as lists of messages. What is of another shape is left for the checks."""
    line = {name: value for name, value in line.items() if value is not None}  # as tables have what a row has not
    if _are_messages(line.get("prompt")) and "messages" not in line:
        line["messages"] = line.pop("prompt")
    if "functions" in line:  # what tools were before
        line.setdefault("tools", line.pop("functions"))
    if isinstance(tools := line.get("tools"), str):
        try:
            line["tools"] = tools = json.loads(tools)
        except (ValueError, RecursionError):
            raise InvalidRequest("tools is a text that is no JSON", param="tools") from None
    if isinstance(tools, list):
        line["tools"] = [_tool(tool) for tool in tools]
    _split_pair(line)
    for field in ("completion", "chosen", "rejected"):
        if isinstance(line.get(field), dict):
            line[field] = [line[field]]
    for field in ("messages", "completion", "chosen", "rejected"):
        if _are_messages(messages := line.get(field)):
            line[field] = _with_ids(messages)
    messages, label = line.get("messages"), line.get("label")
    if _are_messages(messages) and len(messages) > 1 and isinstance(label, str) and _says(messages[-1], label):
        line["messages"] = messages[:-1]  # it stands there as well, for trainers that want a whole conversation
    return line


def _says(message: Tree, text: str) -> bool:
    """Whether this is what the assistant said, and nothing else."""
    return message.get("role") == "assistant" and message.get("content") == text and not message.get("tool_calls")


def _split_pair(line: Tree) -> None:
    """A preference of two whole conversations, as TRL has it, that begin alike and part with the last message."""
    chosen, rejected = line.get("chosen"), line.get("rejected")
    if not (_are_messages(chosen) and _are_messages(rejected)) or "messages" in line or "prompt" in line:
        return
    if len(chosen) > 1 and chosen[:-1] == rejected[:-1]:
        line["messages"], line["chosen"], line["rejected"] = chosen[:-1], chosen[-1:], rejected[-1:]


def answers(messages: list[Tree], weights: list[int | None]) -> list[tuple[list[Tree], Tree]]:
    """(messages before it, an assistant's message) for every one that is to be learned."""
    return [(messages[:i], messages[i]) for i in _learned(messages, weights)]


def unfolded(messages: list[Tree], weights: list[int | None], asked: Tree) -> int:
    """Characters of the inputs that a conversation becomes, of which each has all messages before it and what was
    `asked` besides."""
    before = [0, *itertools.accumulate(len(to_json(message)) for message in messages)]
    learned = _learned(messages, weights)
    return sum(before[i] for i in learned) + len(learned) * len(to_json(asked))


def _learned(messages: list[Tree], weights: list[int | None]) -> list[int]:
    speakers = enumerate(zip(messages, weights, strict=True))
    return [i for i, (message, weight) in speakers if message["role"] == "assistant" and weight != 0 and i]


def target_of(message: Tree, input: Tree) -> tuple[str, str]:
    """The kind and the target of the example whose answer the message is. Raises InvalidRequest."""
    checked = checked_message(message, input)
    return (MESSAGE, message_target(checked)) if checked.get("tool_calls") else ("demonstration", checked["content"])


def pair_of(chosen: str | Tree, rejected: str | Tree, input: Tree) -> tuple[str, str]:
    """The kind and the target of the example of a preference. Raises InvalidRequest."""
    sides = [as_answer(checked_message(side, input)) if isinstance(side, dict) else side for side in (chosen, rejected)]
    if sides[0] == sides[1]:
        raise InvalidRequest("the chosen and the rejected answer are the same")
    if isinstance(sides[0], str) and not sides[0].strip():
        raise InvalidRequest("the chosen answer must have something to read in it")
    return PREFERENCE, to_json(dict(zip(("chosen", "rejected"), sides, strict=True)))


def judged(answer: str | Tree, how: Tree, input: Tree) -> tuple[str, str]:
    """The kind and the target of the example of an answer that is {"good": bool} or has a {"score": number}. Raises
    InvalidRequest."""
    plain = as_answer(checked_message(answer, input)) if isinstance(answer, dict) else answer
    return SCORE if "score" in how else THUMB, to_json({"answer": plain, **how})


def _are_messages(value: Any) -> TypeGuard[list[Tree]]:
    return isinstance(value, list) and bool(value) and all(isinstance(each, dict) for each in value)


def _tool(tool: Any) -> Any:
    is_function = isinstance(tool, dict) and "function" not in tool and isinstance(tool.get("name"), str)
    return {"type": "function", "function": tool} if is_function else tool


def _with_ids(messages: list[Tree]) -> list[Tree]:
    """Messages whose calls have ids, and whose results name the call that they are of: without an id it is the oldest
    that has none yet."""
    numbered: list[Tree] = []
    pending: list[Any] = []
    for number, message in enumerate(messages):
        calls = message.get("tool_calls")
        if isinstance(calls, list) and calls:
            message = {**message, "tool_calls": [_call(call, f"call_{number}_{i}") for i, call in enumerate(calls)]}
            pending += [call["id"] for call in message["tool_calls"] if isinstance(call, dict)]
        elif message.get("role") == "tool":
            message = dict(message)
            if message.get("tool_call_id") is None and pending:
                message["tool_call_id"] = pending[0]
            if (id := message.get("tool_call_id")) in pending:
                pending.remove(id)
            if isinstance(message.get("content"), dict | list) and not _are_messages(message["content"]):
                message["content"] = json.dumps(message["content"], ensure_ascii=False)
        numbered.append(message)
    return numbered


def _call(call: Any, id: str) -> Any:
    if not isinstance(call, dict):
        return call
    call = call if "function" in call or "name" not in call else {"function": call}
    function = call.get("function")
    if isinstance(function, dict) and isinstance(arguments := function.get("arguments") or {}, dict):
        function = {**function, "arguments": json.dumps(arguments, ensure_ascii=False)}
    own = call.get("id")
    final = own if isinstance(own, str) and 0 < len(own) <= MAX_NAME else id
    return {"type": "function", **{k: v for k, v in call.items() if k != "id"}, "id": final, "function": function}
