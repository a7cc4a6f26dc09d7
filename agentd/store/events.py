"""Events: what happened and why, for the administrator to read afterwards."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlite_utils import Database

from agentd import ids
from agentd.store.row import Row, select, to_json, where

PAUSED, RESUMED = "adaptation paused", "adaptation resumed"


@dataclass(frozen=True)
class Event(Row):
    table = "events"

    id: int
    at: str
    kind: str
    message: str
    pass_id: int | None
    revision: int | None
    data: dict[str, Any]


def add(
    db: Database,
    kind: str,
    message: str,
    pass_id: int | None = None,
    revision: int | None = None,
    data: Mapping[str, Any] | None = None,
) -> Event:
    cursor = db.execute(
        "INSERT INTO events (at, kind, message, pass_id, revision, data) VALUES (?, ?, ?, ?, ?, ?)",
        [ids.now(), kind, message, pass_id, revision, to_json(dict(data or {}))],
    )
    return select(db, Event, "WHERE id = ?", [cursor.lastrowid])[0]


def latest(db: Database, limit: int, after_id: int | None = None, pass_id: int | None = None) -> list[Event]:
    """The newest `limit` events; with `after_id`, the first `limit` that followed it, so that a reader misses none.

    Oldest first either way, as a log reads. With `pass_id`, only those of that pass.
    """
    order = "DESC" if after_id is None else "ASC"
    clause, parameters = where(pass_id=pass_id)
    clause = f"{clause} AND id > ?" if clause else "WHERE id > ?"
    rows = select(db, Event, f"{clause} ORDER BY id {order} LIMIT ?", [*parameters, after_id or 0, limit])
    return sorted(rows, key=lambda event: event.id)


def last(db: Database, kinds: Sequence[str]) -> Event | None:
    """The newest event of one of these kinds."""
    rows = select(db, Event, f"WHERE kind IN ({', '.join('?' * len(kinds))}) ORDER BY id DESC LIMIT 1", [*kinds])
    return rows[0] if rows else None


def paused(db: Database) -> bool:
    """Whether passes were paused last, and not resumed since: a restart keeps to it."""
    event = last(db, (PAUSED, RESUMED))
    return event is not None and event.kind == PAUSED


def newest(db: Database) -> str | None:
    """The time of what was stored last: an event or an answer."""
    rows = (
        db.execute("SELECT at FROM events ORDER BY id DESC LIMIT 1").fetchone(),
        db.execute("SELECT created_at FROM inferences ORDER BY rowid DESC LIMIT 1").fetchone(),
    )
    return max((str(row[0]) for row in rows if row), default=None)
