"""Examples: what a pass learns from and what the gate measures it on. One per task and input."""

import hashlib
import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from sqlite_utils import Database

from agentd import faults, ids
from agentd.store import events, recall_index, tasks
from agentd.store.normalise import input_text, normal_text
from agentd.store.row import Row, insert, select, to_json, where

SPLITS = ("train", "holdout")
STATES = ("new", "used", "stale", "excluded")
NEWEST = "ORDER BY updated_at DESC, rowid DESC"
UNUSABLE = "unusable"  # the kind of event that names examples which are excluded
_MOST_NAMED = 20  # examples that cannot be used; more say nothing new
USABLE = "state IN ('new', 'used')"


@dataclass(frozen=True)
class Example(Row):
    """`target` is the label or the text to say; of a `message` that one in JSON; of a `preference` {"chosen": text or
    message, "rejected": text or message} in JSON, of a `thumb` {"answer": ..., "good": bool}, of a `score`
    {"answer": ..., "score": number}. `updated_at` is when it was last set, by `author`. It takes part in
    passes in proportion to `weight`. `text_key` is the same for inputs about the same text, see `text_key`."""

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
    text_key: str
    author: str | None = None
    weight: float = 1.0


@dataclass(frozen=True)
class NewExample:
    """An example to add; `kind` and `target` are as `Example` has them, `input` {"messages": [...], "tools"?: [...]} or
    {"prompt": "..."}, `line` where it stands in an imported file, `author` who says so and `weight` (0, 1] how far that
    one is believed. `text` is what the input is about, where its sender knows that better than `input_text` can."""

    task: str
    kind: str
    input: dict[str, Any]
    target: str
    source_inference_id: str | None = None
    line: int | None = None
    author: str | None = None
    weight: float = 1.0
    text: str | None = None


def identify(task: str, input: dict[str, Any]) -> str:
    """The example's id: 32 hexadecimal digits of the SHA-256 of its task and input."""
    return hashlib.sha256(to_json([task, input]).encode()).hexdigest()[:32]


def text_key(new: NewExample) -> str:
    """32 hexadecimal digits of the SHA-256 of the task and the normalised text that the example is about."""
    return hashlib.sha256(to_json([new.task, normal_text(text_of(new))]).encode()).hexdigest()[:32]


def text_of(new: NewExample) -> str:
    """What the example is about."""
    return new.text if new.text is not None else input_text(new.input)


def split_of(key: str) -> str:
    """Every fifth text is held out, for life: the split depends on nothing but its key, so what differs in blanks,
    case, line ends or the prompt around it is on the same side."""
    return "holdout" if int(key[:8], 16) % 5 == 0 else "train"


def add(db: Database, new: NewExample) -> Example:
    """Adds the example to its task, which is declared if need be, or replaces the target of the same input.

    Raises what `tasks.admit` raises.
    """
    _, target = tasks.admit(db, new.task, new.kind, new.target)
    example, _ = put(db, replace(new, target=target))
    return example


def put(db: Database, new: NewExample) -> tuple[Example, str]:
    """Stores an example that its task has admitted, and says whether it was added, replaced or unchanged."""
    id, now = identify(new.task, new.input), ids.now()
    rows = select(db, Example, "WHERE id = ?", [id])
    if rows and (rows[0].kind, rows[0].target) == (new.kind, new.target):
        if new.weight > rows[0].weight:  # somebody who is believed more says the same
            db.execute("UPDATE examples SET weight = ? WHERE id = ?", [new.weight, id])
        return rows[0], "unchanged"
    if rows:
        db.execute(
            "UPDATE examples SET kind = ?, target = ?, state = 'new', updated_at = ?, author = ?, weight = ?,"
            " source_inference_id = coalesce(?, source_inference_id) WHERE id = ?",
            [new.kind, new.target, now, new.author, new.weight, new.source_inference_id, id],
        )
        return select(db, Example, "WHERE id = ?", [id])[0], "replaced"
    key = text_key(new)
    example = Example(
        id=id,
        task=new.task,
        kind=new.kind,
        input=new.input,
        target=new.target,
        split=split_of(key),
        state="new",
        source_inference_id=new.source_inference_id,
        created_at=now,
        updated_at=now,
        text_key=key,
        author=new.author,
        weight=new.weight,
    )
    insert(db, example)
    if example.split == "train":
        recall_index.add(db, id, new.task, text_of(new))
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
    if task is split is state is None:
        return select(db, Example, f"{NEWEST} LIMIT ? OFFSET ?", [limit, offset])
    # From the newest of every kind that may be among them, so that an index has each in its order.
    kinds = itertools.product([split] if split else SPLITS, [state] if state else STATES)
    branches, parameters = [], list[Any]()
    for one_split, one_state in kinds:
        clause, values = where(task=task, split=one_split, state=one_state)
        branches.append(f"SELECT * FROM (SELECT rowid AS row, updated_at FROM examples {clause} {NEWEST} LIMIT ?)")
        parameters += [*values, limit + offset]
    newest = f"SELECT row FROM ({' UNION ALL '.join(branches)}) ORDER BY updated_at DESC, row DESC LIMIT ? OFFSET ?"
    return select(db, Example, f"WHERE rowid IN ({newest}) {NEWEST}", [*parameters, limit, offset])


