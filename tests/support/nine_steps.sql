-- What agentd made of an empty database in nine steps, before they became one.
PRAGMA auto_vacuum = INCREMENTAL;
PRAGMA journal_mode = WAL;
CREATE TABLE "_sqlite_migrations" (
   "id" INTEGER PRIMARY KEY,
   "migration_set" TEXT,
   "name" TEXT,
   "applied_at" TEXT
);
CREATE UNIQUE INDEX "idx__sqlite_migrations_migration_set_name"
    ON "_sqlite_migrations" ("migration_set", "name");
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
        episode TEXT -- whose step it is
    , recalled TEXT NOT NULL DEFAULT '[]') STRICT;
CREATE INDEX inferences_episode ON inferences (episode) WHERE episode IS NOT NULL;
CREATE INDEX inferences_created_at ON inferences (created_at);
CREATE INDEX inferences_author ON inferences (author);
CREATE INDEX inferences_task ON inferences (task) WHERE task IS NOT NULL;
CREATE TABLE tasks (
        name TEXT PRIMARY KEY,
        choices TEXT NOT NULL, -- JSON list; empty: answers are free text
        open INTEGER NOT NULL, -- 1: a label that is new becomes a choice
        metric TEXT NOT NULL CHECK (metric IN ('auto', 'accuracy', 'exact', 'call', 'json', 'loss')),
        prompt TEXT,
        source TEXT NOT NULL CHECK (source IN ('config', 'feedback')),
        created_at TEXT NOT NULL
    ) STRICT;
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
    ) STRICT;
CREATE INDEX examples_split ON examples (split, state, updated_at);
CREATE INDEX examples_task ON examples (task, split, state, updated_at);
CREATE INDEX examples_newest ON examples (task, split, state, CASE kind WHEN 'label' THEN target ELSE '' END, updated_at);
CREATE INDEX examples_drawn ON examples (task, split, state, CASE kind WHEN 'label' THEN target ELSE '' END, id);
CREATE INDEX examples_updated ON examples (updated_at);
CREATE INDEX examples_author ON examples (author);
CREATE INDEX examples_source ON examples (source_inference_id);
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
    ) STRICT;
CREATE INDEX feedback_part_of ON feedback (part_of) WHERE part_of IS NOT NULL;
CREATE INDEX feedback_inference ON feedback (inference_id);
CREATE INDEX feedback_example ON feedback (example_id);
CREATE INDEX feedback_author ON feedback (author, source);
CREATE INDEX feedback_state ON feedback (state);
CREATE INDEX feedback_task ON feedback (task);
CREATE INDEX feedback_kind ON feedback (kind);
CREATE UNIQUE INDEX feedback_idempotency ON feedback (coalesce(author, ''), idempotency_key);
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
    , resumed TEXT NOT NULL DEFAULT '{}') STRICT;
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
    ) STRICT;
CREATE TABLE activations (
        id INTEGER PRIMARY KEY,
        at TEXT NOT NULL,
        revision INTEGER NOT NULL REFERENCES revisions,
        previous INTEGER NOT NULL REFERENCES revisions,
        reason TEXT NOT NULL
    ) STRICT;
CREATE TABLE pass_examples (
        pass_id INTEGER NOT NULL REFERENCES passes,
        example_id TEXT NOT NULL REFERENCES examples ON DELETE CASCADE,
        role TEXT NOT NULL CHECK (role IN ('train', 'dev', 'holdout')),
        PRIMARY KEY (pass_id, example_id, role)
    ) STRICT, WITHOUT ROWID;
CREATE INDEX pass_examples_example ON pass_examples (example_id);
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
    ) STRICT, WITHOUT ROWID;
CREATE TABLE trials (
        revision INTEGER PRIMARY KEY REFERENCES revisions,
        pass_id INTEGER REFERENCES passes,
        started_at TEXT NOT NULL,
        attempts_left INTEGER NOT NULL,
        state TEXT NOT NULL CHECK (state IN ('running', 'passed', 'failed')),
        reason TEXT
    ) STRICT;
CREATE TABLE events (
        id INTEGER PRIMARY KEY,
        at TEXT NOT NULL,
        kind TEXT NOT NULL,
        message TEXT NOT NULL,
        pass_id INTEGER,
        revision INTEGER,
        data TEXT NOT NULL -- JSON
    ) STRICT;
CREATE TABLE model_files (
        path TEXT PRIMARY KEY,
        stamp TEXT NOT NULL, -- JSON list: bytes, times of the last changes of contents and inode in ns, inode
        sha256 TEXT, -- null: never read to its end
        "offset" INTEGER NOT NULL, -- bytes that a reading has done so far
        state BLOB NOT NULL -- of its SHA-256 there
    ) STRICT;
