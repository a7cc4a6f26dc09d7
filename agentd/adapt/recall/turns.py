"""Past corrections as earlier turns of a conversation. Pure, but for what is read from the store."""

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlite_utils import Database

from agentd.engine.protocol import Recalled
from agentd.formats.tool_use import tool_use
from agentd.store import recall_index, tasks
from agentd.store.demonstrations import MESSAGE
from agentd.store.examples import Example
from agentd.store.normalise import input_text
from agentd.store.row import select, to_json
from agentd.store.tasks import PREFERENCE, THUMB

MOST = 8  # corrections in a prompt
_CHARACTERS = 8  # a token; what has more of them than fit the budget at that rate is not even looked at


@dataclass(frozen=True)
class Recollection:
    """What is recalled for an input: ids of examples and what they become, the nearest first."""

    ids: tuple[str, ...] = ()
    turns: tuple[Sequence[dict[str, Any]], ...] = ()

    def for_prompt(self, tokens: int) -> Recalled | None:
        """At most `tokens` longer than the prompt is without it."""
        return Recalled([list(turn) for turn in self.turns], tokens) if self.turns else None

    def first(self, n: int) -> "Recollection":
        return Recollection(self.ids[:n], self.turns[:n])


def recollect(
    db: Database,
    task: str,
    input: Mapping[str, Any],
    choices: Sequence[str],
    *,
    k: int,
    tokens: int,
    form: Mapping[str, Any],
    without: Collection[str] = (),
    apart: bool = False,
) -> Recollection:
    """The `k` nearest corrections of the task that an answer to `input` could look like.

    choices  the only answers, if it has to be one of them
    form     what else the answer has to be: `response_format` or `grammar`, as the input of an example has it
    without  text keys of examples that are not to be among them
    apart    nor any whose input is nearly the same
    """
    declared = tasks.find(db, task)
    text = input_text(dict(input), declared.prompt if declared else None)
    turns: dict[str, list[dict[str, Any]]] = {}

    def suits(id: str) -> bool:
        rows = select(db, Example, "WHERE id = ?", [id])
        turn = _turn(rows[0], input, choices, form) if rows else None
        if turn is None or len(to_json(turn)) > _CHARACTERS * tokens:
            return False
        turns[id] = turn
        return True

    ids = recall_index.nearest(db, task, text, k, suits, without, apart)
    return Recollection(tuple(ids), tuple(turns[id] for id in ids))


def _turn(
    example: Example, input: Mapping[str, Any], choices: Sequence[str], form: Mapping[str, Any]
) -> list[dict[str, Any]] | None:
    """The messages of an example, with the right answer to them as the last; None where it has none that an answer to
    `input` could be."""
    target = _right(example)
    if target is None or "messages" not in example.input:
        return None
    if _form(example.input) != _form(form):
        return None
    calls = [] if isinstance(target, str) else target.get("tool_calls") or []
    if choices and (calls or target not in choices):
        return None
    use = tool_use(input)
    if not {call["function"]["name"] for call in calls} <= use.parameters.keys():
        return None
    if (len(calls) > 1 and not use.parallel) or (use.required and not calls):
        return None
    said = [message for message in example.input["messages"] if message["role"] not in ("system", "developer")]
    if not said or said[-1]["role"] == "assistant":
        return None
    answer = {"role": "assistant", "content": target} if isinstance(target, str) else {"role": "assistant", **target}
    return [*said, answer]


def _right(example: Example) -> str | dict[str, Any] | None:
    """What is known to be right: said, chosen, or confirmed."""
    right: str | dict[str, Any] | None = None
    if example.kind in ("label", "demonstration"):
        right = example.target
    elif example.kind == MESSAGE:
        right = json.loads(example.target)
    elif example.kind == PREFERENCE:
        right = json.loads(example.target)["chosen"]
    elif example.kind == THUMB:
        judged = json.loads(example.target)
        right = judged["answer"] if judged["good"] else None
    return right or None


def _form(input: Mapping[str, Any]) -> tuple[Any, Any]:
    """What the answer has to be besides."""
    form = input.get("response_format")
    return None if form == {"type": "text"} else form, input.get("grammar")
