"""Feedback: what people and programs said about an answer. Its target (feedback_targets) becomes an example at once."""

import hashlib
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from sqlite_utils import Database

from agentd import faults, ids
from agentd.errors import Conflict, InvalidRequest, NotFound
from agentd.store import examples, inferences, scores, tasks
from agentd.store.demonstrations import as_answer, checked_message
from agentd.store.feedback_targets import Answer, FeedbackTarget, answer_of, says_less, target_on
from agentd.store.inferences import Inference
from agentd.store.normalise import input_text, label_key
from agentd.store.row import Row, insert, select, to_json, where

OUTCOMES = ("boolean", "float", "comment")
"""Kinds of feedback that an episode may get as a whole."""
_STEPS = 256  # of an episode that its outcome is spread over, the last ones
_SOURCES = ("human", "program", "implicit")
CHANGES_OF_MIND = 6  # answers one source may give for the same input before it is taken for noise
STATES = ("accepted", "duplicate", "outweighed", "quarantined")
_ALL: Mapping[str, str | None] = {}
_NOT_SENT = ("idempotency_key", "author", "quarantine")
_EXPECTED = {
    "label": "one of the task's choices, a text",
    "demonstration": "the text that should have been said, or an assistant message with content, tool_calls or both",
    "boolean": "true or false",
    "float": "a finite number",
    "preference": 'an object {"chosen": ..., "rejected": ...} of texts or assistant messages, "rejected" being the'
    " answer itself if left out",
    "comment": "a text",
}


