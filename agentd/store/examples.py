"""Examples: what a pass learns from and what the gate measures it on. One per task and input."""

import hashlib
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from sqlite_utils import Database

from agentd import faults, ids
from agentd.store import tasks
from agentd.store.row import Row, insert, select, to_json, where

_NEWEST = "ORDER BY updated_at DESC, rowid DESC"
_USABLE = "state IN ('new', 'used')"


@dataclass(frozen=True)
class Example(Row):
    """`target` is the label or the text to say; `updated_at` is when it was last set, by `author`. Passes
    take part in proportion to `weight`."""

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
    author: str | None = None
    weight: float = 1.0


@dataclass(frozen=True)
class NewExample:
    """An example to add; `kind` is label or demonstration, `input` {"messages": [...]} or {"prompt": "..."}, `line`
    where it stands in an imported file, `author` who says so and `weight` (0, 1] how far that one is believed."""

    task: str
    kind: str
    input: dict[str, Any]
    target: str
    source_inference_id: str | None = None
    line: int | None = None
    author: str | None = None
    weight: float = 1.0


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


def put(db: Database, new: NewExample) -> tuple[Example, str]:
    """Stores an example that its task has admitted, and says whether it was added, replaced or unchanged."""
    id, now = identify(new.task, new.input), ids.now()
    found = select(db, Example, "WHERE id = ?", [id])
    if found and (found[0].kind, found[0].target) == (new.kind, new.target):
        if new.weight > found[0].weight:  # somebody who is believed more says the same
            db.execute("UPDATE examples SET weight = ? WHERE id = ?", [new.weight, id])
        return found[0], "unchanged"
    if found:
        db.execute(
            "UPDATE examples SET kind = ?, target = ?, state = 'new', updated_at = ?, author = ?, weight = ?,"
            " source_inference_id = coalesce(?, source_inference_id) WHERE id = ?",
            [new.kind, new.target, now, new.author, new.weight, new.source_inference_id, id],
        )
        return select(db, Example, "WHERE id = ?", [id])[0], "replaced"
    example = Example(
        id=id,
        task=new.task,
        kind=new.kind,
        input=new.input,
        target=new.target,
        split=split_of(id),
        state="new",
        source_inference_id=new.source_inference_id,
        created_at=now,
        updated_at=now,
        author=new.author,
        weight=new.weight,
    )
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

    An example of weight w takes part with probability w. All of it depends on `seed` and on nothing else but what is
    stored.
    """
    chosen = "SELECT id, weight FROM examples WHERE split = 'train' AND state = '{}' ORDER BY {}"
    fresh = _drawn(db.execute(chosen.format("new", "updated_at DESC, rowid DESC")), seed)[:limit]
    used = _drawn(db.execute(chosen.format("used", "id")), seed)
    sample = random.Random(seed).sample(used, min(limit - len(fresh), len(used)))
    return _by_id(db, fresh) + _by_id(db, sorted(sample))


def holdout(db: Database, task: str, limit: int) -> list[Example]:
    """At most `limit` of the task's held-out examples, newest first; those of weight w are a share w of theirs.

    Half of the places are kept for established ones, as long as there are any: whoever sends many new ones cannot
    push out what the task has been judged by so far.
    """
    statement = f"SELECT id, weight FROM examples WHERE task = ? AND split = 'holdout' AND {_USABLE} {_NEWEST}"
    found = _drawn(db.execute(statement, [task]), 0)
    if len(found) > limit:
        known = established(db, task)
        old = [id for id in found if id in known]
        kept = max(limit - (len(found) - len(old)), min(len(old), limit // 2))
        chosen = {*old[:kept], *[id for id in found if id not in known][: limit - kept]}
        found = [id for id in found if id in chosen]
    return _by_id(db, found)


def established(db: Database, task: str) -> set[str]:
    """The held-out examples that judged a pass which was committed, and that nobody has changed since."""
    rows = db.execute(
        "SELECT DISTINCT examples.id FROM examples"
        " JOIN pass_examples ON example_id = examples.id AND role = 'holdout'"
        " JOIN passes ON passes.id = pass_id AND passes.state = 'committed'"
        " WHERE examples.task = ? AND updated_at <= passes.created_at",
        [task],
    )
    return {id for (id,) in rows}


def _drawn(rows: Iterable[tuple[str, float]], seed: int) -> list[str]:
    return [id for id, weight in rows if weight >= 1 or random.Random(f"{seed}/{id}").random() < weight]


def _by_id(db: Database, ids: Sequence[str]) -> list[Example]:
    """In the order of `ids`."""
    rows = select(db, Example, "WHERE id IN (SELECT value FROM json_each(?))", [to_json(list(ids))])
    found = {example.id: example for example in rows}
    return [found[id] for id in ids]


def mark_used(db: Database, ids: Iterable[str], as_of: str | None = None) -> None:
    """Notes that a revision has learned them; those corrected after `as_of` (ISO 8601) stay new."""
    statement = "UPDATE examples SET state = 'used' WHERE id = ? AND state = 'new' AND updated_at <= ?"
    for id in ids:
        db.execute(statement, [id, as_of or "9999"])
    faults.change("examples used")


def exclude(db: Database, ids: Iterable[str]) -> None:
    """Leaves them out of training and of the gate until they get another target."""
    for id in ids:
        db.execute("UPDATE examples SET state = 'excluded' WHERE id = ?", [id])
