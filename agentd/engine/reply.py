"""The assistant's message as it grows from pieces, whole and in deltas."""

from typing import Any

from agentd.engine.protocol import Piece


class Reply:
    """`text`, `reasoning` and `calls` are what has come so far; calls as the OpenAI API has them."""

    def __init__(self) -> None:
        self.text, self.reasoning = "", ""
        self.calls: list[dict[str, Any]] = []

    def add(self, piece: Piece) -> None:
        self.text += piece.text
        self.reasoning += piece.reasoning
        for delta in piece.calls:
            if delta.index == len(self.calls):
                function = {"name": delta.name or "", "arguments": ""}
                self.calls.append({"id": delta.id or "", "type": "function", "function": function})
            self.calls[delta.index]["function"]["arguments"] += delta.arguments

    def message(self) -> dict[str, Any]:
        """A message of role `assistant`, which may be sent back as it is."""
        called = bool(self.calls)
        message: dict[str, Any] = {
            "role": "assistant",
            "content": self.text or (None if called else ""),
            "refusal": None,
        }
        if self.reasoning:
            message["reasoning_content"] = self.reasoning
        if called:
            message["tool_calls"] = self.calls
        return message


def delta(piece: Piece, first: bool) -> dict[str, Any]:
    """What a piece adds to the message; the first one says whose it is."""
    added: dict[str, Any] = {"role": "assistant"} if first else {}
    if piece.text or (first and not piece.calls):
        added["content"] = piece.text
    if piece.reasoning:
        added["reasoning_content"] = piece.reasoning
    if piece.calls:
        added["tool_calls"] = [_call(call.index, call.id, call.name, call.arguments) for call in piece.calls]
    return added


def with_function_call(added: dict[str, Any]) -> dict[str, Any]:
    """A message, or what a piece adds to it, with its one call as it was before there were tools."""
    rest = {name: value for name, value in added.items() if name != "tool_calls"}
    return {**rest, "function_call": added["tool_calls"][0]["function"]} if added.get("tool_calls") else rest


def _call(index: int, id: str | None, name: str | None, arguments: str) -> dict[str, Any]:
    if name is None:
        return {"index": index, "function": {"arguments": arguments}}
    return {"index": index, "id": id, "type": "function", "function": {"name": name, "arguments": arguments}}
