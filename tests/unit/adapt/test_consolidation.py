"""When the next pass is to begin at the base."""

import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from sqlite_utils import Database

from agentd import ids
from agentd.adapt.consolidation import due
from agentd.config.schema import ConsolidateSettings
from agentd.store import meanings, passes, revisions, tasks
from agentd.store.database import Store
from agentd.store.revisions import Revision
from agentd.store.tasks import Task

SETTINGS = ConsolidateSettings(depth=4, drift=0.5)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with closing(Store(tmp_path / "agentd.db")) as store:
        yield store


def learn(db: Database, /, state: str = "committed", drift: float = 0.0, **options: Any) -> None:
    """A pass that ended so, on what served."""
    serving = revisions.committed(db)
    row = passes.create(db, "manual", serving, 0, options)
    db.execute("UPDATE passes SET state = ?, gate = json_object('drift', ?) WHERE id = ?", [state, drift, row.id])
    if state == "committed":
        parent, number = 0 if options.get("consolidate") else serving, revisions.next_id(db)
        revisions.add(db, Revision(number, parent, row.id, row.created_at, "committed", None, "mezo", 0, "", {}))
        revisions.activate(db, number, "")


def reason(store: Store, settings: ConsolidateSettings = SETTINGS) -> str | None:
    return store.do(due, settings, 1.0)


def test_after_so_many_passes_on_each_other(store: Store) -> None:
    assert reason(store) is None
    for _ in range(3):
        store.do(learn)
    store.do(learn, "rejected")
    assert reason(store) is None
    store.do(learn)
    assert "4 passes" in (reason(store) or "")
    assert reason(store, ConsolidateSettings(depth=0)) is None


def test_after_labels_changed_their_meaning(store: Store) -> None:
    task = Task("mood", ["bad", "good"], False, "accuracy", None, "config", ids.now())
    store.do(tasks.declare, task)
    store.do(meanings.change, task, ["bad", "good"], "2026-01-01")
    assert reason(store) is None  # nothing was learned before
    time.sleep(0.002)
    store.do(learn)
    assert reason(store) is None
    time.sleep(0.002)
    store.do(meanings.change, task, ["bad", "good"], "2026-01-02")
    assert reason(store) == "labels of task mood have changed their meaning"
    changed = store.do(tasks.get, "mood")
    store.do(meanings.take_back, changed)
    assert reason(store) is None  # they have not
    store.do(meanings.change, changed, ["bad", "good"], "2026-01-03")
    assert reason(store) is not None
    store.do(learn, "rejected", consolidate=True)
    assert reason(store) is None


def test_one_that_was_tried_is_tried_again_after_as_many(store: Store) -> None:
    for state in ("rejected", "committed"):
        for _ in range(4):
            store.do(learn)
        assert reason(store)
        store.do(learn, state, consolidate=True)
        assert reason(store) is None
    assert store.do(lambda db: revisions.lineage(db, revisions.committed(db)))[1:] == [0]


def test_drift_is_a_reason_where_passes_stand_on_each_other(store: Store) -> None:
    store.do(learn, drift=0.9)
    assert reason(store) is None
    store.do(learn, drift=0.4)
    assert reason(store) is None
    store.do(learn, drift=0.5)
    assert "drifted 0.500" in (reason(store) or "")


def test_a_rollback_leads_to_what_served(store: Store) -> None:
    for _ in range(2):
        store.do(learn)
    before = store.do(revisions.committed)
    assert store.do(revisions.predecessor, before) == before - 1
    store.do(learn, consolidate=True)
    serving = store.do(revisions.committed)
    assert store.do(revisions.get, serving).parent == 0
    assert store.do(revisions.predecessor, serving) == before
    assert store.do(revisions.predecessor, 0) is None
