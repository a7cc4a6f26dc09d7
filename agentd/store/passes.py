"""Passes: every attempt to learn, from its trigger to its outcome, with what it was given and what it cost."""

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from sqlite_utils import Database

from agentd import faults, ids
from agentd.errors import NotFound
from agentd.store.row import Row, columns, select, to_json

_NEXT: dict[str, frozenset[str]] = {
    "triggered": frozenset({"planned", "refused"}),
    "planned": frozenset({"tapped", "trained", "refused"}),  # pure ZO needs no tap
    "tapped": frozenset({"trained"}),
    "trained": frozenset({"gated", "contributed"}),  # what a fleet asked for is no revision
    "gated": frozenset({"staged", "rejected"}),
    "staged": frozenset({"trial"}),
    "trial": frozenset({"committed", "rolled_back"}),
    "parked": frozenset({"resumed"}),
    "resumed": frozenset({"planned", "refused"}),  # it goes through all of them again
}
_ANYWHERE = frozenset({"failed", "parked"})
TERMINAL = frozenset({"committed", "contributed", "refused", "failed", "rejected", "rolled_back"})
_STEP_COLUMNS = ("loss", "dev_loss", "dev_accuracy", "seconds", "seed", "projected_gradient", "lr", "epsilon")


@dataclass(frozen=True)
class Pass(Row):
    """A pass. Columns ending in `_bytes` are bytes; `predicted` is {term: bytes}, `peaks` {process: bytes},
    `phases` {phase: seconds}."""

    table = "passes"

    id: int
    created_at: str
    finished_at: str | None
    trigger: str
    state: str
    reason: str | None
    shortfall_bytes: int
    parent_revision: int
    revision: int | None
    method: str | None
    blocks: int | None
    seed: int
    n_train: int
    n_holdout: int
    plan: dict[str, Any]
    predicted: dict[str, Any]
    predicted_bytes: int | None
    peak_bytes: int | None
    peaks: dict[str, Any]
    gate: dict[str, Any]
    phases: dict[str, Any]
    options: dict[str, Any]
    resumed: dict[str, Any]
    """How often it went on after a restart (`times`); see `transitions.resume`."""


def create(db: Database, trigger: str, parent_revision: int, seed: int, options: Mapping[str, Any]) -> Pass:
    """A pass in the state `triggered`. Examples stamped in the future, from before the clock was set, are of now: else
    they would stay new after every pass, and pass would follow pass."""
    now = ids.now()
    db.execute("UPDATE examples SET updated_at = ? WHERE updated_at > ?", [now, now])
    db.execute(
        'INSERT INTO passes (created_at, "trigger", state, parent_revision, seed, options)'
        " VALUES (?, ?, 'triggered', ?, ?, ?)",
        [now, trigger, parent_revision, seed, to_json(dict(options))],
    )
    faults.change("pass triggered")
    return latest(db, 1)[0]


def last_consolidation(db: Database) -> int:
    """The number of the last pass that was to learn everything again from the base; 0 where there was none."""
    statement = "SELECT max(id) FROM passes WHERE json_extract(options, '$.consolidate')"
    return int(db.execute(statement).fetchone()[0] or 0)


def last_end(db: Database) -> str | None:
    """When the last pass ended."""
    row = db.execute("SELECT max(finished_at) FROM passes").fetchone()
    ended: str | None = row[0]
    return ended


def get(db: Database, id: int) -> Pass:
    """Raises NotFound."""
    if rows := select(db, Pass, "WHERE id = ?", [id]):
        return rows[0]
    raise NotFound("pass", id)


def update(db: Database, /, id: int, **values: Any) -> Pass:
    """Sets columns other than the state. Raises ValueError for names that are no columns, NotFound."""
    if fixed := values.keys() & {"id", "state", "created_at", "finished_at"}:
        raise ValueError(f"update does not change {', '.join(sorted(fixed))}; see advance")
    return _set(db, id, values)


def advance(db: Database, /, id: int, state: str, **values: Any) -> Pass:
    """Moves the pass on to `state` and sets columns with it. Raises ValueError if that state cannot follow."""
    current = get(db, id).state
    if current in TERMINAL or (state not in _ANYWHERE and state not in _NEXT[current]):
        raise ValueError(f"pass {id} is {current} and cannot become {state}")
    row = _set(db, id, {**values, "state": state, "finished_at": ids.now() if state in TERMINAL else None})
    faults.change(f"pass {state}")
    return row


