"""Messages that want no call, whatever tools there are: small talk, and questions about words of a task's commands.

What calls are learned for stands in commands; a model that has learned little else calls for whatever sounds like one
("how does a fan work?"). So some messages have words in them that the task's own commands have.
"""

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any

from agentd.adapt.planning.dataset import Member
from agentd.store.normalise import content_text, normal_text

_WORD = re.compile(r"[^\W\d_]{3,20}")
_PLACE = "{}"  # of a word
_MARKS = ".,;:!?¡¿。！？ "


PACKAGES = LEARNED, JUDGED = "agentd.adapt.planning", "agentd.adapt.gate"
"""Whose messages are learned from, and whose the gate asks: different ones."""


def texts(package: str) -> list[str]:
    """Lines of `small_talk.txt` in a package. In some a place is left for a word."""
    return (resources.files(package) / "small_talk.txt").read_text("utf-8").strip().split("\n")


def is_free(input: Mapping[str, Any]) -> bool:
    """Whether it is the model's choice to call a tool."""
    return bool(input.get("tools")) and input.get("tool_choice", "auto") == "auto"


def calls(target: str | Mapping[str, Any]) -> bool:
    return not isinstance(target, str) and bool(target.get("tool_calls"))


def last_said(input: Mapping[str, Any]) -> str:
    """The last message of the user."""
    said = [message for message in input.get("messages") or () if message.get("role") == "user"]
    return content_text(said[-1].get("content")) if said else str(input.get("prompt", ""))


def inputs(lines: Sequence[str], members: Sequence[Member], *, part: int, rounds: int) -> list[dict[str, Any]]:
    """Lines as first messages behind the system's, with the tools that most of a task's examples have. Where a line has
    place for a word there are `rounds` of it, with other words each; the words of parts 0 and 1 are different ones.

    None where calls are no choice, nor where the task's own examples call a tool for small talk: then it is what they
    want (some agents say everything through tools).
    """
    free = [member for member in members if member.answered and not member.choices and is_free(member.example.input)]
    commands = [last_said(member.example.input) for member in free if calls(member.target)]
    known = {_bare(line) for package in PACKAGES for line in texts(package)}
    if not free or any(_bare(command) in known for command in commands):
        return []
    written = [line for line in lines if _PLACE not in line]
    places = [line for line in lines if _PLACE in line]
    words = _words(commands, lines)[part::2]
    if words:
        written += [
            line.replace(_PLACE, words[(i + round * len(places)) % len(words)])
            for round in range(rounds)
            for i, line in enumerate(places)
        ]
    model = _most_common([member.example.input for member in free])
    return [_opened(model, text) for text in dict.fromkeys(written)]


def _words(commands: Sequence[str], lines: Sequence[str]) -> list[str]:
    """Words of commands that small talk does not have, the most frequent ones first."""
    usual = {word for line in lines for word in _WORD.findall(normal_text(line))}
    counts = Counter(word for command in commands for word in set(_WORD.findall(normal_text(command))) - usual)
    return sorted(counts, key=lambda word: (-counts[word], word))


def _most_common(inputs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One with the tools and the system's message that most have."""
    written = [json.dumps([input["tools"], _begun(input)], sort_keys=True) for input in inputs]
    return inputs[written.index(Counter(written).most_common(1)[0][0])]


def _begun(input: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [message for message in input["messages"][:1] if message["role"] == "system"]


def _opened(input: Mapping[str, Any], text: str) -> dict[str, Any]:
    fields = {name: value for name, value in input.items() if name not in ("response_format", "grammar")}
    return {**fields, "messages": [*_begun(input), {"role": "user", "content": text}]}


def _bare(text: str) -> str:
    return normal_text(text).strip(_MARKS)
