"""Feedback: what people and programs said about an answer. Labels and demonstrations become examples at once."""

import hashlib
import sys
from dataclasses import dataclass, field, fields
from typing import Any

from sqlite_utils import Database

from agentd import ids
from agentd.errors import Conflict, InvalidRequest, NotFound
from agentd.store import examples, inferences, tasks
from agentd.store.inferences import Inference
from agentd.store.row import Row, insert, select, to_json, where

_SOURCES = ("human", "program", "implicit")
_EXPECTED = {
    "label": "one of the task's choices, a text",
    "demonstration": "the text that should have been said",
    "boolean": "true or false",
    "float": "a finite number",
    "preference": 'an object {"chosen": text, "rejected": text}, "rejected" being the answer itself if left out',
    "comment": "a text",
}


@dataclass(frozen=True)
class Feedback(Row):
    """One piece of feedback; `example_id` is the example it became."""

    table = "feedback"

    id: str
    inference_id: str | None
    task: str | None
    kind: str
    value: Any
    source: str
    tags: dict[str, Any]
    idempotency_key: str | None
    body_sha256: str
    example_id: str | None
    created_at: str


@dataclass(frozen=True)
class NewFeedback:
    """Feedback as it arrives. `choices` declares the task of a label, which has exactly these from then on."""

    inference_id: str
    kind: str
    value: Any
    task: str | None = None
    choices: list[str] | None = None
    source: str = "human"
    tags: dict[str, Any] = field(default_factory=dict)
    idempotency_key: str | None = None


def add(db: Database, new: NewFeedback) -> tuple[Feedback, bool]:
    """Stores the feedback, the task it declares and the example it becomes: everything or nothing.

    Returns it and whether it was created now: the same body under the same idempotency key is stored once. Raises
    NotFound for an unknown inference, Conflict for another body under a known key, InvalidRequest for a value that
    does not fit its kind, and what `tasks.admit` raises.
    """
    digest = _digest(new)
    if new.idempotency_key is not None:
        known = select(db, Feedback, "WHERE idempotency_key = ?", [new.idempotency_key])
        if known and known[0].body_sha256 == digest:
            return known[0], False
        if known:
            raise Conflict(
                f"idempotency_key {new.idempotency_key!r} came with another body before", param="idempotency_key"
            )
    if new.source not in _SOURCES:
        raise InvalidRequest(f"source must be one of {', '.join(_SOURCES)}, not {new.source!r}", param="source")
    inference = inferences.get(db, new.inference_id)
    value = _checked(new.kind, new.value, inference)
    task = new.task if new.task is not None else inference.task
    example_id = None
    with db.atomic():
        if new.kind in ("label", "demonstration"):
            task = "default" if task is None else task
            tasks.admit(db, task, new.kind, value, new.choices)
            example = examples.NewExample(task, new.kind, inference.input, value, inference.id)
            example_id = examples.put(db, example)[0].id
        elif new.choices is not None:
            raise InvalidRequest(f"choices belong to a label, not to a {new.kind}", param="choices")
        feedback = Feedback(
            id=ids.uuid7(),
            inference_id=inference.id,
            task=task,
            kind=new.kind,
            value=value,
            source=new.source,
            tags=new.tags,
            idempotency_key=new.idempotency_key,
            body_sha256=digest,
            example_id=example_id,
            created_at=ids.now(),
        )
        insert(db, feedback)
    return feedback, True


def get(db: Database, id: str) -> Feedback:
    """Raises NotFound."""
    if found := select(db, Feedback, "WHERE id = ?", [id]):
        return found[0]
    raise NotFound("feedback", id)


def list_(
    db: Database, limit: int, offset: int = 0, kind: str | None = None, task: str | None = None
) -> list[Feedback]:
    """Newest first."""
    clause, parameters = where(kind=kind, task=task)
    return select(db, Feedback, f"{clause} ORDER BY rowid DESC LIMIT ? OFFSET ?", [*parameters, limit, offset])


def count(db: Database, kind: str | None = None, task: str | None = None) -> int:
    clause, parameters = where(kind=kind, task=task)
    return int(db.execute(f"SELECT count(*) FROM feedback {clause}", parameters).fetchone()[0])


def _digest(new: NewFeedback) -> str:
    body = {f.name: getattr(new, f.name) for f in fields(new) if f.name != "idempotency_key"}
    return hashlib.sha256(to_json(body).encode()).hexdigest()


def _checked(kind: str, value: Any, inference: Inference) -> Any:
    """The value as it is stored."""
    match kind, value:
        case (("label" | "demonstration" | "comment"), str()) if value:
            return value
        case "boolean", bool():
            return value
        case "float", int() | float() if not isinstance(value, bool) and abs(value) <= sys.float_info.max:
            return value
        case "preference", {"chosen": str() as chosen, **rest} if chosen and rest.keys() <= {"rejected"}:
            rejected = rest.get("rejected", inference.output)
            if rejected == chosen:
                raise InvalidRequest("the chosen and the rejected text of a preference are the same", param="value")
            if isinstance(rejected, str):
                return {"chosen": chosen, "rejected": rejected}
    if kind not in _EXPECTED:
        raise InvalidRequest(f"kind must be one of {', '.join(_EXPECTED)}, not {kind!r}", param="kind")
    raise InvalidRequest(f"the value of a {kind} must be {_EXPECTED[kind]}", param="value")
