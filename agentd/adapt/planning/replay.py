"""The model's own answers to messages that want no call, learned beside calls so that these stay where they belong.

Who learns calls learns to call. Where most of a task's examples do, a pass has the model that serves answer small
talk with the task's tools, and learns those answers in words again: what it did well before is to stay as it was.
"""

import json
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agentd.adapt.planning import small_talk
from agentd.adapt.planning.dataset import Dataset, Member
from agentd.engine.operations import Answered
from agentd.store.demonstrations import MESSAGE
from agentd.store.examples import Example
from agentd.store.tasks import Task

SECONDS = 60.0  # that answering takes at most
TOKENS = 24  # of an answer: how one begins tells whether it calls
_CALL_TOKENS = 40  # until it is known that a call is one
_MOST = 64  # of a task
_LAST_WORD = re.compile(r"(?<=\S)\s+\S+$")
_ROUNDS = 3  # of messages about words of the task


@dataclass(frozen=True)
class ReplayQuestion:
    """What is asked, of which task."""

    task: Task
    input: dict[str, Any]


def questions(data: Dataset, seed: int) -> list[ReplayQuestion]:
    """What the model is to answer before it learns from this data; `seed` says which of the messages."""
    asked: list[ReplayQuestion] = []
    lines = small_talk.texts(small_talk.LEARNED)
    for task in {member.task.name: member.task for member in data.of("train")}.values():
        members = [member for member in data.members if member.task.name == task.name and member.role != "holdout"]
        free = [member for member in members if member.answered and small_talk.is_free(member.example.input)]
        n_calls = sum(small_talk.calls(member.target) for member in free)
        if 2 * n_calls > len(free):
            inputs = small_talk.inputs(lines, members, part=1, rounds=_ROUNDS)
            random.Random(seed).shuffle(inputs)
            asked += [ReplayQuestion(task, input) for input in inputs[: min(_MOST, n_calls)]]
    return asked


def write(asked: Sequence[ReplayQuestion], path: Path) -> None:
    """As engine.answering reads it, a question a line."""
    how = {"target": "", "max_tokens": TOKENS + _CALL_TOKENS, "enough": {"text": TOKENS, "call": True}}
    lines = [json.dumps({"input": question.input, **how}, ensure_ascii=False) for question in asked]
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")


def members(asked: Sequence[ReplayQuestion], answers: Sequence[Answered | None], first: int) -> list[Member]:
    """What is learned of them, numbered from `first`: answers in words. Of one that was cut the words alone are
    learned, not that it ends there."""
    learned: list[Member] = []
    for question, answer in zip(asked, answers, strict=True):
        if answer is None or answer.error or answer.calls or not answer.text.strip():
            continue
        text = answer.text.rstrip()
        if not answer.whole:  # the last word may be half of one
            text = _LAST_WORD.sub("", text)
        target, name = json.dumps({"role": "assistant", "content": text}, ensure_ascii=False), question.task.name
        example = Example("", name, MESSAGE, question.input, target, "train", "used", None, "", "", "")
        learned.append(Member(first + len(learned), example, "replay", question.task, whole=answer.whole))
    return learned
