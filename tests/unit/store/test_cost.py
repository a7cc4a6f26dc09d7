"""What is asked often costs what it returns, not what is stored: every statement goes through indexes and counters."""

import re
import sqlite3
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from sqlite_utils import Database

from agentd.adapt.planning import dataset
from agentd.config.schema import GateSettings
from agentd.store import examples, feedback, forgetting, imports, inferences, passes, scores, selection, tasks
from agentd.store.database import Store
from agentd.store.examples import NewExample
from agentd.store.feedback import NewFeedback
from agentd.store.forgetting import Selection
from agentd.store.tasks import Task
from tests.support.store_samples import inference

LARGE = ("examples", "inferences", "feedback", "pass_examples", "scores")
_SCAN = re.compile(rf"SCAN ({'|'.join(LARGE)})\b")


@pytest.fixture
def filled(store: Store) -> Store:
    """A little of everything, and no statistics: a daemon never runs ANALYZE."""

    def fill(db: Database) -> None:
        tasks.declare(db, Task("t", ["1", "2"], False, "accuracy", None, "feedback", "2026-01-01T00:00:00.000Z"))
        imports.add_many(db, [NewExample("t", "label", {"prompt": f"{i}"}, str(1 + i % 2)) for i in range(100)])
        row = passes.create(db, "manual", 0, 0, {})
        held = [row.id for row in examples.list_(db, 5, split="holdout")]
        passes.add_examples(db, row.id, [(id, "holdout") for id in held])
        db.execute("UPDATE passes SET state = 'committed'")
        examples.mark_used(db, [row.id for row in examples.list_(db, 30, split="train")])
        for number in range(5):
            inferences.record(db, inference(id=f"i{number}", author="uid:1"))
            feedback.add(db, NewFeedback(f"i{number}", "label", "1", task="t", author="uid:1"))

    store.do(fill)
    return store


def _scans(store: Store, work: Callable[[Database], Any]) -> Iterator[str]:
    """Steps of the plans of what `work` runs that read a large table, or an index of it, from one end to the other."""
    statements: list[str] = []

    def watched(db: Database) -> None:
        db.conn.set_trace_callback(statements.append)
        try:
            work(db)
        finally:
            db.conn.set_trace_callback(None)

    store.do(watched)
    assert [each for each in statements if each.lstrip().upper().startswith(("SELECT", "UPDATE", "DELETE"))]
    connection = sqlite3.connect(store.path)
    for statement in statements:
        if statement.lstrip().startswith("--") or not statement.lstrip().upper().startswith(("SELECT", "UPDATE")):
            continue
        steps = [step for *_, step in connection.execute(f"EXPLAIN QUERY PLAN {statement}")]
        # A plain list ends after its page; a condition, or an order that no index has, makes it read on.
        ends = " LIMIT " in statement and " WHERE " not in statement and not any("ORDER BY" in step for step in steps)
        yield from (f"{step}: {statement}" for step in steps if _SCAN.match(step) and not ends)
    connection.close()


CALLS: dict[str, Callable[[Database], Any]] = {
    "counts": examples.count,
    "excluded": examples.excluded,
    "expected new": examples.expected_new,
    "readiness": lambda db: dataset.readiness(db, GateSettings()),
    "dataset": lambda db: dataset.select(db, limit=20, seed=1, gate=GateSettings(min_holdout=1)),
    "holdout": lambda db: selection.holdout(db, "t", 3),
    "new since": lambda db: examples.new_since(db, 10, ["t", "u"]),
    "examples": lambda db: examples.list_(db, 5),
    "examples of a task": lambda db: examples.list_(db, 5, 5, task="t"),
    "examples of a state": lambda db: examples.list_(db, 5, state="excluded"),
    "examples of a task's split": lambda db: examples.list_(db, 5, task="t", split="train"),
    "inferences": lambda db: inferences.latest(db, 5),
    "inferences of an episode": lambda db: inferences.latest(db, 5, episode="night"),
    "examples that wait, held out": lambda db: examples.list_(db, 5, split="holdout", state="new"),
    "feedback of an author in a state": lambda db: feedback.list_(db, 5, only={"author": "uid:1", "state": "accepted"}),
    "feedback": lambda db: feedback.list_(db, 5),
    "scores": lambda db: scores.series(db, 5),
    "feedback of a task": lambda db: feedback.list_(db, 5, only={"task": "t", "kind": "label"}),
    "feedback counts": lambda db: [feedback.count(db, {name: "t"}) for name in ("kind", "task", "state", "author")],
    "feedback given": lambda db: feedback.add(db, NewFeedback("i1", "label", "2", task="t", author="uid:1")),
    "quarantined": lambda db: feedback.quarantined(db, "uid:1", "human"),
    "forgetting": lambda db: forgetting.forget(db, Selection(inferences=("i2",), authors=("uid:1",))),
    "pruning": lambda db: inferences.prune(db, "2026-01-01T00:00:00.000Z"),
}


@pytest.mark.parametrize("call", CALLS)
def test_no_call_reads_a_large_table_from_one_end_to_the_other(filled: Store, call: str) -> None:
    assert list(_scans(filled, CALLS[call])) == []


def test_a_scan_is_seen(filled: Store) -> None:
    work = lambda db: db.execute("SELECT count(*) FROM examples WHERE weight < 1").fetchone()  # noqa: E731
    assert len(list(_scans(filled, work))) == 1
    work = lambda db: db.execute("SELECT sum(weight) FROM examples ORDER BY updated_at").fetchone()  # noqa: E731
    assert len(list(_scans(filled, work))) == 1