@dataclass(frozen=True)
class Feedback(Row):
    """One piece of feedback; `example_id` is the example it became, `author` who sent it (`uid:1000`, from the socket).

    `state`: accepted; duplicate (the same author said so before); outweighed (somebody who is believed more said
    otherwise); quarantined (kept apart for the reason in `reason` until somebody releases it). All but the first have
    no effect on what the model learns.

    Feedback on an `episode` is about no inference; each of its steps has a row of its own that is `part_of` it.
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
    episode: str | None = None
    part_of: str | None = None


@dataclass(frozen=True)
class NewFeedback:
    """Feedback as it arrives, on an inference or on an `episode`. `choices` declares the task of a label, which has
    exactly these from then on. `author` and `quarantine`, a reason to keep it apart, are the daemon's own knowledge and
    no part of what was sent."""

    inference_id: str | None
    kind: str
    value: Any
    task: str | None = None
    choices: list[str] | None = None
    source: str = "human"
    tags: dict[str, Any] = field(default_factory=dict)
    idempotency_key: str | None = None
    author: str | None = None
    quarantine: str | None = None
    episode: str | None = None


def add(db: Database, new: NewFeedback, weights: Mapping[str, float] | None = None) -> tuple[Feedback, bool]:
    """Stores the feedback, the task it declares and the example it becomes: everything or nothing.

    `weights` say how far each source is believed, from 0 (its examples wait in quarantine) to 1, which is what a
    source that is not named gets. The outcome of an episode is shared out among its steps: each one's weight is divided
    by their number, and what was said of a step itself wins.

    Returns it and whether it was created now: the same body under the same idempotency key of its
    author is stored once. Raises
    NotFound for an unknown inference, Conflict for another body under a known key, InvalidRequest for a value that
    does not fit its kind, and what `tasks.admit` raises.
    """
    digest = _digest(new)
    if new.idempotency_key is not None:
        known = select(
            db,
            Feedback,
            "WHERE coalesce(author, '') = ? AND idempotency_key = ?",
            [new.author or "", new.idempotency_key],
        )
        if known and known[0].body_sha256 == digest:
            return known[0], False
        if known:
            raise Conflict(
                f"idempotency_key {new.idempotency_key!r} came with another body before", param="idempotency_key"
            )
    if new.source not in _SOURCES:
        raise InvalidRequest(f"source must be one of {', '.join(_SOURCES)}, not {new.source!r}", param="source")
    believed = (weights or {}).get(new.source, 1.0)
    with db.atomic():
        row = _add(db, new, digest, believed) if new.episode is None else _spread(db, new, digest, believed)
        faults.change("feedback stored")
    return row, True


def _spread(db: Database, new: NewFeedback, digest: str, believed: float) -> Feedback:
    """Stores what was said of an episode, and the share that each of its steps has in it."""
    if new.kind not in OUTCOMES or new.choices is not None:
        raise InvalidRequest(f"an episode gets {', '.join(OUTCOMES)}; a {new.kind} is about one step", param="kind")
    assert new.episode is not None
    steps = inferences.steps(db, new.episode, _STEPS)
    value = _checked(new.kind, new.value, steps[-1])
    whole = _row(new, new.task, value, digest)
    insert(db, whole)
    for step in steps if new.kind != "comment" else ():
        share = replace(new, inference_id=step.id, idempotency_key=None, episode=None)
        _add(db, share, digest, believed / len(steps), part_of=whole.id)
    return whole


def _add(db: Database, new: NewFeedback, digest: str, weight: float, part_of: str | None = None) -> Feedback:
    assert new.inference_id is not None
    inference = inferences.get(db, new.inference_id)
    value = _checked(new.kind, new.value, inference)
    task = new.task if new.task is not None else inference.task
    row = _row(new, task, value, digest, part_of=part_of)
    if new.choices is not None and new.kind != "label":
        raise InvalidRequest(f"choices belong to a label, not to a {new.kind}", param="choices")
    target = target_on(inference, new.kind, value, tasks.find(db, task or "default"))
    if target is not None:
        task = "default" if task is None else task
        state, reason = _judged(db, new, task, value, target, inference, weight, part_of)
        row = replace(row, task=task, state=state, reason=reason)
        if state != "quarantined":  # what is kept apart declares no task and adds no choice either
            _, text = tasks.admit(db, task, target.kind, target.target, new.choices)
            target = replace(target, target=text)
        if state == "accepted":
            row = replace(row, example_id=_learn(db, task, target, inference, new.author, weight))
    insert(db, row)
    if part_of is None and new.kind != "comment":
        scores.restate(db, inference.id)
    return row


def _row(new: NewFeedback, task: str | None, value: Any, digest: str, part_of: str | None = None) -> Feedback:
    return Feedback(
        id=ids.uuid7(),
        inference_id=new.inference_id,
        task=task,
        kind=new.kind,
        value=value,
        source=new.source,
        tags=new.tags,
        idempotency_key=new.idempotency_key,
        body_sha256=digest,
        example_id=None,
        created_at=ids.now(),
        author=new.author,
        episode=new.episode,
        part_of=part_of,
    )


def release(db: Database, feedback_ids: list[str], weights: Mapping[str, float] | None = None) -> list[Feedback]:
    """Takes feedback out of quarantine: it becomes examples now, as `add` would have made them. What is known by now to
    be better stays, and the feedback is `outweighed`.

    Raises NotFound, Conflict for one that is not in quarantine, and what `tasks.admit` raises; then none is released.
    """
    released = []
    with db.atomic():
        for id in feedback_ids:
            row = get(db, id)
            if row.state != "quarantined":
                raise Conflict(f"feedback {id!r} is {row.state}, not quarantined")
            assert row.task is not None
            assert row.inference_id is not None
            weight = weight_of(db, row, weights)
            inference = inferences.get(db, row.inference_id)
            target = target_on(inference, row.kind, row.value, tasks.find(db, row.task))
            example_id = reason = None
            if target is not None:
                _, text = tasks.admit(db, row.task, target.kind, target.target)
                target = replace(target, target=text)
                reason = _outdone(db, row.task, target, inference, row.part_of)
                if reason is None:
                    example_id = _learn(db, row.task, target, inference, row.author, weight)
            db.execute(
                "UPDATE feedback SET state = ?, reason = ?, example_id = ? WHERE id = ?",
                ["accepted" if reason is None else "outweighed", reason, example_id, id],
            )
            scores.restate(db, inference.id)
            released.append(get(db, id))
    return released


def weight_of(db: Database, row: Feedback, weights: Mapping[str, float] | None = None) -> float:
    """How far accepted feedback is believed. Where its source is not at all, whoever released it vouches for it."""
    weight = (weights or {}).get(row.source, 1.0) or 1.0
    return weight / (parts(db, row.part_of)[0] if row.part_of is not None else 1)


def get(db: Database, id: str) -> Feedback:
    """Raises NotFound."""
    if rows := select(db, Feedback, "WHERE id = ?", [id]):
        return rows[0]
    raise NotFound("feedback", id)


def list_(db: Database, limit: int, offset: int = 0, only: Mapping[str, str | None] = _ALL) -> list[Feedback]:
    """Newest first; `only` are columns and the values they must have, such as kind, task, state."""
    clause, parameters = where(**only)
    return select(db, Feedback, f"{clause} ORDER BY rowid DESC LIMIT ? OFFSET ?", [*parameters, limit, offset])


def count(db: Database, only: Mapping[str, str | None] = _ALL) -> int:
    clause, parameters = where(**only)
    conditions = {name for name, value in only.items() if value is not None}
    if conditions <= {"kind", "task", "state"}:  # those are counted as they come
        return int(db.execute(f"SELECT coalesce(sum(n), 0) FROM feedback_counts {clause}", parameters).fetchone()[0])
    return int(db.execute(f"SELECT count(*) FROM feedback {clause}", parameters).fetchone()[0])


def parts(db: Database, id: str) -> tuple[int, int]:
    """Among how many steps feedback on an episode was shared out, and how many examples came of it."""
    counted = "SELECT count(*), count(example_id) FROM feedback WHERE part_of = ?"
    n, n_examples = db.execute(counted, [id]).fetchone()
    return n, n_examples


def quarantined(db: Database, author: str | None, source: str) -> int:
    """How much of one source's feedback is kept apart."""
    statement = "SELECT count(*) FROM feedback WHERE author IS ? AND source = ? AND state = 'quarantined'"
    return int(db.execute(statement, [author, source]).fetchone()[0])


