"""The schema is what nine steps made before they became one, and goes on from there."""

import re
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
from sqlite_utils import Database

from agentd.errors import StateTooOld
from agentd.store import examples, revisions, tasks
from agentd.store.database import Store
from agentd.store.examples import NewExample
from agentd.store.migrations import migrations
from tests.support.store_samples import database_of_nine_steps


def objects(path: Path) -> dict[tuple[str, str], str]:
    """Every table, index and trigger as SQLite remembers it, without comments and the blanks that mean nothing."""
    with closing(sqlite3.connect(path)) as db:
        rows = db.execute("SELECT type, name, coalesce(sql, '') FROM sqlite_master").fetchall()
    without = [(type, name, re.sub(r"--[^\n]*", "", sql)) for type, name, sql in rows]
    return {(type, name): re.sub(r"\s*([(),;])\s*", r"\1", " ".join(sql.split())) for type, name, sql in without}


def schema_version(path: Path) -> int:
    with closing(sqlite3.connect(path)) as db:
        return int(db.execute("PRAGMA schema_version").fetchone()[0])


def test_a_fresh_database_is_one_that_nine_steps_made(tmp_path: Path) -> None:
    fresh, older = tmp_path / "fresh.db", database_of_nine_steps(tmp_path / "older.db")
    with closing(Database(fresh)) as db:
        migrations.apply(db, stop_before="m010_meanings")
    assert objects(fresh) == objects(older)
    assert len(objects(fresh)) == 77


def test_it_goes_on_as_a_fresh_one_does_with_all_that_it_holds(tmp_path: Path) -> None:
    fresh, path = tmp_path / "fresh.db", database_of_nine_steps(tmp_path / "agentd.db")
    Store(fresh).close()
    task = ("home", '["on","off"]', 0, "accuracy", "feedback", "2026-11-01T00:00:00.000Z")
    with closing(sqlite3.connect(path)) as db:
        db.execute(
            "INSERT INTO tasks (name, choices, open, metric, source, created_at) VALUES (?, ?, ?, ?, ?, ?)", task
        )
        db.commit()
    with closing(Store(path)) as store:
        store.do(examples.add, NewExample("home", "label", {"prompt": "lamp"}, "on"))
        assert [revision.id for revision in store.do(revisions.all)] == [0]
        assert store.do(tasks.get, "home").meaning == {}
    assert objects(path) == objects(fresh)
    before = schema_version(path)
    Store(path).close()
    assert schema_version(path) == before  # and once only


@pytest.mark.parametrize(("steps", "last"), [(1, "m001_initial"), (1, "m001_release_0_1_0"), (8, "m008_fleet")])
def test_one_that_lacks_a_step_is_refused_untouched(tmp_path: Path, steps: int, last: str) -> None:
    path = database_of_nine_steps(tmp_path / "agentd.db")
    with closing(sqlite3.connect(path)) as db:
        db.execute("DELETE FROM _sqlite_migrations WHERE id > ?", [steps])
        db.execute("UPDATE _sqlite_migrations SET name = ? WHERE id = ?", [last, steps])
        db.commit()
    before = path.read_bytes()
    with pytest.raises(StateTooOld, match=rf"{last}\).*not touched.*start afresh.*install the version that wrote it"):
        Store(path)
    assert path.read_bytes() == before
