"""Conversations with tools in a model's own template, and in the words of the format that was read off it."""

import hashlib
import json
import re
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

from agentd.engine.calls.derive import derive, spans
from agentd.engine.calls.format import AnswerFormat
from agentd.engine.calls.generic import GENERIC, explained, spelled_out
from agentd.engine.calls.probes import NotDerivable
from agentd.engine.calls.roles import Roles, of_calls
from agentd.engine.calls.segments import behind
from agentd.engine.chat_template import ChatTemplate, TemplateRefusal

_ID = re.compile(r"[A-Za-z0-9]{9}")
_NO_PARAMETERS = {"type": "object", "properties": {}}
_PROBE = "zzprobefn"


class Conversation:
    """Renders what a request's input holds. `ends` says the texts of the tokens that end an answer."""

    def __init__(self, template: ChatTemplate, ends: Callable[[], Sequence[str]]) -> None:
        self._template, self._find_ends, self._roles = template, ends, Roles(template)
        self.why_generic: str | None = None

    @cached_property
    def _ends(self) -> Sequence[str]:
        return self._find_ends()

    @cached_property
    def form(self) -> AnswerFormat:
        """The format of the model's answers."""
        try:
            form = derive(self._template)
        except NotDerivable as error:
            self.why_generic = str(error)
            try:
                reasoning, said = spans(self._template)
            except NotDerivable:
                reasoning = said = None
            form = AnswerFormat(GENERIC, reasoning, said)
        return form.until(self._ends)

    @property
    def template(self) -> ChatTemplate:
        return self._template

    def render(self, input: dict[str, Any], *, generate: bool = True) -> str:
        """The text of {"messages", "tools"?, "tool_choice"?, "chat_template_kwargs"?}; with `generate`, ready to be
        answered. Raises TemplateRefusal."""
        messages, variables = input["messages"], input.get("chat_template_kwargs")
        tools = [_declared(tool) for tool in input.get("tools") or ()] if input.get("tool_choice") != "none" else []
        if not tools and not any(map(of_calls, messages)):
            return self._rendered([_thought(message) for message in messages], [], generate, variables)
        if self.form.calls.origin == "generic":
            plain_messages = [_thought(message) for message in explained(messages, tools)]
            return self._rendered(plain_messages, [], generate, variables)
        if not self._shows_results:
            messages = [spelled_out(message) if message["role"] == "tool" else message for message in messages]
        prepared = [_thought(message) for message in self._prepared(messages)]
        try:
            return self._rendered(prepared, tools, generate, variables)
        except TemplateRefusal:
            # A template may have one call a message (Llama 3.1), or no results that follow each other.
            split = _one_call_each(prepared)
            if len(split) == len(prepared):
                raise
            return self._rendered(split, tools, generate, variables)

    def answer(self, input: dict[str, Any], message: dict[str, Any]) -> str:
        """What the assistant's message adds to the prompt of `input`, without the end of its turn. Raises
        TemplateRefusal."""
        prompt = self.render(input)
        whole = self.render({**input, "messages": [*input["messages"], message]}, generate=False)
        text = behind(prompt, whole)
        if self.form.reasoning and not message.get("reasoning_content"):
            opening, closing = re.escape(self.form.reasoning.opening), re.escape(self.form.reasoning.closing)
            text = re.sub(rf"^\s*({opening})?\s*{closing}", "", text)
        places = [at for end in self._ends if end and (at := text.rfind(end)) >= 0]
        return text[: min(places)].rstrip() if places else text.rstrip()

    def _rendered(
        self, messages: list[dict[str, Any]], tools: list[dict[str, Any]], generate: bool, variables: Any
    ) -> str:
        options: dict[str, Any] = {"tools": tools, "generate": generate, "variables": variables}
        refusal, tried = None, None
        for fitted in self._roles.fitted(messages):
            if fitted == tried:
                continue
            try:
                return self._template.render(fitted, **options)
            except TemplateRefusal as error:
                refusal, tried = refusal or error, fitted
        assert refusal is not None
        raise refusal

    @cached_property
    def _shows_results(self) -> bool:
        """Whether the template knows the role of results."""
        call = {"id": "probe0001", "type": "function", "function": {"name": _PROBE, "arguments": "{}"}}
        messages: list[dict[str, Any]] = [
            {"role": "user", "content": _PROBE},
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "tool_call_id": call["id"], "content": "RESULTR"},
        ]
        tool = _declared({"type": "function", "function": {"name": _PROBE}})
        try:
            return "RESULTR" in self._template.render(self._prepared(messages), tools=[tool], generate=True)
        except TemplateRefusal:
            return False

    def _prepared(self, messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """Messages with arguments and ids as the template takes them."""
        calls = self.form.calls
        ids: dict[str, str] = {}
        prepared: list[dict[str, Any]] = []
        for message in messages:
            if message.get("tool_calls"):
                plain_calls = []
                for index, call in enumerate(message["tool_calls"]):
                    name = call["function"]["name"]
                    ids[call["id"]] = self._id(call["id"], name, index)
                    function = {"name": name, "arguments": _arguments(call["function"]["arguments"], calls.as_text)}
                    plain_calls.append({"id": ids[call["id"]], "type": "function", "function": function})
                content = calls.silence if calls.alone else message["content"] or calls.silence
                prepared.append({**message, "content": content, "tool_calls": plain_calls})
            elif message["role"] == "tool":
                id = message["tool_call_id"]
                name = _name_of(messages, id)
                prepared.append({**message, "tool_call_id": ids.get(id, id), **({"name": name} if name else {})})
            else:
                prepared.append(message)
        return prepared

    def _id(self, id: str, name: str, index: int) -> str:
        if self.form.calls.ids:
            return self.form.calls.ids.format(name=name, index=index)
        return id if _ID.fullmatch(id) else hashlib.sha256(id.encode("utf-8", "replace")).hexdigest()[:9]


def _declared(tool: dict[str, Any]) -> dict[str, Any]:
    """A tool with what templates expect in it."""
    function = tool["function"]
    description, parameters = function.get("description") or "", function.get("parameters") or _NO_PARAMETERS
    if "properties" not in parameters:
        parameters = {**parameters, "properties": {}}
    return {
        "type": "function",
        "function": {"name": function["name"], "description": description, "parameters": parameters},
    }


def _thought(message: dict[str, Any]) -> dict[str, Any]:
    """The message with its reasoning by every name that templates have for it."""
    reasoning = message.get("reasoning_content")
    if not reasoning:
        return message
    twice = message.get("tool_calls") and message.get("content")  # gpt-oss refuses both
    return {**message, "reasoning": reasoning, **({} if twice else {"thinking": reasoning})}


def _arguments(text: Any, as_text: bool) -> Any:
    """A call's arguments as the template takes them; what is no object of JSON becomes one."""
    try:
        value = json.loads(text) if isinstance(text, str) else text
    except ValueError:
        value = None
    if not isinstance(value, dict):
        value = {"arguments": text} if text else {}
        return json.dumps(value, ensure_ascii=False) if as_text else value
    return text if as_text and isinstance(text, str) else value


def _name_of(messages: Sequence[dict[str, Any]], id: str) -> str | None:
    """The function whose result a message has."""
    for message in messages:
        for call in message.get("tool_calls") or ():
            if call["id"] == id:
                return str(call["function"]["name"])
    return None


def _one_call_each(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Every call in a message of its own, with its result behind it."""
    results = {message["tool_call_id"]: message for message in messages if message["role"] == "tool"}
    split: list[dict[str, Any]] = []
    placed: set[int] = set()
    for message in messages:
        if len(message.get("tool_calls") or ()) < 2:
            if id(message) not in placed:
                split.append(message)
            continue
        for number, call in enumerate(message["tool_calls"]):
            content = message["content"] if number == 0 else ""
            split.append({**message, "content": content, "tool_calls": [call]})
            if result := results.get(call["id"]):
                split.append(result)
                placed.add(id(result))
    return split
