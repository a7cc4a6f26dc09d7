"""Tools as clients declare them, and what they say about which are to be called."""

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from agentd.api.lenient import Lenient, Text
from agentd.errors import InvalidRequest

ToolName = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.:/-]{1,128}$")]
Mode = Literal["none", "auto", "required"]


class Function(Lenient):
    name: ToolName
    description: Text | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Lenient):
    type: Literal["function"]
    function: Function


class FunctionName(Lenient):
    name: ToolName


class NamedTool(Lenient):
    """{"type": "function", "function": {"name": ...}}: this one has to be called."""

    type: Literal["function"]
    function: FunctionName


class AllowedTools(Lenient):
    mode: Literal["auto", "required"]
    tools: Annotated[list[NamedTool], Field(min_length=1)]


class AllowedChoice(Lenient):
    """{"type": "allowed_tools", "allowed_tools": {...}}: `tool_choice` with a part of the tools."""

    type: Literal["allowed_tools"]
    allowed_tools: AllowedTools


def form_of_choice(tree: Any) -> str:
    """Which form a `tool_choice` has."""
    kind = tree.get("type") if isinstance(tree, dict) else getattr(tree, "type", None)
    return "[allowed]" if kind == "allowed_tools" else "[mode]" if not isinstance(tree, dict | Lenient) else "[named]"


ToolChoice = Annotated[
    Annotated[Mode, Tag("[mode]")] | Annotated[NamedTool, Tag("[named]")] | Annotated[AllowedChoice, Tag("[allowed]")],
    Discriminator(form_of_choice),
]

FunctionChoice = Annotated[
    Annotated[Literal["none", "auto"], Tag("[mode]")] | Annotated[FunctionName, Tag("[named]")],
    Discriminator(form_of_choice),
]
"""`function_call`, which was there before `tool_choice`."""


def tools_input(tools: list[Tool], choice: ToolChoice | None, parallel: bool) -> dict[str, Any]:
    """What a request's input says about tools; nothing without any. Raises InvalidRequest where names are declared
    twice, or chosen and not declared."""
    names = [tool.function.name for tool in tools]
    if twice := next((name for i, name in enumerate(names) if name in names[:i]), None):
        raise InvalidRequest(f"tools declares {twice!r} twice", param="tools")
    if not tools and choice not in (None, "none", "auto"):
        raise InvalidRequest("tool_choice asks for a call, and tools declares no function", param="tool_choice")
    for name in _named(choice):
        if name not in names:
            raise InvalidRequest(f"tool_choice names {name!r}, which tools does not declare", param="tool_choice")
    if not tools:
        return {}
    input: dict[str, Any] = {"tools": [tool.model_dump(include=_TOOL, exclude_none=True) for tool in tools]}
    if isinstance(choice, str):
        input["tool_choice"] = choice
    elif choice is not None:
        input["tool_choice"] = choice.model_dump(include=_CHOICE, exclude_none=True)
    if not parallel:
        input["parallel_tool_calls"] = False
    return input


_FUNCTION = {"name", "description", "parameters", "strict"}
_TOOL: Any = {"type": True, "function": _FUNCTION}
_NAMED: Any = {"type": True, "function": {"name"}}
_CHOICE: Any = {**_NAMED, "allowed_tools": {"mode": True, "tools": {"__all__": _NAMED}}}


def _named(choice: ToolChoice | None) -> list[str]:
    if isinstance(choice, NamedTool):
        return [choice.function.name]
    if isinstance(choice, AllowedChoice):
        return [tool.function.name for tool in choice.allowed_tools.tools]
    return []
