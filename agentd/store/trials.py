"""Trials: a revision that serves provisionally, and how many restarts it has left."""

from dataclasses import dataclass

from sqlite_utils import Database

from agentd import faults, ids
from agentd.errors import NotFound
from agentd.store.row import Row, select


@dataclass(frozen=True)
class Trial(Row):
    """A trial that is `running` when the daemon starts was cut short; that costs it an attempt."""

    table = "trials"

    revision: int
    pass_id: int | None
    started_at: str
    attempts_left: int
    state: str
    reason: str | None


def start(db: Database, revision: int, pass_id: int | None, attempts: int) -> Trial:
    """Starts the revision's trial, or starts it again."""
    db.execute(
        "INSERT OR REPLACE INTO trials VALUES (?, ?, ?, ?, 'running', NULL)", [revision, pass_id, ids.now(), attempts]
    )
    faults.change("trial started")
    return _get(db, revision)


def spend_attempt(db: Database, revision: int) -> int:
    """Takes one attempt away and returns how many are left. Raises NotFound."""
    db.execute("UPDATE trials SET attempts_left = max(attempts_left - 1, 0) WHERE revision = ?", [revision])
    faults.change("trial attempt spent")
    return _get(db, revision).attempts_left


def finish(db: Database, revision: int, state: str, reason: str | None = None) -> None:
    """Ends the trial as 'passed' or 'failed'. Raises NotFound."""
    if (
        db.execute("UPDATE trials SET state = ?, reason = ? WHERE revision = ?", [state, reason, revision]).rowcount
        == 0
    ):
        raise NotFound("trial of revision", revision)
    faults.change(f"trial {state}")


def running(db: Database) -> Trial | None:
    """The trial that has not ended, if there is one."""
    rows = select(db, Trial, "WHERE state = 'running' ORDER BY started_at DESC LIMIT 1")
    return rows[0] if rows else None


def _get(db: Database, revision: int) -> Trial:
    if rows := select(db, Trial, "WHERE revision = ?", [revision]):
        return rows[0]
    raise NotFound("trial of revision", revision)