CREATE TABLE example_counts (task TEXT NOT NULL, split TEXT NOT NULL, state TEXT NOT NULL, label TEXT NOT NULL, n INTEGER NOT NULL, PRIMARY KEY (task, split, state, label)) STRICT, WITHOUT ROWID;
CREATE TRIGGER examples_counted AFTER INSERT ON examples BEGIN
        INSERT INTO example_counts (task, split, state, label, n) VALUES (NEW.task, NEW.split, NEW.state, CASE NEW.kind WHEN 'label' THEN NEW.target ELSE '' END, 1) ON CONFLICT (task, split, state, label) DO UPDATE SET n = n + 1;
    END;
CREATE TRIGGER examples_uncounted AFTER DELETE ON examples BEGIN
        INSERT INTO example_counts (task, split, state, label, n) VALUES (OLD.task, OLD.split, OLD.state, CASE OLD.kind WHEN 'label' THEN OLD.target ELSE '' END, -1) ON CONFLICT (task, split, state, label) DO UPDATE SET n = n + -1;
    END;
CREATE TRIGGER examples_recounted AFTER UPDATE OF task, split, state, kind, target ON examples BEGIN
        INSERT INTO example_counts (task, split, state, label, n) VALUES (OLD.task, OLD.split, OLD.state, CASE OLD.kind WHEN 'label' THEN OLD.target ELSE '' END, -1) ON CONFLICT (task, split, state, label) DO UPDATE SET n = n + -1;INSERT INTO example_counts (task, split, state, label, n) VALUES (NEW.task, NEW.split, NEW.state, CASE NEW.kind WHEN 'label' THEN NEW.target ELSE '' END, 1) ON CONFLICT (task, split, state, label) DO UPDATE SET n = n + 1;
    END;
CREATE TABLE feedback_counts (kind TEXT NOT NULL, task TEXT NOT NULL, state TEXT NOT NULL, n INTEGER NOT NULL, PRIMARY KEY (kind, task, state)) STRICT, WITHOUT ROWID;
CREATE TRIGGER feedback_counted AFTER INSERT ON feedback BEGIN
        INSERT INTO feedback_counts (kind, task, state, n) VALUES (NEW.kind, coalesce(NEW.task, ''), NEW.state, 1) ON CONFLICT (kind, task, state) DO UPDATE SET n = n + 1;
    END;
CREATE TRIGGER feedback_uncounted AFTER DELETE ON feedback BEGIN
        INSERT INTO feedback_counts (kind, task, state, n) VALUES (OLD.kind, coalesce(OLD.task, ''), OLD.state, -1) ON CONFLICT (kind, task, state) DO UPDATE SET n = n + -1;
    END;
CREATE TRIGGER feedback_recounted AFTER UPDATE OF kind, task, state ON feedback BEGIN
        INSERT INTO feedback_counts (kind, task, state, n) VALUES (OLD.kind, coalesce(OLD.task, ''), OLD.state, -1) ON CONFLICT (kind, task, state) DO UPDATE SET n = n + -1;INSERT INTO feedback_counts (kind, task, state, n) VALUES (NEW.kind, coalesce(NEW.task, ''), NEW.state, 1) ON CONFLICT (kind, task, state) DO UPDATE SET n = n + 1;
    END;
CREATE INDEX examples_doubted ON examples (split, state, task, weight) WHERE weight < 1;
CREATE TABLE scores (
        inference_id TEXT PRIMARY KEY REFERENCES inferences ON DELETE CASCADE,
        feedback_id TEXT NOT NULL REFERENCES feedback ON DELETE CASCADE, -- that says so
        task TEXT NOT NULL,
        revision INTEGER NOT NULL, -- that answered
        day TEXT NOT NULL, -- of the answer: 2026-01-31
        correct INTEGER NOT NULL CHECK (correct IN (0, 1))
    ) STRICT, WITHOUT ROWID;
CREATE INDEX scores_feedback ON scores (feedback_id);
CREATE INDEX examples_calls ON examples (task) WHERE kind = 'message';
CREATE TABLE score_counts (
        task TEXT NOT NULL,
        day TEXT NOT NULL,
        revision INTEGER NOT NULL,
        n INTEGER NOT NULL,
        correct INTEGER NOT NULL,
        PRIMARY KEY (task, day, revision)
    ) STRICT, WITHOUT ROWID;
CREATE TRIGGER scores_counted AFTER INSERT ON scores BEGIN
        INSERT INTO score_counts VALUES (NEW.task, NEW.day, NEW.revision, 1, NEW.correct) ON CONFLICT (task, day, revision) DO UPDATE SET n = n + 1, correct = correct + NEW.correct;
    END;
