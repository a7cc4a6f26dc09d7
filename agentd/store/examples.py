"""Examples: what a pass learns from and what the gate measures it on. One per task and input."""

import hashlib
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from sqlite_utils import Database

from agentd import ids
from agentd.errors import InvalidLine, InvalidRequest
from agentd.store import tasks
from agentd.store.row import Row, insert, select, to_json, where

_NEWEST = "ORDER BY updated_at DESC, rowid DESC"
_USABLE = "state IN ('new', 'used')"


@dataclass(frozen=True)
class Example(Row):
    """`target` is the label or the text to say; `updated_at` is when it was last set."""

    table = "examples"

    id: str
    task: str
    kind: str
    input: dict[str, Any]
    target: str
    split: str
    state: str
    source_inference_id: str | None
    created_at: str
    updated_at: str


@dataclass(frozen=True)
class NewExample:
    """An example to add; `kind` is label or demonstration, `input` {"messages": [...]} or {"prompt": "..."}, `line`
    where it stands in an imported file."""

    task: str
    kind: str
    input: dict[str, Any]
    target: str
    source_inference_id: str | None = None
    line: int | None = None


def identify(task: str, input: dict[str, Any]) -> str:
    """The example's id: 32 hexadecimal digits of the SHA-256 of its task and input."""
    return hashlib.sha256(to_json([task, input]).encode()).hexdigest()[:32]


def split_of(id: str) -> str:
    """Every fifth example is held out, for life: the split depends on nothing but the id."""
    return "holdout" if int(id[:8], 16) % 5 == 0 else "train"


def add(db: Database, new: NewExample) -> Example:
    """Adds the example to its task, which is declared if need be, or replaces the target of the same input.

    Raises what `tasks.admit` raises.
    """
    tasks.admit(db, new.task, new.kind, new.target)
    example, _ = put(db, new)
    return example


def add_many(db: Database, many: Sequence[NewExample]) -> dict[str, int]:
    """Adds all of them or none; returns how many were added, replaced (another target than before), unchanged.

    Raises InvalidLine with the example's `line`, or else its number counted from 1.
    """
    counts = {"added": 0, "replaced": 0, "unchanged": 0}
    with db.atomic():
        for number, new in enumerate(many, 1):
            try:
                tasks.admit(db, new.task, new.kind, new.target)
                _, change = put(db, new)
            except (InvalidRequest, UnicodeEncodeError) as error:
                raise InvalidLine(new.line or number, str(error)) from error
            counts[change] += 1
    return counts


def put(db: Database, new: NewExample) -> tuple[Example, str]:
    """Stores an example that its task has admitted, and says whether it was added, replaced or unchanged."""
    id, now = identify(new.task, new.input), ids.now()
    found = select(db, Example, "WHERE id = ?", [id])
    if found and (found[0].kind, found[0].target) == (new.kind, new.target):
        return found[0], "unchanged"
    if found:
        db.execute(
            "UPDATE examples SET kind = ?, target = ?, state = 'new', updated_at = ?,"
            " source_inference_id = coalesce(?, source_inference_id) WHERE id = ?",
            [new.kind, new.target, now, new.source_inference_id, id],
        )
        return select(db, Example, "WHERE id = ?", [id])[0], "replaced"
    source = new.source_inference_id
    example = Example(id, new.task, new.kind, new.input, new.target, split_of(id), "new", source, now, now)
    insert(db, example)
    return example, "added"


def list_(
    db: Database,
    limit: int,
    offset: int = 0,
    task: str | None = None,
    split: str | None = None,
    state: str | None = None,
) -> list[Example]:
    """Newest first."""
    clause, parameters = where(task=task, split=split, state=state)
    return select(db, Example, f"{clause} {_NEWEST} LIMIT ? OFFSET ?", [*parameters, limit, offset])


def count(db: Database) -> dict[str, dict[str, Any]]:
    """Usable examples by task: {task: {"train": {"new": n, "used": n}, "holdout": n}}."""
    counts: dict[str, dict[str, Any]] = {}
    grouped = f"SELECT task, split, state, count(*) FROM examples WHERE {_USABLE} GROUP BY task, split, state"
    for task, split, state, n in db.execute(grouped):
        entry = counts.setdefault(task, {"train": {"new": 0, "used": 0}, "holdout": 0})
        if split == "train":
            entry["train"][state] = n
        else:
            entry["holdout"] += n
    return counts


def count_new(db: Database) -> int:
    """Training examples that no committed pass has learned from."""
    row = db.execute("SELECT count(*) FROM examples WHERE split = 'train' AND state = 'new'").fetchone()
    return int(row[0])


def for_training(db: Database, limit: int, seed: int) -> list[Example]:
    """At most `limit` training examples: the new ones, newest first, then a replay sample of those used before.

    The sample depends on `seed` and on nothing else but what is stored.
    """
    fresh = select(db, Example, f"WHERE split = 'train' AND state = 'new' {_NEWEST} LIMIT ?", [limit])
    rows = db.execute("SELECT id FROM examples WHERE split = 'train' AND state = 'used' ORDER BY id")
    used = [id for (id,) in rows]
    sample = random.Random(seed).sample(used, min(limit - len(fresh), len(used)))
    replayed = select(db, Example, "WHERE id IN (SELECT value FROM json_each(?)) ORDER BY id", [to_json(sample)])
    return fresh + replayed


def holdout(db: Database, task: str, limit: int) -> list[Example]:
    """The task's held-out examples, newest first."""
    return select(db, Example, f"WHERE task = ? AND split = 'holdout' AND {_USABLE} {_NEWEST} LIMIT ?", [task, limit])


def mark_used(db: Database, ids: Iterable[str], as_of: str | None = None) -> None:
    """Notes that a revision has learned them; those corrected after `as_of` (ISO 8601) stay new."""
    statement = "UPDATE examples SET state = 'used' WHERE id = ? AND state = 'new' AND updated_at <= ?"
    for id in ids:
        db.execute(statement, [id, as_of or "9999"])


def exclude(db: Database, ids: Iterable[str]) -> None:
    """Leaves them out of training and of the gate until they get another target."""
    for id in ids:
        db.execute("UPDATE examples SET state = 'excluded' WHERE id = ?", [id])
