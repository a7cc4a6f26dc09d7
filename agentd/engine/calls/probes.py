"""Conversations that show what a chat template makes of calls, and the turns of the assistant in them."""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from agentd.engine.calls.segments import behind
from agentd.engine.chat_template import ChatTemplate, TemplateRefusal

QUESTION, SAID, THOUGHT = "QUESTIONQ", "PLAINP", "THOUGHTT"
NAMES = ("zzfirstfn", "zzsecondfn", "zzthirdfn")
_PARAMETERS = {
    "type": "object",
    "properties": {
        "alpha": {"type": "string", "description": "a text"},
        "beta": {"type": "integer", "description": "a number"},
    },
    "required": ["alpha"],
}
TOOLS = [
    {"type": "function", "function": {"name": name, "description": "does it", "parameters": _PARAMETERS}}
    for name in NAMES
]


class NotDerivable(Exception):
    """The template does not show a format; the message says why."""


class NotRendered(NotDerivable):
    """The template refuses a conversation."""


@dataclass(frozen=True)
class Variant:
    """One way to hand calls to a template: arguments as JSON text or as an object, how ids look, and what the content
    is where nothing is said."""

    as_text: bool
    ids: str
    silence: str | None = ""

    def call(self, index: int, arguments: dict[str, Any]) -> dict[str, Any]:
        value = json.dumps(arguments, ensure_ascii=False) if self.as_text else arguments
        return {"id": self.id(index), "type": "function", "function": {"name": NAMES[index], "arguments": value}}

    def id(self, index: int) -> str:
        return self.ids.format(name=NAMES[index], index=index) if self.ids else f"zzid{index}aaaa"


VARIANTS = [
    Variant(as_text, ids, silence)
    for silence in ("", None)
    for ids in ("", "functions.{name}:{index}")
    for as_text in (False, True)
]
"""Ids as any nine letters suit all but templates that take them for more (Kimi); some render calls only where the
content is null (DeepSeek R1)."""


class Turns:
    """Assistant turns as a template renders them behind one and the same question. Raises NotDerivable throughout."""

    def __init__(self, template: ChatTemplate, variant: Variant) -> None:
        self._template, self.variant = template, variant
        self.prompt = self._tail([], generate=True)
        plain = self.turn({"content": SAID})
        if SAID not in plain:
            raise NotDerivable("it does not render what the assistant says")
        self.before, self.after = plain.split(SAID, 1)

    def turn(self, message: dict[str, Any]) -> str:
        return self._tail([{"role": "assistant", "content": self.variant.silence, **message}], generate=False)

    def calls(self, *arguments: dict[str, Any], content: str = "") -> str:
        """The turn that calls the first functions with these arguments."""
        called = [self.variant.call(i, each) for i, each in enumerate(arguments)]
        return self.turn({**({"content": content} if content else {}), "tool_calls": called})

    def thinking(self) -> str:
        """The turn that thinks before it says something, by every name that templates have for it."""
        return self.turn({"content": SAID, **dict.fromkeys(("reasoning_content", "reasoning", "thinking"), THOUGHT)})

    @property
    def ids(self) -> tuple[str, ...]:
        """What stands for ids that are nothing but ids."""
        return () if self.variant.ids else tuple(self.variant.id(i) for i in range(len(NAMES)))

    def answer(self, turn: str) -> str:
        """A turn without what the prompt ends with already."""
        return behind(self.prompt, turn)

    def _tail(self, messages: list[dict[str, Any]], *, generate: bool) -> str:
        user = {"role": "user", "content": QUESTION}
        try:
            text = self._template.render([user, *messages], tools=TOOLS, generate=generate)
        except TemplateRefusal as error:
            raise NotRendered(str(error)) from None
        at = text.rfind(QUESTION)
        if at < 0:
            raise NotDerivable("it does not render what the user says")
        return text[at + len(QUESTION) :]


@dataclass(frozen=True)
class Pieces:
    """A turn of calls taken apart: what stands before each name, between it and the arguments, these themselves, and
    what comes last."""

    before_name: list[str]
    before_arguments: list[str]
    arguments: list[re.Match[str]]
    tail: str


def take_apart(body: str, n: int, block: Callable[[int], str]) -> Pieces | None:
    """The pieces of a turn of `n` calls; `block` is the pattern of a call's arguments. None where it holds no such."""
    before_name, before_arguments, arguments, at = [], [], [], 0
    for i in range(n):
        place = body.find(NAMES[i], at)
        match = re.compile(block(i)).search(body, place + len(NAMES[i])) if place >= 0 else None
        if match is None:
            return None
        before_name.append(body[at:place])
        before_arguments.append(body[place + len(NAMES[i]) : match.start()])
        arguments.append(match)
        at = match.end()
    return Pieces(before_name, before_arguments, arguments, body[at:])
