"""Inferences: what was asked, what the model answered, and what it cost."""

from dataclasses import dataclass
from typing import Any

from sqlite_utils import Database

from agentd.errors import NotFound
from agentd.store.row import Row, insert, select


@dataclass(frozen=True)
class Inference(Row):
    """`input` is {"messages": [...]} or {"prompt": "..."}; `revision` is the one that answered, `author` who asked
    (`uid:1000`, from the socket)."""

    table = "inferences"

    id: str
    created_at: str
    revision: int
    kind: str
    task: str | None
    input: dict[str, Any]
    output: str
    params: dict[str, Any]
    finish_reason: str
    prompt_tokens: int
    completion_tokens: int
    ttft_ms: float | None
    latency_ms: float
    author: str | None = None


def record(db: Database, inference: Inference) -> None:
    insert(db, inference)


def get(db: Database, id: str) -> Inference:
    """Raises NotFound."""
    if found := select(db, Inference, "WHERE id = ?", [id]):
        return found[0]
    raise NotFound("inference", id)


def latest(db: Database, limit: int, offset: int = 0) -> list[Inference]:
    """Newest first."""
    return select(db, Inference, "ORDER BY rowid DESC LIMIT ? OFFSET ?", [limit, offset])


def prune(db: Database, older_than: str) -> int:
    """Deletes the inferences from before `older_than` (ISO 8601) that nobody gave feedback on; returns how many."""
    unreferenced = "NOT EXISTS (SELECT 1 FROM feedback WHERE inference_id = inferences.id)"
    return db.execute(f"DELETE FROM inferences WHERE created_at < ? AND {unreferenced}", [older_than]).rowcount
