"""Feedback: what people and programs said about an answer. What it teaches (lessons.py) becomes an example at once."""

import hashlib
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from sqlite_utils import Database

from agentd import faults, ids
from agentd.errors import Conflict, InvalidRequest, NotFound
from agentd.store import examples, inferences, tasks
from agentd.store.inferences import Inference
from agentd.store.lessons import Lesson, lesson
from agentd.store.row import Row, insert, select, to_json, where

_SOURCES = ("human", "program", "implicit")
CHANGES_OF_MIND = 6  # answers one source may give for the same input before it is taken for noise
STATES = ("accepted", "duplicate", "outweighed", "quarantined")
_ALL: Mapping[str, str | None] = {}
_NOT_SENT = ("idempotency_key", "author", "quarantine")
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
    """One piece of feedback; `example_id` is the example it became, `author` who sent it (`uid:1000`, from the socket).

    `state`: accepted; duplicate (the same author said so before); outweighed (somebody who is believed more said
    otherwise); quarantined (kept apart for the reason in `reason` until somebody releases it). All but the first have
    no effect on what the model learns.
    """

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
    author: str | None = None
    state: str = "accepted"
    reason: str | None = None


@dataclass(frozen=True)
class NewFeedback:
    """Feedback as it arrives. `choices` declares the task of a label, which has exactly these from then on. `author`
    and `quarantine`, a reason to keep it apart, are the daemon's own knowledge and no part of what was sent."""

    inference_id: str
    kind: str
    value: Any
    task: str | None = None
    choices: list[str] | None = None
    source: str = "human"
    tags: dict[str, Any] = field(default_factory=dict)
    idempotency_key: str | None = None
    author: str | None = None
    quarantine: str | None = None


def add(db: Database, new: NewFeedback, weights: Mapping[str, float] | None = None) -> tuple[Feedback, bool]:
    """Stores the feedback, the task it declares and the example it becomes: everything or nothing.

    `weights` say how far each source is believed, from 0 (its examples wait in quarantine) to 1, which is what a
    source that is not named gets.

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
    example_id, state, reason = None, "accepted", None
    with db.atomic():
        if new.choices is not None and new.kind != "label":
            raise InvalidRequest(f"choices belong to a label, not to a {new.kind}", param="choices")
        taught = lesson(new.kind, value, inference.output, None if task is None else tasks.find(db, task))
        if taught is not None:
            task = "default" if task is None else task
            weight = (weights or {}).get(new.source, 1.0)
            state, reason = _judged(db, new, task, value, taught, inference, weight)
            if state != "quarantined":  # what is kept apart declares no task and adds no choice either
                tasks.admit(db, task, taught.kind, taught.target, new.choices)
            if state == "accepted":
                example_id = _learn(db, task, taught, inference, new.author, weight)
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
            author=new.author,
            state=state,
            reason=reason,
        )
        insert(db, feedback)
        faults.change("feedback stored")
    return feedback, True


def release(db: Database, given: list[str], weights: Mapping[str, float] | None = None) -> list[Feedback]:
    """Takes feedback out of quarantine: it becomes examples now, as `add` would have made them.

    Raises NotFound, Conflict for one that is not in quarantine, and what `tasks.admit` raises; then none is released.
    """
    released = []
    with db.atomic():
        for id in given:
            row = get(db, id)
            if row.state != "quarantined":
                raise Conflict(f"feedback {id!r} is {row.state}, not quarantined")
            assert row.task is not None
            assert row.inference_id is not None
            weight = (weights or {}).get(row.source, 1.0) or 1.0  # whoever releases it vouches for it
            inference = inferences.get(db, row.inference_id)
            taught = lesson(row.kind, row.value, inference.output, tasks.find(db, row.task))
            example_id = None
            if taught is not None:
                tasks.admit(db, row.task, taught.kind, taught.target)
                example_id = _learn(db, row.task, taught, inference, row.author, weight)
            db.execute(
                "UPDATE feedback SET state = 'accepted', reason = NULL, example_id = ? WHERE id = ?", [example_id, id]
            )
            released.append(get(db, id))
    return released


def get(db: Database, id: str) -> Feedback:
    """Raises NotFound."""
    if found := select(db, Feedback, "WHERE id = ?", [id]):
        return found[0]
    raise NotFound("feedback", id)


def list_(db: Database, limit: int, offset: int = 0, only: Mapping[str, str | None] = _ALL) -> list[Feedback]:
    """Newest first; `only` are columns and the values they must have, such as kind, task, state."""
    clause, parameters = where(**only)
    return select(db, Feedback, f"{clause} ORDER BY rowid DESC LIMIT ? OFFSET ?", [*parameters, limit, offset])


def count(db: Database, only: Mapping[str, str | None] = _ALL) -> int:
    clause, parameters = where(**only)
    return int(db.execute(f"SELECT count(*) FROM feedback {clause}", parameters).fetchone()[0])


def quarantined(db: Database, author: str | None, source: str) -> int:
    """How much of one source's feedback is kept apart."""
    statement = "SELECT count(*) FROM feedback WHERE author IS ? AND source = ? AND state = 'quarantined'"
    return int(db.execute(statement, [author, source]).fetchone()[0])


def _judged(
    db: Database, new: NewFeedback, task: str, value: Any, taught: Lesson, inference: Inference, weight: float
) -> tuple[str, str | None]:
    """The state that feedback gets which teaches something, and why."""
    if new.quarantine is not None:
        return "quarantined", new.quarantine
    if weight <= 0:
        return "quarantined", f"feedback.weight_{new.source} is 0"
    id = examples.identify(task, inference.input)
    mine = select(
        db,
        Feedback,
        "WHERE example_id = ? AND author IS ? AND source = ? AND state = 'accepted' ORDER BY rowid DESC",
        [id, new.author, new.source],
    )
    if mine and (mine[0].kind, mine[0].value) == (new.kind, value) and _target(db, id) == taught:
        return "duplicate", f"the same as feedback {mine[0].id}"
    if len(mine) >= CHANGES_OF_MIND:
        return "quarantined", f"the same source has given {len(mine)} other answers for this input before"
    found = select(db, examples.Example, "WHERE id = ?", [id])
    if found and Lesson(found[0].kind, found[0].target) != taught and found[0].weight > weight:
        return "outweighed", f"a source of weight {found[0].weight:g} said otherwise"
    return "accepted", None


def _target(db: Database, id: str) -> Lesson | None:
    row = db.execute("SELECT kind, target FROM examples WHERE id = ?", [id]).fetchone()
    return None if row is None else Lesson(*row)


def _learn(db: Database, task: str, taught: Lesson, inference: Inference, author: str | None, weight: float) -> str:
    new = examples.NewExample(
        task, taught.kind, inference.input, taught.target, inference.id, author=author, weight=weight
    )
    return examples.put(db, new)[0].id


def _digest(new: NewFeedback) -> str:
    body = {f.name: getattr(new, f.name) for f in fields(new) if f.name not in _NOT_SENT}
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
