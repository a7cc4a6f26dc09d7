"""The examples of a pass: which ones, in which role, and their tokens."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqlite_utils import Database

from agentd.config import Gate
from agentd.engine.encode import shared_prefix
from agentd.engine.protocol import Encoded
from agentd.errors import PassRefused
from agentd.store import examples, tasks
from agentd.store.examples import Example
from agentd.store.tasks import Task

_DEV_EVERY = 8  # one training example in eight judges the training itself; the gate's holdout stays untouched


@dataclass(frozen=True)
class Member:
    """An example in its role: `train`, `dev` or `holdout`. `number` is its place in the engine's session;
    `established` that it judged an earlier revision that was committed."""

    number: int
    example: Example
    role: str
    task: Task
    established: bool = False

    @property
    def choices(self) -> list[str]:
        """Labels are told apart; a demonstration is learned as text, whatever the task."""
        return self.task.choices if self.example.kind == "label" else []


@dataclass(frozen=True)
class Dataset:
    members: list[Member]
    left_out: dict[str, str]

    def of(self, *roles: str) -> list[Member]:
        return [member for member in self.members if member.role in roles]

    def write(self, path: Path) -> None:
        """As the engine's session reads it: one {"input", "choices", "target"} a line."""
        with path.open("w", encoding="utf-8") as file:
            for member in self.members:
                line = {"input": member.example.input, "choices": member.choices, "target": member.example.target}
                file.write(json.dumps(line, ensure_ascii=False) + "\n")


def select(db: Database, *, limit: int, seed: int, gate: Gate) -> Dataset:
    """Takes what a pass learns from, and what judges it.

    A task is adapted only if enough holdout can tell whether that helped; the others' examples wait. Every task with
    holdout is judged, adapted or not. Raises PassRefused when nothing can be learned.
    """
    known = {task.name: task for task in tasks.all(db)}
    chosen = examples.for_training(db, limit, seed)
    holdout = {name: examples.holdout(db, name, gate.max_holdout) for name in known}
    left_out: dict[str, str] = {}
    for name in sorted({example.task for example in chosen}):
        n = len(holdout[name])
        if n < gate.min_holdout:
            left_out[name] = f"{n} holdout examples, gate.min_holdout asks for {gate.min_holdout}"
        elif _single_answer(chosen, name, known[name]):
            left_out[name] = "all its training examples have the same label"
    chosen = [example for example in chosen if example.task not in left_out]
    roles = [(example, "dev" if is_dev(example.id) else "train") for example in chosen]
    roles += [(example, "holdout") for name in sorted(holdout) for example in holdout[name]]
    old = {id for name in known for id in examples.established(db, name)}
    dataset = Dataset(
        [
            Member(i, example, role, known[example.task], role == "holdout" and example.id in old)
            for i, (example, role) in enumerate(roles)
        ],
        left_out,
    )
    if not dataset.of("train"):
        why = "; ".join(f"task {name}: {reason}" for name, reason in left_out.items())
        raise PassRefused(f"there is nothing to learn from: {why or 'no training examples'}. Send more feedback")
    return dataset


def judging(db: Database, gate: Gate) -> Dataset:
    """The holdout of every task that has enough of it, and nothing to learn from; it may be empty."""
    known = {task.name: task for task in tasks.all(db)}
    holdout = {name: examples.holdout(db, name, gate.max_holdout) for name in sorted(known)}
    enough = [(name, example) for name, held in holdout.items() if len(held) >= gate.min_holdout for example in held]
    return Dataset([Member(i, example, "holdout", known[name]) for i, (name, example) in enumerate(enough)], {})


def is_dev(id: str) -> bool:
    """Whether a training example judges the training; like the split, for life and from other digits of its id."""
    return int(id[8:16], 16) % _DEV_EVERY == 0


def _single_answer(chosen: Iterable[Example], name: str, task: Task) -> bool:
    targets = {example.target for example in chosen if example.task == name and example.kind == "label"}
    labels = [example for example in chosen if example.task == name]
    return bool(task.choices) and len(targets) == 1 and all(example.kind == "label" for example in labels)


def usable(dataset: Dataset, encoded: Path) -> tuple[Dataset, dict[int, dict[str, Any]]]:
    """The dataset without what could not be encoded, and every other member's tokens by its number."""
    tokens: dict[int, dict[str, Any]] = {}
    members = []
    left_out = dict(dataset.left_out)
    with encoded.open(encoding="utf-8") as lines:
        for member, line in zip(dataset.members, lines, strict=True):
            tree = json.loads(line)
            if "error" in tree:
                left_out[f"example {member.example.id}"] = tree["error"]
            else:
                tokens[member.number] = tree
                members.append(member)
    if dataset.of("train") and not any(member.role == "train" for member in members):
        raise PassRefused("none of the training examples fits the background context; " + next(iter(left_out.values())))
    return Dataset(members, left_out), tokens


def trainer_examples(
    members: list[Member], tokens: Mapping[int, dict[str, Any]], sequences: list[list[list[int]]], *, chooses: bool
) -> list[dict[str, Any]]:
    """Examples as the trainer's specification has them; `sequences` are their places in the tap file.

    chooses  those of dev judge the training instead of being learned from
    """
    return [
        {
            "id": member.example.id,
            "number": member.number,
            "dev": chooses and member.role == "dev",
            "task": member.example.task,
            "sequences": [{"offset": offset, "n": n} for offset, n in places],
            "choices": tokens[member.number]["choices"],
            "correct": tokens[member.number]["correct"],
            "target": tokens[member.number]["target"],
        }
        for member, places in zip(members, sequences, strict=True)
    ]


def layout(members: list[Member], tokens: Mapping[int, dict[str, Any]]) -> dict[str, Any]:
    """Places in a tap file for what the trainer will compute: what all sequences share, then the rest of each.

    Like the engine's answer to `tap`, with the token of every row besides.
    """
    encoded = [Encoded(**tokens[member.number]) for member in members]
    n = shared_prefix(encoded)
    rows = encoded[0].sequences[0][:n]
    sequences = []
    for each in encoded:
        placed = []
        for sequence in each.sequences:
            placed.append([len(rows), len(sequence) - n])
            rows += sequence[n:]
        sequences.append(placed)
    return {"prefix_rows": n, "sequences": sequences, "tokens": rows}
