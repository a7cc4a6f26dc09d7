"""What was measured of this machine and the model that it serves, so that a start need not measure again.

The key says what the facts depend on; with another model, version or machine it is another one.
"""

import json
from typing import Any

from sqlite_utils import Database

from agentd import ids
from agentd.store.room import Priority, priority
from agentd.store.row import to_json

_KEPT = 8  # keys: of former versions and models none is needed for long


def recall(db: Database, key: str) -> dict[str, Any] | None:
    row = db.execute("SELECT facts FROM measurements WHERE key = ?", [key]).fetchone()
    return None if row is None else json.loads(row[0])


@priority(Priority.EXPENDABLE)
def remember(db: Database, key: str, facts: dict[str, Any]) -> None:
    db.execute("INSERT OR REPLACE INTO measurements VALUES (?, ?, ?)", [key, to_json(facts), ids.now()])
    db.execute(
        "DELETE FROM measurements WHERE key NOT IN (SELECT key FROM measurements ORDER BY at DESC, key LIMIT ?)",
        [_KEPT],
    )
