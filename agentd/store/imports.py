"""Importing many examples at once: all of them or none, and without keeping the store's thread for seconds.

The rows are laid out in a temporary table, some thousand at a time, with other work in between; one transaction then
merges them, in SQL, into what is there.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from sqlite_utils import Database

from agentd import ids
from agentd.errors import AgentdError, InvalidLine, InvalidRequest
from agentd.store import recall_index, tasks
from agentd.store.database import Store
from agentd.store.examples import USABLE, NewExample, identify, split_of, text_key, text_of
from agentd.store.feedback_targets import FeedbackTarget, says_less
from agentd.store.row import to_json
from agentd.store.tasks import SCORE, THUMB

CHUNK = 2000  # rows; some 20 ms of the store's time
_INDEXES = 600  # bytes of a row in all indexes

_Row = tuple[str, int, str, str, str, str, str, str | None, str | None, float, str, str, str | None]


@dataclass(frozen=True)
class Prepared:
    """Rows of `staged`, one per example; `counts` is what lines for the same input did to one another. A thumb or a
    score that says less than another line leaves that one unchanged."""

    rows: list[_Row]
    counts: dict[str, int]

    @property
    def size(self) -> int:
        """Bytes of disk that adding them takes at once, at most: of rows and indexes, in the log and then in the
        database, and before in the temporary table."""
        texts = sum(len(column.encode()) for row in self.rows for column in row if isinstance(column, str))
        return 3 * (texts * 5 // 4 + _INDEXES * len(self.rows))


def prepare(many: Sequence[NewExample]) -> Prepared:
    """Needs no database, and takes most of the time. Raises InvalidLine."""
    rows: dict[str, _Row] = {}
    counts = {"added": 0, "replaced": 0, "unchanged": 0}
    for number, new in enumerate(many, 1):
        line = new.line or number
        try:
            input = to_json(new.input)
            id = identify(new.task, new.input)
            if not new.target.strip():
                raise InvalidRequest(f"the value of a {new.kind} must have something to read in it", param="value")
            new.target.encode()
        except (InvalidRequest, UnicodeEncodeError) as error:
            raise InvalidLine(line, str(error)) from error
        if (earlier := rows.get(id)) is not None:
            if says_less(FeedbackTarget(new.kind, new.target), FeedbackTarget(earlier[3], earlier[5])):
                counts["unchanged"] += 1
                continue
            counts["unchanged" if earlier[3:6:2] == (new.kind, new.target) else "replaced"] += 1
        key = text_key(new)
        rows[id] = (
            id,
            earlier[1] if earlier else line,
            new.task,
            new.kind,
            input,
            new.target,
            split_of(key),
            new.source_inference_id,
            new.author,
            new.weight,
            key,
            recall_index.scope_of(new.task),
            recall_index.entry(text_of(new)) if split_of(key) == "train" else None,
        )
    return Prepared(list(rows.values()), counts)


async def add(store: Store, prepared: Prepared) -> dict[str, int]:
    """Adds all examples or none; returns how many were added, replaced (another target than before), unchanged. What is
    known of an input is not replaced by a thumb or a score that says less.

    Raises InvalidLine for the first that its task does not admit, StorageFull.
    """
    table = f"staged_{ids.uuid7()}"
    await store.claim(prepared.size, "this import")
    try:
        await store.call(_create, table)
        for start in range(0, len(prepared.rows), CHUNK):
            await store.call(_fill, table, prepared.rows[start : start + CHUNK])
        return await store.call(_merge, table, prepared.counts)
    finally:
        store.submit(_drop, table)


def add_many(db: Database, many: Sequence[NewExample]) -> dict[str, int]:
    """The same at once, in the transaction that is open."""
    prepared = prepare(many)
    table = f"staged_{ids.uuid7()}"
    try:
        _create(db, table)
        _fill(db, table, prepared.rows)
        return _merge(db, table, prepared.counts)
    finally:
        _drop(db, table)


def _create(db: Database, table: str) -> None:
    db.execute(
        f"CREATE TEMP TABLE {table} (id TEXT PRIMARY KEY, line INTEGER, task TEXT, kind TEXT, input TEXT, target TEXT,"
        " split TEXT, source TEXT, author TEXT, weight REAL, text_key TEXT, scope TEXT, terms TEXT)"
    )


def _fill(db: Database, table: str, rows: Sequence[_Row]) -> None:
    db.conn.executemany(f"INSERT INTO {table} VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", rows)


def _drop(db: Database, table: str) -> None:
    db.execute(f"DROP TABLE IF EXISTS {table}")


def _merge(db: Database, table: str, counts: dict[str, int]) -> dict[str, int]:
    with db.atomic():
        # What is admitted depends on the label, for demonstrations on nothing but the task.
        distinct = (
            f"SELECT task, kind, target, min(line) FROM {table}"
            " GROUP BY task, kind, CASE kind WHEN 'label' THEN target END ORDER BY min(line)"
        )
        for task, kind, target, line in db.execute(distinct).fetchall():
            try:
                _, stored = tasks.admit(db, task, kind, target)
            except AgentdError as error:
                raise InvalidLine(line, str(error)) from error
            if stored != target:
                renamed = f"UPDATE {table} SET target = ? WHERE task = ? AND kind = ? AND target = ?"
                db.execute(renamed, [stored, task, kind, target])
        outdone = _leave_out_what_says_less(db, table)
        (total,) = db.execute(f"SELECT count(*) FROM {table}").fetchone()
        same = "staged.kind = examples.kind AND staged.target = examples.target"
        known, unchanged = db.execute(
            f"SELECT count(*), coalesce(sum({same}), 0) FROM {table} AS staged JOIN examples USING (id)"
        ).fetchone()
        db.execute(
            f"UPDATE examples SET weight = staged.weight FROM {table} AS staged"
            f" WHERE staged.id = examples.id AND {same} AND staged.weight > examples.weight"
        )
        db.execute(
            "INSERT INTO examples (id, task, kind, input, target, split, state, source_inference_id, created_at,"
            " updated_at, author, weight, text_key)"
            " SELECT id, task, kind, input, target, split, 'new', source, :now, :now, author, weight, text_key"
            f" FROM {table} WHERE true ORDER BY line"
            " ON CONFLICT (id) DO UPDATE SET kind = excluded.kind, target = excluded.target, state = 'new',"
            " updated_at = :now, author = excluded.author, weight = excluded.weight,"
            " source_inference_id = coalesce(excluded.source_inference_id, source_inference_id)"
            " WHERE excluded.kind != kind OR excluded.target != target",
            {"now": ids.now()},
        )
        db.execute(
            f"INSERT INTO recall_texts (example_id, scope, terms) SELECT id, scope, terms FROM {table}"
            " WHERE terms IS NOT NULL AND id NOT IN (SELECT example_id FROM recall_texts WHERE example_id IN"
            f" (SELECT id FROM {table})) ORDER BY line"
        )
    added = {"added": total - known, "replaced": known - unchanged, "unchanged": unchanged + outdone}
    return {name: counts[name] + n for name, n in added.items()}


def _leave_out_what_says_less(db: Database, table: str) -> int:
    """Takes thumbs and scores out of the rows for which something better is known; returns how many."""
    met = db.execute(
        f"SELECT id, staged.kind, staged.target, examples.kind, examples.target FROM {table} AS staged"
        f" JOIN examples USING (id) WHERE staged.kind IN (?, ?) AND {USABLE}"
        " AND (staged.kind, staged.target) != (examples.kind, examples.target)",
        [THUMB, SCORE],
    )
    outdone = [id for id, *pair in met.fetchall() if says_less(FeedbackTarget(*pair[:2]), FeedbackTarget(*pair[2:]))]
    db.execute(f"DELETE FROM {table} WHERE id IN (SELECT value FROM json_each(?))", [to_json(outdone)])
    return len(outdone)
