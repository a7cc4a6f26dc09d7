"""What recall of a task is judged by: examples, and for each the corrections that a request like it would get."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqlite_utils import Database

from agentd.adapt.planning.dataset import Member
from agentd.adapt.recall.turns import MOST, Recollection, recollect
from agentd.adapt.recall.verdict import COUNTS
from agentd.config.schema import GateSettings
from agentd.engine.operations import Answered
from agentd.learn import metrics
from agentd.store import selection, tasks
from agentd.store.demonstrations import MESSAGE
from agentd.store.examples import Example
from agentd.store.normalise import same_label
from agentd.store.row import select
from agentd.store.tasks import Task

_EXAMPLES = 64  # that judge; each is answered once for every number of corrections


@dataclass(frozen=True)
class Question:
    """An example as it would be asked, with the corrections that are nearest to it."""

    member: Member
    choices: Sequence[str]
    recollection: Recollection

    def line(self, k: int, tokens: int) -> dict[str, Any]:
        """As the engine reads it, with `k` corrections."""
        tree = {"input": self.member.example.input, "target": self.member.target, "choices": list(self.choices)}
        recalled = self.recollection.first(k).for_prompt(tokens)
        return tree if recalled is None else {**tree, "recalled": {"turns": recalled.turns, "tokens": tokens}}


@dataclass(frozen=True)
class Examination:
    """`corrections` is how many training examples the task has; `tokens` the budget of a prompt."""

    task: Task
    metric: str
    held_out: bool
    corrections: int
    tokens: int
    questions: list[Question]

    @property
    def counts(self) -> list[int]:
        """Numbers of corrections that differ in what is recalled."""
        most = max((len(question.recollection.ids) for question in self.questions), default=0)
        return [k for i, k in enumerate(COUNTS) if i == 0 or COUNTS[i - 1] < most]

    def write(self, path: Path) -> list[range]:
        """A line for every question and number of corrections; returns the lines of none, and of each of `counts`."""
        n = len(self.questions)
        with path.open("w", encoding="utf-8") as file:
            for k in (0, *self.counts):
                for question in self.questions:
                    file.write(json.dumps(question.line(k, self.tokens), ensure_ascii=False) + "\n")
        return [range(i * n, (i + 1) * n) for i in range(1 + len(self.counts))]

    def right(self, question: Question, said: Answered | None) -> bool | None:
        if said is None:
            return None
        target = question.member.target
        if question.member.example.kind == "label":
            return same_label(said.text.strip(), self.task.choices) == target
        metric = self.metric if self.metric in metrics.GENERATED else "exact"
        return metrics.share_right(metric, said.text, said.calls, target) == 1.0


def examination(db: Database, name: str, gate: GateSettings, tokens: int, corrections: int) -> Examination | None:
    """Held-out examples where there are enough of them; else the newest training examples, each without itself and
    what says the same. None where there is no such task, or nothing in it has a right answer."""
    task = tasks.find(db, name)
    if task is None:
        return None
    examples = selection.holdout(db, name, min(gate.max_holdout, _EXAMPLES))
    held_out = len(examples) >= gate.min_holdout
    if not held_out:
        newest = "WHERE task = ? AND split = 'train' AND state IN ('new', 'used') ORDER BY updated_at DESC LIMIT ?"
        examples = select(db, Example, newest, [name, _EXAMPLES])
    calls = any(example.kind == MESSAGE for example in examples)
    metric = metrics.resolved(task.metric, choices=bool(task.choices), calls=calls)
    members = [Member(i, example, "holdout", task) for i, example in enumerate(examples)]
    chosen = [member for member in members if member.answered and "messages" in member.example.input]
    if task.choices and metric == "accuracy":  # a task's demonstrations are no choices
        chosen = [member for member in chosen if member.example.kind == "label"]
    questions = [_question(db, member, tokens, held_out) for member in chosen]
    return Examination(task, metric, held_out, corrections, tokens, questions) if questions else None


def _question(db: Database, member: Member, tokens: int, held_out: bool) -> Question:
    example, task = member.example, member.task
    tools = "tools" in example.input
    choices = [] if task.open or tools or example.kind != "label" else task.choices
    recollection = recollect(
        db,
        task.name,
        example.input,
        choices,
        k=MOST,
        tokens=tokens,
        form=_form(example.input),
        without=() if held_out else (example.text_key,),
    )
    return Question(member, choices, recollection)


def _form(input: Mapping[str, Any]) -> dict[str, Any]:
    return {name: input.get(name) for name in ("response_format", "grammar")}
