"""The tasks of a simulated life: what is asked, what is right, and how somebody corrects it."""

import json
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from agentd.learn.metrics import same_calls
from tools import home, reviews
from tools.bench.elastic_tasks import sarcasm as headlines

Row = dict[str, Any]
"""{"text", "right"}: `right` is a label, a text, or an assistant's message with a call."""

_ANSWER_TOKENS = 64


@dataclass(frozen=True)
class LifeTask:
    """`train` rows are corrected, `held` ones are asked to measure; `choices` are labels, `tools` are declared with
    every request, `prompt` has {text}."""

    name: str
    train: list[Row]
    held: list[Row]
    prompt: str = "{text}"
    choices: tuple[str, ...] = ()
    metric: str = "auto"
    tools: tuple[Mapping[str, Any], ...] = ()
    labels: Mapping[str, str] = field(default_factory=dict)
    """What people mean by a label from now on, where that has changed."""

    @property
    def settings(self) -> dict[str, Any]:
        """As the configuration declares it."""
        return {"choices": list(self.choices), "metric": self.metric} if self.choices else {"metric": self.metric}

    def request(self, row: Row) -> dict[str, Any]:
        body: dict[str, Any] = {
            "messages": [{"role": "user", "content": self.prompt.replace("{text}", row["text"])}],
            "temperature": 0,
            "max_tokens": _ANSWER_TOKENS,
            "metadata": {"task": self.name},
        }
        return {**body, "tools": list(self.tools)} if self.tools else body

    def right(self, row: Row) -> Any:
        return self.labels.get(row["right"], row["right"]) if self.choices else row["right"]

    def is_right(self, row: Row, message: Mapping[str, Any]) -> bool:
        right = self.right(row)
        if isinstance(right, dict):
            return same_calls(message.get("tool_calls") or [], right["tool_calls"])
        return bool((message["content"] or "").strip() == right)

    def wrong(self, row: Row, draw: random.Random) -> Any:
        """Another answer of the task than the right one, as somebody gives it who is mistaken."""
        others = [other for each in self.train if (other := self.right(each)) != self.right(row)]
        return draw.choice(others)

    def feedback(self, inference: str, right: Any) -> dict[str, Any]:
        kind = "label" if self.choices else "demonstration"
        return {"inference_id": inference, "kind": kind, "value": right, "task": self.name}

    def line(self, row: Row) -> bytes:
        """As a line of `POST /v1/examples`."""
        messages, right = self.request(row)["messages"], self.right(row)
        tree: dict[str, Any] = {"task": self.name, "messages": messages}
        if self.choices:
            return json.dumps({**tree, "label": right}).encode()
        answer = right if isinstance(right, dict) else {"role": "assistant", "content": right}
        tools = {"tools": list(self.tools)} if self.tools else {}
        return json.dumps({**tree, **tools, "messages": [*messages, answer]}).encode()


def tasks(names: list[str], seed: int, sarcasm: Path | None) -> list[LifeTask]:
    """By name, each with its rows in an order that `seed` says. Raises KeyError, ValueError for `sarcasm` without a
    file."""
    made = [_MAKERS[name](sarcasm) for name in names]
    return [_shuffled(task, seed) for task in made]


def _shuffled(task: LifeTask, seed: int) -> LifeTask:
    rows = list(task.train)
    random.Random(f"{seed}/{task.name}").shuffle(rows)
    return LifeTask(task.name, rows, task.held, task.prompt, task.choices, task.metric, task.tools)


def _reviews(_: Path | None) -> LifeTask:
    train, held = ([{"text": r["text"], "right": r["label"]} for r in reviews.liked(s)] for s in ("train", "heldout"))
    question = "Did the reviewer like this movie? Answer yes or no.\n\n{text}"
    return LifeTask("reviews", train, held, question, ("yes", "no"), "accuracy")


def _sarcasm(file: Path | None) -> LifeTask:
    if file is None:
        raise ValueError("task sarcasm needs --sarcasm FILE: sarcasm/samples.jsonl of the source distribution of evals")
    task = headlines("heldout", file)

    def rows(pairs: list[tuple[str, int]]) -> list[Row]:
        cut = [(prompt.removeprefix("Headline: ").partition("\nIs this")[0], right) for prompt, right in pairs]
        return [{"text": text, "right": ("no", "yes")[right]} for text, right in cut]

    question = "Is this headline sarcastic? Answer yes or no.\n\n{text}"
    return LifeTask("sarcasm", rows(task.train), rows(task.judged), question, ("yes", "no"), "accuracy")


@cache
def _commands(split: str) -> tuple[Row, ...]:
    return tuple(home.commands(split))


def _intents(_: Path | None) -> LifeTask:
    """What a command of a home is about, as a label."""
    names = tuple(sorted({row["name"].removeprefix("Hass") for row in _commands("train")}))
    train, held = (
        [{"text": row["text"], "right": row["name"].removeprefix("Hass")} for row in _commands(split)]
        for split in ("train", "heldout")
    )
    question = f"Which of these is the command about: {', '.join(names)}?\n\n{{text}}"
    return LifeTask("intents", train, held, question, names, "accuracy")


def _home(_: Path | None) -> LifeTask:
    train, held = (
        [{"text": row["text"], "right": home.answer(row)} for row in _commands(split)] for split in ("train", "heldout")
    )
    return LifeTask("home", train, held, metric="call", tools=tuple(home.TOOLS))


def _notes(_: Path | None) -> LifeTask:
    """Free text: a command as a line of a log, of which every word has to be right."""

    def note(row: Row) -> str:
        values = ", ".join(str(value) for value in home.order(row["name"], row["arguments"]).values())
        return f"{row['name'].removeprefix('Hass')}: {values}"

    train, held = ([{"text": r["text"], "right": note(r)} for r in _commands(split)] for split in ("train", "heldout"))
    return LifeTask("notes", train, held, "Write this command as a line of the log.\n\n{text}", metric="exact")


_MAKERS: dict[str, Callable[[Path | None], LifeTask]] = {
    "reviews": _reviews,
    "sarcasm": _sarcasm,
    "intents": _intents,
    "home": _home,
    "notes": _notes,
}
NAMES = tuple(_MAKERS)
