"""What a daemon that no one looks at does for its state: once a week everything is read, and damage is told."""

import os
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from agentd import ids
from agentd.maintenance import CHECKED, DAMAGED, _database_problems
from agentd.revision.files import ADAPTER, RevisionFiles
from agentd.store import events, revisions
from agentd.store.database import Store
from agentd.store.revisions import Revision
from tools import tiny_model
from tools.daemon import DaemonProcess, eventually

LONG_AGO = "2020-01-01T00:00:00.000Z"


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[DaemonProcess]:
    with DaemonProcess(tiny_model.write(tmp_path / "tiny.gguf")) as process:
        yield process


def check_events(daemon: DaemonProcess) -> list[dict[str, Any]]:
    rows = daemon.get("/admin/events?limit=1000", admin=True).json["events"]
    return [event for event in rows if event["kind"] in (CHECKED, DAMAGED)]


def test_a_week_after_the_last_look_everything_is_read(daemon: DaemonProcess) -> None:
    daemon.start()
    first = eventually(lambda: check_events(daemon), 10)
    assert first
    assert [event["kind"] for event in first] == [CHECKED]
    base = daemon.get("/admin/status", admin=True).json["model"]["sha256"]
    daemon.stop()

    files = RevisionFiles(daemon.state / "revisions", base)
    source = daemon.state / "source"
    source.write_bytes(b"weights")
    store = Store(daemon.state / "agentd.db")
    try:
        for number in (1, 2):
            digest = files.write(number, {ADAPTER: source}, {"parent": 0})
            row = Revision(number, 0, None, ids.now(), "rolled_back", None, "mezo", 0, digest, {})
            store.do(revisions.add, row)
        store.do(lambda db: db.execute("UPDATE events SET at = ?", [LONG_AGO]))
    finally:
        store.close()
    source.unlink()
    bad = files.directory(2) / ADAPTER
    bad.chmod(0o600)
    bad.write_bytes(b"weightz")

    daemon.start()
    second = eventually(lambda: [event for event in check_events(daemon) if event["kind"] == DAMAGED], 10)
    assert second
    assert "revision 2" in second[0]["message"]
    assert "revision 1" not in second[0]["message"]
    assert "agentd restore" in second[0]["message"]
    status = daemon.get("/admin/status", admin=True).json
    assert "revision 2" in status["problem"]
    assert (status["state"], status["revision"]) == ("serving", 0)
    daemon.stop()
    daemon.start()  # the damage is still there, and told once
    assert eventually(lambda: daemon.get("/admin/status", admin=True).json["problem"], 10)
    assert len(check_events(daemon)) == 2
    daemon.stop()
    bad.write_bytes(b"weights")
    daemon.start()
    assert eventually(lambda: check_events(daemon)[-1]["kind"] == CHECKED, 10)
    assert daemon.get("/admin/status", admin=True).json["problem"] is None
    daemon.stop()
    daemon.start()  # within the week: not again
    daemon.get("/admin/status", admin=True)
    assert len(check_events(daemon)) == 3


def test_an_index_that_lost_a_row_is_found(tmp_path: Path) -> None:
    store = Store(tmp_path / "agentd.db")
    for n in range(50):
        store.do(events.add, "kind", f"message {n}")
    assert store.raw(_database_problems) == []

    def damage(connection: sqlite3.Connection) -> None:
        connection.executescript("CREATE TABLE t (a); CREATE INDEX ta ON t (a); INSERT INTO t VALUES (1), (2), (3);")
        (root,) = connection.execute("SELECT rootpage FROM sqlite_schema WHERE name = 't'").fetchone()
        # The index's description now points at the table, as if its own pages were gone.
        connection.execute("PRAGMA writable_schema = ON")
        connection.execute("UPDATE sqlite_schema SET rootpage = ? WHERE name = 'ta'", [root])
        connection.execute("PRAGMA writable_schema = RESET")
        connection.commit()

    store.raw(damage)
    store.close()
    connection = sqlite3.connect(tmp_path / "agentd.db")
    problems = _database_problems(connection)
    connection.close()
    assert problems
    assert all(problem.startswith("database: ") for problem in problems)
    os.truncate(tmp_path / "agentd.db", 8192)
    connection = sqlite3.connect(tmp_path / "agentd.db")
    assert _database_problems(connection)
    connection.close()