def _judged(
    db: Database,
    new: NewFeedback,
    task: str,
    value: Any,
    target: FeedbackTarget,
    inference: Inference,
    weight: float,
    part_of: str | None,
) -> tuple[str, str | None]:
    """The state that feedback gets which teaches something, and why."""
    if new.quarantine is not None:
        return "quarantined", new.quarantine
    if weight <= 0:
        return "quarantined", f"feedback.weight_{new.source} is 0"
    if (reason := _outdone(db, task, target, inference, part_of)) is not None:
        return "outweighed", reason
    id = examples.identify(task, inference.example_input)
    rows = select(db, examples.Example, "WHERE id = ?", [id])
    share = bool(rows) and _is_share(db, id)
    mine = select(
        db,
        Feedback,
        "WHERE example_id = ? AND author IS ? AND source = ? AND state = 'accepted' ORDER BY rowid DESC",
        [id, new.author, new.source],
    )
    said = _said(new.kind, value, part_of)
    same = bool(mine) and _said(mine[0].kind, mine[0].value, mine[0].part_of) == said
    if same and _known_target(db, id) == target:
        return "duplicate", f"the same as feedback {mine[0].id}"
    if target.kind in (tasks.THUMB, tasks.SCORE):  # each answer to an input has a verdict of its own
        mine = [row for row in mine if row.inference_id == inference.id]
    if len(mine) >= CHANGES_OF_MIND:
        return "quarantined", f"the same source has given {len(mine)} other answers for this input before"
    if rows and FeedbackTarget(rows[0].kind, rows[0].target) != target and rows[0].weight > weight and not share:
        return "outweighed", f"a source of weight {rows[0].weight:g} said otherwise"
    return "accepted", None


