"""What happens over time: triggers, the pass, the gate, the trial, commit and rollback."""

import agentd.store  # noqa: F401  # before any import of sqlite_utils, which would bring numpy into the daemon