def count(db: Database) -> dict[str, dict[str, Any]]:
    """Usable examples by task: {task: {"train": {"new": n, "used": n}, "holdout": n}}."""
    counts: dict[str, dict[str, Any]] = {}
    for task, split, state, n in db.execute(
        f"SELECT task, split, state, sum(n) FROM example_counts WHERE {USABLE} AND n > 0 GROUP BY task, split, state"
    ):
        entry = counts.setdefault(task, {"train": {"new": 0, "used": 0}, "holdout": 0})
        if split == "train":
            entry["train"][state] = n
        else:
            entry["holdout"] += n
    return counts


def count_new(db: Database) -> int:
    """Training examples that no committed pass has learned from."""
    statement = "SELECT coalesce(sum(n), 0) FROM example_counts WHERE split = 'train' AND state = 'new'"
    return int(db.execute(statement).fetchone()[0])


def expected_new(db: Database) -> dict[str, float]:
    """By task, how many new training examples a pass would draw: the sum of their weights."""
    counted = "SELECT task, sum(n) FROM example_counts WHERE split = 'train' AND state = 'new' AND n > 0 GROUP BY task"
    expected = {task: float(n) for task, n in db.execute(counted)}
    doubted = (
        "SELECT task, sum(1.0 - weight) FROM examples"
        " WHERE split = 'train' AND state = 'new' AND weight < 1 GROUP BY task"
    )
    for task, doubt in db.execute(doubted):
        expected[task] -= doubt
    return expected


def new_since(db: Database, number: int, tasks: Iterable[str]) -> tuple[str | None, str | None]:
    """When the oldest new training example of these tasks was set, and since when there are `number` of them."""
    oldest = (
        "SELECT updated_at FROM examples WHERE task = ? AND split = 'train' AND state = 'new'"
        " ORDER BY updated_at LIMIT ?"
    )
    times = sorted(at for task in tasks for (at,) in db.execute(oldest, [task, number]))
    return (times[0] if times else None), (times[number - 1] if len(times) >= number else None)


def mark_used(db: Database, ids: Iterable[str], as_of: str | None = None) -> None:
    """Notes that a revision has learned them; those corrected after `as_of` (ISO 8601) stay new."""
    statement = "UPDATE examples SET state = 'used' WHERE id = ? AND state = 'new' AND updated_at <= ?"
    for id in ids:
        db.execute(statement, [id, as_of or "9999"])
    faults.change("examples used")


def excluded(db: Database, state: str = "excluded") -> dict[str, int]:
    """How many examples of each task are left out of everything: `excluded` because they cannot be used, or `stale`
    with their label, or the tool that they call."""
    counted = "SELECT task, sum(n) FROM example_counts WHERE state = ? AND n > 0 GROUP BY task"
    return dict(db.execute(counted, [state]).fetchall())


def set_aside(
    db: Database, unusable: Mapping[str, str], as_of: str | None, context: int, pass_id: int | None = None
) -> None:
    """Excludes what cannot be used, by its id and with the reason, and names it once, in events. `context` is that of
    the model, in tokens, which may be why."""
    exclude(db, unusable, as_of)
    for id, why in itertools.islice(unusable.items(), _MOST_NAMED):
        events.add(db, UNUSABLE, f"example {id}: {why}", pass_id=pass_id, data={"context": context})
    if (others := len(unusable) - _MOST_NAMED) > 0:
        more = f"{others} more examples, see `agentctl examples --state excluded`"
        events.add(db, UNUSABLE, more, pass_id=pass_id, data={"context": context})


def exclude(db: Database, ids: Iterable[str], as_of: str | None = None) -> None:
    """Leaves them out of training and of the gate until they get another target; those that got one after `as_of` (ISO
    8601) stay."""
    for id in ids:
        db.execute("UPDATE examples SET state = 'excluded' WHERE id = ? AND updated_at <= ?", [id, as_of or "9999"])


def readmit(db: Database, context: int) -> int:
    """Makes excluded examples new again where the context (tokens) has grown since they could not be used, which may
    have been why; returns how many."""
    last = events.last(db, (UNUSABLE,))
    if last is None or context <= last.data.get("context", context):
        return 0
    n = db.execute("UPDATE examples SET state = 'new' WHERE state = 'excluded'").rowcount
    if n:
        events.add(db, "examples tried again", f"{n} that could not be used: the context is {context} tokens now")
    return n