CREATE TRIGGER scores_uncounted AFTER DELETE ON scores BEGIN
        UPDATE score_counts SET n = n - 1, correct = correct - OLD.correct WHERE task = OLD.task AND day = OLD.day AND revision = OLD.revision; DELETE FROM score_counts WHERE task = OLD.task AND day = OLD.day AND revision = OLD.revision AND n = 0;
    END;
CREATE TRIGGER scores_recounted AFTER UPDATE OF task, correct ON scores BEGIN
        UPDATE score_counts SET n = n - 1, correct = correct - OLD.correct WHERE task = OLD.task AND day = OLD.day AND revision = OLD.revision; DELETE FROM score_counts WHERE task = OLD.task AND day = OLD.day AND revision = OLD.revision AND n = 0;INSERT INTO score_counts VALUES (NEW.task, NEW.day, NEW.revision, 1, NEW.correct) ON CONFLICT (task, day, revision) DO UPDATE SET n = n + 1, correct = correct + NEW.correct;
    END;
CREATE TABLE recalled_examples (
        example_id TEXT NOT NULL REFERENCES examples ON DELETE CASCADE,
        inference_id TEXT NOT NULL REFERENCES inferences ON DELETE CASCADE,
        PRIMARY KEY (example_id, inference_id)
    ) STRICT, WITHOUT ROWID;
CREATE INDEX recalled_examples_inference ON recalled_examples (inference_id);
CREATE TABLE recall_texts (
        id INTEGER PRIMARY KEY,
        example_id TEXT NOT NULL UNIQUE REFERENCES examples ON DELETE CASCADE,
        scope TEXT NOT NULL, -- a term that stands for the task
        terms TEXT NOT NULL
    ) STRICT;
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
    ) STRICT;
CREATE VIRTUAL TABLE recall_index USING fts5 (terms, content = '', columnsize = 0, detail = none, tokenize = 'ascii');
CREATE TRIGGER recall_texts_indexed AFTER INSERT ON recall_texts BEGIN
        INSERT INTO recall_index (rowid, terms) VALUES (NEW.id, NEW.scope || ' ' || NEW.scope || replace(NEW.terms, ' ', ' ' || NEW.scope));
    END;
CREATE TRIGGER recall_texts_removed AFTER DELETE ON recall_texts BEGIN
        INSERT INTO recall_index (recall_index, rowid, terms) VALUES ('delete', OLD.id, OLD.scope || ' ' || OLD.scope || replace(OLD.terms, ' ', ' ' || OLD.scope));
    END;
CREATE TABLE api_keys (
        id INTEGER PRIMARY KEY,
        name TEXT NOT NULL,
        scopes TEXT NOT NULL, -- JSON list
        digest TEXT NOT NULL UNIQUE, -- sha256 of the key
        rate INTEGER, -- requests a minute; null: as many as it likes
        created_at TEXT NOT NULL,
        last_used_at TEXT,
        revoked_at TEXT
    ) STRICT;
CREATE UNIQUE INDEX api_keys_valid ON api_keys (name) WHERE revoked_at IS NULL;
CREATE TABLE measurements (
        key TEXT PRIMARY KEY, -- what they depend on, hashed
        facts TEXT NOT NULL, -- JSON
        at TEXT NOT NULL
    ) STRICT;
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
    ) STRICT;
CREATE INDEX fleet_rounds_created_at ON fleet_rounds (created_at);
CREATE TABLE fleet_files (
        sha256 TEXT PRIMARY KEY,
        data BLOB NOT NULL,
        weights_sha256 TEXT, -- that it was found to lead to here
        at TEXT NOT NULL
    ) STRICT;
INSERT INTO _sqlite_migrations (migration_set, name, applied_at) VALUES
    ('agentd', 'm001_release_0_1_0', '2026-11-30 08:16:17.673392+00:00'),
    ('agentd', 'm002_doubted_examples', '2026-11-30 08:16:17.673392+00:00'),
    ('agentd', 'm003_scores', '2026-11-30 08:16:17.673392+00:00'),
    ('agentd', 'm004_recall', '2026-11-30 08:16:17.673392+00:00'),
    ('agentd', 'm005_recall_by_task', '2026-11-30 08:16:17.673392+00:00'),
    ('agentd', 'm006_api_keys', '2026-11-30 08:16:17.673392+00:00'),
    ('agentd', 'm007_measurements', '2026-11-30 08:16:17.673392+00:00'),
    ('agentd', 'm008_fleet', '2026-11-30 08:16:17.673392+00:00'),
    ('agentd', 'm009_parked_passes', '2026-11-30 08:16:17.673392+00:00');
INSERT INTO revisions (id, created_at, state, summary) VALUES (0, '2026-11-30T08:16:17.674Z', 'base', '{}');
