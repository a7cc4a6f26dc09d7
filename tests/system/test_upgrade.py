"""A state that an older version has written: everything is there after the upgrade, and it goes on."""

import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from sqlite_utils import Database

from agentd.store.migrations import migrations
from tests.support.tiny_passes import LLAMACPP, adapt, gguf, teach
from tools.daemon import DaemonProcess

with closing(Database(memory=True)) as fresh:
    NAMES = [migration.name for migration in migrations.pending(fresh)]

# Are made by triggers, or of other tables.
_DERIVED = ("_counts", "recall_index", "recall_texts", "_sqlite_migrations")


def made_older(path: Path, first_unknown: str) -> None:
    """The database as the version left it that did not know this migration yet: its schema, with the same rows."""
    newer = path.with_name("newer.db")
    path.rename(newer)
    for name in (f"{path.name}-wal", f"{path.name}-shm"):
        path.with_name(name).unlink(missing_ok=True)
    with closing(Database(path)) as old:
        migrations.apply(old, stop_before=first_unknown)
        old.execute("PRAGMA foreign_keys = OFF")
        old.execute("ATTACH ? AS newer", [str(newer)])
        for table in old.tables:
            if table.name.endswith(_DERIVED) or "recall_index" in table.name:
                continue
            names = ", ".join(f'"{column.name}"' for column in table.columns)
            with old.conn:
                old.conn.execute(f'DELETE FROM main."{table.name}"')  # the base revision
                old.conn.execute(f'INSERT INTO main."{table.name}" ({names}) SELECT {names} FROM newer."{table.name}"')
    newer.unlink()


def rows(path: Path, *tables: str) -> dict[str, int]:
    with closing(sqlite3.connect(path)) as db:
        return {table: db.execute(f'SELECT count(*) FROM "{table}"').fetchone()[0] for table in tables}


@pytest.fixture(scope="module")
def state(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaemonProcess]:
    """A daemon, stopped, that has examples, answers with feedback, and a revision that serves."""
    folder = tmp_path_factory.mktemp("upgrade")
    with DaemonProcess(gguf(folder), LLAMACPP) as daemon:
        daemon.start()
        teach(daemon)
        for value in ("yes", "no"):
            id = daemon.ask(value, metadata={"task": "reviews"}).json["id"]
            assert daemon.post("/v1/feedback", {"inference_id": id, "kind": "label", "value": value}).status == 201
        assert adapt(daemon, method="suffix-bp", blocks=1)["state"] == "committed"
        assert daemon.stop() == 0
        yield daemon


TABLES = ("examples", "inferences", "feedback", "tasks", "passes", "revisions", "activations", "events", "steps")


@pytest.mark.parametrize("migration", NAMES[1:])
def test_nothing_is_lost(state: DaemonProcess, migration: str) -> None:
    path = state.state / "agentd.db"
    before = rows(path, *TABLES)
    made_older(path, migration)
    assert migration not in [name for (name,) in _applied(path)]
    state.start()
    after = rows(path, *TABLES)
    assert {**after, "events": before["events"]} == before
    assert after["events"] >= before["events"]
    assert state.status()["revision"] == 1
    assert len(state.get("/admin/examples?limit=1000", admin=True).json["examples"]) == before["examples"]
    assert state.post("/admin/rollback", {"revision": 0}, admin=True).status == 200
    assert state.post("/admin/rollback", {"revision": 1}, admin=True).status == 200
    assert state.stop() == 0
    assert [name for (name,) in _applied(path)] == NAMES


def _applied(path: Path) -> list[tuple[str]]:
    with closing(sqlite3.connect(path)) as db:
        return db.execute("SELECT name FROM _sqlite_migrations ORDER BY id").fetchall()


def test_it_learns_on_what_the_older_version_was_told(state: DaemonProcess) -> None:
    made_older(state.state / "agentd.db", NAMES[1])
    state.start()
    number = adapt(state, method="suffix-bp", blocks=1)
    assert number["state"] in ("committed", "rejected"), number
    texts = rows(state.state / "agentd.db", "recall_texts")["recall_texts"]
    assert 0 < texts <= 122
    assert state.stop() == 0
