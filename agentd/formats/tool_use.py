"""What a request's input says about tools: which there are, and which may or must be called."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class ToolUse:
    """`tools` are those that may be called, as they were declared; of none, none may be. `required`: one must be."""

    tools: tuple[dict[str, Any], ...]
    required: bool
    parallel: bool

    @property
    def parameters(self) -> dict[str, Any]:
        """The schema of each function's arguments, by name."""
        return {tool["function"]["name"]: tool["function"].get("parameters") for tool in self.tools}

    @property
    def strict(self) -> set[str]:
        """The names of functions whose schemas have to be obeyed in full."""
        return {tool["function"]["name"] for tool in self.tools if tool["function"].get("strict")}


def tool_use(input: Mapping[str, Any]) -> ToolUse:
    """Of an input as `ChatCompletion.input` makes it."""
    tools, choice = input.get("tools") or [], input.get("tool_choice") or "auto"
    required = choice == "required"
    if choice == "none":
        tools = []
    elif isinstance(choice, dict):
        allowed = choice.get("allowed_tools")
        named = allowed["tools"] if allowed else [choice]
        names = {each["function"]["name"] for each in named}
        tools = [tool for tool in tools if tool["function"]["name"] in names]
        required = allowed["mode"] == "required" if allowed else True
    return ToolUse(tuple(tools), required and bool(tools), input.get("parallel_tool_calls", True) is not False)
