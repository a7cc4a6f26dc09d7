"""API keys: what each may do. Of a key itself only the sha256 is kept, which tells no one what it is: it is 256 random
bits, so that no salt and no slow hash would make it harder to guess.
"""

from dataclasses import dataclass
from typing import Any

from sqlite_utils import Database

from agentd import ids
from agentd.errors import Conflict, NotFound
from agentd.store import events
from agentd.store.row import Row, insert, select

MAX_KEYS = 256  # that may be valid at a time; every request over TCP is compared with all of them


@dataclass(frozen=True)
class ApiKey(Row):
    """A key, valid until it is revoked. `digest` is the sha256 of its text, in hexadecimal; `rate` is in requests a
    minute, None: as many as it likes."""

    table = "api_keys"

    id: int | None
    name: str
    scopes: list[str]
    digest: str
    rate: int | None
    created_at: str
    last_used_at: str | None = None
    revoked_at: str | None = None

    @property
    def author(self) -> str:
        """Whose everything is that it sends."""
        return f"key:{self.name}"

    def shown(self) -> dict[str, Any]:
        """What people see of it: neither its digest nor its number."""
        return {name: value for name, value in self.as_json().items() if name not in ("id", "digest")}


def all(db: Database) -> list[ApiKey]:
    return select(db, ApiKey, "ORDER BY id")


def valid(db: Database) -> list[ApiKey]:
    return select(db, ApiKey, "WHERE revoked_at IS NULL ORDER BY id")


def add(db: Database, key: ApiKey) -> ApiKey:
    """Raises Conflict where a valid key has this name, or there are too many."""
    known = valid(db)
    if any(other.name == key.name for other in known):
        raise Conflict(f"there is a key {key.name!r} already; revoke it first, or take another name", param="name")
    if len(known) >= MAX_KEYS:
        raise Conflict(f"{MAX_KEYS} keys are valid, which is the most there may be; revoke some")
    rowid = insert(db, key)
    events.add(db, "key added", f"key {key.name!r}: {', '.join(key.scopes)}")
    return select(db, ApiKey, "WHERE id = ?", [rowid])[0]


def revoke(db: Database, name: str) -> ApiKey:
    """Raises NotFound."""
    named = select(db, ApiKey, "WHERE name = ? AND revoked_at IS NULL", [name])
    if not named:
        raise NotFound("valid key", name)
    db.execute("UPDATE api_keys SET revoked_at = ? WHERE id = ?", [ids.now(), named[0].id])
    events.add(db, "key revoked", f"key {name!r}")
    return select(db, ApiKey, "WHERE id = ?", [named[0].id])[0]


def used(db: Database, id: int, at: str) -> None:
    """Notes when it was used last."""
    db.execute("UPDATE api_keys SET last_used_at = ? WHERE id = ?", [at, id])
