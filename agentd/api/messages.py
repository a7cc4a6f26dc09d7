"""Messages of a chat as clients send them: texts, calls of tools and their results."""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Tag, model_validator

from agentd.api.lenient import Lenient, Name, Text, several
from agentd.errors import InvalidRequest


class TextPart(Lenient):
    type: Literal["text"]
    text: Text


class RefusalPart(Lenient):
    """What an assistant said in place of an answer."""

    type: Literal["refusal"]
    refusal: Text


def _part(tree: Any) -> str:
    return "[refusal]" if isinstance(tree, dict) and tree.get("type") == "refusal" else "[text part]"


Part = Annotated[
    Annotated[TextPart, Tag("[text part]")] | Annotated[RefusalPart, Tag("[refusal]")], Discriminator(_part)
]
Content = Annotated[Annotated[Text, Tag("[text]")] | Annotated[list[Part], Tag("[list]")], Discriminator(several)]


class CalledFunction(Lenient):
    name: Name
    arguments: Text


class ToolCall(Lenient):
    id: Text
    type: Literal["function"] = "function"
    function: CalledFunction


class Message(Lenient):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Content | None = None
    refusal: Text | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: Text | None = None
    reasoning_content: Text | None = None
    reasoning: Text | None = None  # the same, by the name that other servers have for it

    @model_validator(mode="after")
    def _has_content(self) -> "Message":
        said = self.tool_calls or self.refusal or "content" in self._nulls
        if self.content is None and not (self.role == "assistant" and said):
            raise ValueError("content is missing")
        if self.role != "assistant" and (self.refusal or any(isinstance(p, RefusalPart) for p in self.content or ())):
            raise ValueError("a refusal goes with role assistant")
        if self.tool_calls and self.role != "assistant":
            raise ValueError("tool_calls goes with role assistant")
        if (self.role == "tool") != (self.tool_call_id is not None):
            raise ValueError("tool_call_id goes with role tool")
        return self

    def plain(self) -> dict[str, Any]:
        """Role and text, reasoning, calls and which call is answered, as chat templates take them."""
        content = self.content or self.refusal or ""
        if isinstance(content, list):
            content = "\n".join(part.refusal if isinstance(part, RefusalPart) else part.text for part in content)
        plain: dict[str, Any] = {"role": "system" if self.role == "developer" else self.role, "content": content}
        if self.tool_calls:
            plain["tool_calls"] = [
                {"id": c.id, "type": c.type, "function": {"name": c.function.name, "arguments": c.function.arguments}}
                for c in self.tool_calls
            ]
        if self.role == "assistant" and (reasoning := self.reasoning_content or self.reasoning):
            plain["reasoning_content"] = reasoning
        if self.tool_call_id is not None:
            plain["tool_call_id"] = self.tool_call_id
        return plain


def plain(messages: "Sequence[Message]") -> list[dict[str, Any]]:
    """Messages as chat templates take them. Raises InvalidRequest for a result that answers no call before it."""
    open_calls: set[str] = set()
    for number, message in enumerate(messages):
        open_calls |= {call.id for call in message.tool_calls or ()}
        if message.tool_call_id is not None and message.tool_call_id not in open_calls:
            raise InvalidRequest(
                f"messages.{number}.tool_call_id: {message.tool_call_id!r} names no call of a message before it",
                param="messages",
            )
    return [message.plain() for message in messages]
