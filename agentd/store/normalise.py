"""What counts as the same text: for the split of examples, and for the labels of a task.

Clients send the same review with a blank at its end, with other line ends, composed or decomposed accents (Unicode
Standard Annex #15). Byte for byte these differ; for a split that keeps training and judging apart, and for a list of
choices, they are one.
"""

import re
import unicodedata
from collections.abc import Sequence
from typing import Any

from agentd.learn.labels import INVISIBLE

_VARIANTS = re.compile("[\ufe00-\ufe0f]")  # of how a character looks: the heart of text, or the red one
_WORDS = 3  # of a user's text that is taken to stand for the whole conversation


def normal_text(text: str) -> str:
    """NFC, case folded, without invisible characters, every run of white space one blank, none at the ends."""
    text = unicodedata.normalize("NFC", INVISIBLE.sub("", text)).casefold()
    return " ".join(unicodedata.normalize("NFC", text).split())  # folding may decompose: U+0130


def same_label(label: str, choices: Sequence[str]) -> str | None:
    """The choice that `label` is: as it stands, or else the only one that is the same text. None if there is none."""
    if label in choices:
        return label
    key = label_key(label)
    alike = [choice for choice in choices if label_key(choice) == key]
    return alike[0] if len(alike) == 1 else None


def label_key(label: str) -> str:
    """What is the same of labels that are the same."""
    return normal_text(_VARIANTS.sub("", label))


def input_text(input: dict[str, Any], prompt: str | None = None) -> str:
    """What an input is about: the raw prompt, or all that its user said, without the task's prompt around it.

    input   {"messages": [...]}, {"prompt": ...} or a classifier's {"input": [...]} or {"png": ...}
    prompt  the task's, with {text} where the text goes
    """
    if isinstance(text := input.get("prompt"), str):
        return _within(text, prompt)
    messages = input.get("messages")
    if not isinstance(messages, list):
        return repr(sorted(input.items()))
    said = [content_text(message.get("content")) for message in messages if message.get("role") == "user"]
    text = "\n".join(_within(content, prompt) for content in said)
    if len(text.split()) >= _WORDS:
        return text
    # "Go on." says nothing by itself: what it is about stands in the other messages.
    return "\n".join(content_text(message.get("content")) for message in messages)


def content_text(content: Any) -> str:
    """The text of a message's content, which is a text or a list of parts."""
    if isinstance(content, list):
        return "\n".join(
            part["text"] for part in content if isinstance(part, dict) and isinstance(part.get("text"), str)
        )
    return content if isinstance(content, str) else ""


def _within(text: str, prompt: str | None) -> str:
    """What stands in place of the {text} of `prompt`; all of `text` where it is no such prompt."""
    before, marker, after = (prompt or "").partition("{text}")
    if not marker:
        return text
    plain, head, tail = normal_text(text), normal_text(before), normal_text(after)
    if len(plain) >= len(head) + len(tail) and plain.startswith(head) and plain.endswith(tail):
        return plain[len(head) : len(plain) - len(tail)]
    return text
