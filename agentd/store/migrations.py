"""The schema, as named migrations. One that has been released is never changed; add the next below it.

Times are ISO 8601 text in UTC. Columns that hold JSON say so. Booleans are 0 and 1.
"""

from contextlib import closing

from sqlite_utils import Database, Migrations

from agentd import faults, ids

migrations = Migrations("agentd")


def unknown_migrations(db: Database) -> list[str]:
    """Migrations that were applied to `db` and that this version does not know: a newer agentd's. Only reads."""
    with closing(Database(memory=True)) as fresh:
        known = {migration.name for migration in migrations.pending(fresh)}
    return [migration.name for migration in migrations.applied(db) if migration.name not in known]


@migrations()
def m001_initial(db: Database) -> None:
    # One by one: executescript would commit the migration's transaction first.
    for statement in _INITIAL:
        db.execute(statement)
    db.execute("INSERT INTO revisions (id, created_at, state, summary) VALUES (0, ?, 'base', '{}')", [ids.now()])
    faults.change("migration m001_initial")


@migrations()
def m002_trust(db: Database) -> None:
    """Who said something, how far it is believed, and which revisions hold what has since been forgotten."""
    for statement in _TRUST:
        db.execute(statement)
    faults.change("migration m002_trust")


@migrations()
def m002_classifications(db: Database) -> None:
    """Inferences of a third kind. A CHECK changes nothing that is stored, so its text is changed where SQLite keeps it;
    making the table anew would need foreign keys off, which a transaction cannot (sqlite.org/lang_altertable.html)."""
    (version,) = db.execute("PRAGMA schema_version").fetchone()
    db.execute("PRAGMA writable_schema = ON")
    db.execute(
        "UPDATE sqlite_schema SET sql = replace(sql, ?, ?) WHERE type = 'table' AND name = 'inferences'",
        ["CHECK (kind IN ('chat', 'completion'))", "CHECK (kind IN ('chat', 'completion', 'classification'))"],
    )
    db.execute(f"PRAGMA schema_version = {version + 1}")
    db.execute("PRAGMA writable_schema = OFF")


_INITIAL = (
    """
    CREATE TABLE inferences (
        id TEXT PRIMARY KEY,
        created_at TEXT NOT NULL,
        revision INTEGER NOT NULL,
        kind TEXT NOT NULL CHECK (kind IN ('chat', 'completion')),
        task TEXT,
        input TEXT NOT NULL, -- JSON: {"messages": [...]} or {"prompt": "..."}
        output TEXT NOT NULL,
        params TEXT NOT NULL, -- JSON
        finish_reason TEXT NOT NULL,
        prompt_tokens INTEGER NOT NULL,
        completion_tokens INTEGER NOT NULL,
        ttft_ms REAL,
        latency_ms REAL NOT NULL
    ) STRICT""",
    "CREATE INDEX inferences_created_at ON inferences (created_at)",
    """
    CREATE TABLE tasks (
        name TEXT PRIMARY KEY,
        choices TEXT NOT NULL, -- JSON list; empty: answers are free text
        open INTEGER NOT NULL, -- 1: a label that is new becomes a choice
        metric TEXT NOT NULL CHECK (metric IN ('accuracy', 'loss')),
        prompt TEXT,
        source TEXT NOT NULL CHECK (source IN ('config', 'feedback')),
        created_at TEXT NOT NULL
    ) STRICT""",
    """
    CREATE TABLE examples (
        id TEXT PRIMARY KEY,
        task TEXT NOT NULL REFERENCES tasks,
        kind TEXT NOT NULL CHECK (kind IN ('label', 'demonstration')),
        input TEXT NOT NULL, -- JSON, as in inferences
        target TEXT NOT NULL,
        split TEXT NOT NULL CHECK (split IN ('train', 'holdout')),
        state TEXT NOT NULL CHECK (state IN ('new', 'used', 'stale', 'excluded')),
        source_inference_id TEXT REFERENCES inferences ON DELETE SET NULL,
        created_at TEXT NOT NULL,
        updated_at TEXT NOT NULL -- when the target was last set
    ) STRICT""",
    "CREATE INDEX examples_split ON examples (split, state, updated_at)",
    "CREATE INDEX examples_task ON examples (task)",
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
        idempotency_key TEXT UNIQUE,
        body_sha256 TEXT NOT NULL,
        example_id TEXT REFERENCES examples ON DELETE SET NULL,
        created_at TEXT NOT NULL
    ) STRICT""",
    "CREATE INDEX feedback_inference ON feedback (inference_id)",
    "CREATE INDEX feedback_example ON feedback (example_id)",
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
        options TEXT NOT NULL -- JSON
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
        summary TEXT NOT NULL -- JSON: task -> {before, after, n}
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
)

_TRUST = (
    "ALTER TABLE inferences ADD COLUMN author TEXT",  # who was at the socket: uid:1000
    "ALTER TABLE feedback ADD COLUMN author TEXT",
    """
    ALTER TABLE feedback ADD COLUMN state TEXT NOT NULL DEFAULT 'accepted'
        CHECK (state IN ('accepted', 'duplicate', 'outweighed', 'quarantined'))""",
    "ALTER TABLE feedback ADD COLUMN reason TEXT",  # of the state
    "ALTER TABLE examples ADD COLUMN author TEXT",  # who set the target
    "ALTER TABLE examples ADD COLUMN weight REAL NOT NULL DEFAULT 1.0 CHECK (weight > 0 AND weight <= 1)",
    "ALTER TABLE revisions ADD COLUMN forgotten INTEGER NOT NULL DEFAULT 0",  # examples it learned and we forgot
    "CREATE INDEX feedback_author ON feedback (author, source)",
    "CREATE INDEX examples_author ON examples (author)",
    "CREATE INDEX inferences_author ON inferences (author)",
    "CREATE INDEX feedback_state ON feedback (state)",
)
