"""What a fleet asked of this board, what became of it, and what left the board for it: never a text."""

from dataclasses import dataclass
from typing import Any

from sqlite_utils import Database

from agentd import ids
from agentd.errors import NotFound
from agentd.store import events, passes
from agentd.store.passes import Pass
from agentd.store.row import Row

TRAIN, TAKE = "train", "take"
_RESULTS, _FILES = 4, 3  # newest ones that are kept as bytes
_COLUMNS = (
    "run, number, action, fleet, peer, request, state, pass_id, kind, examples, rho, norm, bytes_in, bytes_out,"
    " created_at, sent_at, length(result) AS result_bytes"
)


@dataclass(frozen=True)
class FleetRound(Row):
    """One action in one round. `bytes_out` counts every time that a result was handed out; `result_bytes` is how long
    the result is, None where there is none (any more)."""

    table = "fleet_rounds"

    run: str
    number: int
    action: str
    fleet: str
    peer: str | None
    request: str
    state: str | None
    pass_id: int
    kind: str | None
    examples: int | None
    rho: float | None
    norm: float | None
    bytes_in: int
    bytes_out: int
    created_at: str
    sent_at: str | None
    result_bytes: int | None

    def shown(self) -> dict[str, Any]:
        """What people see of it."""
        return {name: value for name, value in self.as_json().items() if name != "request"}


@dataclass(frozen=True)
class Totals:
    """Of all rounds. `rho` is None where something was made without noise."""

    bytes_in: int
    bytes_out: int
    contributions: int
    rho: float | None


def find(db: Database, run: str, number: int, action: str) -> FleetRound | None:
    rows = _select(db, "WHERE run = ? AND number = ? AND action = ?", [run, number, action])
    return rows[0] if rows else None


def with_pass(db: Database, run: str, number: int, action: str) -> tuple[FleetRound, Pass] | None:
    """The same with its pass, both as they are at one moment: what a pass has made is there as soon as it has ended."""
    row = find(db, run, number, action)
    return None if row is None else (row, passes.get(db, row.pass_id))


def newest(db: Database, run: str) -> int | None:
    """The number of a run's newest round here."""
    number: int | None = db.execute("SELECT max(number) FROM fleet_rounds WHERE run = ?", [run]).fetchone()[0]
    return number


def latest(db: Database, limit: int) -> list[tuple[FleetRound, Pass]]:
    """Newest first, each with its pass."""
    rows = _select(db, "ORDER BY created_at DESC, rowid DESC LIMIT ?", [limit])
    return [(row, passes.get(db, row.pass_id)) for row in rows]


def begin(db: Database, row: FleetRound) -> None:
    """Notes that a pass was started for it, in place of one that came to nothing."""
    db.execute(
        "INSERT INTO fleet_rounds (run, number, action, fleet, peer, request, state, pass_id, bytes_in, created_at)"
        " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT (run, number, action) DO UPDATE SET peer = excluded.peer,"
        " request = excluded.request, state = excluded.state, pass_id = excluded.pass_id,"
        " bytes_in = bytes_in + excluded.bytes_in",
        [
            *(row.run, row.number, row.action, row.fleet, row.peer, row.request, row.state, row.pass_id),
            *(row.bytes_in, row.created_at),
        ],
    )


def contributed(
    db: Database,
    pass_id: int,
    result: bytes,
    *,
    kind: str,
    examples: int | None,
    rho: float | None,
    norm: float | None,
) -> None:
    """Ends a pass with what it made for the fleet: both are stored, or neither. What is asked for again is answered
    with this, so that no noise is drawn twice for the same data."""
    db.execute(
        "UPDATE fleet_rounds SET result = ?, kind = ?, examples = ?, rho = ?, norm = ?"
        " WHERE pass_id = ? AND action = ?",
        [result, kind, examples, rho, norm, pass_id, TRAIN],
    )
    db.execute(
        "UPDATE fleet_rounds SET result = NULL WHERE result IS NOT NULL AND rowid NOT IN"
        " (SELECT rowid FROM fleet_rounds WHERE result IS NOT NULL ORDER BY created_at DESC, rowid DESC LIMIT ?)",
        [_RESULTS],
    )
    passes.advance(db, pass_id, "contributed", reason=f"{kind} for the fleet, {len(result)} bytes")


def send(db: Database, run: str, number: int) -> bytes:
    """What a round made, which counts as having left the board from now on. Raises NotFound."""
    row = db.execute(
        "SELECT result, fleet, peer, kind, sent_at FROM fleet_rounds WHERE run = ? AND number = ? AND action = ?",
        [run, number, TRAIN],
    ).fetchone()
    if row is None or row[0] is None:
        raise NotFound("result of a round", f"{run}/{number}")
    result, name, peer, kind, sent_at = row
    db.execute(
        "UPDATE fleet_rounds SET bytes_out = bytes_out + ?, sent_at = ? WHERE run = ? AND number = ? AND action = ?",
        [len(result), ids.now(), run, number, TRAIN],
    )
    if sent_at is None:
        to = f"fleet {name!r}" + (f" at {peer}" if peer else "")
        events.add(db, "sent to the fleet", f"{kind}, {len(result)} bytes, to {to}")
    return bytes(result)


def note_figures(db: Database, run: str, number: int, size: int) -> None:
    """Counts figures that were handed out as having left the board."""
    db.execute(
        "UPDATE fleet_rounds SET bytes_out = bytes_out + ?, sent_at = ? WHERE run = ? AND number = ? AND action = ?",
        [size, ids.now(), run, number, TAKE],
    )


def totals(db: Database) -> Totals:
    statement = (
        "SELECT coalesce(sum(bytes_in), 0), coalesce(sum(bytes_out), 0), count(kind), coalesce(sum(rho), 0.0),"
        " count(kind) - count(rho) FROM fleet_rounds"
    )
    bytes_in, bytes_out, made, rho, bare = db.execute(statement).fetchone()
    return Totals(bytes_in, bytes_out, made, None if bare else rho)


def keep(db: Database, sha256: str, data: bytes) -> None:
    """Keeps the fleet's newest files."""
    db.execute(
        "INSERT INTO fleet_files (sha256, data, at) VALUES (?, ?, ?) ON CONFLICT DO UPDATE SET at = excluded.at",
        [sha256, data, ids.now()],
    )
    db.execute(
        "DELETE FROM fleet_files WHERE rowid NOT IN"
        " (SELECT rowid FROM fleet_files ORDER BY at DESC, rowid DESC LIMIT ?)",
        [_FILES],
    )


def kept(db: Database, sha256: str) -> tuple[bytes, str | None] | None:
    """A file of the fleet, and the sha256 of the weights that it leads to where that is known."""
    row = db.execute("SELECT data, weights_sha256 FROM fleet_files WHERE sha256 = ?", [sha256]).fetchone()
    return None if row is None else (bytes(row[0]), row[1])


def leads_to(db: Database, sha256: str, weights_sha256: str) -> None:
    """Notes the sha256 of the weights that a file was found to lead to."""
    db.execute("UPDATE fleet_files SET weights_sha256 = ? WHERE sha256 = ?", [weights_sha256, sha256])


def _select(db: Database, rest: str, parameters: list[Any]) -> list[FleetRound]:
    rows = db.query(f"SELECT {_COLUMNS} FROM fleet_rounds {rest}", parameters)
    return [FleetRound(**row) for row in rows]
