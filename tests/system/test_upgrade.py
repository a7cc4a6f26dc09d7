"""A state that an older version has written: everything is there after the upgrade, and it goes on."""

import sqlite3
from contextlib import closing
from pathlib import Path

from tests.support.store_samples import database_of_nine_steps
from tests.support.tiny_passes import LLAMACPP, adapt, gguf, teach
from tools.daemon import DaemonProcess

# Are made by triggers, or belong to the schema.
_DERIVED = ("_counts", "_sqlite_migrations")
TABLES = ("examples", "inferences", "feedback", "tasks", "passes", "revisions", "activations", "events", "steps")


def made_older(path: Path) -> None:
    """The same rows in the database of the older version."""
    newer = path.rename(path.with_name("newer.db"))
    with closing(sqlite3.connect(database_of_nine_steps(path))) as old:
        old.execute("DELETE FROM revisions")
        old.execute("ATTACH ? AS newer", [str(newer)])
        for (table,) in old.execute("SELECT name FROM main.sqlite_master WHERE type = 'table'").fetchall():
            if not table.endswith(_DERIVED) and "recall_index" not in table:
                names = ", ".join(f'"{row[1]}"' for row in old.execute(f"PRAGMA main.table_info({table})"))
                old.execute(f"INSERT INTO main.{table} ({names}) SELECT {names} FROM newer.{table}")
        old.commit()
    newer.unlink()


def rows(path: Path, *tables: str) -> dict[str, int]:
    with closing(sqlite3.connect(path)) as db:
        return {table: db.execute(f'SELECT count(*) FROM "{table}"').fetchone()[0] for table in tables}


def test_nothing_is_lost_and_it_learns_on(tmp_path: Path) -> None:
    with DaemonProcess(gguf(tmp_path), LLAMACPP) as daemon:
        daemon.start()
        teach(daemon)
        for value in ("yes", "no"):
            id = daemon.ask(value, metadata={"task": "reviews"}).json["id"]
            assert daemon.post("/v1/feedback", {"inference_id": id, "kind": "label", "value": value}).status == 201
        assert adapt(daemon, method="suffix-bp", blocks=1)["state"] == "committed"
        assert daemon.stop() == 0
        path = daemon.state / "agentd.db"
        before = rows(path, *TABLES)
        made_older(path)
        daemon.start()
        after = rows(path, *TABLES)
        assert {**after, "events": before["events"]} == before
        assert after["events"] >= before["events"]
        assert daemon.status()["revision"] == 1
        assert len(daemon.get("/admin/examples?limit=1000", admin=True).json["examples"]) == before["examples"]
        assert daemon.post("/admin/rollback", {"revision": 0}, admin=True).status == 200
        assert daemon.post("/admin/rollback", {"revision": 1}, admin=True).status == 200
        number = adapt(daemon, method="suffix-bp", blocks=1)
        assert number["state"] in ("committed", "rejected"), number
