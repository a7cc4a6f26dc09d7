"""Revisions of the model, and which of them was made to serve when. Revision 0 is the base model and always there."""

from dataclasses import dataclass
from typing import Any

from sqlite_utils import Database

from agentd import faults, ids
from agentd.errors import NotFound
from agentd.store.row import Row, insert, select


@dataclass(frozen=True)
class Revision(Row):
    """`summary` is {task: {"before", "after", "n"}}: the task's metric on holdout, against the parent.
    `forgotten` counts the examples that it or an ancestor learned and that have been forgotten since."""

    table = "revisions"

    id: int
    parent: int | None
    pass_id: int | None
    created_at: str
    state: str
    reason: str | None
    method: str | None
    blocks: int | None
    manifest_sha256: str | None
    summary: dict[str, Any]
    forgotten: int = 0


@dataclass(frozen=True)
class Activation(Row):
    """From `at` on, `revision` should serve instead of `previous`."""

    table = "activations"

    id: int
    at: str
    revision: int
    previous: int
    reason: str


def next_id(db: Database) -> int:
    """One more than any revision has had, those that passes planned and never finished included."""
    used = "SELECT id FROM revisions UNION ALL SELECT revision FROM passes"
    return int(db.execute(f"SELECT max(id) + 1 FROM ({used})").fetchone()[0])


def add(db: Database, revision: Revision) -> None:
    insert(db, revision)
    faults.change(f"revision {revision.state}")


def get(db: Database, id: int) -> Revision:
    """Raises NotFound."""
    if rows := select(db, Revision, "WHERE id = ?", [id]):
        return rows[0]
    raise NotFound("revision", id)


def all(db: Database) -> list[Revision]:
    """Oldest first, the base included."""
    return select(db, Revision, "ORDER BY id")


def set_state(db: Database, id: int, state: str, reason: str | None = None) -> None:
    """Raises NotFound."""
    if db.execute("UPDATE revisions SET state = ?, reason = ? WHERE id = ?", [state, reason, id]).rowcount == 0:
        raise NotFound("revision", id)
    faults.change(f"revision {state}")


def committed(db: Database) -> int:
    """The revision that should serve: the last one activated, or the base."""
    last = history(db, 1)
    return last[0].revision if last else 0


def activate(db: Database, revision: int, reason: str) -> Activation:
    """Notes that `revision` should serve from now on, after a restart too. Raises NotFound."""
    get(db, revision)
    db.execute(
        "INSERT INTO activations (at, revision, previous, reason) VALUES (?, ?, ?, ?)",
        [ids.now(), revision, committed(db), reason],
    )
    faults.change("revision activated")
    return history(db, 1)[0]


def predecessor(db: Database, id: int) -> int | None:
    """What a revision took the place of: its parent, or where it was learned again from the base what served then.
    None for the base. Raises NotFound."""
    row = get(db, id)
    served = "SELECT parent_revision FROM passes JOIN revisions ON revisions.id = parent_revision"
    usable = "revisions.state IN ('base', 'committed')"
    before = db.execute(f"{served} WHERE passes.id = ? AND {usable}", [row.pass_id]).fetchone()
    return int(before[0]) if before else row.parent


def history(db: Database, limit: int) -> list[Activation]:
    """Newest first."""
    return select(db, Activation, "ORDER BY id DESC LIMIT ?", [limit])


def digests(db: Database) -> dict[int, str]:
    """The sha256 of every revision's manifest, where one is known."""
    return dict(db.execute("SELECT id, manifest_sha256 FROM revisions WHERE manifest_sha256 IS NOT NULL").fetchall())


def children(db: Database, id: int) -> list[int]:
    """The revisions made from this one."""
    return [child for (child,) in db.execute("SELECT id FROM revisions WHERE parent = ? ORDER BY id", [id])]


def lineage(db: Database, id: int) -> list[int]:
    """The revision, its parent, and so on to the base. Raises NotFound."""
    line = [get(db, id)]
    while (parent := line[-1].parent) is not None:
        line.append(get(db, parent))
    return [revision.id for revision in line]
