"""Messages of a chat as clients send them: texts, calls of tools and their results."""

from collections import Counter
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Tag, model_validator

from agentd.api.lenient import Lenient, Name, RefusalPart, Text, part, several
from agentd.errors import InvalidRequest


class TextPart(Lenient):
    type: Literal["text"]
    text: Text


Part = Annotated[Annotated[TextPart, Tag("[part]")] | Annotated[RefusalPart, Tag("[refusal]")], Discriminator(part)]
Content = Annotated[Annotated[Text, Tag("[text]")] | Annotated[list[Part], Tag("[list]")], Discriminator(several)]


class CalledFunction(Lenient):
    name: Name
    arguments: Text


class ToolCall(Lenient):
    id: Text
    type: Literal["function"] = "function"
    function: CalledFunction


class Message(Lenient):
    """`function_call`, and the role function for its result, are what calls were before there were tools."""

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: Content | None = None
    refusal: Text | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    function_call: CalledFunction | None = None
    tool_call_id: Text | None = None
    reasoning_content: Text | None = None
    reasoning: Text | None = None  # the same, by the name that other servers have for it

    @model_validator(mode="after")
    def _has_content(self) -> "Message":
        said = self.tool_calls or self.function_call or self.refusal or "content" in self._nulls
        if self.content is None and not (self.role == "assistant" and said):
            raise ValueError("content is missing")
        if self.role != "assistant" and (self.refusal or any(isinstance(p, RefusalPart) for p in self.content or ())):
            raise ValueError("a refusal goes with role assistant")
        for field in ("tool_calls", "function_call"):
            if getattr(self, field) and self.role != "assistant":
                raise ValueError(f"{field} goes with role assistant")
        if self.tool_calls and self.function_call:
            raise ValueError("tool_calls and function_call exclude each other")
        if self.role == "function" and not self.name:
            raise ValueError("name says which function a message of role function is the result of")
        if (self.role == "tool") != (self.tool_call_id is not None):
            raise ValueError("tool_call_id goes with role tool")
        return self

    def plain(self, number: int = 0) -> dict[str, Any]:
        """Role and text, reasoning, calls and which call is answered, as chat templates take them. `number` is its
        place, by which a call of `function_call` is known."""
        content = self.content or self.refusal or ""
        if isinstance(content, list):
            content = "\n".join(part.refusal if isinstance(part, RefusalPart) else part.text for part in content)
        plain: dict[str, Any] = {"role": "system" if self.role == "developer" else self.role, "content": content}
        calls = self.tool_calls or []
        if self.function_call is not None:
            calls = [ToolCall(id=f"call_{number}", function=self.function_call)]
        if calls:
            plain["tool_calls"] = [
                {"id": c.id, "type": c.type, "function": {"name": c.function.name, "arguments": c.function.arguments}}
                for c in calls
            ]
        if self.role == "assistant" and (reasoning := self.reasoning_content or self.reasoning):
            plain["reasoning_content"] = reasoning
        if self.tool_call_id is not None:
            plain["tool_call_id"] = self.tool_call_id
        return plain


def plain(messages: "Sequence[Message]") -> list[dict[str, Any]]:
    """Messages as chat templates take them. Raises InvalidRequest for a result that answers no call before it, or one
    that has its result."""
    trees: list[dict[str, Any]] = []
    waiting = Counter[str]()  # calls without a result, by id: clients may begin anew with the ids in every message
    seen: set[str] = set()
    for number, message in enumerate(messages):
        tree = message.plain(number)
        ids = [call["id"] for call in tree.get("tool_calls", ())]
        waiting.update(ids)
        seen.update(ids)
        if message.role == "function":
            tree |= {"role": "tool", "tool_call_id": _called_before(messages, number)}
        if (id := tree.get("tool_call_id")) is not None:
            if not waiting[id]:
                what = "has a result already" if id in seen else "names no call of a message before it"
                field, named = ("name", message.name) if message.role == "function" else ("tool_call_id", id)
                raise InvalidRequest(f"messages.{number}.{field}: {named!r} {what}", param="messages")
            waiting[id] -= 1
        trees.append(tree)
    return trees


def _called_before(messages: "Sequence[Message]", number: int) -> str:
    """The id of the call that a message of role function is the result of: the last one of this name. Raises
    InvalidRequest."""
    name = messages[number].name
    for before in range(number - 1, -1, -1):
        call = messages[before].function_call
        if call is not None and call.name == name:
            return f"call_{before}"
    raise InvalidRequest(f"messages.{number}.name: {name!r} was not called in a message before it", param="messages")
