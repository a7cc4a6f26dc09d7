"""What a piece of feedback teaches: the answer that should have been given, where feedback of its kind says so.

A thumb is worth a label where the task's choices leave no doubt: up confirms the answer, down on one of two choices
means the other. The chosen text of a preference is the label it names, or, where answers are free text, what should
have been said.
"""

from dataclasses import dataclass
from typing import Any

from agentd.store.tasks import Task

KINDS = ("label", "demonstration", "boolean", "preference")
"""Kinds of feedback that may teach; whether a piece does is `lesson`'s to say."""
_AROUND = " \t\r\n.,;:!?\"'`*"  # what models put around the word that was asked for


@dataclass(frozen=True)
class Lesson:
    """The example that comes of it: its `kind`, label or demonstration, and the `target`."""

    kind: str
    target: str


def lesson(kind: str, value: Any, output: str, task: Task | None) -> Lesson | None:
    """Of feedback of this kind and value (as stored) on an answer `output`; None where it says nothing to learn.

    A task that nobody has declared yet is taught by labels and demonstrations alone, which declare it.
    """
    if kind in ("label", "demonstration"):
        return Lesson(kind, value)
    if task is None:
        return None
    if kind == "boolean":
        said = _choice(output, task)
        return _label(said if value or said is None else _other(said, task))
    if kind == "preference":
        return _label(_choice(value["chosen"], task)) if task.choices else Lesson("demonstration", value["chosen"])
    return None


def _label(choice: str | None) -> Lesson | None:
    return None if choice is None else Lesson("label", choice)


def _other(said: str, task: Task) -> str | None:
    """The choice that is left; None where there are several, or may be."""
    others = [choice for choice in task.choices if choice != said]
    return others[0] if len(others) == 1 and not task.open else None


def _choice(text: str, task: Task) -> str | None:
    """The choice that a text names: as it stands, or else the only one that it is but for case and punctuation."""
    if text.strip() in task.choices:
        return text.strip()
    found = [choice for choice in task.choices if _plain(choice) == _plain(text)]
    return found[0] if len(found) == 1 else None


def _plain(text: str) -> str:
    return text.strip(_AROUND).casefold()