def latest(db: Database, limit: int, offset: int = 0) -> list[Pass]:
    """Newest first."""
    return select(db, Pass, "ORDER BY id DESC LIMIT ? OFFSET ?", [limit, offset])


def unfinished(db: Database) -> list[Pass]:
    """Oldest first. After a start there is one if the daemon died in the middle of it."""
    return select(db, Pass, "WHERE finished_at IS NULL ORDER BY id")


def parked(db: Database) -> Pass | None:
    """The pass that a restart has cut short and that is to go on."""
    rows = select(db, Pass, "WHERE state = 'parked' ORDER BY id DESC LIMIT 1")
    return rows[0] if rows else None


def add_examples(db: Database, pass_id: int, members: Iterable[tuple[str, str]]) -> None:
    """Notes which examples the pass uses, as (example id, 'train' | 'dev' | 'holdout')."""
    for example_id, role in members:
        db.execute("INSERT OR IGNORE INTO pass_examples VALUES (?, ?, ?)", [pass_id, example_id, role])


def has_examples(db: Database, pass_id: int) -> bool:
    """Whether it is noted which examples the pass uses."""
    return db.execute("SELECT 1 FROM pass_examples WHERE pass_id = ? LIMIT 1", [pass_id]).fetchone() is not None


def note_progress(db: Database, id: int, phases: Mapping[str, float], rows: Iterable[Mapping[str, Any]]) -> None:
    """How a pass that runs has spent its time so far, and its steps: what a restart would lose."""
    _set(db, id, {"phases": dict(phases)})
    add_steps(db, id, rows)


def add_steps(db: Database, pass_id: int, rows: Iterable[Mapping[str, Any]]) -> None:
    """Notes training steps: mappings with `phase` ('bp' | 'zo'), `step`, `seconds` and any other column of the table.

    A step may come in parts, such as its loss and later its dev_loss: columns that are given replace those there.
    """
    names = ", ".join(_STEP_COLUMNS)
    marks = ", ".join(f":{name}" for name in _STEP_COLUMNS)
    merged = ", ".join(f"{name} = coalesce(excluded.{name}, {name})" for name in _STEP_COLUMNS)
    statement = (
        f"INSERT INTO steps (pass_id, phase, step, {names}) VALUES (:pass_id, :phase, :step, {marks})"
        f" ON CONFLICT DO UPDATE SET {merged}"
    )
    for row in rows:
        if unknown := row.keys() - {"phase", "step", *_STEP_COLUMNS}:
            raise ValueError(f"steps has no columns {', '.join(sorted(unknown))}")
        values = {name: _finite(row.get(name)) for name in ("phase", "step", *_STEP_COLUMNS)}
        seed = values["seed"]
        db.execute(statement, {**values, "pass_id": pass_id, "seed": None if seed is None else str(seed)})


def steps(db: Database, pass_id: int) -> list[dict[str, Any]]:
    """The steps of a pass as rows, in their order: BP, then ZO."""
    return list(db.query("SELECT * FROM steps WHERE pass_id = ? ORDER BY phase, step", [pass_id]))


def forget_answers(db: Database, id: int, examples: Collection[str] | None = None) -> None:
    """Takes what was answered to these examples, or to all, out of the record of a pass."""
    gate = get(db, id).gate
    for facts in gate.get("tasks", {}).values():
        if "answers" in facts:
            facts["answers"] = [
                each for each in facts["answers"] if examples is not None and each["example"] not in examples
            ]
    _set(db, id, {"gate": gate})


def retain_answers(db: Database, keep: int) -> None:
    """Leaves what was answered in the records of the newest passes alone."""
    old = "SELECT id FROM passes WHERE id <= (SELECT max(id) FROM passes) - ? AND instr(gate, '\"example\":')"
    for (id,) in db.execute(old, [keep]).fetchall():
        forget_answers(db, id)


def _set(db: Database, id: int, values: Mapping[str, Any]) -> Pass:
    if values:
        encoded = columns(Pass, values)
        assignments = ", ".join(f'"{name}" = :{name}' for name in encoded)
        db.execute(f"UPDATE passes SET {assignments} WHERE id = :_id", {**encoded, "_id": id})
    return get(db, id)


def _finite(value: Any) -> Any:
    """SQLite has no NaN, JSON no infinity either; both mean here that a loss diverged."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
