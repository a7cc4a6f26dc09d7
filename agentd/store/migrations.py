"""The schema, and the migrations that come after it.

Times are ISO 8601 text in UTC. Columns that hold JSON say so. Booleans are 0 and 1.
"""

import re
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path

from sqlite_utils import Database, Migrations

from agentd import faults, ids
from agentd.errors import StateTooNew, StateTooOld

migrations = Migrations("agentd")


def refuse_other(db: Database, path: Path) -> None:
    """Raises StateTooNew or StateTooOld where no migration leads from `db`, which is at `path`, to this version's
    schema. Only reads."""
    with closing(Database(memory=True)) as fresh:
        known = [migration.name for migration in migrations.pending(fresh)]
    applied = [migration.name for migration in migrations.applied(db)]
    if newer := [name for name in applied if name > known[-1]]:
        raise StateTooNew(path, newer)
    if applied and known[0] not in applied:
        raise StateTooOld(path, applied)


# The name of the last of nine steps that this is made of: a database that took them all is one of this schema.
@migrations(name="m009_parked_passes")
def schema(db: Database) -> None:
    # One by one: executescript would commit the migration's transaction first.
    for statement in _SCHEMA:
        db.execute(statement)
    db.execute("INSERT INTO revisions (id, created_at, state, summary) VALUES (0, ?, 'base', '{}')", [ids.now()])
    faults.change("schema made")


# Once a version is released, what it made is not changed: the next is a function `m011_…` below, which passes a point
# of `faults` of its own.


@migrations()
def m010_meanings(db: Database) -> None:
    # JSON object: "since", by label the day since when it means what it does, and "settled", the day until which that
    # has been looked at
    db.execute("ALTER TABLE tasks ADD COLUMN meaning TEXT NOT NULL DEFAULT '{}'")
    db.execute("CREATE INDEX scores_task ON scores (task, day)")
    faults.change("meanings added")


_COUNTED = """
    CREATE TRIGGER {table}_{event} AFTER {on} ON {table} BEGIN
        {statements}
    END"""


def _counter(table: str, columns: Mapping[str, str]) -> tuple[str, ...]:
    """A table of how many rows of `table` have which values, kept by triggers. `columns` are names of texts and what
    they are of a row, never null; `{row}` stands for the row."""
    names = ", ".join(columns)

    def step(row: str, by: str) -> str:
        values = ", ".join(value.format(row=row) for value in columns.values())
        return (
            f"INSERT INTO {counter} ({names}, n) VALUES ({values}, {by})"
            f" ON CONFLICT ({names}) DO UPDATE SET n = n + {by};"
        )

    counter = f"{table.removesuffix('s')}_counts"
    kinds = ", ".join(f"{column} TEXT NOT NULL" for column in columns)
    more, less = step("NEW", "1"), step("OLD", "-1")
    sources = ", ".join(dict.fromkeys(re.findall(r"{row}\.(\w+)", " ".join(columns.values()))))
    return (
        f"CREATE TABLE {counter} ({kinds}, n INTEGER NOT NULL, PRIMARY KEY ({names})) STRICT, WITHOUT ROWID",
        _COUNTED.format(table=table, event="counted", on="INSERT", statements=more),
        _COUNTED.format(table=table, event="uncounted", on="DELETE", statements=less),
        _COUNTED.format(table=table, event="recounted", on=f"UPDATE OF {sources}", statements=less + more),
    )


_LABEL = "CASE {row}kind WHEN 'label' THEN {row}target ELSE '' END"
LABEL = _LABEL.format(row="")
"""An example's label, or '' for a demonstration: as it stands here it is what the indexes are made of."""

# Terms begin with the task's: one look into the index tells where a term stands in the task. It holds no texts and no
# places in them, and `scope` alone says which examples there are.
_BY_TASK = "{row}.scope || ' ' || {row}.scope || replace({row}.terms, ' ', ' ' || {row}.scope)"

