"""A small home: its tools, commands with the right call, and messages that want none.

tools/data/home_commands.jsonl is made by tools/extract_home.py; home_chat.jsonl beside it was written for this project.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

DATA = Path(__file__).resolve().parent / "data"
COMMANDS, CHAT = DATA / "home_commands.jsonl", DATA / "home_chat.jsonl"
TASK = "home"

AREAS = ("kitchen", "living room", "bedroom", "bathroom", "office")
DOMAINS = ("light", "fan")
COLORS = ("white", "red", "orange", "yellow", "green", "blue", "purple", "pink")
DEVICES = {  # by kind: turning on opens a cover, and locks a lock
    "desk lamp": "light",
    "bedside lamp": "light",
    "christmas tree": "switch",
    "coffee machine": "switch",
    "heated blanket": "switch",
    "radio": "media_player",
    "television": "media_player",
    "ceiling fan": "fan",
    "garage door": "cover",
    "roller blind": "cover",
    "awning": "cover",
    "front door": "lock",
    "cellar door": "lock",
    "bike shed": "lock",
}

_TEXT = {"type": "string"}
_AREA = {"enum": list(AREAS)}
_NUMBER = {"type": "integer"}
_SWITCHED = {"name": _TEXT, "area": _AREA, "domain": {"enum": list(DOMAINS)}}


def _tool(name: str, properties: dict[str, Any], required: tuple[str, ...] = ()) -> dict[str, Any]:
    parameters: dict[str, Any] = {"type": "object", "properties": properties}
    if required:
        parameters["required"] = list(required)
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


# Short, because every request carries them: some 450 tokens. Arguments stand in the order of their schema, in which a
# constrained answer has them, too.
TOOLS = [
    _tool("HassTurnOn", _SWITCHED),
    _tool("HassTurnOff", _SWITCHED),
    _tool("HassLightSet", {"area": _AREA, "brightness": _NUMBER, "color": _TEXT}),
    _tool("HassClimateSetTemperature", {"area": _AREA, "temperature": _NUMBER}, ("temperature",)),
    _tool("HassStartTimer", {"name": _TEXT, "hours": _NUMBER, "minutes": _NUMBER, "seconds": _NUMBER}),
    _tool("HassShoppingListAddItem", {"item": _TEXT}, ("item",)),
]


def commands(split: str) -> list[dict[str, Any]]:
    """{"text", "name", "arguments", "template", "split"} of `train` or `heldout`, in an order that means nothing: the
    first n are a sample. No sentence template is in both splits."""
    return _rows(COMMANDS, split)


def chat(split: str) -> list[dict[str, Any]]:
    """{"text", "answer", "split"}: messages that want words and no call."""
    return _rows(CHAT, split)


def order(name: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments in the order of the tool's schema."""
    return {key: arguments[key] for key in properties(name) if key in arguments}


def properties(name: str) -> dict[str, Any]:
    """The schemas of a tool's arguments by name."""
    return next(
        dict(tool["function"]["parameters"]["properties"]) for tool in TOOLS if tool["function"]["name"] == name
    )


def answer(row: dict[str, Any]) -> dict[str, Any]:
    """The assistant message that is right: a call, or words."""
    if "name" not in row:
        return {"role": "assistant", "content": row["answer"]}
    function = {"name": row["name"], "arguments": json.dumps(row["arguments"], ensure_ascii=False)}
    return {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"id": "call_0", "type": "function", "function": function}],
    }


def example(row: dict[str, Any]) -> dict[str, Any]:
    """A row as a line of `POST /v1/examples`."""
    messages = [{"role": "user", "content": row["text"]}, answer(row)]
    return {"task": TASK, "messages": messages, "tools": TOOLS}


def is_right(row: dict[str, Any], calls: Sequence[dict[str, Any]]) -> bool:
    """Whether an answer's `tool_calls` are the one right call: its name, and its arguments as JSON."""
    if len(calls) != 1 or calls[0]["function"]["name"] != row["name"]:
        return False
    try:
        return bool(json.loads(calls[0]["function"]["arguments"]) == row["arguments"])
    except ValueError:  # cut by max_tokens
        return False


def _rows(file: Path, split: str) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    return [row for row in rows if row["split"] == split]
