"""What is known of the model's files: their sha256, and how far a reading of them is."""

import json
from contextlib import suppress

from sqlite_utils import Database

from agentd.errors import AgentdError
from agentd.host.file_digest import DigestMemory, FileDigest, Stamp
from agentd.store.database import Store
from agentd.store.room import Priority, priority
from agentd.store.row import to_json


class ModelFiles:
    """A memory of digests in the database. For plain threads; what it has not seen is looked up in `other`.

    A database that cannot be read or written costs time only.
    """

    def __init__(self, store: Store, other: DigestMemory) -> None:
        self.store, self._other = store, other
        self._known: dict[str, FileDigest] = {}

    def recall(self, path: str) -> FileDigest | None:
        if path not in self._known:
            digest: FileDigest | None = None
            with suppress(AgentdError):
                digest = self.store.do(_select, path)
            if digest := digest or self._other.recall(path):
                self._known[path] = digest
        return self._known.get(path)

    def remember(self, path: str, digest: FileDigest) -> None:
        self._known[path] = digest
        with suppress(AgentdError):
            self.store.do(_upsert, path, digest)


def _select(db: Database, path: str) -> FileDigest | None:
    row = db.execute('SELECT stamp, sha256, "offset", state FROM model_files WHERE path = ?', [path]).fetchone()
    return None if row is None else FileDigest(Stamp(*json.loads(row[0])), *row[1:])


@priority(Priority.EXPENDABLE)
def _upsert(db: Database, path: str, digest: FileDigest) -> None:
    values = [path, to_json(list(digest.stamp)), digest.sha256, digest.offset, digest.state]
    db.execute("INSERT OR REPLACE INTO model_files VALUES (?, ?, ?, ?, ?)", values)
