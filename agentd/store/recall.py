"""Recall of tasks: what the owner has set, and what was judged where it is left to the daemon."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from sqlite_utils import Database

from agentd import faults
from agentd.ids import now
from agentd.store import tasks
from agentd.store.row import Row, select, to_json


@dataclass(frozen=True)
class Recall(Row):
    """Of a task. `setting` off, on or auto as the owner's command said, None: as the configuration says. The rest is
    the last judgement: whether recall is `active` where it is `auto`, with how many corrections (`k`), why, with which
    figures, on which revision and how many `corrections` there were."""

    table = "recall"

    task: str
    setting: str | None = None
    active: bool = False
    k: int | None = None
    reason: str | None = None
    figures: dict[str, Any] = field(default_factory=dict)
    revision: int | None = None
    corrections: int = 0
    decided_at: str | None = None


def all(db: Database) -> dict[str, Recall]:
    return {row.task: row for row in select(db, Recall)}


def set_(db: Database, task: str, setting: str) -> Recall:
    """Raises NotFound."""
    tasks.get(db, task)
    db.execute(
        "INSERT INTO recall (task, setting) VALUES (?, ?) ON CONFLICT (task) DO UPDATE SET setting = excluded.setting",
        [task, setting],
    )
    return select(db, Recall, "WHERE task = ?", [task])[0]


def judged(
    db: Database,
    task: str,
    *,
    active: bool,
    k: int | None,
    reason: str,
    figures: Mapping[str, Any],
    revision: int,
    corrections: int,
) -> Recall | None:
    """Notes a judgement; None where the task is gone."""
    if tasks.find(db, task) is None:
        return None
    verdict = [int(active), k, reason, to_json(dict(figures)), revision, corrections, now()]
    db.execute(
        "INSERT INTO recall (task, active, k, reason, figures, revision, corrections, decided_at)"
        " VALUES (?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT (task) DO UPDATE SET active = excluded.active, k = excluded.k,"
        " reason = excluded.reason, figures = excluded.figures, revision = excluded.revision,"
        " corrections = excluded.corrections, decided_at = excluded.decided_at",
        [task, *verdict],
    )
    faults.change("recall judged")
    return select(db, Recall, "WHERE task = ?", [task])[0]