_SCORED = (
    "INSERT INTO score_counts VALUES (NEW.task, NEW.day, NEW.revision, 1, NEW.correct)"
    " ON CONFLICT (task, day, revision) DO UPDATE SET n = n + 1, correct = correct + NEW.correct;"
)
# What no answer is left of is gone, with the task's name.
_UNSCORED = " ".join(
    f"{what} WHERE task = OLD.task AND day = OLD.day AND revision = OLD.revision{more};"
    for what, more in (
        ("UPDATE score_counts SET n = n - 1, correct = correct - OLD.correct", ""),
        ("DELETE FROM score_counts", " AND n = 0"),
    )
)

_SCHEMA = (
    """
    CREATE TABLE inferences (
        id TEXT PRIMARY KEY,
        created_at TEXT NOT NULL,
        revision INTEGER NOT NULL,
        kind TEXT NOT NULL CHECK (kind IN ('chat', 'response', 'completion', 'classification')),
        task TEXT,
        input TEXT NOT NULL, -- JSON: {"messages": [...], "tools": [...], ...} or {"prompt": "..."}
        output TEXT NOT NULL,
        reasoning TEXT NOT NULL DEFAULT '',
        tool_calls TEXT NOT NULL DEFAULT '[]', -- JSON list, as the answer has them
        params TEXT NOT NULL, -- JSON
        finish_reason TEXT NOT NULL, -- streaming: it goes on
        prompt_tokens INTEGER NOT NULL,
        completion_tokens INTEGER NOT NULL,
        ttft_ms REAL,
        latency_ms REAL NOT NULL,
        author TEXT, -- who was at the socket: uid:1000
        episode TEXT, -- whose step it is
        recalled TEXT NOT NULL DEFAULT '[]' -- JSON list: ids of examples that were in its prompt
    ) STRICT""",
    "CREATE INDEX inferences_episode ON inferences (episode) WHERE episode IS NOT NULL",
    "CREATE INDEX inferences_created_at ON inferences (created_at)",
    "CREATE INDEX inferences_author ON inferences (author)",
    "CREATE INDEX inferences_task ON inferences (task) WHERE task IS NOT NULL",
    """
    CREATE TABLE tasks (
        name TEXT PRIMARY KEY,
        choices TEXT NOT NULL, -- JSON list; empty: answers are free text
        open INTEGER NOT NULL, -- 1: a label that is new becomes a choice
        metric TEXT NOT NULL CHECK (metric IN ('auto', 'accuracy', 'exact', 'call', 'json', 'loss')),
        prompt TEXT,
        source TEXT NOT NULL CHECK (source IN ('config', 'feedback')),
        created_at TEXT NOT NULL
    ) STRICT""",
    """
    CREATE TABLE examples (
        id TEXT PRIMARY KEY,
        task TEXT NOT NULL REFERENCES tasks,
        kind TEXT NOT NULL CHECK (kind IN ('label', 'demonstration', 'message', 'preference', 'thumb', 'score')),
        input TEXT NOT NULL, -- JSON, as in inferences
        target TEXT NOT NULL,
        split TEXT NOT NULL CHECK (split IN ('train', 'holdout')),
        state TEXT NOT NULL CHECK (state IN ('new', 'used', 'stale', 'excluded')),
        source_inference_id TEXT REFERENCES inferences ON DELETE SET NULL,
        created_at TEXT NOT NULL,
        updated_at TEXT NOT NULL, -- when the target was last set
        author TEXT, -- who set the target
        weight REAL NOT NULL DEFAULT 1.0 CHECK (weight > 0 AND weight <= 1),
        text_key TEXT NOT NULL DEFAULT '' -- by which examples are split
    ) STRICT""",
    "CREATE INDEX examples_split ON examples (split, state, updated_at)",
    "CREATE INDEX examples_task ON examples (task, split, state, updated_at)",
    f"CREATE INDEX examples_newest ON examples (task, split, state, {LABEL}, updated_at)",
    f"CREATE INDEX examples_drawn ON examples (task, split, state, {LABEL}, id)",
    # What is believed by half counts by half; only those of weight below 1 are read for that.
    "CREATE INDEX examples_doubted ON examples (split, state, task, weight) WHERE weight < 1",
    "CREATE INDEX examples_calls ON examples (task) WHERE kind = 'message'",
    "CREATE INDEX examples_updated ON examples (updated_at)",
    "CREATE INDEX examples_author ON examples (author)",
    "CREATE INDEX examples_source ON examples (source_inference_id)",
    """
    CREATE TABLE feedback (
        id TEXT PRIMARY KEY,
        inference_id TEXT REFERENCES inferences,
        task TEXT,
        kind TEXT NOT NULL
            CHECK (kind IN ('label', 'demonstration', 'boolean', 'float', 'preference', 'comment')),
        value TEXT NOT NULL, -- JSON
        source TEXT NOT NULL CHECK (source IN ('human', 'program', 'implicit')),
        tags TEXT NOT NULL, -- JSON object
        idempotency_key TEXT, -- of its author
        body_sha256 TEXT NOT NULL,
        example_id TEXT REFERENCES examples ON DELETE SET NULL,
        created_at TEXT NOT NULL,
        author TEXT,
        state TEXT NOT NULL DEFAULT 'accepted'
            CHECK (state IN ('accepted', 'duplicate', 'outweighed', 'quarantined')),
        reason TEXT, -- of the state
        episode TEXT, -- which it is about as a whole
        part_of TEXT REFERENCES feedback ON DELETE CASCADE -- feedback on an episode, of which this is a step's share
    ) STRICT""",
    "CREATE INDEX feedback_part_of ON feedback (part_of) WHERE part_of IS NOT NULL",
    "CREATE INDEX feedback_inference ON feedback (inference_id)",
    "CREATE INDEX feedback_example ON feedback (example_id)",
    "CREATE INDEX feedback_author ON feedback (author, source)",
    "CREATE INDEX feedback_state ON feedback (state)",
    "CREATE INDEX feedback_task ON feedback (task)",
    "CREATE INDEX feedback_kind ON feedback (kind)",
    "CREATE UNIQUE INDEX feedback_idempotency ON feedback (coalesce(author, ''), idempotency_key)",
    """
    CREATE TABLE passes (
        id INTEGER PRIMARY KEY,
        created_at TEXT NOT NULL,
        finished_at TEXT,
        "trigger" TEXT NOT NULL CHECK ("trigger" IN ('manual', 'examples', 'interval')),
        state TEXT NOT NULL,
        reason TEXT,
        shortfall_bytes INTEGER NOT NULL DEFAULT 0,
        parent_revision INTEGER NOT NULL REFERENCES revisions,
        revision INTEGER, -- set before the revision's files and its row exist
        method TEXT,
        blocks INTEGER,
        seed INTEGER NOT NULL,
        n_train INTEGER NOT NULL DEFAULT 0,
        n_holdout INTEGER NOT NULL DEFAULT 0,
        plan TEXT NOT NULL DEFAULT '{}', -- JSON
        predicted TEXT NOT NULL DEFAULT '{}', -- JSON: term -> bytes
        predicted_bytes INTEGER,
        peak_bytes INTEGER,
        peaks TEXT NOT NULL DEFAULT '{}', -- JSON: process -> bytes
        gate TEXT NOT NULL DEFAULT '{}', -- JSON
        phases TEXT NOT NULL DEFAULT '{}', -- JSON: phase -> seconds
        options TEXT NOT NULL, -- JSON
        resumed TEXT NOT NULL DEFAULT '{}' -- JSON: how often it went on after a restart, and where it was the last time
    ) STRICT""",
    """
    CREATE TABLE revisions (
        id INTEGER PRIMARY KEY, -- 0 is the base model
        parent INTEGER REFERENCES revisions,
        pass_id INTEGER REFERENCES passes,
        created_at TEXT NOT NULL,
        state TEXT NOT NULL
            CHECK (state IN ('base', 'staged', 'trial', 'committed', 'rolled_back', 'discarded')),
        reason TEXT,
        method TEXT,
        blocks INTEGER,
        manifest_sha256 TEXT,
        summary TEXT NOT NULL, -- JSON: task -> {before, after, n}
        forgotten INTEGER NOT NULL DEFAULT 0 -- examples it learned and we forgot
    ) STRICT""",
    """
    CREATE TABLE activations (
        id INTEGER PRIMARY KEY,
        at TEXT NOT NULL,
        revision INTEGER NOT NULL REFERENCES revisions,
        previous INTEGER NOT NULL REFERENCES revisions,
        reason TEXT NOT NULL
    ) STRICT""",
    """
    CREATE TABLE pass_examples (
        pass_id INTEGER NOT NULL REFERENCES passes,
        example_id TEXT NOT NULL REFERENCES examples ON DELETE CASCADE,
        role TEXT NOT NULL CHECK (role IN ('train', 'dev', 'holdout')),
        PRIMARY KEY (pass_id, example_id, role)
    ) STRICT, WITHOUT ROWID""",
    "CREATE INDEX pass_examples_example ON pass_examples (example_id)",
    """
    CREATE TABLE steps (
        pass_id INTEGER NOT NULL REFERENCES passes,
        phase TEXT NOT NULL CHECK (phase IN ('bp', 'zo')),
        step INTEGER NOT NULL,
        loss REAL, -- null: it was not finite
        dev_loss REAL,
        dev_accuracy REAL,
        seconds REAL NOT NULL,
        seed TEXT, -- 64 bits without sign do not fit an INTEGER
        projected_gradient REAL,
        lr REAL,
        epsilon REAL,
        PRIMARY KEY (pass_id, phase, step)
    ) STRICT, WITHOUT ROWID""",
    """
    CREATE TABLE trials (
        revision INTEGER PRIMARY KEY REFERENCES revisions,
        pass_id INTEGER REFERENCES passes,
        started_at TEXT NOT NULL,
        attempts_left INTEGER NOT NULL,
        state TEXT NOT NULL CHECK (state IN ('running', 'passed', 'failed')),
        reason TEXT
    ) STRICT""",
    """
    CREATE TABLE events (
        id INTEGER PRIMARY KEY,
        at TEXT NOT NULL,
        kind TEXT NOT NULL,
        message TEXT NOT NULL,
        pass_id INTEGER,
        revision INTEGER,
        data TEXT NOT NULL -- JSON
    ) STRICT""",
    """
    CREATE TABLE model_files (
        path TEXT PRIMARY KEY,
        stamp TEXT NOT NULL, -- JSON list: bytes, times of the last changes of contents and inode in ns, inode
        sha256 TEXT, -- null: never read to its end
        "offset" INTEGER NOT NULL, -- bytes that a reading has done so far
        state BLOB NOT NULL -- of its SHA-256 there
    ) STRICT""",
    # counters, so that no one who looks counts rows
    *_counter(
        "examples",
        {
            "task": "{row}.task",
            "split": "{row}.split",
            "state": "{row}.state",
            "label": _LABEL.replace("{row}", "{row}."),
        },
    ),
    *_counter("feedback", {"kind": "{row}.kind", "task": "coalesce({row}.task, '')", "state": "{row}.state"}),
    """
    CREATE TABLE recalled_examples (
        example_id TEXT NOT NULL REFERENCES examples ON DELETE CASCADE,
        inference_id TEXT NOT NULL REFERENCES inferences ON DELETE CASCADE,
        PRIMARY KEY (example_id, inference_id)
    ) STRICT, WITHOUT ROWID""",
    "CREATE INDEX recalled_examples_inference ON recalled_examples (inference_id)",
    # Of training examples; their terms as `store.terms` makes them, one blank between two.
    """
    CREATE TABLE recall_texts (
        id INTEGER PRIMARY KEY,
        example_id TEXT NOT NULL UNIQUE REFERENCES examples ON DELETE CASCADE,
        scope TEXT NOT NULL, -- a term that stands for the task
        terms TEXT NOT NULL
    ) STRICT""",
    # Tokenizer ascii: what is no ASCII is left as it is, and terms have nothing to cut at besides.
    "CREATE VIRTUAL TABLE recall_index USING fts5 (terms, content = '', columnsize = 0, detail = none,"
    " tokenize = 'ascii')",
    f"""
    CREATE TRIGGER recall_texts_indexed AFTER INSERT ON recall_texts BEGIN
        INSERT INTO recall_index (rowid, terms) VALUES (NEW.id, {_BY_TASK.format(row="NEW")});
    END""",
    f"""
    CREATE TRIGGER recall_texts_removed AFTER DELETE ON recall_texts BEGIN
        INSERT INTO recall_index (recall_index, rowid, terms) VALUES ('delete', OLD.id, {_BY_TASK.format(row="OLD")});
    END""",
    """
    CREATE TABLE recall (
        task TEXT PRIMARY KEY REFERENCES tasks ON DELETE CASCADE,
        setting TEXT CHECK (setting IN ('off', 'on', 'auto')), -- by the owner's command; null: the configuration's
        active INTEGER NOT NULL DEFAULT 0, -- what was judged, where the setting is auto
        k INTEGER, -- corrections that were judged to help most; null: never judged
        reason TEXT,
        figures TEXT NOT NULL DEFAULT '{}', -- JSON
        revision INTEGER, -- with which it was judged
        corrections INTEGER NOT NULL DEFAULT 0, -- that there were
        decided_at TEXT
    ) STRICT""",
    """
    CREATE TABLE scores (
        inference_id TEXT PRIMARY KEY REFERENCES inferences ON DELETE CASCADE,
        feedback_id TEXT NOT NULL REFERENCES feedback ON DELETE CASCADE, -- that says so
        task TEXT NOT NULL,
        revision INTEGER NOT NULL, -- that answered
        day TEXT NOT NULL, -- of the answer: 2026-01-31
        correct INTEGER NOT NULL CHECK (correct IN (0, 1))
    ) STRICT, WITHOUT ROWID""",
    "CREATE INDEX scores_feedback ON scores (feedback_id)",
    """
    CREATE TABLE score_counts (
        task TEXT NOT NULL,
        day TEXT NOT NULL,
        revision INTEGER NOT NULL,
        n INTEGER NOT NULL,
        correct INTEGER NOT NULL,
        PRIMARY KEY (task, day, revision)
    ) STRICT, WITHOUT ROWID""",
    _COUNTED.format(table="scores", event="counted", on="INSERT", statements=_SCORED),
    _COUNTED.format(table="scores", event="uncounted", on="DELETE", statements=_UNSCORED),
    _COUNTED.format(table="scores", event="recounted", on="UPDATE OF task, correct", statements=_UNSCORED + _SCORED),
    """
    CREATE TABLE api_keys (
        id INTEGER PRIMARY KEY,
        name TEXT NOT NULL,
        scopes TEXT NOT NULL, -- JSON list
        digest TEXT NOT NULL UNIQUE, -- sha256 of the key
        rate INTEGER, -- requests a minute; null: as many as it likes
        created_at TEXT NOT NULL,
        last_used_at TEXT,
        revoked_at TEXT
    ) STRICT""",
    "CREATE UNIQUE INDEX api_keys_valid ON api_keys (name) WHERE revoked_at IS NULL",
    """
    CREATE TABLE measurements (
        key TEXT PRIMARY KEY, -- what they depend on, hashed
        facts TEXT NOT NULL, -- JSON
        at TEXT NOT NULL
    ) STRICT""",
    """
    CREATE TABLE fleet_rounds (
        run TEXT NOT NULL, -- a run of the fleet, and the number of a round in it
        number INTEGER NOT NULL,
        action TEXT NOT NULL CHECK (action IN ('train', 'take')),
        fleet TEXT NOT NULL,
        peer TEXT, -- who the fleet's server is, as its client says
        request TEXT NOT NULL, -- sha256 of what was asked
        state TEXT, -- sha256 of the fleet's file that it is about
        pass_id INTEGER NOT NULL REFERENCES passes, -- the newest one that does it
        kind TEXT, -- of what was made
        examples INTEGER, -- that it was learned from; null: not told
        rho REAL, -- zCDP of what was made; null: no noise
        norm REAL, -- of a ledger's coefficients before clipping
        bytes_in INTEGER NOT NULL DEFAULT 0,
        bytes_out INTEGER NOT NULL DEFAULT 0,
        created_at TEXT NOT NULL,
        sent_at TEXT,
        result BLOB, -- what leaves the board; dropped when newer ones are there
        PRIMARY KEY (run, number, action)
    ) STRICT""",
    "CREATE INDEX fleet_rounds_created_at ON fleet_rounds (created_at)",
    # what the fleet has sent, so that it need not send it again
    """
    CREATE TABLE fleet_files (
        sha256 TEXT PRIMARY KEY,
        data BLOB NOT NULL,
        weights_sha256 TEXT, -- that it was found to lead to here
        at TEXT NOT NULL
    ) STRICT""",
)
