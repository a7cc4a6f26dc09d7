"""Inferences: what was asked, what the model answered, and what it cost."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from sqlite_utils import Database

from agentd import ids
from agentd.errors import Conflict, NotFound
from agentd.store.room import Priority, priority
from agentd.store.row import Row, columns, insert, select, to_json, where


@dataclass(frozen=True)
class Inference(Row):
    """`input` is {"messages": [...]}, with the tools and what else made up the prompt, or {"prompt": "..."}.

    revision    the one that answered
    output      the text of the answer; what it thought and called besides is in `reasoning` and `tool_calls`
    author      who asked (`uid:1000`, from the socket)
    episode     the client's name for what this is a step of
    recalled    ids of the examples that stood in the prompt besides, the nearest first; no part of `input`
    """

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
    episode: str | None = None
    reasoning: str = ""
    tool_calls: list[Any] = field(default_factory=list)
    recalled: list[str] = field(default_factory=list)

    @property
    def example_input(self) -> dict[str, Any]:
        """The input of an example: with what the request said that the answer must be."""
        return {**self.input, **{name: self.params[name] for name in _FORMATS if name in self.params}}


_FORMATS = ("response_format", "grammar")
STREAMING = "streaming"
"""The `finish_reason` of an answer of which the client has only the beginning."""
_UNJUDGED = (
    f"finish_reason != '{STREAMING}' AND NOT EXISTS (SELECT 1 FROM feedback WHERE inference_id = inferences.id"
    " AND part_of IS NULL AND kind != 'comment' AND source != 'implicit')"
)
"""Neither a remark nor what was inferred from behaviour, nor how an episode came out, is a verdict on the answer."""


@priority(Priority.EXPENDABLE)
def record(db: Database, inference: Inference, begun: bool = False) -> bool:
    """Stores the inference; one that is stored already, as far as it had come, is completed. One that was `begun` so
    and is gone has been forgotten, and stays so. Returns whether it is stored."""
    there_already = db.execute("SELECT 1 FROM inferences WHERE id = ?", [inference.id]).fetchone() is not None
    if begun and not there_already:
        return False
    if inference.recalled:  # one may have been forgotten meanwhile
        known = db.execute(
            "SELECT id FROM examples WHERE id IN (SELECT value FROM json_each(?))", [to_json(inference.recalled)]
        )
        there = {id for (id,) in known}
        inference = replace(inference, recalled=[id for id in inference.recalled if id in there])
    if not there_already:
        insert(db, inference)
    else:
        values = columns(Inference, inference.as_json())
        assignments = ", ".join(f"{name} = :{name}" for name in values)
        db.execute(f"UPDATE inferences SET {assignments} WHERE id = :id", values)
    for example in inference.recalled:
        db.execute("INSERT OR IGNORE INTO recalled_examples VALUES (?, ?)", [example, inference.id])
    return True


def end_streams(db: Database) -> int:
    """Marks those as cancelled that a daemon which is gone was answering; returns how many."""
    statement = "UPDATE inferences SET finish_reason = 'cancelled' WHERE finish_reason = ?"
    return db.execute(statement, [STREAMING]).rowcount


def get(db: Database, id: str) -> Inference:
    """Raises NotFound."""
    if (inference := find(db, id)) is not None:
        return inference
    raise NotFound("inference", id)


def find(db: Database, id: str) -> Inference | None:
    rows = select(db, Inference, "WHERE id = ?", [id])
    return rows[0] if rows else None


def latest(
    db: Database,
    limit: int,
    offset: int = 0,
    episode: str | None = None,
    task: str | None = None,
    *,
    unjudged: bool = False,
) -> list[Inference]:
    """Newest first; all of them, or those of one episode or task, or those that no one has judged yet."""
    clause, parameters = where(episode=episode, task=task)
    if unjudged:
        clause = f"{clause} AND {_UNJUDGED}" if clause else f"WHERE {_UNJUDGED}"
    return select(db, Inference, f"{clause} ORDER BY rowid DESC LIMIT ? OFFSET ?", [*parameters, limit, offset])


def steps(db: Database, episode: str, limit: int) -> list[Inference]:
    """The last `limit` steps of an episode in their order. Raises NotFound where it has none."""
    newest_first = latest(db, limit, episode=episode)
    if not newest_first:
        raise NotFound("episode", episode)
    return newest_first[::-1]


@priority(Priority.DELETING)
def forget_response(db: Database, id: str) -> None:
    """Deletes an answer of the Responses API. Raises NotFound, and Conflict where something was said about it."""
    if get(db, id).kind != "response":
        raise NotFound("response", id)
    if db.execute("SELECT 1 FROM feedback WHERE inference_id = ?", [id]).fetchone():
        raise Conflict(f"response {id} has feedback; `agentctl forget` deletes both")
    db.execute("DELETE FROM inferences WHERE id = ?", [id])


def forget_recalled(db: Database, examples: Sequence[str]) -> None:
    """Takes the ids of examples that are to be forgotten out of what was answered with them."""
    gone = "(SELECT value FROM json_each(?1))"
    db.execute(
        "UPDATE inferences SET recalled = (SELECT json_group_array(value) FROM json_each(recalled)"
        f" WHERE value NOT IN {gone}) WHERE id IN"
        f" (SELECT inference_id FROM recalled_examples WHERE example_id IN {gone})",
        [to_json(list(examples))],
    )


@priority(Priority.DELETING)
def prune(db: Database, older_than: str) -> int:
    """Deletes the inferences from before `older_than` (ISO 8601) that no one gave feedback on; returns how many.

    What was stored after a younger one is younger, even if its time says otherwise: then the clock was wrong.
    """
    unreferenced = "NOT EXISTS (SELECT 1 FROM feedback WHERE inference_id = inferences.id)"
    younger = "SELECT min(rowid) FROM inferences WHERE created_at BETWEEN ? AND ?"
    return db.execute(
        f"DELETE FROM inferences WHERE created_at < ? AND rowid < coalesce(({younger}), 1 << 62) AND {unreferenced}",
        [older_than, older_than, ids.now()],
    ).rowcount