def _said(kind: str, value: Any, part_of: str | None) -> tuple[Any, ...]:
    """What is the same of feedback that says the same; of a step itself it is more than its share in an outcome."""
    return kind, label_key(value) if kind == "label" else value, part_of is None


def _outdone(db: Database, task: str, target: FeedbackTarget, inference: Inference, part_of: str | None) -> str | None:
    """Why what is known of the input already is better than this target."""
    id = examples.identify(task, inference.example_input)
    rows = select(db, examples.Example, "WHERE id = ?", [id])
    share = bool(rows) and _is_share(db, id)
    if part_of is not None and ((rows and not share) or _said_of(db, inference.id)):
        return "something was said of this step itself"
    if share and part_of is None:
        return None
    if rows and rows[0].state in ("new", "used") and says_less(target, FeedbackTarget(rows[0].kind, rows[0].target)):
        return "a better answer to this input is known"
    return None


def _known_target(db: Database, id: str) -> FeedbackTarget | None:
    row = db.execute("SELECT kind, target FROM examples WHERE id = ?", [id]).fetchone()
    return None if row is None else FeedbackTarget(*row)


def _is_share(db: Database, example: str) -> bool:
    """Whether an example is what an episode's outcome made of it."""
    latest = "SELECT part_of FROM feedback WHERE example_id = ? AND state = 'accepted' ORDER BY rowid DESC LIMIT 1"
    row = db.execute(latest, [example]).fetchone()
    return row is not None and row[0] is not None


def _said_of(db: Database, inference: str) -> bool:
    """Whether somebody judged an inference by itself."""
    judged = "inference_id = ? AND part_of IS NULL AND kind != 'comment' AND state = 'accepted'"
    return db.execute(f"SELECT 1 FROM feedback WHERE {judged} LIMIT 1", [inference]).fetchone() is not None


def _learn(
    db: Database, task: str, target: FeedbackTarget, inference: Inference, author: str | None, weight: float
) -> str:
    declared = tasks.find(db, task)
    new = examples.NewExample(
        task,
        target.kind,
        inference.example_input,
        target.target,
        inference.id,
        author=author,
        weight=weight,
        text=input_text(inference.input, declared.prompt if declared else None),
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
        case "demonstration", dict():
            return checked_message(value, inference.input)
        case "boolean", bool():
            return value
        case "float", int() | float() if not isinstance(value, bool) and abs(value) <= sys.float_info.max:
            return value
        case "preference", {"chosen": str() | dict() as chosen, **rest} if chosen and rest.keys() <= {"rejected"}:
            rejected = rest["rejected"] if "rejected" in rest else _said_so_far(inference)
            if isinstance(rejected, str | dict):
                sides = {"chosen": _answer(chosen, inference), "rejected": _answer(rejected, inference)}
                if sides["chosen"] == sides["rejected"]:
                    raise InvalidRequest("the chosen and the rejected side of a preference are the same", param="value")
                if isinstance(sides["chosen"], str) and not sides["chosen"].strip():
                    raise InvalidRequest("the chosen side of a preference must have something to read", param="value")
                return sides
    if kind not in _EXPECTED:
        raise InvalidRequest(f"kind must be one of {', '.join(_EXPECTED)}, not {kind!r}", param="kind")
    raise InvalidRequest(f"the value of a {kind} must be {_EXPECTED[kind]}", param="value")


def _said_so_far(inference: Inference) -> Answer:
    """The answer; nothing while no more of it is stored than its beginning."""
    return answer_of(inference) or ("" if inference.finish_reason == inferences.STREAMING else inference.output)


def _answer(answer: str | dict[str, Any], inference: Inference) -> Answer:
    """Raises InvalidRequest."""
    return as_answer(checked_message(answer, inference.input)) if isinstance(answer, dict) else answer
