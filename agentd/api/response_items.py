"""Items of the Responses API as clients send them, and the chat messages that they are."""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from agentd.api.lenient import Lenient, Name, RefusalPart, Text, part, several

Status = Literal["in_progress", "completed", "incomplete"]


class Part(Lenient):
    """A part of a message. What is no text cannot be read by a language model."""

    type: Literal["input_text", "output_text", "text", "reasoning_text", "summary_text"]
    text: Text
    annotations: list[Any] | None = None
    logprobs: list[Any] | None = None


_Part = Annotated[Annotated[Part, Tag("[part]")] | Annotated[RefusalPart, Tag("[refusal]")], Discriminator(part)]
_Content = Annotated[Annotated[Text, Tag("[text]")] | Annotated[list[_Part], Tag("[list]")], Discriminator(several)]


class MessageItem(Lenient):
    type: Literal["message"] = "message"
    role: Literal["user", "system", "developer", "assistant"]
    content: _Content
    id: Text | None = None
    status: Status | None = None
    phase: Text | None = None


class FunctionCall(Lenient):
    type: Literal["function_call"]
    call_id: Text
    name: Annotated[str, Field(min_length=1, max_length=200)]
    arguments: Text
    id: Text | None = None
    status: Status | None = None


class FunctionCallOutput(Lenient):
    type: Literal["function_call_output"]
    call_id: Text
    output: _Content
    id: Text | None = None
    status: Status | None = None


class ReasoningItem(Lenient):
    type: Literal["reasoning"]
    summary: list[Part] = Field(default_factory=list)
    content: list[Part] | None = None
    encrypted_content: Text | None = None
    id: Text | None = None
    status: Status | None = None


class ItemReference(Lenient):
    """An item of a response that is stored, by its id."""

    type: Literal["item_reference"] = "item_reference"
    id: Name


def _item(tree: Any) -> str:
    kind = tree.get("type") if isinstance(tree, dict) else getattr(tree, "type", None)
    if kind is None:  # without a role and a content it can only be a reference
        return "[item_reference]" if isinstance(tree, dict) and tree.keys() == {"id"} else "[message]"
    return f"[{kind}]"


_Items = MessageItem | FunctionCall | FunctionCallOutput | ReasoningItem

Item = Annotated[
    Annotated[MessageItem, Tag("[message]")]
    | Annotated[FunctionCall, Tag("[function_call]")]
    | Annotated[FunctionCallOutput, Tag("[function_call_output]")]
    | Annotated[ReasoningItem, Tag("[reasoning]")]
    | Annotated[ItemReference, Tag("[item_reference]")],
    Discriminator(_item),
]
Input = Annotated[Annotated[Text, Tag("[text]")] | Annotated[list[Item], Tag("[list]")], Discriminator(several)]


def text_of(content: str | Sequence[Part | RefusalPart] | None) -> str:
    """A content as one text."""
    if content is None or isinstance(content, str):
        return content or ""
    return "\n".join(part.refusal if isinstance(part, RefusalPart) else part.text for part in content)


def messages_of(
    items: Sequence[_Items],
) -> list[dict[str, Any]]:
    """Items as messages of a chat: reasoning, text and calls that follow each other are one message."""
    messages: list[dict[str, Any]] = []
    open_message: dict[str, Any] | None = None  # the assistant's, to which something may be added

    def assistant() -> dict[str, Any]:
        nonlocal open_message
        if open_message is None:
            open_message = {"role": "assistant", "content": None}
            messages.append(open_message)
        return open_message

    for item in items:
        if isinstance(item, ReasoningItem):
            if open_message is not None and (open_message["content"] is not None or "tool_calls" in open_message):
                open_message = None  # thought of what follows
            reasoning = text_of(item.content) or text_of(item.summary)
            if reasoning:
                message = assistant()
                message["reasoning_content"] = "\n".join(filter(None, [message.get("reasoning_content"), reasoning]))
        elif isinstance(item, FunctionCall):
            function = {"name": item.name, "arguments": item.arguments}
            assistant().setdefault("tool_calls", []).append(
                {"id": item.call_id, "type": "function", "function": function}
            )
        elif isinstance(item, FunctionCallOutput):
            open_message = None
            messages.append({"role": "tool", "tool_call_id": item.call_id, "content": text_of(item.output)})
        elif item.role == "assistant":
            if open_message is not None and (open_message["content"] is not None or "tool_calls" in open_message):
                open_message = None
            assistant()["content"] = text_of(item.content)
        else:
            open_message = None
            messages.append({"role": item.role, "content": text_of(item.content)})
    for message in messages:
        if message["role"] == "assistant" and message["content"] is None and "tool_calls" not in message:
            message["content"] = ""  # reasoning that nothing followed
    return messages
